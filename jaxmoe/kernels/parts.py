"""Packing experts in small parts, so that little more memory is taken than the result needs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Intermediate values take three times the bytes of the strips that they belong to: with a sixth of
# a matrix in work they stay below one expert. More parts would only cost time.
_PARTS = 6


def pack_in_parts(
    pack: Callable[[jax.Array, jax.Array, int], jax.Array], num_experts: int, num_strips: int
) -> jax.Array:
    """Packs the strips of every expert's matrix, some at a time.

    >>> pack_in_parts(lambda e, first, count: 10 * e + first + jnp.arange(count), 2, 3).tolist()
    [[0, 1, 2], [10, 11, 12]]

    Args:
      pack: takes an expert `i32[]`, the first strip `i32[]` and how many, returns their packed
        bytes, one strip after the other. It should read no more than it needs, as `cut_rows` does.
      num_experts: `E`.
      num_strips: strips of each matrix.

    Returns:
      `[E, bytes]`.
    """
    most = max(1, num_strips // _PARTS)
    count = next(c for c in range(most, 0, -1) if num_strips % c == 0)
    parts = num_strips // count
    data = jax.lax.map(
        lambda part: pack(part // parts, part % parts * count, count),
        jnp.arange(num_experts * parts),
    )
    return data.reshape(num_experts, -1)


def slice_bits(
    matrices: jax.Array, expert: jax.Array | int, first: jax.Array | int, rows: int
) -> jax.Array:
    """`uint8[rows, X]`: the bits of some rows of one of the one-byte matrices `[E, N, X]`.

    >>> slice_bits(jnp.ones((2, 3, 1), jnp.float8_e4m3fn), 1, 1, 2).tolist()
    [[56], [56]]
    """
    # The barrier is for calls in a loop: without it XLA moves the conversion of all experts out of
    # the loop and keeps its result, and it would slice float8 by way of a wider type.
    matrices, expert = jax.lax.optimization_barrier((matrices, expert))
    bits = jax.lax.bitcast_convert_type(matrices, jnp.uint8)
    return jax.lax.dynamic_slice(bits, (expert, first, 0), (1, rows, bits.shape[2]))[0]


def cut_rows(
    matrices: jax.Array,
    expert: jax.Array,
    first: jax.Array,
    count: int,
    gated: bool,
    encode: Callable[[jax.Array], jax.Array] = lambda bits: bits,
) -> jax.Array:
    """The bits of `count` rows of one expert, encoded, with zeros where the matrix has ended.

    >>> w = jnp.arange(1, 7, dtype=jnp.uint8).reshape(1, 6, 1)  # gate rows 1, 2, 3; up 4, 5, 6
    >>> cut_rows(w, 0, 2, 2, True, lambda rows: 10 * rows)[:, 0].tolist()
    [30, 0, 60, 0]

    Args:
      matrices: `[E, N, X]` of one-byte values.
      expert: `i32[]`.
      first: `i32[]`, the first row.
      count: how many.
      gated: whether the rows are `[gate; up]`; then `count` rows of each are cut.
      encode: applied to `uint8` rows before zeros are added, keeps their shape.

    Returns:
      `uint8[count, X]`, gated `uint8[2 * count, X]`.
    """
    halves = 2 if gated else 1
    n, x = matrices.shape[1] // halves, matrices.shape[2]
    size = min(count, n)
    start = jnp.minimum(first, n - size)

    def cut(half: int) -> jax.Array:
        rows = encode(slice_bits(matrices, expert, half * n + start, size))
        rows = jnp.pad(rows, ((0, count), (0, 0)))
        return jax.lax.dynamic_slice(rows, (first - start, 0), (count, x))

    return jnp.concatenate([cut(half) for half in range(halves)])
