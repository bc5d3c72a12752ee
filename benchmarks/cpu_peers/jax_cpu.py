"""jaxmoe as its users call it, and what JAX has without it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from cpu_peers.problem import NotOfferedError, Problem
from jaxmoe import benchmark, kernels
from jaxmoe.benchmark.baseline import dequantized_mlp
from jaxmoe.capability import UnsupportedError
from jaxmoe.experts import ExpertWeights
from jaxmoe.formats import get_format
from jaxmoe.quantization import QuantizedTensor, dequantize


def canonical(problem: Problem) -> ExpertWeights:
    """The weights as jaxmoe's canonical form."""
    fmt = get_format(problem.weight_format)

    def matrix(packed: np.ndarray, scale: np.ndarray) -> QuantizedTensor:
        block_scale = jax.lax.bitcast_convert_type(jnp.asarray(scale), fmt.scale)
        ones = jnp.ones(problem.num_experts, jnp.float32) if fmt.has_global_scale else None
        return QuantizedTensor(jnp.asarray(packed), block_scale, ones, fmt)

    return ExpertWeights(
        matrix(problem.gate_up, problem.gate_up_scale), matrix(problem.down, problem.down_scale)
    )


class _Jitted:
    """A jitted function of x, matrices, ids and weights."""

    dtype = "bfloat16"
    version = f"jax {jax.__version__}"

    def __init__(self, problem: Problem, function: Callable[..., jax.Array], sets: list[Any]):
        self._problem = problem
        self._function = function
        self._sets = sets
        self.weight_sets = len(sets)

    def begin(self, tokens: int) -> None:
        problem = self._problem
        self._x = jnp.asarray(problem.x[:tokens]).astype(self.dtype)
        self._routings = [
            (jnp.asarray(ids[:tokens]), jnp.asarray(weights[:tokens]))
            for ids, weights in zip(problem.expert_ids, problem.weights, strict=True)
        ]
        _check_memory(self._function, self._x, self._sets[0], *self._routings[0], problem.memory)

    def call(self, number: int) -> float:
        experts = self._sets[number % len(self._sets)]
        ids, weights = self._routings[number % len(self._routings)]
        start = time.perf_counter()
        self._y = self._function(self._x, experts, ids, weights).block_until_ready()
        return time.perf_counter() - start

    def output(self) -> np.ndarray:
        return np.asarray(self._y.astype(jnp.float32))


class Jaxmoe(_Jitted):
    """`jaxmoe.moe_mlp` over weights that `jaxmoe.prepare` made."""

    asked = "auto"
    variant: str | None = None  # the machine's best

    def __init__(self, problem: Problem):
        layer = benchmark.Layer(
            problem.layer, problem.hidden_size, problem.intermediate_size, problem.num_experts,
            problem.top_k,
        )  # fmt: skip
        asked = benchmark.layer_problem(layer, problem.weight_format, self.dtype, self.asked)
        try:
            chosen = kernels.select(asked, self.variant)
        except UnsupportedError as error:
            which = f"{self.variant} does not compute" if self.variant else "no variant computes"
            raise NotOfferedError(
                f"{which} {self.asked} here: `jaxmoe explain` has the reasons"
            ) from error
        self.name, self.compute = str(chosen.selected), str(chosen.compute)
        if self.asked not in ("auto", self.compute):
            raise NotOfferedError(f"{self.name} computes {self.compute} on this machine")
        experts = canonical(problem)
        prepare: Callable[..., Any] = jaxmoe.prepare
        sets = [
            jax.block_until_ready(prepare(experts, self.name, compute=self.compute))
            for _ in range(problem.weight_sets)
        ]
        function = jax.jit(
            functools.partial(jaxmoe.moe_mlp, compute=self.asked, implementation=self.variant)
        )
        super().__init__(problem, function, sets)


class JaxmoeW4A8(Jaxmoe):
    """The same with activations of 8 bits."""

    asked = "w4a8"


class JaxmoeAvx2(Jaxmoe):
    """As on a machine without AVX-512 and AVX-VNNI."""

    variant = "cpu_avx2"


class RaggedDot(_Jitted):
    """`jax.lax.ragged_dot` over weights that were dequantised to bfloat16 beforehand."""

    name = benchmark.BASELINE
    compute = "bf16"

    def __init__(self, problem: Problem):
        e, h, i, k = (
            problem.num_experts, problem.hidden_size, problem.intermediate_size, problem.top_k,
        )  # fmt: skip
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=self.dtype)
        ids, weights = (jax.ShapeDtypeStruct((1, k), d) for d in ("int32", "float32"))
        matrices = (shape((e, h, 2 * i)), shape((e, i, h)))
        function = jax.jit(dequantized_mlp)
        _check_memory(function, shape((1, h)), matrices, ids, weights, problem.memory)
        experts = canonical(problem)
        sets = [tuple(_dequantized(w) for w in (experts.gate_up, experts.down))]
        super().__init__(problem, function, sets)


def _dequantized(w: Any) -> jax.Array:
    """`bf16[E, K, N]`, expert by expert."""
    e, n, k = w.shape
    wide = jnp.zeros((e, k, n), jnp.bfloat16)
    for expert in range(e):
        wide = _put(wide, w, jnp.int32(expert))
    return wide


@functools.partial(jax.jit, donate_argnums=0)
def _put(wide: jax.Array, w: QuantizedTensor, expert: jax.Array) -> jax.Array:
    return wide.at[expert].set(dequantize(w[expert[None]], jnp.bfloat16)[0].T)


def _check_memory(
    function: Callable[..., jax.Array], x: Any, matrices: Any, ids: Any, weights: Any, allowed: int
) -> None:
    """Compiles for these shapes; refuses where arguments and temporaries take more than allowed."""
    lowered: Any = function
    analysis = lowered.lower(x, matrices, ids, weights).compile().memory_analysis()
    if analysis is None:  # not every platform says
        return
    needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    if needed > allowed:
        raise NotOfferedError(
            f"its weights and temporaries at T = {x.shape[0]} take {needed / 2**30:.1f} GiB, and "
            f"{allowed / 2**30:.1f} GiB are allowed: half of --memory"
        )
