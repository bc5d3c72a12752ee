"""The `block_scaled_128x4` layout of packed weights, read by the Blackwell kernels.

One matrix `[N, K]`, with blocks of V elements (16 for NVFP4, 32 for MXFP4):

    elements  [N][K / 2] bytes, two e2m1 each, even k in the low nibble, as in a checkpoint
    zeros     up to a multiple of 128 bytes
    scales    [tiles of 128 rows][kt tiles of 4 blocks][32 rows][4 rows 32 apart][4 blocks], one
              byte each, with kt = ceil(K / V / 4)

so that the scale of row n and block b is at

    (n / 128) kt 512 + (b / 4) 512 + (n % 32) 16 + (n % 128 / 32) 4 + b % 4

Rows past N and blocks past K / V are zeros. The rows of a gated matrix stay `[gate; up]`.

Source: the order in which tcgen05 and mma block scales of 32 x 128 bit are laid out in memory, "1D
block scaling factors layout" of the cuBLAS documentation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmoe.experts import PreparedMatrix
from jaxmoe.formats import Format
from jaxmoe.kernels.fragment import round_up
from jaxmoe.kernels.parts import slice_bits
from jaxmoe.quantization import QuantizedTensor

NAME = "block_scaled_128x4"
_ALIGNMENT = 128  # bytes, of the scales within a matrix and of the matrices
_TILE_ROWS, _TILE_BLOCKS, _LANES = 128, 4, 32


def _element_bytes(rows: int, k: int) -> int:
    return round_up(rows * k // 2, _ALIGNMENT)


def num_bytes(rows: int, k: int, fmt: Format) -> int:
    """Bytes of one packed matrix."""
    assert fmt.block_size is not None
    blocks = round_up(k // fmt.block_size, _TILE_BLOCKS)
    return _element_bytes(rows, k) + round_up(rows, _TILE_ROWS) * blocks


def pack_matrix(elements: jax.Array, scale: jax.Array) -> jax.Array:
    """Packs one matrix.

    Args:
      elements: `uint8[N, K/2]`, two e2m1 a byte, even K in the low nibble.
      scale: `uint8[N, K/V]`, bits of the block scales.

    Returns:
      `uint8[num_bytes]`.
    """
    rows, blocks = scale.shape
    padding = (-rows % _TILE_ROWS, -blocks % _TILE_BLOCKS)
    s = jnp.pad(scale, [(0, p) for p in padding])
    s = s.reshape(-1, _TILE_ROWS // _LANES, _LANES, s.shape[1] // _TILE_BLOCKS, _TILE_BLOCKS)
    e = jnp.pad(elements.reshape(-1), (0, -elements.size % _ALIGNMENT))
    return jnp.concatenate([e, s.transpose(0, 3, 2, 1, 4).reshape(-1)])


def unpack_matrix(packed: jax.Array, rows: int, k: int, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """Inverse of `pack_matrix`: `(uint8[N, K/2], uint8[N, K/V])`."""
    assert fmt.block_size is not None
    blocks = k // fmt.block_size
    tiles = round_up(blocks, _TILE_BLOCKS) // _TILE_BLOCKS
    s = packed[_element_bytes(rows, k) :]
    s = s.reshape(-1, tiles, _LANES, _TILE_ROWS // _LANES, _TILE_BLOCKS)
    s = s.transpose(0, 3, 2, 1, 4).reshape(-1, tiles * _TILE_BLOCKS)
    return packed[: rows * k // 2].reshape(rows, k // 2), s[:rows, :blocks]


@functools.partial(jax.jit, static_argnums=1)
def pack(w: QuantizedTensor, gated: bool) -> PreparedMatrix:
    """Packs `[E, N, K]`, one expert after the other.

    Args:
      w: NVFP4 or MXFP4.
      gated: whether the rows are `[gate; up]`, which the layout leaves as they are.
    """
    assert w.scale is not None
    elements, scale = w.packed(), w.scale
    e, n, k = w.shape

    def one(expert: jax.Array) -> jax.Array:
        return pack_matrix(slice_bits(elements, expert, 0, n), slice_bits(scale, expert, 0, n))

    return PreparedMatrix(
        data=jax.lax.map(one, jnp.arange(e)),
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
    elements, scale = jax.vmap(lambda p: unpack_matrix(p, w.rows, w.k, w.format))(w.data[expert])
    return QuantizedTensor(
        elements,
        jax.lax.bitcast_convert_type(scale, w.format.scale),
        w.global_scale[expert] if w.format.has_global_scale else None,
        w.format,
    )
