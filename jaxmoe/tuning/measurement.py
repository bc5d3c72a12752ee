"""Timing the tactics of one layer on this device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.benchmark.data import random_experts, random_tokens
from jaxmoe.benchmark.layers import Layer
from jaxmoe.benchmark.machine import cache_bytes
from jaxmoe.benchmark.runner import ROUTINGS, MemoryLimitError, num_weight_sets
from jaxmoe.benchmark.timing import measure
from jaxmoe.capability import Resolution
from jaxmoe.experts import ExpertWeights
from jaxmoe.ops import moe_mlp
from jaxmoe.tuning.choice import override

# Tactics of one variant do the same arithmetic in another order, or hold bfloat16 as 16-bit
# integers: bfloat16 roundings apart.
_TOLERANCE = 1e-2


class Bench:
    """The weights of one layer, to time tactics with.

    Args:
      layer: the layer.
      resolution: of its problem.
      tokens: the smallest T that will be measured.
      memory_limit: bytes that weights may take.

    Raises:
      MemoryLimitError: not even one set of weights fits.
    """

    def __init__(
        self, layer: Layer, resolution: Resolution, tokens: int, memory_limit: int
    ) -> None:
        fmt, layout = resolution.problem.weight_format, str(resolution.layout)
        one = layer.weight_bytes(fmt)
        if one > memory_limit:
            raise MemoryLimitError(
                f"{layer.name} in {fmt} needs {one / 2**30:.1f} GiB for one set of weights, and "
                f"{memory_limit / 2**30:.1f} GiB are allowed: raise the limit"
            )
        sets = num_weight_sets(
            layer,
            fmt,
            tokens,
            cache_bytes(jax.local_devices()[0].platform),
            int(memory_limit // one),
        )
        self._layer = layer
        self._resolution = resolution
        self._sets = [random_experts(layer, fmt, layout, seed) for seed in range(sets)]

    def measure(
        self, tokens: int, tactics: Sequence[str], budget: float
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Seconds of one layer by tactic, "" for the library's own choice; and refusals by tactic.

        Args:
          tokens: `T`.
          tactics: names, without "".
          budget: seconds of measuring for each.
        """
        dtype = self._resolution.problem.activation_dtype
        inputs = [random_tokens(self._layer, tokens, dtype, seed) for seed in range(ROUTINGS)]
        # Enough layers that the dispatch of the program, which all tactics share, is a small part.
        layers = max(4, min(32, 4096 // tokens))
        program = functools.partial(_program, self._resolution, layers)
        calls: dict[str, Callable[[int], Any]] = {}
        refused: dict[str, str] = {}
        expected = None
        for tactic in ("", *tactics):
            try:
                with override(tactic):
                    compiled = jax.jit(program).lower(self._sets, inputs).compile()
                y = compiled(self._sets, inputs).block_until_ready()
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                if not tactic:
                    raise
                refused[tactic] = str(error).strip().splitlines()[0]
                continue
            expected = y if expected is None else expected
            off = float(_distance(y, expected))
            if off > _TOLERANCE:
                refused[tactic] = f"its numbers are {off:.1e} off those of the library's own choice"
                continue
            calls[tactic] = functools.partial(_run, compiled, self._sets, inputs)
        timings = measure(list(calls.values()), budget)
        seconds = {
            tactic: timing.median / layers for tactic, timing in zip(calls, timings, strict=True)
        }
        return seconds, refused


def _program(
    resolution: Resolution,
    layers: int,
    sets: Sequence[ExpertWeights],
    inputs: Sequence[tuple[jax.Array, ...]],
) -> jax.Array:
    """Layers one after the other, of the sets of weights and the inputs in rotation."""
    first, y = jnp.int32(0), None
    for n in range(layers):
        if y is not None:
            # 0 in a way that no compiler sees through: a layer waits for the one before.
            first = jnp.minimum(jnp.abs(y[0, 0]), 0).astype(jnp.int32)
        x, ids, weights = inputs[n % len(inputs)]
        y = moe_mlp(
            x,
            sets[n % len(sets)],
            ids,
            weights,
            compute=str(resolution.compute),
            expert_offset=first,
            implementation=resolution.variant,
        )
    assert y is not None
    return y


def _run(
    compiled: Any, sets: Sequence[ExpertWeights], inputs: Sequence[Any], number: int
) -> jax.Array:
    return compiled(sets, inputs).block_until_ready()


@jax.jit
def _distance(y: jax.Array, expected: jax.Array) -> jax.Array:
    """Relative L2 distance."""
    # float16 may overflow with these weights; then it does so in both.
    y, expected = (jnp.nan_to_num(a).astype(jnp.float32) for a in (y, expected))
    return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
