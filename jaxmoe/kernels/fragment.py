"""The `sm90_fragment` layout of packed FP4 weights, read by the kernels for SM 80 and newer.

A matrix `W[N, K]` of one expert is cut into strips of 64 rows and these into blocks of 64 elements
of K, so that a block is one contiguous copy and each thread finds in it what it multiplies:

    strip s, block b:
      elements  [4 warps, 8 rows g, 4 columns c, 4 steps j] dwords of eight elements
      scales    [4 warps, 8 rows g, scales of a row, 2: row g and row g + 8], one byte each

The dword of (w, g, c, j) holds, for each register r of an `mma` A fragment, the elements
`k = 64 b + 16 j + 2 c + 8 (r >> 1)` (low half) and `k + 1` (high half) of row `g + 8 (r & 1)` of
warp w; `_PLACES` has the order of their bits, which makes decoding a shift and a mask. A plain
matrix puts row `64 s + 16 w + rr` into row rr of warp w. A gated `gate_up` matrix puts gate rows
`32 s + 8 w ... + 7` into rows 0 ... 7 and up rows of the same numbers into rows 8 ... 15. Rows and
K are padded with zeros.

Block scales are rewritten so that a kernel builds its factor with integer instructions. NVFP4: the
byte is `(exponent + 20) << 3 | mantissa`, subnormals normalised. MXFP4: exponents count from 244
for the largest scale of the matrix, whose value becomes the global scale. A scale of zero, and an
MXFP4 scale more than 2^243 times smaller than the largest, make their block's elements zero.

Source: csrc/cuda/layout.h and csrc/cuda/dequantize.cuh.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmoe.experts import PreparedMatrix
from jaxmoe.formats import Format
from jaxmoe.kernels.parts import cut_rows, pack_in_parts, slice_bits
from jaxmoe.quantization import QuantizedTensor

NAME = "sm90_fragment"
STRIP = 64  # rows
BLOCK = 64  # elements of K
_WARPS, _ROWS, _COLUMNS, _STEPS = 4, 8, 4, 4
_ELEMENT_BYTES = STRIP * BLOCK // 2

# Of each register: (bits of an e2m1 code, how far they move up) within a half of the dword.
_PLACES = (
    ((0x8, 12), (0x7, 6)),
    ((0x8, 9), (0x7, 3)),
    ((0x8, 6), (0x7, 0)),
    ((0x8, 11), (0x6, 9), (0x1, 13)),
)

# NVFP4 scale bytes of the subnormal e4m3 values 1 ... 7 times 2^-9; larger ones move by 104.
_SUBNORMAL = (88, 96, 100, 104, 106, 108, 110)
_E4M3_SHIFT = 104
_E8M0_TOP = 244


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def block_bytes(fmt: Format) -> int:
    """Bytes of one block of one strip: its elements and its scales."""
    assert fmt.block_size is not None
    return _ELEMENT_BYTES + STRIP * BLOCK // fmt.block_size


def num_strips(rows: int, gated: bool) -> int:
    """Strips of a matrix with `rows` rows (gate and up rows together where gated)."""
    return -(-(rows // 2) // (STRIP // 2)) if gated else -(-rows // STRIP)


def num_bytes(rows: int, k: int, fmt: Format, gated: bool) -> int:
    """Bytes of one packed matrix."""
    return num_strips(rows, gated) * (round_up(k, BLOCK) // BLOCK) * block_bytes(fmt)


def to_warps(rows: jax.Array, gated: bool) -> jax.Array:
    """[N, ...] -> [strips, 4 warps, 2 halves, 8 rows, ...] with zero rows as padding."""

    def split(a: jax.Array, strip: int) -> jax.Array:
        pad = round_up(a.shape[0], strip) - a.shape[0]
        a = jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, _WARPS, strip // (_WARPS * _ROWS), _ROWS, *a.shape[1:])

    if not gated:
        return split(rows, STRIP)
    gate, up = jnp.split(rows, 2)
    return jnp.concatenate([split(gate, STRIP // 2), split(up, STRIP // 2)], axis=2)


def from_warps(warps: jax.Array, n: int, gated: bool) -> jax.Array:
    """Inverse of `to_warps`."""

    def join(a: jax.Array, count: int) -> jax.Array:
        return a.reshape(-1, *a.shape[4:])[:count]

    if not gated:
        return join(warps, n)
    return jnp.concatenate([join(warps[:, :, :1], n // 2), join(warps[:, :, 1:], n // 2)])


def _pack_elements(elements: jax.Array) -> jax.Array:
    """uint8 [S, 4, 2, 8, blocks * 32] -> [S, blocks, 2048]."""
    strips = elements.shape[0]
    e = elements.reshape(strips, _WARPS, 2, _ROWS, -1, _STEPS, 2, _COLUMNS)
    dword = jnp.zeros((), jnp.uint32)
    for register, places in enumerate(_PLACES):
        # A byte holds k in its low nibble and k + 1 in its high one.
        pair = e[:, :, register % 2, :, :, :, register // 2, :].astype(jnp.uint32)
        pair = pair & 0xF | (pair & 0xF0) << 12
        for bits, shift in places:
            dword = dword | (pair & (bits * 0x10001)) << shift
    dword = dword.transpose(0, 3, 1, 2, 5, 4)  # [S, w, g, b, j, c] -> [S, b, w, g, c, j]
    return jax.lax.bitcast_convert_type(dword, jnp.uint8).reshape(strips, -1, _ELEMENT_BYTES)


def _unpack_elements(packed: jax.Array) -> jax.Array:
    """Inverse of `_pack_elements`."""
    strips, blocks, _ = packed.shape
    shape = (strips, blocks, _WARPS, _ROWS, _COLUMNS, _STEPS)
    dword = jax.lax.bitcast_convert_type(packed.reshape(*shape, 4), jnp.uint32)
    registers = []
    for places in _PLACES:
        pair = jnp.zeros((), jnp.uint32)
        for bits, shift in places:
            pair = pair | dword >> shift & (bits * 0x10001)
        registers.append((pair | pair >> 12).astype(jnp.uint8))
    e = jnp.stack(registers).reshape(2, 2, *shape)  # [k half, row half, S, b, w, g, c, j]
    return e.transpose(2, 4, 1, 5, 3, 7, 0, 6).reshape(strips, _WARPS, 2, _ROWS, -1)


def _encode_nvfp4(scale: jax.Array) -> jax.Array:
    subnormal = jnp.array((0, *_SUBNORMAL), jnp.uint8)[jnp.minimum(scale, 7)]
    return jnp.where(scale < 8, subnormal, scale + _E4M3_SHIFT)


def _decode_nvfp4(code: jax.Array) -> jax.Array:
    subnormal = sum(((code >= byte).astype(jnp.uint8) for byte in _SUBNORMAL), jnp.uint8(0))
    return jnp.where(code < 8 + _E4M3_SHIFT, subnormal, code - _E4M3_SHIFT)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2^(exponent - 127) in float32 by its bits: 2^-127 would be flushed to zero otherwise."""
    exponent = exponent.astype(jnp.uint32)
    bits = jnp.where(exponent == 0, jnp.uint32(1 << 22), exponent << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _encode_mxfp4(scale: jax.Array, top: jax.Array) -> jax.Array:
    """Bytes by the distance from the largest scale, 0 for one that is out of reach."""
    code = scale.astype(jnp.int32) - top.astype(jnp.int32) + _E8M0_TOP
    return jnp.maximum(code, 0).astype(jnp.uint8)


def _decode_mxfp4(code: jax.Array, global_scale: jax.Array) -> jax.Array:
    top = jax.lax.bitcast_convert_type(global_scale, jnp.uint32) >> 23
    scale = code.astype(jnp.int32) + top.astype(jnp.int32) - _E8M0_TOP
    return jnp.clip(scale, 0, 254).astype(jnp.uint8)


def _pack_rows(elements: jax.Array, code: jax.Array, gated: bool) -> jax.Array:
    """uint8 [N, K/2] and [N, K/B] to packed bytes."""
    k = 2 * elements.shape[1]
    per_block = BLOCK * code.shape[1] // k
    zero = jnp.repeat(code == 0, BLOCK // 2 // per_block, axis=1)
    elements = jnp.where(zero, 0, elements)
    blocks = round_up(k, BLOCK) // BLOCK
    elements = jnp.pad(elements, ((0, 0), (0, blocks * BLOCK // 2 - k // 2)))
    code = jnp.pad(code, ((0, 0), (0, blocks * per_block - code.shape[1])))
    e = _pack_elements(to_warps(elements, gated))
    s = to_warps(code, gated).reshape(e.shape[0], _WARPS, 2, _ROWS, blocks, per_block)
    s = s.transpose(0, 4, 1, 3, 5, 2).reshape(e.shape[0], blocks, STRIP * per_block)
    return jnp.concatenate([e, s], axis=-1).reshape(-1)


def pack_matrix(
    elements: jax.Array, scale: jax.Array, global_scale: jax.Array | None, gated: bool
) -> tuple[jax.Array, jax.Array]:
    """Packs one matrix.

    Args:
      elements: `uint8[N, K/2]`, two e2m1 a byte, even K in the low nibble.
      scale: `uint8[N, K/B]`, bits of the block scales.
      global_scale: `f32[]` of an NVFP4 matrix; None for MXFP4.
      gated: whether the rows are `[gate; up]`.

    Returns:
      `uint8[num_bytes]` and the global scale `f32[]` that goes with it.
    """
    if global_scale is not None:
        return _pack_rows(elements, _encode_nvfp4(scale), gated), global_scale
    top = scale.max(initial=0)
    return _pack_rows(elements, _encode_mxfp4(scale, top), gated), _power_of_two(top)


def unpack_matrix(
    packed: jax.Array, global_scale: jax.Array, rows: int, k: int, fmt: Format, gated: bool
) -> tuple[jax.Array, jax.Array]:
    """Inverse of `pack_matrix` up to the signs of zero blocks: `(uint8[N, K/2], uint8[N, K/B])`."""
    assert fmt.block_size is not None
    per_block = BLOCK // fmt.block_size
    both = packed.reshape(num_strips(rows, gated), -1, block_bytes(fmt))
    e, s = both[..., :_ELEMENT_BYTES], both[..., _ELEMENT_BYTES:]
    elements = from_warps(_unpack_elements(e), rows, gated)
    s = s.reshape(*s.shape[:2], _WARPS, _ROWS, per_block, 2).transpose(0, 2, 5, 3, 1, 4)
    code = from_warps(s.reshape(*s.shape[:4], -1), rows, gated)
    scale = _decode_nvfp4(code) if fmt.has_global_scale else _decode_mxfp4(code, global_scale)
    return elements[:, : k // 2], scale[:, : k // fmt.block_size]


@functools.partial(jax.jit, static_argnums=1)
def pack(w: QuantizedTensor, gated: bool) -> PreparedMatrix:
    """Packs `[E, N, K]`, some strips of one expert after the other."""
    assert w.scale is not None
    elements, scale, global_scale = w.packed(), w.scale, w.global_scale
    e, n, _ = w.shape
    top = None
    if global_scale is None:
        top = jax.lax.map(lambda i: slice_bits(scale, i, 0, n).max(initial=0), jnp.arange(e))
        global_scale = _power_of_two(top)

    def strips(expert: jax.Array, first: jax.Array, count: int) -> jax.Array:
        def encode(bits: jax.Array) -> jax.Array:
            return _encode_nvfp4(bits) if top is None else _encode_mxfp4(bits, top[expert])

        rows = STRIP // 2 if gated else STRIP
        where = (expert, first * rows, count * rows, gated)
        cut = cut_rows(elements, *where), cut_rows(scale, *where, encode)
        return _pack_rows(*cut, gated)

    data = pack_in_parts(strips, e, num_strips(n, gated))
    return PreparedMatrix(
        data=data,
        global_scale=global_scale,
        layout=NAME,
        format=w.format,
        rows=w.shape[1],
        k=w.shape[2],
        gated=gated,
    )


def unpack(w: PreparedMatrix, expert: jax.Array) -> QuantizedTensor:
    """The matrices `[C, N, K]` of the experts `i32[C]` in canonical order."""
    assert w.format.scale is not None
    global_scale = w.global_scale[expert]
    elements, scale = jax.vmap(lambda p, g: unpack_matrix(p, g, w.rows, w.k, w.format, w.gated))(
        w.data[expert], global_scale
    )
    return QuantizedTensor(
        elements,
        jax.lax.bitcast_convert_type(scale, w.format.scale),
        global_scale if w.format.has_global_scale else None,
        w.format,
    )
