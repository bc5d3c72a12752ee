"""The Blackwell kernels: on their own GPUs, and emulated on a Hopper GPU.

Against the oracle that quantises activations as the kernels do, by every tactic of the manifest.
"""

import concurrent.futures
import dataclasses
import functools
import itertools

import families
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from families import family, marked, tactics
from problems import ACTIVATIONS, EDGES, GROUPED_EDGES, GroupedSpec, Spec
from suite import (
    BLACKWELL,
    BLOCK_SCALED,
    COMPUTE,
    EMULATED,
    activation_arrays,
    aligned,
    assert_matches,
    assert_same_bits,
    prepared,
    relative_l2,
    run,
)

import jaxmoe
from jaxmoe.kernels import block_scaled

VARIANTS = (*EMULATED, *BLACKWELL)
every_tactic = pytest.mark.parametrize(
    ("variant", "tactic"), [marked(v, t) for v in VARIANTS for t in tactics(v)]
)
every_variant = pytest.mark.parametrize(("variant", "tactic"), [marked(v, "") for v in VARIANTS])
pytestmark = pytest.mark.gpu
replace = dataclasses.replace

# From the oracle that rounds as the kernels do: x's dtype. A value between the products that falls
# to the other side of its rounding is off by up to 2^-2: much, where a row has few of them.
TOLERANCE, ROW_TOLERANCE = 5e-3, 8e-2
# T around the edges of every tile of tokens, and beyond several.
EDGE_TOKENS = (*families.EDGE_TOKENS, 255, 256, 384, 511, 512, 513, 1023, 1024)


def problem_of(variant, spec=None, **changes):
    changes = {"weight_format": BLOCK_SCALED[variant][1], "dtype": "bfloat16", **changes}
    return problems.random_problem(aligned(replace(spec or Spec(), **changes)))


def run_tactic(variant, problem, tactic):
    return families.run_tactic(variant, problem, tactic)


def assert_right(got, problem, variant):
    assert_matches(got, problem.pairs(BLOCK_SCALED[variant][0]), TOLERANCE, ROW_TOLERANCE)


# --- the choice -----------------------------------------------------------------------------------


@every_variant
def test_it_passes_its_self_test_and_is_what_runs(variant, tactic):
    assert family(variant).self_test(variant) == ""
    problem = jaxmoe.Problem(
        weight_format=BLOCK_SCALED[variant][1], compute=COMPUTE[variant], hidden_size=128,
        intermediate_size=64, num_experts=4, top_k=2,
    )  # fmt: skip
    assert jaxmoe.explain(problem, variant).selected == variant
    if variant in EMULATED:
        with pytest.raises(jaxmoe.UnsupportedError, match="AUTO never takes it"):
            jaxmoe.explain(replace(problem, weight_format="nvfp4", compute="w4a4"))
    else:
        assert jaxmoe.explain(problem).selected == variant


@every_variant
def test_an_unknown_tactic_is_refused_by_name(variant, tactic):
    with pytest.raises(Exception, match=r"tactic must be '' or one of .*, got 'fastest'"):
        run_tactic(variant, problem_of(variant), "fastest")


# --- against the oracle ---------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("edge", EDGES)
def test_edges(variant, tactic, edge):
    for input_scales in (False, True):
        problem = problem_of(variant, EDGES[edge], seed=1, input_scales=input_scales)
        assert_right(run_tactic(variant, problem, tactic), problem, variant)


@every_tactic
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(variant, tactic, activation):
    for bias, params in itertools.product([False, True], ["default", "per_expert"]):
        if params == "per_expert" and activation not in problems.PARAMETRIC:
            continue
        problem = problem_of(
            variant, activation_name=activation, bias=bias, params=params, top_k=3, num_experts=9,
            num_total=12, expert_offset=2, tokens=40, hidden_size=160, intermediate_size=288,
        )  # fmt: skip
        assert_right(run_tactic(variant, problem, tactic), problem, variant)


@every_tactic
@pytest.mark.parametrize("routing", problems.ROUTINGS)
def test_every_routing(variant, tactic, routing):
    for tokens, (num_experts, top_k) in itertools.product((3, 31, 130), ((4, 1), (5, 4))):
        problem = problem_of(
            variant, tokens=tokens, num_experts=num_experts, top_k=top_k, routing=routing,
            intermediate_size=96, seed=tokens,
        )  # fmt: skip
        assert_right(run_tactic(variant, problem, tactic), problem, variant)


@every_tactic
@pytest.mark.parametrize("tokens", EDGE_TOKENS)
def test_tile_edges(variant, tactic, tokens):
    """All tokens to one expert, so that its rows end where the tile does, one before, one after."""
    for hidden, inner in ((96, 160), (224, 64), (384, 256)):
        problem = problem_of(
            variant, tokens=tokens, num_experts=3, top_k=1, routing="single", hidden_size=hidden,
            intermediate_size=inner, seed=tokens,
        )  # fmt: skip
        assert_right(run_tactic(variant, problem, tactic), problem, variant)


