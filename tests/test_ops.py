"""Every implementation against the oracle; then determinism, poisoned buffers and donation."""

import dataclasses
import itertools
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import ACTIVATIONS, EDGES, GroupedSpec, Spec
from suite import (
    DTYPES,
    FORMATS,
    IMPLEMENTATIONS,
    NATIVE,
    TOLERANCE,
    assert_exact,
    assert_matches,
    assert_same_bits,
    compiled,
    every_dtype,
    every_fp4,
    every_implementation,
    refusal,
    relative_l2,
    require,
    run,
    run_grouped,
    widest_dtype,
)

import jaxmoe

replace = dataclasses.replace


# --- which implementations run here ---------------------------------------------------------------

AVX512 = "avx512f avx512bw avx512vl avx512dq fma f16c"
# What each variant needs, by hand from DESIGN.md section 5, in the kernel's spelling of CPU flags.
NEEDS = {
    "xla": "",
    "cpu_portable": "",
    "cpu_avx2": "avx2 fma f16c",
    "cpu_avx_vnni": "avx2 fma f16c avx_vnni",
    "cpu_avx512": AVX512,
    "cpu_avx512_vnni": f"{AVX512} avx512_vnni",
    "cpu_avx512_bf16": f"{AVX512} avx512vbmi avx512_vnni avx512_bf16",
    "cpu_amx": f"{AVX512} avx512vbmi avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16",
}


