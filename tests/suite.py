"""What the shared suite needs of the package: implementations, compiled calls, and the measure."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import GroupedProblem, Problem, Spec

import jaxmoe

IMPLEMENTATIONS = (
    "xla",
    "cpu_portable",
    "cpu_avx2",
    "cpu_avx_vnni",
    "cpu_avx512",
    "cpu_avx512_vnni",
    "cpu_avx512_bf16",
    "cpu_amx",
)
NATIVE = IMPLEMENTATIONS[1:]
EMULATED = tuple(
    f"{family}_{compute}_emulated" for family in ("sm120", "sm100") for compute in ("w4a4", "w4a8")
)
BLACKWELL = tuple(variant.removesuffix("_emulated") for variant in EMULATED)
# Their tests are in tests/gpu.
GPU = ("sm90_w4a16", "sm90_w4a8", "sm80_w4a16", *BLACKWELL, *EMULATED)
# Variants that quantise both operands by block: the oracle's arithmetic and the weight format.
BLOCK_SCALED = {
    variant: ("w4a4", "nvfp4") if "w4a4" in variant else ("mxfp8", "mxfp4")
    for variant in ("xla_w4a4", "xla_w4a8", *BLACKWELL, *EMULATED)
}
# What a variant has to be asked for; auto for all others.
COMPUTE = {
    variant: "w4a4" if "w4a4" in variant else "w4a8" for variant in ("sm90_w4a8", *BLOCK_SCALED)
}


def aligned(spec: Any) -> Any:
    """A spec of MXFP4 weights with sizes that the kernels of W4A8 on Blackwell take."""
    names = {"hidden_size", "intermediate_size", "in_size"} & vars(spec).keys()
    if spec.weight_format != "mxfp4":
        return spec
    return dataclasses.replace(spec, **{n: -(-getattr(spec, n) // 64) * 64 for n in names})


every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
DTYPES, FORMATS = ("float32", "bfloat16"), ("nvfp4", "mxfp4")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_fp4 = pytest.mark.parametrize("weight_format", FORMATS)

# Relative L2 against float64. float32: rounding of the sums. bfloat16: rounding of the activation's
# output and of the result, 2^-9 at most and about 2^-10.3 on average each.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 5e-4}


@functools.cache
def refusal(implementation: str, dtype: str = "bfloat16", op: str = "moe_mlp") -> str | None:
    """Why `implementation` cannot run FP4 weights with activations of `dtype` here, or None."""
    problem = jaxmoe.capability.Problem(
        op=op, weight_format="nvfp4", activation_dtype=dtype,
        activation="swiglu" if op == "moe_mlp" else "identity",
        hidden_size=64, intermediate_size=64, num_experts=4, top_k=2 if op == "moe_mlp" else 1,
    )  # fmt: skip
    try:
        jaxmoe.ops.explain(problem, implementation)
    except jaxmoe.UnsupportedError as error:
        return str(error)
    return None


def require(implementation: str, dtype: str = "bfloat16", op: str = "moe_mlp") -> None:
    """Skips with the Resolution's own words where the implementation cannot run."""
    reason = refusal(implementation, dtype, op)
    if reason is not None:
        pytest.skip(reason)


def widest_dtype(implementation: str, wanted: str = "float32", op: str = "moe_mlp") -> str:
    """`wanted`, or bfloat16 for the variants that take nothing else; skips as `require` does."""
    dtype = wanted if refusal(implementation, wanted, op) is None else "bfloat16"
    require(implementation, dtype, op)
    return dtype


@functools.cache
def compiled(
    activation_name: str, weight_on_input: bool, implementation: Any, compute: str | None = None
):
    """jit of moe_mlp as f(x, experts, expert_ids, weights, expert_offset, params).

    compute: the implementation's own by default.
    Offset and activation parameters are arguments, so that one compilation serves many problems.
    """

    def call(x, experts, expert_ids, weights, expert_offset, params):
        return jaxmoe.moe_mlp(
            x, experts, expert_ids, weights,
            activation=jaxmoe.activations.ACTIVATIONS[activation_name](*params),
            expert_offset=expert_offset, weight_on_input=weight_on_input,
            compute=compute or COMPUTE.get(implementation, "auto"), implementation=implementation,
        )  # fmt: skip

    return jax.jit(call)


@functools.cache
def preparing(variant: str, gated: bool):
    """jit of prepare for a native variant."""
    compute = COMPUTE.get(variant, "auto")
    return jax.jit(functools.partial(jaxmoe.prepare, variant=variant, gated=gated, compute=compute))


def prepared(experts: Any, implementation: str | None, gated: bool) -> Any:
    """What `run` passes: canonical weights for `xla`, prepared ones for the native variants.

    Rearranging them inside the call would compile for longer than all else. The CPU variants read
    one layout, which is prepared once.
    """
    if implementation not in NATIVE and implementation not in GPU:
        return experts
    return preparing("cpu_portable" if implementation in NATIVE else implementation, gated)(experts)


