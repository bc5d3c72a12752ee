"""Measures one layer: which implementations, over which weights, how often."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import kernels
from jaxmoe.benchmark.baseline import ragged_dot_mlp
from jaxmoe.benchmark.data import (
    distance,
    random_experts,
    random_tokens,
    reference,
    sample_rows,
)
from jaxmoe.benchmark.layers import Layer, expected_experts
from jaxmoe.benchmark.machine import Machine
from jaxmoe.benchmark.timing import Call, measure
from jaxmoe.capability import Problem, Resolution, UnsupportedError
from jaxmoe.experts import CANONICAL, ExpertWeights
from jaxmoe.ops import moe_mlp

BASELINE = "ragged_dot"
"""Name of the implementation that dequantises and calls `jax.lax.ragged_dot`."""

AUTO = "auto"

ROUTINGS = 7
"""Routings in rotation; prime, so that they and the weight sets meet in every combination."""

MODES = ("dispatch", "program")
"""`dispatch`: each call is a jitted function of its own, and the host waits for it. `program`: one
jitted function has many calls, each over other weights and after the one before, as a model has."""

_MOST_SETS = 64  # small layers would take hundreds to outgrow a cache
# A program has this many calls of the layer, or one for each set of weights where they are slow;
# and programs are launched together until the device has work for that long.
_CALLS = 16
_SLOW_CALL = 1e-3  # seconds
_WORK = 1e-2  # seconds
_GIB = 2**30

Weights = dict[str, list[ExpertWeights]]


class MemoryLimitError(Exception):
    """The layer's weights alone are larger than the memory that the benchmark may use."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one implementation did at one number of tokens.

    Args:
      implementation: name of the variant, or `ragged_dot`.
      layer: the layer.
      weight_format: format of the weights.
      compute: the arithmetic.
      dtype: dtype of the activations.
      tokens: `T`.
      mode: one of `MODES`.
      seconds: median of the timed calls; in a program, of its time by its number of calls.
      overhead: median seconds of a call without a local expert: launch, sorting, zeros; None for
        the baseline and in a program.
      weight_bytes: packed bytes of the experts that a call touches, mean over the routings.
      floor: seconds that the machine's ceilings allow.
      error: relative L2 distance from float64, on a sample of the tokens.
      runs: timed calls, or programs.
      weight_sets: sets of weights in rotation.
    """

    implementation: str
    layer: Layer
    weight_format: str
    compute: str
    dtype: str
    tokens: int
    mode: str
    seconds: float
    overhead: float | None
    weight_bytes: float
    floor: float
    error: float
    runs: int
    weight_sets: int

    @property
    def gbps(self) -> float:
        """Packed weights touched per second, in 1e9 bytes."""
        return self.weight_bytes / self.seconds / 1e9

    @property
    def tflops(self) -> float:
        """`6 T k H I / t` in 1e12 operations a second."""
        return self.layer.flops(self.tokens) / self.seconds / 1e12


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An implementation that was not measured, and why."""

    implementation: str
    tokens: int
    reason: str


@dataclasses.dataclass(frozen=True)
class _Plan:
    name: str  # variant or BASELINE
    layout: str
    compute: str


def measure_layer(
    layer: Layer,
    weight_format: str,
    tokens: Sequence[int],
    *,
    machine: Machine,
    implementations: Sequence[str] = (AUTO, "xla", BASELINE),
    dtype: Any = jnp.bfloat16,
    compute: str = AUTO,
    modes: Sequence[str] = ("dispatch",),
    budget: float = 2.0,
    memory_limit: int = 6 * _GIB,
    seed: int = 0,
) -> Iterator[Measurement | Skipped]:
    """Measures implementations of one layer side by side.

    >>> from jaxmoe import benchmark
    >>> machine = benchmark.Machine("any", "cpu", bandwidth=1e10, peak=1e11, cache_bytes=0)
    >>> results = benchmark.measure_layer(benchmark.TINY, "nvfp4", [3], machine=machine,
    ...                                   implementations=["xla", "ragged_dot"], budget=0.1)
    >>> [result.implementation for result in results]
    ['xla', 'ragged_dot']

    A native kernel's weights rotate through as many sets as it takes for none to be in the cache
    when it is used again; canonical weights, whose users are far from memory's speed, are one set.
    Routings rotate too.

    Args:
      layer: the layer.
      weight_format: `nvfp4` or `mxfp4`.
      tokens: the numbers `T` to measure.
      machine: ceilings and cache size.
      implementations: names of variants or providers; `auto` for what the capability table
        selects; `ragged_dot` for the baseline.
      dtype: dtype of the activations.
      compute: as for `moe_mlp`.
      modes: some of `MODES`; the baseline is only dispatched.
      budget: seconds of measuring for each implementation, T and mode.
      memory_limit: bytes that weights and the baseline's temporaries may take.
      seed: of weights, tokens and routings.

    Yields:
      For each T, a `Measurement` or `Skipped` for each implementation and mode.

    Raises:
      ValueError: an implementation or a mode is unknown.
      MemoryLimitError: not even one set of weights fits.
    """
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(
            f"modes must be some of {', '.join(MODES)}, got {', '.join(modes) or '()'}"
        )
    plans, refused = _plans(layer, weight_format, dtype, compute, implementations)
    weights = _weights(layer, weight_format, min(tokens), plans, machine, memory_limit, seed)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    for t in tokens:
        yield from (Skipped(name, t, reason) for name, reason in refused)
        inputs = [random_tokens(layer, t, dtype, seed + r) for r in range(ROUTINGS)]
        able: list[tuple[_Plan, Callable[..., jax.Array]]] = []
        for plan in plans:
            if plan.name != BASELINE:
                able.append((plan, _function(plan, compute)))
                continue
            function, reason = _baseline(weights, inputs[0], memory_limit - held)
            if function is None:
                yield Skipped(BASELINE, t, reason)
            else:
                able.append((plan, function))
        yield from _measure(layer, weight_format, t, able, modes, weights, inputs, machine, budget)


