"""What layers remember of the tokens read so far."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """One slot per position for the equal layers of one stack.

    Attributes:
      arrays: each `[layers, B, heads, S, D]`: keys and values, or what stands for both.
    """

    arrays: tuple[jax.Array, ...]

    def write(
        self, layer: jax.Array | int, slot: jax.Array, new: tuple[jax.Array, ...]
    ) -> tuple[SlotCache, tuple[jax.Array, ...]]:
        """Puts `[B, T, heads, D]` of one layer at `slot[B, T]`; slots past the end are dropped.

        Returns:
          The cache, and what it now holds for the layer, each `[B, heads, S, D]`.
        """
        row = jnp.arange(slot.shape[0])[:, None]

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            at = into.at[layer, row, :, slot]
            return at.set(new.astype(into.dtype), mode="drop", unique_indices=True)

        arrays = tuple(map(put, self.arrays, new))
        read = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in arrays)
        return SlotCache(arrays), tuple(read)


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
        return tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in self.arrays)

    def write(self, layer: jax.Array | int, new: tuple[jax.Array, ...]) -> StateCache:
        """The cache with the state of one layer replaced."""
        return StateCache(
            tuple(
                jax.lax.dynamic_update_index_in_dim(a, n.astype(a.dtype), layer, 0)
                for a, n in zip(self.arrays, new, strict=True)
            )
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a decoder remembers of a batch of texts.

    Attributes:
      layers: for every stack of layers, for every block in it, a `SlotCache` or `StateCache`.
      length: `i32[B]`, tokens read of each text.
      max_length: how many there is room for.
    """

    layers: tuple[tuple[SlotCache | StateCache, ...], ...]
    length: jax.Array
    max_length: int = dataclasses.field(metadata={"static": True})
