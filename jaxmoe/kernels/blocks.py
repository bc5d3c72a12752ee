"""Sorted rows cut into blocks that each belong to one expert: the schedule of the `xla` kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Upper bound on the float32 bytes of weights that one step of the loop may hold.
_STEP_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of `block_rows` rows; the rows of block b all use expert `expert[b]`.

    Attributes:
      expert: `i32[NB]`, index among the local experts.
      row: `i32[NB, block_rows]`, the row of the caller's array, or `num_rows` for padding.
      place: `i32[num_rows]`, where each row stands in the flattened blocks, or `row.size` for a
        row that is in no block.
      count: `i32[]`, how many blocks are in use; the others hold only padding.
      step: how many blocks one step of the loop takes.
    """

    expert: jax.Array
    row: jax.Array
    place: jax.Array
    count: jax.Array
    step: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What one block costs: `expert_bytes` of float32 weights, and whether they are dequantised."""

    expert_bytes: int
    dequantises: bool


def _block_rows(num_rows: int, num_experts: int) -> int:
    """A power of two that keeps both the padding and the number of blocks small.

    Up to 128 rows an expert's mean share is one block, so that its weights are dequantised once;
    beyond, a quarter of the share keeps the padding of the last block near an eighth.
    """
    mean = max(1, num_rows // max(1, num_experts))
    rows = 1 << (mean - 1).bit_length()
    return max(8, rows) if rows <= 128 else min(2048, max(128, rows // 4))


def cut(
    order: jax.Array | None, start: jax.Array, size: jax.Array, num_rows: int, work: Work
) -> Blocks:
    """Cuts groups of sorted rows into blocks.

    Args:
      order: `i32[num_rows]`, the row at each sorted position; None if rows are sorted already.
      start: `i32[E]`, sorted position of each expert's first row.
      size: `i32[E]`, rows of each expert.
      num_rows: number of rows.
      work: bounds of one step.
    """
    num_experts = start.shape[0]
    rows = _block_rows(num_rows, num_experts)
    total = num_rows // rows + min(num_experts, num_rows)
    step = max(1, min(_STEP_BYTES // work.expert_bytes, total))
    if work.dequantises:  # never every expert at once, whatever the experts' size
        step = min(step, max(1, num_experts // 2))
    total = -(-total // step) * step
    blocks = -(-size // rows)
    end = jnp.cumsum(blocks)
    first = end - blocks
    expert = _owner(end, jnp.arange(total, dtype=jnp.int32))
    within = (jnp.arange(total, dtype=jnp.int32) - first[expert]) * rows
    offset = within[:, None] + jnp.arange(rows, dtype=jnp.int32)
    used = (offset >= 0) & (offset < size[expert][:, None])
    position = jnp.where(used, start[expert][:, None] + offset, 0)
    row = jnp.where(used, position if order is None else order[position], num_rows)

    position = jnp.arange(num_rows, dtype=jnp.int32)
    if order is not None:
        position = jnp.zeros_like(order).at[order].set(position, unique_indices=True)
    expert_of = _owner(start + size, position)
    offset = position - start[expert_of]
    inside = (offset >= 0) & (offset < size[expert_of])
    place = jnp.where(inside, first[expert_of] * rows + offset, total * rows)
    return Blocks(expert, row, place, end[-1], step)


def _owner(end: jax.Array, index: jax.Array) -> jax.Array:
    """The first expert whose `end` lies beyond each index, or the last expert."""
    expert = jnp.searchsorted(end, index, side="right").astype(jnp.int32)
    return jnp.minimum(expert, end.shape[0] - 1)


def by_expert(
    expert_ids: jax.Array, num_experts: int, expert_offset: jax.Array, work: Work
) -> Blocks:
    """Blocks of the (token, choice) pairs of `expert_ids[T, k]`, pair `t * k + j`.

    Pairs whose expert is not in `[expert_offset, expert_offset + num_experts)` are in no block.
    """
    local = expert_ids.reshape(-1) - expert_offset
    local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
    order = jnp.argsort(local, stable=True).astype(jnp.int32)
    edges = jnp.searchsorted(local[order], jnp.arange(num_experts + 1), method="sort")
    edges = edges.astype(jnp.int32)
    return cut(order, edges[:-1], edges[1:] - edges[:-1], local.shape[0], work)


def by_group(
    group_sizes: jax.Array,
    num_experts: int,
    group_offset: jax.Array,
    num_rows: int,
    work: Work,
) -> Blocks:
    """Blocks of rows that are sorted by group; group `group_offset + e` uses expert e."""
    edges = jnp.cumsum(jnp.maximum(group_sizes, 0), dtype=jnp.int32)
    edges = jnp.minimum(jnp.concatenate([jnp.zeros(1, jnp.int32), edges]), num_rows)
    group = group_offset + jnp.arange(num_experts, dtype=jnp.int32)
    inside = (group >= 0) & (group < group_sizes.shape[0])
    group = jnp.where(inside, group, 0)
    size = jnp.where(inside, edges[group + 1] - edges[group], 0)
    return cut(None, edges[group], size, num_rows, work)


def rows_map(
    blocks: Blocks,
    body: Callable[[jax.Array, jax.Array, Any], tuple[Any, Any]],
    shapes: Any,
    init: Any,
) -> tuple[Any, Any]:
    """Runs `values, carry = body(expert[C], row[C, rows], carry)` over the blocks in use.

    Args:
      blocks: the schedule.
      body: one step; the leaves of `values` are `[C, rows, ...]`, one value for each row.
      shapes: the leaves of `values` for one row, as arrays (their shape and dtype count).
      init: the first carry.

    Returns:
      The values of all rows, leaves `[num_rows, ...]` with zeros for rows in no block; and the last
      carry. Values are written in the order of the blocks and gathered back at the end: a scatter
      would be slower on GPUs.
    """
    slots = blocks.row.shape

    def one(i: int | jax.Array, state: Any) -> Any:
        values, carry = state
        first = i * blocks.step
        expert = jax.lax.dynamic_slice_in_dim(blocks.expert, first, blocks.step)
        row = jax.lax.dynamic_slice_in_dim(blocks.row, first, blocks.step)
        part, carry = body(expert, row, carry)
        values = jax.tree.map(
            lambda v, p: jax.lax.dynamic_update_slice_in_dim(v, p.astype(v.dtype), first, axis=0),
            values,
            part,
        )
        return values, carry

    values = jax.tree.map(lambda s: jnp.zeros((*slots, *s.shape), s.dtype), shapes)
    if slots[0] == blocks.step:
        values, init = one(0, (values, init))
    elif slots[0]:
        steps = -(-blocks.count // blocks.step)
        values, init = jax.lax.fori_loop(0, steps, one, (values, init))
    flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), values)
    return jax.tree.map(lambda v: take_rows(v, blocks.place), flat), init


def take_rows(a: jax.Array, row: jax.Array) -> jax.Array:
    """`a[row]` with zeros where `row` is past the end of `a`."""
    return jnp.take(a, row, axis=0, mode="fill", fill_value=0)


def add_by_expert(total: jax.Array, expert: jax.Array, value: jax.Array) -> jax.Array:
    """`total[expert] += value` as a product, because a scatter-add is not deterministic on GPUs."""
    mask = jax.nn.one_hot(expert, total.shape[0], dtype=value.dtype, axis=0)
    return total + jnp.tensordot(mask, value, axes=1, precision="highest")