@every_tactic
@pytest.mark.parametrize("routing", ["uniform", "hot", "sparse", "skewed"])
def test_many_experts(variant, tactic, routing):
    for tokens in (0, 1, 9, 64, 200, 1024):
        problem = problem_of(
            variant, tokens=tokens, num_experts=128, top_k=8, routing=routing, hidden_size=256,
            intermediate_size=192, bias=tokens == 9, input_scales=tokens == 64,
        )  # fmt: skip
        assert_right(run_tactic(variant, problem, tactic), problem, variant)


# H and I of qwen3-30b-a3b, gpt-oss and deepseek-v3, with a few of their experts.
MODELS = {
    "qwen3": Spec(hidden_size=2048, intermediate_size=768, num_experts=16, top_k=8),
    "gpt_oss": Spec(
        hidden_size=2880, intermediate_size=2880, num_experts=6, top_k=4, bias=True,
        params="uniform",
    ),
    "deepseek_v3": Spec(hidden_size=7168, intermediate_size=2048, num_experts=3, top_k=2),
}  # fmt: skip


@every_tactic
@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_models(variant, tactic, model):
    for tokens in (1, 77):
        problem = problem_of(variant, MODELS[model], tokens=tokens)
        assert_right(run_tactic(variant, problem, tactic), problem, variant)


@every_tactic
def test_random_problems(variant, tactic):
    sizes = [(32, 32), (96, 64), (128, 128), (160, 224), (544, 288), (1056, 96), (256, 640)]
    for (index, (hidden, inner)), tokens in itertools.product(enumerate(sizes), (0, 1, 33, 131)):
        for scales in ("normal", "wide", "zero_blocks"):
            problem = problem_of(
                variant, tokens=tokens, hidden_size=hidden, intermediate_size=inner, scales=scales,
                seed=index, bias=index % 2 == 1, activation_name=("swiglu", "silu")[index % 2],
                input_scales=index % 3 == 0,
            )  # fmt: skip
            assert_right(run_tactic(variant, problem, tactic), problem, variant)


@every_tactic
def test_input_scales_one_or_both(variant, tactic):
    problem = problem_of(variant, input_scales=True, tokens=40, intermediate_size=160)
    first, second = problem.input_scales
    for scales in ((first, second), (first, None), (None, second), (None, None)):
        one = replace(problem, input_scales=scales)
        assert_right(run_tactic(variant, one, tactic), one, variant)


@every_variant
def test_weight_on_input_is_quantised_with_its_weight(variant, tactic):
    for input_scales, routing in itertools.product([False, True], ["uniform", "out_of_range"]):
        problem = problem_of(
            variant, weight_on_input=True, top_k=1, bias=True, routing=routing,
            input_scales=input_scales,
        )  # fmt: skip
        weights = np.random.default_rng(0).uniform(0.1, 3, problem.weights.shape)
        problem = replace(problem, weights=weights.astype(np.float32))
        assert_right(run_tactic(variant, problem, tactic), problem, variant)


@every_tactic
def test_rows_of_very_different_sizes(variant, tactic):
    problem = problem_of(variant, tokens=60, activation_name="identity")
    sizes = np.exp2(np.resize([0, -40, 40, -90, 60], 60))[:, None] * (np.arange(60) != 7)[:, None]
    x = (problem.x.astype(np.float64) * sizes).astype(problem.x.dtype)
    problem = replace(problem, x=x)
    got, pairs = run_tactic(variant, problem, tactic), problem.pairs(BLOCK_SCALED[variant][0])
    assert not got[7].astype(np.float32).any()
    for row in range(60):
        assert_matches(got[row : row + 1], pairs[row : row + 1], ROW_TOLERANCE)


@every_variant
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_in_its_row_and_is_never_made_finite(variant, tactic, activation):
    problem = problem_of(variant, activation_name=activation, params="uniform")
    clean = run_tactic(variant, problem, tactic)
    for value in (np.nan, np.inf):
        x = problem.x.copy()
        x[3, 5] = value
        got = run_tactic(variant, replace(problem, x=x), tactic)
        assert not np.isfinite(got[3].astype(np.float32)).any()
        others = np.delete(np.arange(len(x)), 3)
        assert_same_bits(got[others], clean[others])


@every_variant
def test_weights_of_ids_out_of_range_are_never_used(variant, tactic):
    problem = problem_of(variant, routing="out_of_range", top_k=4)
    outside = (problem.expert_ids < 0) | (problem.expert_ids >= 8)
    weights = np.where(outside, np.float32(np.nan), problem.weights)
    poisoned = replace(problem, weights=weights)
    assert_same_bits(run(problem, variant), run(poisoned, variant))


@every_tactic
@pytest.mark.parametrize("edge", GROUPED_EDGES)
def test_grouped_edges(variant, tactic, edge):
    arithmetic, weight_format = BLOCK_SCALED[variant]
    for scale in (None, 0.0015):
        spec = replace(
            GROUPED_EDGES[edge], weight_format=weight_format, dtype="bfloat16", input_scale=scale
        )
        problem = problems.random_grouped(aligned(spec))
        got = families.run_grouped_tactic(variant, problem, tactic)
        assert_matches(got, problem.expected(arithmetic)[:, None], TOLERANCE, ROW_TOLERANCE)
        local = problem.expected().any(1)
        assert not got[~local].astype(np.float32).any(), "rows without a matrix must be zero"


