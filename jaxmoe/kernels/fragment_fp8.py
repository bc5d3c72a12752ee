"""The `sm90_fragment_fp8` layout of packed MXFP4 weights, read by the Hopper kernels of W4A8.

Strips of 64 rows are those of `fragment`; a strip is cut into blocks of 128 elements of K:

    strip s, block b (4352 contiguous bytes):
      elements  [2: row g, row g + 8][4 warps][8 rows g][4 columns c][4 steps j] dwords
      scales    [4 warps][8 rows g][2: row g, row g + 8][4 steps], one byte each
    after the last block of a strip (64 bytes):
      row exponents  [4 warps][8 rows g][2: row g, row g + 8], one byte each

Element i of the dword of (w, g, c, j) is `k = 128 b + 32 j + 4 c + i` for i = 0 ... 3 and
`k = 128 b + 32 j + 16 + 4 c + i - 4` for i = 4 ... 7. Its magnitude is in bits `4 i ... 4 i + 2`;
`_SIGNS` has the places of the signs, which are the highest bits of bytes after one shift or none.
Rows and K are padded with zeros.

A kernel multiplies in e4m3, whose normal numbers hold e2m1 times 2^d for d = -5 ... 6 exactly. So
each row has an exponent b, 6 below the largest e8m0 byte of its blocks (at least 0; blocks of zeros
do not count), and each block the byte `8 (6 + d)`, where d is its e8m0 byte less b:

    W = e2m1 * 2^d * 2^(b - 127)

A block with d < -5 is rebased to d = -5: its elements become `v 2^(d + 5)`, rounded to the nearest
e2m1 value (ties to the even code). All other blocks are exact.

Bound of the rebased elements. Let u = 2^(b - 127 - 5), the scale of a rebased block. |v| <= 6 and
d + 5 <= -1, so that |v 2^(d + 5)| is one of 0, .25, .5, .75, 1, 1.5, 2, 3 or, for d + 5 <= -2, at
most 1.5. Only values below 2 are off the e2m1 grid, where its steps are 0.5: the error is at most
0.25 u = 2^(b - 127 - 7). A rebased block has 0 <= b + d and d <= -6, so b >= 6 > 0 was not raised
to 0, and the largest scale of the row is m = 2^(b + 6 - 127). The error is at most 2^-13 m.

Source: OCP 8-bit Floating Point Specification (OFP8) v1.0 for e4m3, OCP Microscaling Formats (MX)
v1.0 for MXFP4.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmoe.experts import PreparedMatrix
from jaxmoe.formats import Format
from jaxmoe.kernels.fragment import STRIP, from_warps, num_strips, round_up, to_warps
from jaxmoe.kernels.parts import cut_rows, pack_in_parts
from jaxmoe.quantization import QuantizedTensor

NAME = "sm90_fragment_fp8"
BLOCK = 128  # elements of K
_SCALE_BLOCK = 32  # elements of one e8m0 scale, and of one step
_WARPS, _ROWS, _COLUMNS, _STEPS = 4, 8, 4, BLOCK // _SCALE_BLOCK
_ELEMENT_BYTES = STRIP * BLOCK // 2
_SCALE_BYTES = STRIP * _STEPS

# Of each element of a dword: where its sign is with the lowest nibble first -> where it goes.
_SIGNS = ((3, 7), (7, 15), (11, 23), (15, 31), (19, 3), (23, 11), (27, 19), (31, 27))

_LOWEST, _HIGHEST = -5, 6  # of d
# Code c = 1 ... 7, while it is scaled down by at most 2^r for the r here, is one code more than
# code c - 1 scaled down as far.
_REACH = (0, 1, 2, 0, 3, 1, 4)


def num_bytes(rows: int, k: int, fmt: Format, gated: bool) -> int:
    """Bytes of one packed matrix."""
    blocks = round_up(k, BLOCK) // BLOCK
    return num_strips(rows, gated) * (blocks * (_ELEMENT_BYTES + _SCALE_BYTES) + STRIP)


def _move(dword: jax.Array, moves: tuple[tuple[int, int], ...]) -> jax.Array:
    """Keeps the magnitudes of a dword and moves its signs."""
    out = dword & 0x77777777
    for source, to in moves:
        out = out | (dword >> source & 1) << to
    return out


def _pack_elements(elements: jax.Array) -> jax.Array:
    """uint8 [S, 4, 2, 8, blocks * 64] -> [S, blocks, 4096]."""
    strips = elements.shape[0]
    # The axes of K are [blocks, 4 steps j, 2 halves of a dword, 4 columns c, 2 bytes].
    e = elements.reshape(strips, _WARPS, 2, _ROWS, -1, _STEPS, 2, _COLUMNS, 2)
    e = e.transpose(0, 4, 2, 1, 3, 7, 5, 6, 8)  # [S, b, row half, w, g, c, j, half, byte]
    dword = jax.lax.bitcast_convert_type(e.reshape(*e.shape[:-2], 4), jnp.uint32)
    dword = _move(dword, _SIGNS)
    return jax.lax.bitcast_convert_type(dword, jnp.uint8).reshape(strips, -1, _ELEMENT_BYTES)


def _unpack_elements(packed: jax.Array) -> jax.Array:
    """Inverse of `_pack_elements`."""
    strips, blocks, _ = packed.shape
    shape = (strips, blocks, 2, _WARPS, _ROWS, _COLUMNS, _STEPS)
    dword = jax.lax.bitcast_convert_type(packed.reshape(*shape, 4), jnp.uint32)
    dword = _move(dword, tuple((to, source) for source, to in _SIGNS))
    e = jax.lax.bitcast_convert_type(dword, jnp.uint8).reshape(*shape, 2, 2)
    return e.transpose(0, 3, 2, 4, 1, 6, 7, 5, 8).reshape(strips, _WARPS, 2, _ROWS, -1)


def _rebase(elements: jax.Array, shift: jax.Array) -> jax.Array:
    """e2m1 pairs `uint8[...]` with their magnitudes times `2^-shift`, to nearest, ties to even."""
    out = elements & 0x88
    for code, reach in enumerate(_REACH, start=1):
        for place in (0, 4):
            above = (elements >> place & 7 >= code) & (shift <= reach)
            out = out + (above.astype(jnp.uint8) << place)
    return out


def _rescale(elements: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Elements, `d + 5` of each block, and the exponent of each row."""
    blocks = elements.reshape(*scale.shape, _SCALE_BLOCK // 2)
    zero = (blocks & 0x77 == 0).all(axis=-1)
    top = jnp.where(zero, 0, scale).max(axis=1, initial=0)
    row = jnp.maximum(top, _HIGHEST) - _HIGHEST
    d = scale.astype(jnp.int16) - row[:, None].astype(jnp.int16)
    shift = jnp.maximum(_LOWEST - d, 0).astype(jnp.uint8)
    # Blocks of zeros may be larger than the row's exponent lets them: any scale will do for them.
    d = jnp.clip(d, _LOWEST, _HIGHEST)
    rebased = _rebase(blocks, shift[..., None]).reshape(elements.shape)
    return rebased, (d - _LOWEST).astype(jnp.uint8), row


def pack_matrix(elements: jax.Array, scale: jax.Array, gated: bool) -> jax.Array:
    """Packs one matrix.

    Args:
      elements: `uint8[N, K/2]`, two e2m1 a byte, even K in the low nibble.
      scale: `uint8[N, K/32]`, bits of the e8m0 block scales.
      gated: whether the rows are `[gate; up]`.

    Returns:
      `uint8[num_bytes]`.
    """
    elements, scale, row = _rescale(elements, scale)
    blocks = round_up(2 * elements.shape[1], BLOCK) // BLOCK
    elements = jnp.pad(elements, ((0, 0), (0, blocks * BLOCK // 2 - elements.shape[1])))
    scale = jnp.pad(scale, ((0, 0), (0, blocks * _STEPS - scale.shape[1])))
    e = _pack_elements(to_warps(elements, gated))
    s = to_warps(scale, gated).reshape(e.shape[0], _WARPS, 2, _ROWS, blocks, _STEPS)
    s = s.transpose(0, 4, 1, 3, 2, 5).reshape(e.shape[0], blocks, _SCALE_BYTES)
    r = to_warps(row, gated).transpose(0, 1, 3, 2).reshape(e.shape[0], STRIP)
    data = jnp.concatenate([e, 8 * s + 8 * (6 + _LOWEST)], axis=-1).reshape(e.shape[0], -1)
    return jnp.concatenate([data, r], axis=-1).reshape(-1)


def unpack_matrix(packed: jax.Array, rows: int, k: int, gated: bool) -> tuple[jax.Array, jax.Array]:
    """What `pack_matrix` packed, after its rebasing: `(uint8[N, K/2], uint8[N, K/32])`.

    The values are those that a kernel multiplies. The scale of a block of zeros may differ from the
    one that was packed.
    """
    strips = num_strips(rows, gated)
    packed = packed.reshape(strips, -1)
    data, r = packed[:, :-STRIP], packed[:, -STRIP:]
    data = data.reshape(strips, -1, _ELEMENT_BYTES + _SCALE_BYTES)
    elements = from_warps(_unpack_elements(data[..., :_ELEMENT_BYTES]), rows, gated)
    s = data[..., _ELEMENT_BYTES:].reshape(strips, -1, _WARPS, _ROWS, 2, _STEPS)
    s = s.transpose(0, 2, 4, 3, 1, 5).reshape(strips, _WARPS, 2, _ROWS, -1)
    d = from_warps(s, rows, gated).astype(jnp.int16) // 8 - 6
    r = r.reshape(strips, _WARPS, _ROWS, 2).transpose(0, 1, 3, 2)
    row = from_warps(r, rows, gated).astype(jnp.int16)
    scale = jnp.clip(row[:, None] + d, 0, 254).astype(jnp.uint8)
    return elements[:, : k // 2], scale[:, : k // _SCALE_BLOCK]


@functools.partial(jax.jit, static_argnums=1)
def pack(w: QuantizedTensor, gated: bool) -> PreparedMatrix:
    """Packs `[E, N, K]`, some strips of one expert after the other.

    Args:
      w: MXFP4; the capability table lets no other format through.
      gated: whether the rows are `[gate; up]`.
    """
    assert w.scale is not None
    assert w.format.block_size == _SCALE_BLOCK
    elements, scale = w.packed(), w.scale
    e, n, k = w.shape

    def strips(expert: jax.Array, first: jax.Array, count: int) -> jax.Array:
        rows = STRIP // 2 if gated else STRIP
        where = (expert, first * rows, count * rows, gated)
        return pack_matrix(cut_rows(elements, *where), cut_rows(scale, *where), gated)

    return PreparedMatrix(
        data=pack_in_parts(strips, e, num_strips(n, gated)),
        global_scale=jnp.ones(e, jnp.float32),
        layout=NAME,
        format=w.format,
        rows=n,
        k=k,
        gated=gated,
    )


def unpack(w: PreparedMatrix, expert: jax.Array) -> QuantizedTensor:
    """The matrices `[C, N, K]` of the experts `i32[C]` in canonical order, after rebasing."""
    assert w.format.scale is not None
    elements, scale = jax.vmap(lambda p: unpack_matrix(p, w.rows, w.k, w.gated))(w.data[expert])
    return QuantizedTensor(
        elements, jax.lax.bitcast_convert_type(scale, w.format.scale), None, w.format
    )
