"""Blocks, and the stacks that run equal ones with one compiled body."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.models import _architecture as architecture
from jaxmoe.models._attention import Attention, Implementation, LatentAttention, rms_norm
from jaxmoe.models._cache import LayerCache, Place
from jaxmoe.models._delta_net import DeltaNet
from jaxmoe.models._linear import Linear
from jaxmoe.models._structure import Structure, split
from jaxmoe.nn import MoE
from jaxmoe.routing import RouterAux

_MIXERS: dict[type, Callable[..., Any]] = {
    architecture.Attention: Attention,
    architecture.LatentAttention: LatentAttention,
    architecture.DeltaNet: DeltaNet,
}


class Mlp(nnx.Module):
    """`jaxmoe.models.Dense` with its weights."""

    def __init__(self, config: architecture.Dense, hidden_size: int, **options: Any):
        width = config.intermediate_size
        self.gate = Linear(hidden_size, width, use_bias=False, **options)
        self.up = Linear(hidden_size, width, use_bias=False, **options)
        self.down = Linear(width, hidden_size, use_bias=False, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., H]` -> `[..., H]`."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """A mixer and a feed-forward part, each after an RMS norm and around a residual connection.

    The feed-forward part is `moe` or `mlp`; the other is None.
    """

    def __init__(
        self,
        layer: architecture.Layer,
        whole: architecture.Architecture,
        *,
        weight_format: str,
        attention: Implementation,
        dtype: Any,
        param_dtype: Any,
        rngs: Any,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        h = whole.hidden_size
        # Residual branches start small, so that depth does not widen the stream (GPT-2).
        out_init = nnx.initializers.variance_scaling(
            0.5 / whole.num_layers, "fan_in", "truncated_normal"
        )
        self.attention_norm = rms_norm(h, whole.norm_eps, dtype, rngs)
        self.attention = _MIXERS[type(layer.mixer)](
            layer.mixer,
            h,
            norm_eps=whole.norm_eps,
            out_init=out_init,
            implementation=attention,
            **options,
        )
        self.moe_norm = rms_norm(h, whole.norm_eps, dtype, rngs)
        part = layer.feed_forward
        if isinstance(part, architecture.Dense):
            self.moe = nnx.data(None)
            self.mlp: Any = nnx.data(Mlp(part, h, **options))
            return
        self.mlp = nnx.data(None)
        self.moe = nnx.data(
            MoE(
                h,
                part.intermediate_size,
                part.num_experts,
                part.router.top_k,
                router=part.router,
                activation=part.activation,
                use_bias=part.bias,
                router_bias=part.router_bias,
                shared_experts=part.shared,
                shared_gate=part.shared_gate,
                weight_format=weight_format,
                **options,
            )
        )

    def __call__(
        self,
        x: jax.Array,
        place: Place,
        cache: LayerCache | None = None,
        layer: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None, RouterAux | None]:
        """`x[B, T, H]`, where it stands, cache, which layer of it -> `[B, T, H]`, cache, aux."""
        y, cache = self.attention(self.attention_norm(x), place, cache, layer)
        x = x + y
        if self.moe is None:
            return x + self.mlp(self.moe_norm(x)), cache, None
        y, aux = self.moe(self.moe_norm(x), return_aux=True)
        return x + y, cache, aux


class Stack(nnx.Module):
    """A pattern of blocks that comes `count` times in a row.

    With `count` above 1 the weights of each block of the pattern are stacked along a first axis and
    `lax.scan` runs them, so that one pattern is compiled for all.

    Args:
      count: how often.
      make: for each block of the pattern, what makes it.
      rngs: random streams; the stream "params" is divided over the blocks.
    """

    def __init__(self, count: int, make: Sequence[Callable[[nnx.Rngs], Block]], *, rngs: nnx.Rngs):
        self.count = count
        if count == 1:
            self.blocks = nnx.List([one(rngs) for one in make])
        else:
            self.blocks = nnx.List([_stacked(count, one, rngs) for one in make])

    def __call__(
        self, x: jax.Array, place: Place, cache: Any
    ) -> tuple[jax.Array, Any, list[RouterAux | None]]:
        """`x[B, T, H]`, where it stands, caches of the pattern's blocks -> the same, and aux.

        The aux of each block of the pattern has a first axis of length `count`.
        """
        if self.count == 1:
            new, auxes = [], []
            for block, one in zip(self.blocks, cache, strict=True):
                x, one, aux = _run(*split(block), x, place, one)
                new.append(one)
                auxes.append(aux)
            return x, tuple(new), jax.tree.map(lambda a: a[None], auxes)

        structure, arrays = split(self.blocks)

        def step(carry: Any, inputs: Any) -> Any:
            index, arrays = inputs
            x, caches = carry
            new, auxes = [], []
            for block, cache in zip(structure.module(arrays), caches, strict=True):
                x, cache, aux = block(x, place, cache, index)
                new.append(cache)
                auxes.append(aux)
            return (x, tuple(new)), auxes

        (x, cache), auxes = jax.lax.scan(step, (x, cache), (jnp.arange(self.count), arrays))
        return x, cache, auxes


@functools.partial(jax.jit, static_argnums=0)
def _run(structure: Structure, arrays: list[jax.Array], x: Any, place: Place, cache: Any) -> Any:
    """One block. As a function of its own, it is traced once for all layers that are alike."""
    return structure.module(arrays)(x, place, cache)


def _stacked(count: int, make: Callable[[nnx.Rngs], Block], rngs: nnx.Rngs) -> Block:
    graph: Any = None

    def one(key: jax.Array) -> Any:
        nonlocal graph  # static, and the same for every block
        graph, state = nnx.split(make(nnx.Rngs(params=key)))
        return state

    state = jax.jit(jax.vmap(one))(jax.random.split(rngs.params(), count))
    return nnx.merge(graph, state)


class Layers(nnx.Module):
    """All layers of a decoder, as stacks; `layers[i]` is a copy of one block.

    Args:
      whole: what to build.
      make: makes the block of a layer.
      scan: stack the weights of equal layers. Without it every layer has arrays of its own, which
        compiles longer, but lets a kernel read them in place: a scan copies each layer's slice.
      rngs: random streams.
    """

    def __init__(
        self,
        whole: architecture.Architecture,
        make: Callable[[architecture.Layer, nnx.Rngs], Block],
        *,
        scan: bool,
        rngs: nnx.Rngs,
    ):
        parts = (
            architecture.repetitions(whole.layers)
            if scan
            else tuple(((layer,), 1) for layer in whole.layers)
        )
        makes = [[functools.partial(make, layer) for layer in pattern] for pattern, _ in parts]
        self.stacks = nnx.List(
            [Stack(part[1], make, rngs=rngs) for part, make in zip(parts, makes, strict=True)]
        )

    def __len__(self) -> int:
        return sum(stack.count * len(stack.blocks) for stack in self.stacks)

    def place(self, index: int) -> tuple[int, int, int | None]:
        """The stack of a layer, the block in its pattern, and the repetition, None if it is one.

        Raises:
          IndexError: if there is no such layer.
        """
        start = 0
        for number, stack in enumerate(self.stacks):
            repetition, block = divmod(index - start, len(stack.blocks))
            if 0 <= repetition < stack.count:
                return number, block, None if stack.count == 1 else repetition
            start += stack.count * len(stack.blocks)
        raise IndexError(f"there are {len(self)} layers, got index {index}")

    def __getitem__(self, index: int) -> Block:
        number, block, repetition = self.place(index)
        graph, state = nnx.split(self.stacks[number].blocks[block])
        if repetition is not None:
            state = jax.tree.map(lambda a: a[repetition], state)
        return nnx.merge(graph, state)

    def init_cache(self, batch: int, length: int, dtype: Any) -> tuple[Any, ...]:
        """Empty caches, for every stack one for each block of its pattern."""
        return tuple(
            tuple(
                block.attention.init_cache(stack.count, batch, length, dtype)
                for block in stack.blocks
            )
            for stack in self.stacks
        )

    def __call__(
        self, x: jax.Array, place: Place, caches: tuple[Any, ...] | None
    ) -> tuple[jax.Array, tuple[Any, ...] | None, RouterAux | None]:
        """`x[B, T, H]`, where it stands, caches -> the same, and aux with the MoE layers in front.

        Aux is None if no layer has experts.
        """
        new, auxes = [], []
        for number, stack in enumerate(self.stacks):
            cache = (None,) * len(stack.blocks) if caches is None else caches[number]
            x, cache, aux = stack(x, place, cache)
            new.append(cache)
            with_experts = [a for a in aux if a is not None]
            if with_experts:
                auxes.append(jax.tree.map(_in_turn, *with_experts))
        joined = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes) if auxes else None
        return x, None if caches is None else tuple(new), joined


def _in_turn(*arrays: jax.Array) -> jax.Array:
    """Arrays `[count, ...]` of a pattern's blocks as `[count · blocks, ...]` in layer order."""
    stacked = jnp.stack(arrays, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