@every_tactic
@pytest.mark.parametrize("rows", [0, 1, 8, 64, 65, 131, 300])
def test_grouped_rows(variant, tactic, rows):
    arithmetic, weight_format = BLOCK_SCALED[variant]
    for grouping, bias in itertools.product(problems.GROUPINGS, [False, True]):
        spec = GroupedSpec(
            rows=rows, grouping=grouping, bias=bias, dtype="bfloat16", num_experts=5, num_groups=9,
            group_offset=2, out_size=72, in_size=288, seed=rows, weight_format=weight_format,
        )  # fmt: skip
        problem = problems.random_grouped(aligned(spec))
        got = families.run_grouped_tactic(variant, problem, tactic)
        assert_matches(got, problem.expected(arithmetic)[:, None], TOLERANCE, ROW_TOLERANCE)


@every_variant
def test_it_gives_what_plain_jax_gives(variant, tactic):
    """Where no value falls to another side of a rounding, but for x's dtype the same numbers."""
    problem = problem_of(variant, tokens=100, hidden_size=256, intermediate_size=160)
    x, experts, ids, weights = problem.call_args()
    compute = COMPUTE[variant]
    plain = functools.partial(jaxmoe.moe_mlp, compute=compute, implementation=f"xla_{compute}")
    want = np.asarray(jax.jit(plain)(x, experts, ids, weights), np.float64)
    assert relative_l2(run_tactic(variant, problem, tactic), want) <= TOLERANCE


# --- determinism, poison, graphs ------------------------------------------------------------------

BIG = Spec(tokens=150, num_experts=32, top_k=8, hidden_size=256, intermediate_size=96, bias=True)


@every_tactic
def test_repetition_gives_the_same_bits(variant, tactic):
    problem = problem_of(variant, BIG)
    first = run_tactic(variant, problem, tactic)
    assert_right(first, problem, variant)
    for seed in range(5):
        run_tactic(variant, problem_of(variant, seed=seed), tactic)  # between
        assert_same_bits(first, run_tactic(variant, problem, tactic))


@every_tactic
def test_poisoned_buffers(variant, tactic):
    """Outputs and workspaces that hold NaN before the call leave no trace in the answer."""
    problem = problem_of(variant, BIG, routing="out_of_range")
    clean = run_tactic(variant, problem, tactic)
    for _ in range(3):
        # The same executable on NaN leaves NaN in every buffer that it frees; then bytes 0xFF of
        # many sizes, which are NaN in every floating-point format and -1 in every index.
        run_tactic(variant, replace(problem, x=np.full_like(problem.x, np.nan)), tactic)
        rubbish = [jax.device_put(np.full(2**p, 0xFF, np.uint8)) for p in range(6, 24)]
        jax.block_until_ready(rubbish)
        del rubbish
        assert_same_bits(clean, run_tactic(variant, problem, tactic))


@every_tactic
def test_layers_in_a_row_may_become_a_cuda_graph(variant, tactic):
    """A chain of calls, run often enough for XLA to record and replay it, with changing inputs."""
    spec = Spec(tokens=33, num_experts=16, top_k=4, hidden_size=256, intermediate_size=96)
    batch = [problem_of(variant, spec, seed=s) for s in range(4)]
    calls = [problem.call_args() for problem in batch]
    weights = prepared(calls[0][1], variant, True)
    assert weights.layout == block_scaled.NAME
    params = jnp.stack(activation_arrays(batch[0]))

    def layer(x, ids, w):
        if tactic:
            call = families.by_tactic(variant, "swiglu", False, tactic)
            return call(x, weights, ids, w, params, jnp.int32(0))
        return jaxmoe.moe_mlp(x, weights, ids, w, compute=COMPUTE[variant], implementation=variant)

    def model(x, ids, w):
        for _ in range(6):  # XLA records sequences of at least five commands by default
            x = jnp.clip(x + layer(x, ids, w), -4, 4)
        return x

    inputs = [(x, ids, w) for x, _, ids, w in calls]
    compiled = jax.jit(model).lower(*inputs[0])
    plain = compiled.compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
    fast = compiled.compile(compiler_options={"xla_gpu_graph_min_graph_size": 1})
    want = [np.asarray(plain(*values)) for values in inputs]
    for _ in range(3):
        for values, expected in zip(inputs, want, strict=True):
            assert_same_bits(np.asarray(fast(*values)), expected)


@every_variant
def test_calls_from_many_threads_at_once_give_the_bits_of_one(variant, tactic):
    batch = [problem_of(variant, BIG, tokens=20 + 9 * i, seed=i) for i in range(6)]
    want = [run(problem, variant) for problem in batch]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            got = pool.map(functools.partial(run, implementation=variant), batch)
            for ours, expected in zip(got, want, strict=True):
                assert_same_bits(ours, expected)