def layer_problem(layer: Layer, weight_format: str, dtype: Any, compute: str) -> Problem:
    """What the capability table is asked for a layer.

    >>> from jaxmoe import benchmark
    >>> benchmark.layer_problem(benchmark.TINY, "nvfp4", "bfloat16", "auto").num_experts
    8
    """
    return Problem(
        weight_format=weight_format,
        compute=compute,
        activation_dtype=jnp.dtype(dtype).name,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
    )


def _plans(
    layer: Layer, weight_format: str, dtype: Any, compute: str, names: Sequence[str]
) -> tuple[list[_Plan], list[tuple[str, str]]]:
    """What to run, each variant once; and the names that nothing here can run, with the reason."""
    problem = layer_problem(layer, weight_format, dtype, compute)
    plans: dict[str, _Plan] = {}
    refused = []
    for name in names:
        if name == BASELINE:
            plans[name] = _Plan(BASELINE, CANONICAL, "w4a16")
            continue
        try:
            chosen = kernels.select(problem, None if name == AUTO else name)
        except UnsupportedError as error:
            refused.append((name, _refusal(error.resolution)))
            continue
        variant = str(chosen.selected)
        plans[variant] = _Plan(variant, str(chosen.layout), str(chosen.compute))
    return list(plans.values()), refused


def _refusal(resolution: Resolution) -> str:
    if len(resolution.rejected) == 1:
        return resolution.rejected[0].detail
    return f"no variant can; {resolution.hint}; `jaxmoe explain` has every reason"


def _weights(
    layer: Layer,
    weight_format: str,
    tokens: int,
    plans: Sequence[_Plan],
    machine: Machine,
    memory_limit: int,
    seed: int,
) -> Weights:
    """Sets of weights by layout, within the limit."""
    layouts = list(dict.fromkeys(plan.layout for plan in plans))
    one = layer.weight_bytes(weight_format)
    native = len([layout for layout in layouts if layout != CANONICAL])
    left = memory_limit - one * (len(layouts) - native)
    if left < native * one:
        raise MemoryLimitError(
            f"{layer.name} in {weight_format} needs {one * len(layouts) / _GIB:.1f} GiB for one "
            f"set of weights in each layout ({', '.join(layouts)}), and {memory_limit / _GIB:.1f} "
            "GiB are allowed: raise the limit, or measure fewer implementations at once"
        )
    sets = (
        num_weight_sets(
            layer, weight_format, tokens, machine.cache_bytes, int(left / (native * one))
        )
        if native
        else 1
    )
    return {
        layout: [
            random_experts(layer, weight_format, layout, seed + s)
            for s in range(1 if layout == CANONICAL else sets)
        ]
        for layout in layouts
    }


def num_weight_sets(
    layer: Layer, weight_format: str, tokens: int, cache_bytes: int, most: int
) -> int:
    """Sets of weights in rotation of which none is in the cache when it is used again.

    At least one, at most `most`.
    """
    touched = layer.expert_bytes(weight_format) * expected_experts(layer, tokens)
    return max(1, min(math.ceil(2 * cache_bytes / touched), _MOST_SETS, most))


def _function(plan: _Plan, compute: str) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(moe_mlp, implementation=plan.name, compute=compute))