def activation_arrays(problem: Problem) -> tuple[jax.Array, ...]:
    """The activation's parameters, defaults written out, as one float32 array [E] each."""
    params = problem.params or problems.default_params(problem.spec.activation_name)
    shape = (problem.spec.num_experts,)
    return tuple(jnp.asarray(np.broadcast_to(np.float32(p), shape)) for p in params)


def run(
    problem: Problem, implementation: str | None, experts: Any = None, compute: str | None = None
) -> np.ndarray:
    """moe_mlp on a problem, compiled; checks shape and dtype of the answer.

    experts: what to pass; `prepared` by default.
    compute: as for `compiled`.
    """
    spec, (x, canonical, ids, weights) = problem.spec, problem.call_args()
    if experts is None:
        experts = prepared(canonical, implementation, spec.gated)
    y = compiled(spec.activation_name, spec.weight_on_input, implementation, compute)(
        x, experts, ids, weights, jnp.int32(spec.expert_offset), activation_arrays(problem)
    )
    assert y.shape == problem.x.shape
    assert y.dtype == problem.x.dtype
    return np.asarray(y)


@functools.cache
def compiled_grouped(implementation: Any, preferred: str | None = None, compute: str | None = None):
    """jit of grouped_matmul as f(x, w, group_sizes, bias, input_scale, group_offset)."""

    def call(x, w, group_sizes, bias, input_scale, group_offset):
        return jaxmoe.grouped_matmul(
            x, w, group_sizes, bias=bias, input_scale=input_scale, group_offset=group_offset,
            preferred_element_type=preferred,
            compute=compute or COMPUTE.get(implementation, "auto"), implementation=implementation,
        )  # fmt: skip

    return jax.jit(call)


def run_grouped(
    problem: GroupedProblem, implementation: Any, preferred: str | None = None,
    compute: str | None = None,
):  # fmt: skip
    """grouped_matmul on a problem, compiled."""
    kwargs = problem.call_kwargs()
    offset = kwargs["group_offset"]
    y = compiled_grouped(implementation, preferred, compute)(
        *problem.call_args(), kwargs["bias"], kwargs["input_scale"],
        None if offset is None else jnp.int32(offset),
    )  # fmt: skip
    assert y.shape == (problem.spec.rows, problem.spec.out_size)
    assert y.dtype == np.dtype(jnp.dtype(preferred or problem.x.dtype))
    return np.asarray(y)


def batch_of_problems(spec: Spec, size: int) -> tuple[list[Problem], tuple[Any, ...]]:
    """Problems that differ in every value, and the stack of their arguments to moe_mlp."""
    batch = [problems.random_problem(dataclasses.replace(spec, seed=s)) for s in range(size)]
    return batch, jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p.call_args() for p in batch])


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||, 0 / 0 = 0."""
    error = np.linalg.norm(np.asarray(got).astype(np.float64) - want)
    return float(error / (np.linalg.norm(want) or 1.0)) if error else 0.0


def assert_matches(
    got: np.ndarray, pairs: np.ndarray, tolerance: float, row_tolerance: float | None = None
) -> None:
    """The answer agrees with the oracle's as a whole and row by row; no-expert rows are exactly 0.

    pairs: float64[T, k, H], the oracle's contributions per slot. A row is measured against the size
    of what is added up in it, so that cancellation is no failure and a small wrong row is.
    row_tolerance: of each row; 4 times `tolerance` by default.
    """
    row_tolerance = 4 * tolerance if row_tolerance is None else row_tolerance
    got, want = np.asarray(got).astype(np.float64), pairs.sum(1)
    assert np.isfinite(got).all(), f"not finite at {np.argwhere(~np.isfinite(got))[:5].tolist()}"
    sizes = np.maximum(np.sqrt((pairs**2).sum((1, 2))), np.linalg.norm(want, axis=1))
    errors = np.linalg.norm(got - want, axis=1)
    bad = errors > row_tolerance * sizes
    shares = (errors / np.maximum(sizes, 1e-300))[bad][:8]
    assert not bad.any(), (
        f"rows {np.flatnonzero(bad)[:8].tolist()} are off by {shares} of their size "
        f"(allowed {row_tolerance:.1e})"
    )
    error = np.linalg.norm(errors) / (np.linalg.norm(sizes) or 1.0)
    assert error <= tolerance, f"relative L2 {error:.2e} > {tolerance:.0e}"


def assert_exact(got: np.ndarray, want: np.ndarray) -> None:
    """Every value equals the float64 one rounded once (zeros of either sign are one value)."""
    got = np.asarray(got)
    want = want.astype(np.float32).astype(got.dtype)
    differ = np.argwhere(got != want)
    assert not differ.size, (
        f"{len(differ)} of {got.size} values differ; first at {differ[0].tolist()}: "
        f"got {got[tuple(differ[0])]!r}, want {want[tuple(differ[0])]!r}"
    )


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
