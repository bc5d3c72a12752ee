"""W4A8 on a Hopper GPU, against the oracle that rounds what the kernel rounds and the exact one."""

import concurrent.futures
import dataclasses
import functools
import itertools

import families
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from families import DTYPES, EDGE_TOKENS, obstacle
from problems import ACTIVATIONS, EDGES, GROUPED_EDGES, GroupedSpec, Spec
from suite import TOLERANCE, assert_matches, assert_same_bits, prepared, relative_l2, run

import jaxmoe
from jaxmoe.kernels import sm90

VARIANT = "sm90_w4a8"
WHY_NOT = obstacle(VARIANT)
TACTICS = families.tactics(VARIANT)
run_tactic = functools.partial(families.run_tactic, VARIANT)
run_grouped_tactic = functools.partial(families.run_grouped_tactic, VARIANT)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "runs here")]
every_half = pytest.mark.parametrize("dtype", DTYPES)
every_tactic = pytest.mark.parametrize("tactic", TACTICS)

# From the oracle that rounds as the kernel does: sums of e4m3 products keep about 14 bits, so that
# one in hundreds of the values between the products falls to the other side of its rounding and is
# off by up to 2^-3; and x's dtype. Where there are few values, one of them is a large part of all.
# Measured on an H100: at most 1.03e-2, and 2.02e-2 where there are few.
ROUNDED, ROUNDED_SMALL, ROUNDED_ROW = 1.2e-2, 2.5e-2, 8e-2
# From the exact oracle: e4m3 is off by 2^-4 at most and 2^-5.3 on average in each operand.
EXACT, EXACT_SMALL, EXACT_ROW = 6e-2, 1.2e-1, 4.8e-1


def spec_of(spec=None, **changes):
    """MXFP4, bfloat16 unless said otherwise."""
    return dataclasses.replace(spec or Spec(), **{"weight_format": "mxfp4", **changes})


def problem_of(spec=None, **changes):
    return problems.random_problem(spec_of(spec, **{"dtype": "bfloat16", **changes}))


def assert_right(got, problem):
    large = problem.x.shape[0] * problem.spec.intermediate_size >= 2**13
    rounded = ROUNDED if large else ROUNDED_SMALL
    assert_matches(got, problem.pairs("w4a8"), rounded, ROUNDED_ROW)
    if problem.spec.scales == "normal":  # else one block of a row may be all that counts
        assert_matches(got, problem.pairs(), EXACT if large else EXACT_SMALL, EXACT_ROW)


def assert_grouped_right(got, problem):
    for arithmetic, tolerance in (("w4a8", ROUNDED), ("exact", EXACT_SMALL)):
        assert_matches(got, problem.expected(arithmetic)[:, None], tolerance)
    local = problem.expected().any(1)
    assert not got[~local].astype(np.float32).any(), "rows without a matrix must be zero"


# --- the choice -----------------------------------------------------------------------------------


def test_it_is_selected_where_it_is_asked_for_and_passes_its_self_test():
    assert sm90.self_test(VARIANT) == ""
    problem = jaxmoe.Problem(
        weight_format="mxfp4", hidden_size=96, intermediate_size=64, num_experts=4, top_k=2
    )
    assert jaxmoe.explain(problem).selected == "sm90_w4a16"
    asked = jaxmoe.explain(dataclasses.replace(problem, compute="w4a8"))
    assert (asked.selected, asked.degraded_from) == (VARIANT, None)


def test_an_unknown_tactic_is_refused_by_name():
    with pytest.raises(Exception, match=r"tactic must be '' or one of .*, got 'fastest'"):
        run_tactic(problem_of(), "fastest")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4"}, r"format must be mxfp4"),
        (
            {"gate_up": np.zeros((8, 100), np.uint8)},
            r"gate_up must be u8\[\*,\d+\], got u8\[8,100\]",
        ),
        ({"x": np.zeros((17, 96), np.float32)}, r"x must be bf16\|f16\[\*,96\], got f32\[17,96\]"),
    ],
)
def test_a_wrong_call_is_refused_with_the_argument(change, message):
    values, attrs = families.raw_call(VARIANT, "mxfp4", problem_of())
    for name, value in change.items():
        (values if name in values else attrs)[name] = value
    families.assert_refused(VARIANT, values, attrs, message)


