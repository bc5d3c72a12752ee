"""The `panel32` layout of packed FP4 weights, read by every CPU kernel.

A matrix `W[N, K]` of one expert becomes a sequence of panels of 32 rows ("lanes"), each a sequence
of superblocks of 64 elements of K, so that a kernel streams memory strictly forwards:

    panel p, superblock s:
      block scales  [64 / B, 32]    one byte each, lane fastest
      elements      [8, 32] dwords  dword (g, lane): k = 64 s + 8 g ... + 7, lowest nibble first

A plain matrix puts row 32 p + l into lane l. A gated `gate_up` matrix puts gate row 16 p + l into
lane l and up row 16 p + l into lane 16 + l, so that one panel yields finished activations. Rows and
K are padded with zero elements and zero scale bytes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmoe.experts import PreparedMatrix
from jaxmoe.formats import Format
from jaxmoe.quantization import QuantizedTensor

NAME = "panel32"
LANES = 32
HALF = LANES // 2
SUPERBLOCK = 64
_ELEMENT_BYTES = SUPERBLOCK // 2 * LANES


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def superblock_bytes(fmt: Format) -> int:
    """Bytes of one superblock of one panel: its scales and its elements."""
    assert fmt.block_size is not None
    return SUPERBLOCK // fmt.block_size * LANES + _ELEMENT_BYTES


def num_panels(rows: int, gated: bool) -> int:
    """Panels of a matrix with `rows` rows (gate and up rows together where gated)."""
    return -(-(rows // 2) // HALF) if gated else -(-rows // LANES)


def num_bytes(rows: int, k: int, fmt: Format, gated: bool) -> int:
    """Bytes of one packed matrix."""
    return (
        num_panels(rows, gated) * (_round_up(k, SUPERBLOCK) // SUPERBLOCK) * superblock_bytes(fmt)
    )


def _to_lanes(rows: jax.Array, gated: bool) -> jax.Array:
    """[N, ...] -> [panels, 32, ...] with zero rows as padding."""

    def split(a: jax.Array, lanes: int) -> jax.Array:
        pad = _round_up(a.shape[0], lanes) - a.shape[0]
        a = jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, lanes, *a.shape[1:])

    if not gated:
        return split(rows, LANES)
    gate, up = jnp.split(rows, 2)
    return jnp.concatenate([split(gate, HALF), split(up, HALF)], axis=1)


def _from_lanes(lanes: jax.Array, n: int, gated: bool) -> jax.Array:
    """Inverse of `_to_lanes`."""

    def join(a: jax.Array, count: int) -> jax.Array:
        return a.reshape(-1, *a.shape[2:])[:count]

    if not gated:
        return join(lanes, n)
    return jnp.concatenate([join(lanes[:, :HALF], n // 2), join(lanes[:, HALF:], n // 2)])


def pack_matrix(elements: jax.Array, scale: jax.Array, gated: bool) -> jax.Array:
    """Packs one matrix.

    Args:
      elements: `uint8[N, K/2]`, two e2m1 a byte, even K in the low nibble.
      scale: `uint8[N, K/B]`, bits of the block scales.
      gated: whether the rows are `[gate; up]`.

    Returns:
      `uint8[num_bytes]`.
    """
    k = 2 * elements.shape[1]
    blocks_per_superblock = SUPERBLOCK * scale.shape[1] // k
    supers = _round_up(k, SUPERBLOCK) // SUPERBLOCK
    elements = jnp.pad(elements, ((0, 0), (0, supers * SUPERBLOCK // 2 - k // 2)))
    scale = jnp.pad(scale, ((0, 0), (0, supers * blocks_per_superblock - scale.shape[1])))
    e = _to_lanes(elements, gated).reshape(-1, LANES, supers, 8, 4)
    s = _to_lanes(scale, gated).reshape(-1, LANES, supers, blocks_per_superblock)
    e = e.transpose(0, 2, 3, 1, 4).reshape(*e.shape[:1], supers, -1)
    s = s.transpose(0, 2, 3, 1).reshape(*s.shape[:1], supers, -1)
    return jnp.concatenate([s, e], axis=-1).reshape(-1)


def unpack_matrix(
    packed: jax.Array, rows: int, k: int, fmt: Format, gated: bool
) -> tuple[jax.Array, jax.Array]:
    """Inverse of `pack_matrix`: `(uint8[N, K/2], uint8[N, K/B])`."""
    assert fmt.block_size is not None
    supers = _round_up(k, SUPERBLOCK) // SUPERBLOCK
    blocks = SUPERBLOCK // fmt.block_size
    both = packed.reshape(num_panels(rows, gated), supers, superblock_bytes(fmt))
    s, e = both[..., : blocks * LANES], both[..., blocks * LANES :]
    s = s.reshape(-1, supers, blocks, LANES).transpose(0, 3, 1, 2)
    e = e.reshape(-1, supers, 8, LANES, 4).transpose(0, 3, 1, 2, 4)
    elements = _from_lanes(e.reshape(-1, LANES, supers * SUPERBLOCK // 2), rows, gated)
    scale = _from_lanes(s.reshape(-1, LANES, supers * blocks), rows, gated)
    return elements[:, : k // 2], scale[:, : k // fmt.block_size]


@functools.partial(jax.jit, static_argnums=1)
def pack(w: QuantizedTensor, gated: bool) -> PreparedMatrix:
    """Packs `[E, N, K]`, one expert after the other."""
    assert w.scale is not None
    scale = jax.lax.bitcast_convert_type(w.scale, jnp.uint8)
    e, n, k = w.shape
    return PreparedMatrix(
        data=jax.lax.map(lambda one: pack_matrix(one[0], one[1], gated), (w.packed(), scale)),
        global_scale=jnp.ones(e, jnp.float32) if w.global_scale is None else w.global_scale,
        layout=NAME,
        format=w.format,
        rows=n,
        k=k,
        gated=gated,
    )


def unpack(w: PreparedMatrix, expert: jax.Array) -> QuantizedTensor:
    """The matrices `[C, N, K]` of the experts `i32[C]` in canonical order."""
    assert w.format.scale is not None
    elements, scale = jax.vmap(lambda p: unpack_matrix(p, w.rows, w.k, w.format, w.gated))(
        w.data[expert]
    )
    return QuantizedTensor(
        elements,
        jax.lax.bitcast_convert_type(scale, w.format.scale),
        w.global_scale[expert] if w.format.has_global_scale else None,
        w.format,
    )
