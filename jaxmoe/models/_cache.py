"""What layers remember of the tokens read so far."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp


class Place(NamedTuple):
    """Where the tokens of a call stand.

    A row's tokens come first in it, padding last: `Decoder.hidden` sees to that.

    Attributes:
      position: `i32[B, T]`, in the row's text.
      counts: `i32[B]`, how many of the `T` are tokens; the rest is padding.
    """

    position: jax.Array
    counts: jax.Array


_NEVER = jnp.iinfo(jnp.int32).max  # the position of what no token may look at


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """Keys and values, or what stands for both, for the equal layers of one stack.

    Slot `lead + p` holds position p; the slots before `lead` are zeros that every token sees.

    Attributes:
      arrays: each `[layers, B, heads, lead + S, D]`.
      lead: see above.
    """

    arrays: tuple[jax.Array, ...]
    lead: int = dataclasses.field(default=0, metadata={"static": True})

    def extend(
        self, layer: jax.Array | int, place: Place, new: tuple[jax.Array, ...]
    ) -> tuple[SlotCache, tuple[jax.Array, ...], jax.Array]:
        """Adds what the tokens at `place` have for one layer, each `[B, T, heads, D]`.

        Positions past the end are dropped.

        Returns:
          The cache; what the tokens may look at, each `[B, heads, slots, D]`; and the position of
          each slot, `i32[1, slots]`, less than 0 for what every token sees.
        """
        arrays = _put(self.arrays, layer, self.lead + place.position, new)
        slots = jnp.arange(arrays[0].shape[3], dtype=jnp.int32)
        return (
            dataclasses.replace(self, arrays=arrays),
            _layer(arrays, layer),
            slots[None] - self.lead,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """As `SlotCache`, for layers whose tokens see no further back than `S` positions, their own one
    included: slot `lead + p mod S` holds position p, until position `p + S` takes its place.

    Attributes:
      arrays: each `[layers, B, heads, lead + S, D]`.
      lead: as for `SlotCache`.
    """

    arrays: tuple[jax.Array, ...]
    lead: int = dataclasses.field(default=0, metadata={"static": True})

    def extend(
        self, layer: jax.Array | int, place: Place, new: tuple[jax.Array, ...]
    ) -> tuple[RingCache, tuple[jax.Array, ...], jax.Array]:
        """As `SlotCache.extend`; the positions of slots differ by row, `i32[B, slots]`."""
        size = self.arrays[0].shape[3] - self.lead
        t = place.position.shape[1]
        start = place.position[:, :1]
        # Of tokens that want the same slot only the last is kept, and padding is not.
        index = jnp.arange(t, dtype=jnp.int32)
        left = place.counts[:, None] - index
        kept = (left > 0) & (left <= size)
        slot = jnp.where(kept, place.position % size, size + index)
        arrays = _put(self.arrays, layer, self.lead + slot, new)
        # A single token takes the place of one that it does not see. Several see what was there
        # before them, and each other.
        before = start + 1 if t == 1 else start
        seen = _layer(arrays if t == 1 else self.arrays, layer)
        position = before - 1 - (before - 1 - jnp.arange(size, dtype=jnp.int32)) % size
        position = jnp.where(position < 0, _NEVER, position)
        position = jnp.pad(position, ((0, 0), (self.lead, 0)), constant_values=-1)
        if t > 1:
            joined = (
                jnp.concatenate([old, a.swapaxes(1, 2).astype(old.dtype)], axis=2)
                for old, a in zip(seen, new, strict=True)
            )
            seen, position = tuple(joined), jnp.concatenate([position, place.position], axis=1)
        return dataclasses.replace(self, arrays=arrays), seen, position


def _put(
    arrays: tuple[jax.Array, ...],
    layer: jax.Array | int,
    slot: jax.Array,
    new: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Puts `[B, T, heads, D]` of one layer at `slot[B, T]`; slots past the end are dropped."""
    row = jnp.arange(slot.shape[0])[:, None]

    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        at = into.at[layer, row, :, slot]
        return at.set(new.astype(into.dtype), mode="drop", unique_indices=True)

    return tuple(map(put, arrays, new))


def _layer(arrays: tuple[jax.Array, ...], layer: jax.Array | int) -> tuple[jax.Array, ...]:
    """What one layer has, without the axis of layers."""
    return tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache:
    """A state of fixed size for the equal layers of one stack.

    Attributes:
      arrays: each `[layers, B, ...]`.
    """

    arrays: tuple[jax.Array, ...]

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, ...]:
        """The state of one layer."""
        return _layer(self.arrays, layer)

    def write(self, layer: jax.Array | int, new: tuple[jax.Array, ...]) -> StateCache:
        """The cache with the state of one layer replaced."""
        return StateCache(
            tuple(
                jax.lax.dynamic_update_index_in_dim(a, n.astype(a.dtype), layer, 0)
                for a, n in zip(self.arrays, new, strict=True)
            )
        )


LayerCache: TypeAlias = SlotCache | RingCache | StateCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a decoder remembers of a batch of texts.

    Attributes:
      layers: for every stack of layers, for every block in it, what it keeps.
      length: `i32[B]`, tokens read of each text.
      max_length: how many there is room for.
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    length: jax.Array
    max_length: int = dataclasses.field(metadata={"static": True})