# --- against the oracles --------------------------------------------------------------------------


@every_half
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, dtype):
    if dtype == "float16" and EDGES[edge].scales in ("huge", "tiny"):
        pytest.skip("values between the products leave float16's range")
    problem = problem_of(EDGES[edge], dtype=dtype, seed=1)
    assert_right(run(problem, VARIANT), problem)


@every_tactic
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(tactic, activation):
    for bias, params in itertools.product([False, True], ["default", "per_expert"]):
        if params == "per_expert" and activation not in problems.PARAMETRIC:
            continue
        problem = problem_of(
            activation_name=activation, bias=bias, params=params, top_k=3, num_experts=9,
            num_total=12, expert_offset=2, tokens=40, hidden_size=160, intermediate_size=288,
        )  # fmt: skip
        assert_right(run_tactic(problem, tactic), problem)


@every_tactic
@pytest.mark.parametrize("routing", problems.ROUTINGS)
def test_every_routing(tactic, routing):
    for tokens, (num_experts, top_k) in itertools.product((3, 31, 130), ((4, 1), (5, 4))):
        problem = problem_of(
            tokens=tokens, num_experts=num_experts, top_k=top_k, routing=routing,
            intermediate_size=96, seed=tokens,
        )  # fmt: skip
        assert_right(run_tactic(problem, tactic), problem)


@every_tactic
@pytest.mark.parametrize("tokens", EDGE_TOKENS)
def test_tile_edges(tactic, tokens):
    """All tokens to one expert, so that its rows end where the tile does, one before, one after."""
    for hidden, inner in ((96, 160), (224, 64)):
        problem = problem_of(
            tokens=tokens, num_experts=3, top_k=1, routing="single", hidden_size=hidden,
            intermediate_size=inner, seed=tokens,
        )  # fmt: skip
        assert_right(run_tactic(problem, tactic), problem)


SIZES = [(32, 32), (96, 64), (128, 128), (160, 224), (544, 288), (1056, 96), (256, 640)]


@every_tactic
@every_half
@pytest.mark.parametrize("index", range(len(SIZES)), ids=[f"{h}x{i}" for h, i in SIZES])
def test_every_tactic_on_random_problems(index, tactic, dtype):
    """H and I before, at and after a block of 128 and several; T = 0, 1, 17, 33, 131."""
    hidden, inner = SIZES[index]
    for tokens, scales in itertools.product((0, 1, 17, 33, 131), ("normal", "wide", "zero_blocks")):
        problem = problem_of(
            tokens=tokens, hidden_size=hidden, intermediate_size=inner, dtype=dtype,
            scales=scales, seed=index, bias=index % 2 == 1,
            activation_name=("swiglu", "silu")[index % 2],
        )  # fmt: skip
        assert_right(run_tactic(problem, tactic), problem)


@every_half
def test_weight_on_input(dtype):
    for bias, routing in itertools.product([False, True], ["uniform", "out_of_range"]):
        problem = problem_of(weight_on_input=True, top_k=1, bias=bias, routing=routing, dtype=dtype)
        assert_right(run(problem, VARIANT), problem)


@every_tactic
def test_rows_of_very_different_sizes(tactic):
    """Each row has a factor of its own: zeros, tiny and huge rows beside each other."""
    problem = problem_of(tokens=60, activation_name="identity")
    sizes = np.exp2(np.resize([0, -40, 40, -90, 60], 60))[:, None] * (np.arange(60) != 7)[:, None]
    x = (problem.x.astype(np.float64) * sizes).astype(problem.x.dtype)
    problem = dataclasses.replace(problem, x=x)
    got = run_tactic(problem, tactic)
    assert not got[7].astype(np.float32).any()
    for row in range(60):  # one by one: a norm over all rows sees the largest alone
        one = problem.pairs("w4a8")[row : row + 1]
        assert_matches(got[row : row + 1], one, ROUNDED_ROW)