def _baseline(
    weights: Weights, inputs: tuple[jax.Array, ...], memory: float
) -> tuple[Callable[..., jax.Array] | None, str]:
    """The compiled baseline, or None and the reason if its temporaries do not fit."""
    x, ids, w = inputs
    compiled = jax.jit(ragged_dot_mlp).lower(x, weights[CANONICAL][0], ids, w).compile()
    analysis = compiled.memory_analysis()
    # Not every platform says; then the allocator decides.
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes if analysis else 0
    if needed > memory:
        return None, (
            f"its temporaries would take {needed / _GIB:.1f} GiB (all experts dequantised, and "
            f"rows times experts on this platform), {memory / _GIB:.1f} GiB are left"
        )
    return compiled, ""


def _measure(
    layer: Layer,
    weight_format: str,
    tokens: int,
    able: Sequence[tuple[_Plan, Callable[..., jax.Array]]],
    modes: Sequence[str],
    weights: Weights,
    inputs: Sequence[tuple[jax.Array, ...]],
    machine: Machine,
    budget: float,
) -> Iterator[Measurement]:
    experts = [len(np.unique(np.asarray(ids))) for _, ids, _ in inputs]
    touched = layer.expert_bytes(weight_format) * float(np.mean(experts))
    flops = layer.flops(tokens)
    runs: list[tuple[_Plan, str, _Run]] = []
    for plan, function in able:
        sets = weights[plan.layout]
        if "dispatch" in modes or plan.name == BASELINE:
            runs.append((plan, "dispatch", _dispatch(function, sets, inputs)))
        if "program" in modes and plan.name != BASELINE:
            floor = machine.floor(touched, flops, plan.compute)
            runs.append((plan, "program", _program(function, sets, inputs, floor)))
    timings = measure([run.call for _, _, run in runs], budget)
    rows = sample_rows(tokens)
    expected: dict[str, np.ndarray] = {}  # by layout; each has other random weights
    for (plan, mode, run), timing in zip(runs, timings, strict=True):
        sets = weights[plan.layout]
        x, ids, w = inputs[0]
        if plan.layout not in expected:
            expected[plan.layout] = reference(sets[0], inputs[0], rows)
        overhead = None
        if plan.name != BASELINE and mode == "dispatch":
            nobody = (x, jnp.full_like(ids, layer.num_experts), w)
            call = _dispatch(run.function, sets, [nobody]).call
            overhead = measure([call], budget / 4)[0].median
        yield Measurement(
            implementation=plan.name,
            layer=layer,
            weight_format=weight_format,
            compute=plan.compute,
            dtype=x.dtype.name,
            tokens=tokens,
            mode=mode,
            seconds=timing.median / run.layers,
            overhead=overhead,
            weight_bytes=touched,
            floor=machine.floor(touched, flops, plan.compute),
            error=distance(run.first()[rows], expected[plan.layout]),
            runs=len(timing.seconds),
            weight_sets=len(sets),
        )


@dataclasses.dataclass(frozen=True)
class _Run:
    call: Call
    layers: int  # calls of the layer in one `call`
    first: Callable[[], jax.Array]  # the result of the first set of weights and the first inputs
    function: Callable[..., jax.Array]


def _dispatch(
    function: Callable[..., jax.Array],
    sets: Sequence[ExpertWeights],
    inputs: Sequence[tuple[jax.Array, ...]],
) -> _Run:
    def one(number: int) -> jax.Array:
        x, ids, w = inputs[number % len(inputs)]
        return function(x, sets[number % len(sets)], ids, w)

    return _Run(lambda number: one(number).block_until_ready(), 1, lambda: one(0), function)


def _program(
    function: Callable[..., jax.Array],
    sets: Sequence[ExpertWeights],
    inputs: Sequence[tuple[jax.Array, ...]],
    floor: float,
) -> _Run:
    rounds = math.ceil(_CALLS / len(sets)) if floor < _SLOW_CALL else 1
    length = rounds * len(sets)
    launches = math.ceil(_WORK / (length * floor))

    @jax.jit
    def program(
        sets: Sequence[ExpertWeights], inputs: Sequence[tuple[jax.Array, ...]]
    ) -> list[jax.Array]:
        results: list[jax.Array] = []
        for number in range(length):
            x, ids, w = inputs[number % len(inputs)]
            if results:  # each call waits for the one before
                x, _ = jax.lax.optimization_barrier((x, results[-1]))
            results.append(function(x, sets[number % len(sets)], ids, w))
        return results

    def call(number: int) -> None:
        jax.block_until_ready([program(sets, inputs)[-1] for _ in range(launches)])

    return _Run(call, length * launches, lambda: program(sets, inputs)[0], function)
