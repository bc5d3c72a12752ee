"""Sorted rows cut into blocks that each belong to one expert: the schedule of the `xla` kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")

# Upper bound on the float32 bytes of dequantised weights that one step of the loop may hold.
_STEP_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of `block_rows` rows; the rows of block b all use expert `expert[b]`.

    Attributes:
      expert: `i32[NB]`, index among the local experts.
      row: `i32[NB, block_rows]`, the row of the caller's array, or `num_rows` for padding.
      count: `i32[]`, how many blocks are in use; the others hold only padding.
      num_rows: rows of the caller's array.
      step: how many blocks one step of the loop takes.
    """

    expert: jax.Array
    row: jax.Array
    count: jax.Array
    num_rows: int
    step: int


def _block_rows(num_rows: int, num_experts: int) -> int:
    """A power of two that keeps both the padding and the number of blocks small.

    Up to 128 rows an expert's mean share is one block, so that its weights are dequantised once;
    beyond, a quarter of the share keeps the padding of the last block near an eighth.
    """
    mean = max(1, num_rows // max(1, num_experts))
    rows = 1 << (mean - 1).bit_length()
    return max(8, rows) if rows <= 128 else min(2048, max(128, rows // 4))


def cut(
    order: jax.Array | None, start: jax.Array, size: jax.Array, num_rows: int, expert_bytes: int
) -> Blocks:
    """Cuts groups of sorted rows into blocks.

    Args:
      order: `i32[num_rows]`, the row at each sorted position; None if rows are sorted already.
      start: `i32[E]`, sorted position of each expert's first row.
      size: `i32[E]`, rows of each expert.
      num_rows: number of rows.
      expert_bytes: float32 bytes of one dequantised expert, which bound the work of a step.
    """
    num_experts = start.shape[0]
    rows = _block_rows(num_rows, num_experts)
    total = num_rows // rows + min(num_experts, num_rows)
    # Never every expert at once, whatever the experts' size.
    step = max(1, min(_STEP_BYTES // expert_bytes, num_experts // 2, total))
    total = -(-total // step) * step
    blocks = -(-size // rows)
    end = jnp.cumsum(blocks)
    index = jnp.arange(total, dtype=jnp.int32)
    expert = jnp.searchsorted(end, index, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)
    within = (index - (end - blocks)[expert]) * rows
    offset = within[:, None] + jnp.arange(rows, dtype=jnp.int32)
    used = (offset >= 0) & (offset < size[expert][:, None]) & (index < end[-1])[:, None]
    position = jnp.where(used, start[expert][:, None] + offset, 0)
    row = position if order is None else order[position]
    return Blocks(expert, jnp.where(used, row, num_rows), end[-1], num_rows, step)


def by_expert(
    expert_ids: jax.Array, num_experts: int, expert_offset: jax.Array, expert_bytes: int
) -> Blocks:
    """Blocks of the (token, choice) pairs of `expert_ids[T, k]`, pair `t * k + j`.

    Pairs whose expert is not in `[expert_offset, expert_offset + num_experts)` are in no block.
    """
    local = expert_ids.reshape(-1) - expert_offset
    local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
    order = jnp.argsort(local, stable=True).astype(jnp.int32)
    edges = jnp.searchsorted(local[order], jnp.arange(num_experts + 1), method="sort")
    edges = edges.astype(jnp.int32)
    return cut(order, edges[:-1], edges[1:] - edges[:-1], local.shape[0], expert_bytes)


def by_group(
    group_sizes: jax.Array,
    num_experts: int,
    group_offset: jax.Array,
    num_rows: int,
    expert_bytes: int,
) -> Blocks:
    """Blocks of rows that are sorted by group; group `group_offset + e` uses expert e."""
    edges = jnp.cumsum(jnp.maximum(group_sizes, 0), dtype=jnp.int32)
    edges = jnp.minimum(jnp.concatenate([jnp.zeros(1, jnp.int32), edges]), num_rows)
    group = group_offset + jnp.arange(num_experts, dtype=jnp.int32)
    inside = (group >= 0) & (group < group_sizes.shape[0])
    group = jnp.where(inside, group, 0)
    size = jnp.where(inside, edges[group + 1] - edges[group], 0)
    return cut(None, edges[group], size, num_rows, expert_bytes)


def fold(blocks: Blocks, body: Callable[[jax.Array, jax.Array, Carry], Carry], init: Carry) -> Carry:
    """Runs `carry = body(expert[step], row[step, rows], carry)` over the blocks in use."""
    if blocks.num_rows == 0:
        return init

    def one(i: jax.Array, carry: Any) -> Any:
        first = i * blocks.step
        expert = jax.lax.dynamic_slice_in_dim(blocks.expert, first, blocks.step)
        row = jax.lax.dynamic_slice_in_dim(blocks.row, first, blocks.step)
        return body(expert, row, carry)

    return jax.lax.fori_loop(0, -(-blocks.count // blocks.step), one, init)


def take_rows(a: jax.Array, row: jax.Array) -> jax.Array:
    """`a[row]` with zeros where `row` is the padding mark `a.shape[0]`."""
    return jnp.take(a, row, axis=0, mode="fill", fill_value=0)


def put_rows(a: jax.Array, row: jax.Array, value: jax.Array) -> jax.Array:
    """`a` with `a[row] = value`, leaving out padding."""
    return a.at[row].set(value.astype(a.dtype), mode="drop", unique_indices=False)


def add_by_expert(total: jax.Array, expert: jax.Array, value: jax.Array) -> jax.Array:
    """`total[expert] += value` as a product, because a scatter-add is not deterministic on GPUs."""
    mask = jax.nn.one_hot(expert, total.shape[0], dtype=value.dtype, axis=0)
    return total + jnp.tensordot(mask, value, axes=1, precision="highest")