@every_implementation
@pytest.mark.parametrize("op", ["moe_mlp", "grouped_matmul"])
def test_skips_only_what_the_machine_lacks(implementation, op):
    """A wrong refusal would turn the rest of this file into skips; the kernel's flags decide."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        pytest.skip(f"CPU flags are not readable on {platform.machine()}/{platform.system()}")
    flags = next(line for line in info.read_text().splitlines() if line.startswith("flags"))
    can = set(NEEDS[implementation].split()) <= set(flags.split())
    reason = refusal(implementation, "bfloat16", op)
    assert (reason is None) == can, reason
    if can:
        in_f32 = refusal(implementation, "float32", op)
        assert (in_f32 is None) == (implementation != "cpu_avx512_bf16"), in_f32


# --- against the oracle ---------------------------------------------------------------------------


# A compilation takes a second, so each edge takes its turn among the four combinations; the exact
# grid below runs all of them.
COMBINATIONS = dict(zip(EDGES, itertools.cycle(itertools.product(DTYPES, FORMATS)), strict=False))


@every_implementation
@pytest.mark.parametrize("edge", EDGES)
def test_edges(implementation, edge):
    dtype, weight_format = COMBINATIONS[edge]
    dtype = widest_dtype(implementation, dtype)
    problem = problems.random_problem(
        replace(EDGES[edge], weight_format=weight_format, dtype=dtype, seed=1)
    )
    assert_matches(run(problem, implementation), problem.pairs(), TOLERANCE[dtype])


@every_implementation
@pytest.mark.parametrize(("weight_format", "dtype"), [("mxfp4", "float32"), ("nvfp4", "bfloat16")])
@pytest.mark.parametrize("scales", ["normal", "wide", "zero_blocks", "huge", "tiny"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_other_format_and_dtype(implementation, weight_format, dtype, scales, activation):
    require(implementation, dtype)
    spec = Spec(
        weight_format=weight_format, dtype=dtype, scales=scales, bias=scales == "normal",
        activation_name=activation, seed=2,
    )  # fmt: skip
    problem = problems.random_problem(spec)
    assert_matches(run(problem, implementation), problem.pairs(), TOLERANCE[dtype])


# xla compiles for two seconds each time: there each activation takes one combination.
EXACT_CASES = [
    (implementation, dtype, weight_format, activation)
    for implementation in IMPLEMENTATIONS
    for index, activation in enumerate(ACTIVATIONS)
    for turn, (dtype, weight_format) in enumerate(itertools.product(DTYPES, FORMATS))
    if implementation != "xla" or turn == index % 4
]


@pytest.mark.parametrize(("implementation", "dtype", "weight_format", "activation"), EXACT_CASES)
def test_exact_grid_bit_for_bit(implementation, dtype, weight_format, activation):
    require(implementation, dtype)
    for seed, bias, params in itertools.product([0, 1], [False, True], ["default", "per_expert"]):
        if params == "per_expert" and activation not in problems.PARAMETRIC:
            continue
        spec = Spec(
            weight_format=weight_format, dtype=dtype, activation_name=activation, bias=bias,
            params=params, seed=seed, top_k=3, num_experts=9, num_total=12, expert_offset=2,
        )  # fmt: skip
        problem = problems.exact_problem(spec)
        assert_exact(run(problem, implementation), problem.expected())


@pytest.mark.parametrize("routing", problems.ROUTINGS)
@pytest.mark.parametrize(
    ("implementation", "dtype", "tokens"),
    [
        ("xla", "float32", 3),
        ("xla", "bfloat16", 31),
        *itertools.product(NATIVE, DTYPES, (1, 3, 16, 31, 65)),
    ],
)
def test_exact_grid_for_every_routing_and_tile_edge(routing, implementation, dtype, tokens):
    require(implementation, dtype)
    for num_experts, top_k in ((4, 1), (5, 4)):
        spec = Spec(
            tokens=tokens, num_experts=num_experts, top_k=top_k, routing=routing, dtype=dtype,
            intermediate_size=96, activation_name="swiglu", seed=tokens,
        )  # fmt: skip
        problem = problems.exact_problem(spec)
        assert_exact(run(problem, implementation), problem.expected())


@every_implementation
@every_dtype
def test_weight_on_input_exact(implementation, dtype):
    require(implementation, dtype)
    for bias, routing in itertools.product([False, True], ["uniform", "out_of_range"]):
        spec = Spec(weight_on_input=True, top_k=1, bias=bias, routing=routing, dtype=dtype)
        problem = problems.exact_problem(spec)
        assert_exact(run(problem, implementation), problem.expected())


@pytest.mark.parametrize("weight_format", ["mxfp8", "fp8", "bf16"])
@every_dtype
def test_xla_runs_the_other_formats(weight_format, dtype):
    spec = Spec(weight_format=weight_format, dtype=dtype, bias=True)
    problem = problems.random_problem(spec)
    assert_matches(run(problem, None), problem.pairs(), TOLERANCE[dtype])


@every_fp4
def test_xla_runs_float16(weight_format):
    problem = problems.random_problem(Spec(weight_format=weight_format, dtype="float16", bias=True))
    assert_matches(run(problem, None), problem.pairs(), TOLERANCE["float16"])


@every_implementation
@every_dtype
@every_fp4
def test_float4_elements_and_packed_bytes_are_one_thing(implementation, dtype, weight_format):
    require(implementation, dtype)
    spec = Spec(weight_format=weight_format, dtype=dtype)
    packed, elements = (problems.random_problem(replace(spec, packed=p)) for p in (True, False))
    assert_same_bits(run(packed, implementation), run(elements, implementation))


@every_implementation
def test_a_nan_stays_in_its_row(implementation):
    """A NaN in x makes its own row NaN, as in jnp, and no other; so does a NaN routing weight."""
    dtype = widest_dtype(implementation)
    for activation in ACTIVATIONS:
        spec = Spec(activation_name=activation, params="uniform", dtype=dtype)
        problem = problems.random_problem(spec)
        clean = run(problem, implementation)
        x, weights = problem.x.copy(), problem.weights.copy()
        x[3, 5], weights[6, 1] = np.nan, np.nan
        got = run(replace(problem, x=x, weights=weights), implementation)
        assert np.isnan(got[[3, 6]]).all(), activation
        others = np.delete(np.arange(spec.tokens), [3, 6])
        assert_same_bits(got[others], clean[others])


@every_implementation
def test_weights_of_ids_out_of_range_are_never_used(implementation):
    require(implementation)
    problem = problems.random_problem(Spec(routing="out_of_range", top_k=4, dtype="bfloat16"))
    outside = (problem.expert_ids < 0) | (problem.expert_ids >= 8)
    weights = np.where(outside, np.float32(np.nan), problem.weights)
    assert_same_bits(
        run(problem, implementation), run(replace(problem, weights=weights), implementation)
    )


# --- determinism, poison, donation ----------------------------------------------------------------


BIG = Spec(tokens=150, num_experts=32, top_k=8, hidden_size=256, intermediate_size=96, bias=True)


@every_implementation
@every_dtype
def test_two_runs_give_the_same_bits(implementation, dtype):
    require(implementation, dtype)
    problem = problems.random_problem(replace(BIG, dtype=dtype))
    first = run(problem, implementation)
    for _ in range(3):
        run(problems.random_problem(Spec(dtype=dtype)), implementation)  # something else between
        assert_same_bits(first, run(problem, implementation))
    compiled.cache_clear()  # and so does another compilation
    assert_same_bits(first, run(problem, implementation))


@every_implementation
@every_dtype
def test_a_tokens_answer_does_not_depend_on_its_batch_beyond_rounding(implementation, dtype):
    require(implementation, dtype)
    problem = problems.random_problem(replace(BIG, tokens=33, dtype=dtype))
    whole = run(problem, implementation)
    for rows in (slice(0, 1), slice(5, 12), slice(20, 33)):
        part = replace(
            problem, x=problem.x[rows], expert_ids=problem.expert_ids[rows],
            weights=problem.weights[rows],
        )  # fmt: skip
        got = run(part, implementation).astype(np.float64)
        assert relative_l2(got, whole[rows].astype(np.float64)) <= TOLERANCE[dtype]


@every_implementation
@every_dtype
def test_poisoned_buffers(implementation, dtype):
    """Outputs and workspaces that hold NaN before the call leave no trace in the answer."""
    require(implementation, dtype)
    problem = problems.random_problem(replace(BIG, routing="out_of_range", dtype=dtype))
    clean = run(problem, implementation)
    x, experts, ids, weights = problem.call_args()
    for _ in range(3):
        # The same executable on NaN leaves NaN in every buffer that it frees; then bytes 0xFF of
        # many sizes, which are NaN in every floating-point format and -1 in every index.
        run(replace(problem, x=np.full_like(problem.x, np.nan)), implementation)
        rubbish = [np.full(2**p, 0xFF, np.uint8) for p in range(6, 24) for _ in range(4)]
        rubbish += [jax.device_put(r) for r in rubbish[::4]]
        jax.block_until_ready(rubbish)
        del rubbish
        assert_same_bits(clean, run(problem, implementation))

    def with_poison(poison, x, experts, ids, weights):
        y = jaxmoe.moe_mlp(x, experts, ids, weights, implementation=implementation)
        return y, jnp.isnan(poison[0, 0])

    poison = jnp.full_like(x, jnp.nan)
    y, was_nan = jax.jit(with_poison, donate_argnums=0)(poison, x, experts, ids, weights)
    assert poison.is_deleted(), "the output was to reuse the NaN-filled buffer"
    assert was_nan
    assert_same_bits(clean, np.asarray(y))


@every_implementation
def test_poisoned_buffers_grouped(implementation):
    require(implementation, op="grouped_matmul")
    spec = GroupedSpec(rows=131, grouping="short", bias=True, dtype="bfloat16")
    problem = problems.random_grouped(spec)
    clean = run_grouped(problem, implementation)
    x, w, sizes = problem.call_args()
    bias = problem.call_kwargs()["bias"]

    def with_poison(poison, x, w, sizes, bias):
        y = jaxmoe.grouped_matmul(x, w, sizes, bias=bias, implementation=implementation)
        return y, jnp.isnan(poison[0, 0])

    poison = jnp.full((spec.rows, spec.out_size), jnp.nan, x.dtype)
    y, _ = jax.jit(with_poison, donate_argnums=0)(poison, x, w, sizes, bias)
    assert poison.is_deleted()
    assert_same_bits(clean, np.asarray(y))


@every_implementation
def test_donated_tokens(implementation):
    require(implementation)
    problem = problems.random_problem(Spec(dtype="bfloat16"))
    x, experts, ids, weights = problem.call_args()

    def layer(x, experts, ids, weights):
        return jaxmoe.moe_mlp(x, experts, ids, weights, implementation=implementation)

    y = jax.jit(layer, donate_argnums=0)(x, experts, ids, weights)
    assert x.is_deleted()
    assert_same_bits(run(problem, implementation), np.asarray(y))