@pytest.mark.parametrize("code", [0, 1, 12, 247, 254])
def test_smallest_and_largest_scales(code):
    """All scales of gate_up from 2^-127 to 2^127, and x so that nothing leaves bf16's range."""
    problem = problem_of(activation_name="identity", routing="round_robin")
    scale = np.full_like(problem.gate_up.scale, code)
    gate_up = dataclasses.replace(problem.gate_up, scale=scale)
    x = problem.x.astype(np.float64) * 2.0 ** np.clip(123 - code, -100, 100)
    problem = dataclasses.replace(problem, gate_up=gate_up, x=x.astype(problem.x.dtype))
    assert_right(run(problem, VARIANT), problem)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_row(activation):
    problem = problem_of(activation_name=activation, params="uniform")
    clean = run(problem, VARIANT)
    x, weights = problem.x.copy(), problem.weights.copy()
    x[3, 5], weights[6, 1] = np.nan, np.nan
    got = run(dataclasses.replace(problem, x=x, weights=weights), VARIANT)
    assert np.isnan(got[[3, 6]]).all()
    others = np.delete(np.arange(len(x)), [3, 6])
    assert_same_bits(got[others], clean[others])


def test_an_infinity_is_never_made_finite():
    """e4m3 has no infinity, and saturating one would give a number that looks right."""
    problem = problem_of(activation_name="identity")
    clean = run(problem, VARIANT)
    x = problem.x.copy()
    x[3, 5] = np.inf
    got = run(dataclasses.replace(problem, x=x), VARIANT)
    assert not np.isfinite(got[3].astype(np.float32)).any()
    others = np.delete(np.arange(len(x)), 3)
    assert_same_bits(got[others], clean[others])


def test_weights_of_ids_out_of_range_are_never_used():
    problem = problem_of(routing="out_of_range", top_k=4)
    outside = (problem.expert_ids < 0) | (problem.expert_ids >= 8)
    weights = np.where(outside, np.float32(np.nan), problem.weights)
    poisoned = dataclasses.replace(problem, weights=weights)
    assert_same_bits(run(problem, VARIANT), run(poisoned, VARIANT))


@every_tactic
@every_half
@pytest.mark.parametrize("edge", GROUPED_EDGES)
def test_grouped_edges(tactic, edge, dtype):
    problem = problems.random_grouped(spec_of(GROUPED_EDGES[edge], dtype=dtype, seed=1))
    assert_grouped_right(run_grouped_tactic(problem, tactic), problem)


@every_tactic
@pytest.mark.parametrize("rows", [0, 1, 8, 15, 64, 65, 131, 300])
def test_grouped_rows(tactic, rows):
    for grouping, bias, dtype in itertools.product(problems.GROUPINGS, [False, True], DTYPES):
        spec = GroupedSpec(
            rows=rows, grouping=grouping, bias=bias, dtype=dtype, num_experts=5, num_groups=9,
            group_offset=2, out_size=72, in_size=288, seed=rows,
        )  # fmt: skip
        problem = problems.random_grouped(spec_of(spec))
        assert_grouped_right(run_grouped_tactic(problem, tactic), problem)


def test_gradients_are_those_of_the_canonical_weights():
    problem = problem_of(bias=True)
    x, experts, ids, weights = problem.call_args()
    cotangent = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape), jnp.float32)

    def gradient(experts, implementation, compute):
        def loss(x, weights):
            y = jaxmoe.moe_mlp(
                x, experts, ids, weights, compute=compute, implementation=implementation
            )
            return (cotangent * y).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, weights)

    got = gradient(prepared(experts, VARIANT, True), VARIANT, "w4a8")
    for ours, theirs in zip(got, gradient(experts, "xla", "w4a16"), strict=True):
        assert relative_l2(ours, np.asarray(theirs, np.float64)) <= TOLERANCE["bfloat16"]


