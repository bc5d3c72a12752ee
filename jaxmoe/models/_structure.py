"""Modules as jit's arguments: a static structure, and arrays."""

from __future__ import annotations

import operator
import weakref
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxmoe.nn._variables import value


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


class _Known(NamedTuple):
    """What a module held when it was last split."""

    contents: list[Any]
    structure: Structure
    variables: list[nnx.Variable]


_known: weakref.WeakKeyDictionary[nnx.Module, _Known] = weakref.WeakKeyDictionary()


def split_known(module: nnx.Module) -> tuple[Structure, list[jax.Array]]:
    """As `split`, and fast for a module that comes again.

    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> structure, _ = split_known(layer)
    >>> split_known(layer)[0] is structure
    True

    Flax takes 0.1 ms for each array. A module whose attributes, and those of all modules in it, are
    the objects that they were is only asked for its variables' present values.
    """
    contents = _contents(module, [])
    known = _known.get(module)
    if known is None or not _same(contents, known.contents):
        graph, state = nnx.split(module)
        nodes = dict(nnx.iter_graph(module))
        variables = [nodes[path] for path, _ in nnx.to_flat_state(state)]
        known = _Known(contents, Structure(graph, jax.tree.structure(state)), variables)
        _known[module] = known
    return known.structure, jax.tree.leaves([value(variable) for variable in known.variables])


def _contents(node: Any, found: list[Any]) -> list[Any]:
    """The attributes of a module and of all modules in it, however deep."""
    if not isinstance(node, list | tuple):
        node = (node if isinstance(node, dict) else vars(node)).values()
    for one in node:
        found.append(one)
        if isinstance(one, nnx.Module | dict | list | tuple):
            _contents(one, found)
    return found


def _same(these: list[Any], those: list[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))
