"""Modules as jit's arguments: a static structure, and arrays."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx


class Structure:
    """A module without its arrays, hashed once.

    A call with Flax's own graph and state would hash and flatten them anew: milliseconds with many
    layers, while the GPU waits.
    """

    def __init__(self, graph: Any, tree: Any):
        self._parts = graph, tree
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._parts == other._parts)

    def module(self, arrays: list[jax.Array]) -> Any:
        """The module with these arrays."""
        graph, tree = self._parts
        return nnx.merge(graph, jax.tree.unflatten(tree, arrays))


def split(module: nnx.Module) -> tuple[Structure, list[jax.Array]]:
    """A module as its structure and its arrays; `structure.module(arrays)` is the inverse.

    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> structure, arrays = split(layer)
    >>> structure == split(nnx.Linear(2, 3, rngs=nnx.Rngs(1)))[0], len(arrays)
    (True, 2)
    """
    graph, state = nnx.split(module)
    arrays, tree = jax.tree.flatten(state)
    return Structure(graph, tree), arrays