# --- determinism, poison, streams -----------------------------------------------------------------

BIG = Spec(tokens=150, num_experts=32, top_k=8, hidden_size=256, intermediate_size=96, bias=True)


@every_tactic
@every_half
def test_repetition_gives_the_same_bits(tactic, dtype):
    problem = problem_of(BIG, dtype=dtype)
    first = run_tactic(problem, tactic)
    assert_right(first, problem)
    for seed in range(5):
        run_tactic(problem_of(dtype=dtype, seed=seed), tactic)  # between
        assert_same_bits(first, run_tactic(problem, tactic))


@every_tactic
def test_poisoned_buffers(tactic):
    """Outputs and workspaces that hold NaN before the call leave no trace in the answer."""
    problem = problem_of(BIG, routing="out_of_range")
    clean = run_tactic(problem, tactic)
    for _ in range(3):
        # The same executable on NaN leaves NaN in every buffer that it frees; then bytes 0xFF of
        # many sizes, which are NaN in every floating-point format and -1 in every index.
        run_tactic(dataclasses.replace(problem, x=np.full_like(problem.x, np.nan)), tactic)
        rubbish = [jax.device_put(np.full(2**p, 0xFF, np.uint8)) for p in range(6, 24)]
        jax.block_until_ready(rubbish)
        del rubbish
        assert_same_bits(clean, run_tactic(problem, tactic))


@every_half
def test_layers_in_a_row_may_become_a_cuda_graph(dtype):
    """A chain of calls, run often enough for XLA to record and replay it, with changing inputs."""
    spec = Spec(tokens=33, num_experts=16, top_k=4, hidden_size=256, intermediate_size=96)
    calls = [problem_of(spec, dtype=dtype, seed=s).call_args() for s in range(4)]
    weights = prepared(calls[0][1], VARIANT, True)

    def model(x, ids, w):
        for _ in range(6):  # XLA records sequences of at least five commands by default
            y = jaxmoe.moe_mlp(x, weights, ids, w, compute="w4a8", implementation=VARIANT)
            x = jnp.clip(x + y, -4, 4)
        return x

    inputs = [(x, ids, w) for x, _, ids, w in calls]
    compiled = jax.jit(model).lower(*inputs[0])
    plain = compiled.compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
    fast = compiled.compile(compiler_options={"xla_gpu_graph_min_graph_size": 1})
    want = [np.asarray(plain(*values)) for values in inputs]
    for _ in range(3):
        for values, expected in zip(inputs, want, strict=True):
            assert_same_bits(np.asarray(fast(*values)), expected)


def test_calls_from_many_threads_at_once_give_the_bits_of_one():
    batch = [problem_of(BIG, tokens=20 + 9 * i, seed=i) for i in range(6)]
    want = [run(problem, VARIANT) for problem in batch]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            got = pool.map(functools.partial(run, implementation=VARIANT), batch)
            for ours, expected in zip(got, want, strict=True):
                assert_same_bits(ours, expected)


def test_rebased_blocks_are_multiplied_as_they_were_rounded():
    """One row of each kind: block scales 2^12 ... 2^20 below the largest, and x where they are."""
    spec = GroupedSpec(rows=40, num_experts=2, out_size=64, in_size=256, grouping="even")
    problem = problems.random_grouped(spec_of(spec, dtype="bfloat16"))
    w, x = problem.w, problem.x.copy()
    scale = np.full_like(w.scale, 127)
    scale[..., 4:] = (127 - 12 - np.arange(64) % 9)[:, None]
    x[:, :128] = 0
    w = oracle.Bits("mxfp4", w.data, scale)
    problem = dataclasses.replace(problem, w=w, x=x)
    got = families.run_grouped_tactic(VARIANT, problem, "")
    assert_matches(got, problem.expected("w4a8")[:, None], ROUNDED)
