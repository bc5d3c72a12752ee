"""W4A16 on a GPU, by each family: the shared problems, every tactic, every tile edge."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from families import (
    DTYPES,
    EDGE_TOKENS,
    family,
    marked,
    obstacle,
    run_grouped_tactic,
    run_tactic,
    tactics,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import ACTIVATIONS, EDGES, GROUPED_EDGES, GroupedSpec, Spec
from suite import (
    FORMATS,
    TOLERANCE,
    assert_exact,
    assert_matches,
    assert_same_bits,
    every_fp4,
    prepared,
    relative_l2,
    run,
    run_grouped,
)

import jaxmoe

VARIANTS = ("sm90_w4a16", "sm80_w4a16")
FUSED = "fused"  # the whole MLP in one kernel, for few tokens
FUSED_TOKENS, FUSED_PAIRS = 8, 64

pytestmark = pytest.mark.gpu
every_half = pytest.mark.parametrize("dtype", DTYPES)
every_variant = pytest.mark.parametrize("variant", [marked(v) for v in VARIANTS])
every_tactic = pytest.mark.parametrize(
    ("variant", "tactic"), [marked(v, t) for v in VARIANTS for t in tactics(v)]
)
every_grouped_tactic = pytest.mark.parametrize(
    ("variant", "tactic"), [marked(v, t) for v in VARIANTS for t in tactics(v) if t != FUSED]
)
replace = dataclasses.replace


def fit(spec, tactic):
    """The spec with as many of its tokens as the tactic takes."""
    if tactic != FUSED:
        return spec
    return replace(spec, tokens=min(spec.tokens, FUSED_TOKENS, FUSED_PAIRS // spec.top_k))


def expected(problem, variant, tactic=""):
    """The exact answer.

    All tactics but `fused`, which is the usual one of Hopper for a token, round each pair's result
    to x's dtype before it is weighted. The weights of an exact problem are powers of two: rounding
    commutes with them.
    """
    pairs = problem.pairs()
    usual = FUSED if problem.spec.tokens == 1 and FUSED in tactics(variant) else ""
    if (tactic or usual) != FUSED:
        pairs = pairs.astype(np.float32).astype(problem.x.dtype).astype(np.float64)
    return pairs.sum(axis=1)


# --- the choice -----------------------------------------------------------------------------------


@every_variant
def test_it_is_selected_and_passes_its_self_test(variant):
    assert family(variant).self_test(variant) == ""
    problem = jaxmoe.Problem(
        weight_format="nvfp4", hidden_size=96, intermediate_size=64, num_experts=4, top_k=2
    )
    first = next(v for v in VARIANTS if not obstacle(v))
    assert jaxmoe.explain(problem).selected == first
    with jaxmoe.override(implementation=variant):
        assert jaxmoe.explain(problem).selected == variant
    with jaxmoe.override(implementation="xla"):
        assert jaxmoe.explain(problem).selected == "xla"


@every_variant
def test_an_unknown_tactic_is_refused_by_name(variant):
    problem = problems.random_problem(Spec(dtype="bfloat16"))
    with pytest.raises(Exception, match=r"tactic must be '' or one of .*, got 'fastest'"):
        run_tactic(variant, problem, "fastest")


@every_variant
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": np.int64(100)}, r"hidden_size must be a positive multiple of 16"),
        ({"format": "fp5"}, r"format must be one of nvfp4, mxfp4, got 'fp5'"),
        ({"activation": "mish"}, r"activation must be one of swiglu"),
        ({"variant": "sm90_w4a4"}, r"variant must be one of sm[89]0_w4a16.*, got 'sm90_w4a4'"),
        ({"workspace": 1}, r"workspace must have at least \d+ bytes, got u8\[1\]"),
        ({"x": np.zeros((17, 96), np.float32)}, r"x must be bf16\|f16\[\*,96\], got f32\[17,96\]"),
        ({"down_global": np.ones(3, np.float32)}, r"down_global must be f32\[8\], got f32\[3\]"),
        ({"expert_offset": np.ones(1, np.int32)}, r"expert_offset must be i32\[\], got i32\[1\]"),
    ],
)
def test_a_wrong_call_is_refused_with_the_argument(variant, change, message):
    problem = problems.random_problem(Spec(dtype="bfloat16"))
    values, attrs = families.raw_call(variant, "nvfp4", problem)
    size = change.get("workspace", 1 << 22)
    for name, value in change.items():
        (values if name in values else attrs)[name] = value
    attrs.pop("workspace", None)
    families.assert_refused(variant, values, attrs, message, size)


# --- against the oracle ---------------------------------------------------------------------------


@every_variant
@every_half
@every_fp4
@pytest.mark.parametrize("edge", EDGES)
def test_edges(variant, edge, weight_format, dtype):
    if dtype == "float16" and EDGES[edge].scales in ("huge", "tiny"):
        pytest.skip("values between the products leave float16's range")
    problem = problems.random_problem(
        replace(EDGES[edge], weight_format=weight_format, dtype=dtype, seed=1)
    )
    assert_matches(run(problem, variant), problem.pairs(), TOLERANCE[dtype])


@every_tactic
@every_fp4
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exact_grid_bit_for_bit(variant, tactic, weight_format, activation):
    for seed, bias, params in itertools.product([0, 1], [False, True], ["default", "per_expert"]):
        if params == "per_expert" and activation not in problems.PARAMETRIC:
            continue
        spec = Spec(
            weight_format=weight_format, dtype="bfloat16", activation_name=activation, bias=bias,
            params=params, seed=seed, top_k=3, num_experts=9, num_total=12, expert_offset=2,
        )  # fmt: skip
        problem = problems.exact_problem(fit(spec, tactic))
        assert_exact(run_tactic(variant, problem, tactic), expected(problem, variant, tactic))


@every_tactic
@pytest.mark.parametrize("routing", problems.ROUTINGS)
def test_exact_grid_for_every_routing(variant, tactic, routing):
    for tokens, (num_experts, top_k) in itertools.product((3, 31, 130), ((4, 1), (5, 4))):
        spec = Spec(
            tokens=tokens, num_experts=num_experts, top_k=top_k, routing=routing, dtype="bfloat16",
            intermediate_size=96, seed=tokens,
        )  # fmt: skip
        problem = problems.exact_problem(fit(spec, tactic))
        assert_exact(run_tactic(variant, problem, tactic), expected(problem, variant, tactic))


@every_tactic
@pytest.mark.parametrize("tokens", EDGE_TOKENS)
def test_tile_edges(variant, tactic, tokens):
    """All tokens to one expert, so that its rows end where the tile does, one before, one after."""
    if tactic == FUSED and tokens > FUSED_TOKENS:
        pytest.skip("more tokens than the tactic takes")
    for weight_format, (hidden, inner) in zip(FORMATS, ((96, 160), (224, 32)), strict=True):
        spec = Spec(
            tokens=tokens, num_experts=3, top_k=1, routing="single", dtype="bfloat16",
            weight_format=weight_format, hidden_size=hidden, intermediate_size=inner, seed=tokens,
        )  # fmt: skip
        problem = problems.exact_problem(spec)
        assert_exact(run_tactic(variant, problem, tactic), expected(problem, variant, tactic))


@every_tactic
@every_half
@every_fp4
def test_every_tactic_on_random_problems(variant, tactic, weight_format, dtype):
    sizes = [(32, 32), (96, 64), (160, 224), (544, 288), (1056, 96)]
    for index, (hidden, inner) in enumerate(sizes):
        for scales in ("normal", "wide", "zero_blocks"):
            spec = Spec(
                tokens=(1, 33, 131)[index % 3], hidden_size=hidden, intermediate_size=inner,
                weight_format=weight_format, dtype=dtype, scales=scales, seed=index,
                bias=index % 2 == 1, activation_name=("swiglu", "relu2")[index % 2],
            )  # fmt: skip
            problem = problems.random_problem(fit(spec, tactic))
            assert_matches(run_tactic(variant, problem, tactic), problem.pairs(), TOLERANCE[dtype])


@every_variant
@every_half
def test_weight_on_input(variant, dtype):
    for bias, routing in itertools.product([False, True], ["uniform", "out_of_range"]):
        spec = Spec(weight_on_input=True, top_k=1, bias=bias, routing=routing, dtype=dtype)
        problem = problems.random_problem(spec)
        assert_matches(run(problem, variant), problem.pairs(), TOLERANCE[dtype])
        problem = problems.exact_problem(replace(spec, dtype="bfloat16"))
        assert_exact(run(problem, variant), expected(problem, variant))


@every_variant
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_row(variant, activation):
    spec = Spec(activation_name=activation, params="uniform", dtype="bfloat16")
    problem = problems.random_problem(spec)
    clean = run(problem, variant)
    x, weights = problem.x.copy(), problem.weights.copy()
    x[3, 5], weights[6, 1] = np.nan, np.nan
    got = run(replace(problem, x=x, weights=weights), variant)
    assert np.isnan(got[[3, 6]]).all()
    others = np.delete(np.arange(spec.tokens), [3, 6])
    assert_same_bits(got[others], clean[others])


@every_variant
def test_weights_of_ids_out_of_range_are_never_used(variant):
    problem = problems.random_problem(Spec(routing="out_of_range", top_k=4, dtype="bfloat16"))
    outside = (problem.expert_ids < 0) | (problem.expert_ids >= 8)
    weights = np.where(outside, np.float32(np.nan), problem.weights)
    assert_same_bits(run(problem, variant), run(replace(problem, weights=weights), variant))


@every_grouped_tactic
@every_fp4
@pytest.mark.parametrize("edge", GROUPED_EDGES)
def test_grouped_edges(variant, tactic, weight_format, edge):
    for dtype in DTYPES:
        spec = replace(GROUPED_EDGES[edge], weight_format=weight_format, dtype=dtype, seed=1)
        problem = problems.random_grouped(spec)
        got = run_grouped_tactic(variant, problem, tactic)
        assert_matches(got, problem.expected()[:, None], TOLERANCE[dtype])
        local = problem.expected().any(1)
        assert not got[~local].astype(np.float32).any(), "rows without a matrix must be zero"


@every_grouped_tactic
@pytest.mark.parametrize("rows", [0, 1, 8, 15, 64, 65, 131, 300])
def test_grouped_exact_grid(variant, tactic, rows):
    cases = itertools.product(problems.GROUPINGS, [False, True], FORMATS, DTYPES)
    for grouping, bias, weight_format, dtype in cases:
        spec = GroupedSpec(
            rows=rows, grouping=grouping, bias=bias, dtype=dtype, weight_format=weight_format,
            num_experts=5, num_groups=9, group_offset=2, out_size=72, seed=rows,
        )  # fmt: skip
        problem = problems.exact_grouped(spec)
        assert_exact(run_grouped_tactic(variant, problem, tactic), problem.expected())


@every_variant
def test_a_wider_result_falls_to_xla(variant):
    problem = problems.exact_grouped(GroupedSpec(dtype="bfloat16", bias=True))
    with pytest.raises(jaxmoe.UnsupportedError, match="preferred_element_type float32"):
        run_grouped(problem, variant, "float32")
    assert_exact(run_grouped(problem, None, "float32"), problem.expected())


@every_variant
def test_gradients_are_those_of_the_canonical_weights(variant):
    problem = problems.random_problem(Spec(dtype="bfloat16", bias=True))
    x, experts, ids, weights = problem.call_args()
    cotangent = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape), jnp.float32)

    def gradient(experts, implementation):
        def loss(x, weights):
            y = jaxmoe.moe_mlp(x, experts, ids, weights, implementation=implementation)
            return (cotangent * y).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, weights)

    got = gradient(prepared(experts, variant, True), variant)
    for ours, theirs in zip(got, gradient(experts, "xla"), strict=True):
        assert relative_l2(ours, np.asarray(theirs, np.float64)) <= TOLERANCE["bfloat16"]


# --- determinism, poison, streams -----------------------------------------------------------------

BIG = Spec(tokens=150, num_experts=32, top_k=8, hidden_size=256, intermediate_size=96, bias=True)


@every_tactic
@every_half
def test_repetition_gives_the_same_bits(variant, tactic, dtype):
    problem = problems.random_problem(fit(replace(BIG, dtype=dtype), tactic))
    first = run_tactic(variant, problem, tactic)
    for seed in range(5):
        between = fit(Spec(dtype=dtype, seed=seed), tactic)
        run_tactic(variant, problems.random_problem(between), tactic)
        assert_same_bits(first, run_tactic(variant, problem, tactic))


@every_variant
@every_half
def test_a_tokens_answer_does_not_depend_on_its_batch_beyond_rounding(variant, dtype):
    problem = problems.random_problem(replace(BIG, dtype=dtype))
    whole = run(problem, variant)
    for rows in (slice(0, 1), slice(5, 12), slice(20, 100)):
        part = replace(
            problem, x=problem.x[rows], expert_ids=problem.expert_ids[rows],
            weights=problem.weights[rows],
        )  # fmt: skip
        got = run(part, variant)
        assert relative_l2(got, whole[rows].astype(np.float64)) <= TOLERANCE[dtype]


@every_tactic
def test_poisoned_buffers(variant, tactic):
    """Outputs and workspaces that hold NaN before the call leave no trace in the answer."""
    spec = replace(BIG, routing="out_of_range", dtype="bfloat16")
    problem = problems.random_problem(fit(spec, tactic))
    clean = run_tactic(variant, problem, tactic)
    for _ in range(3):
        # The same executable on NaN leaves NaN in every buffer that it frees; then bytes 0xFF of
        # many sizes, which are NaN in every floating-point format and -1 in every index.
        run_tactic(variant, replace(problem, x=np.full_like(problem.x, np.nan)), tactic)
        rubbish = [jax.device_put(np.full(2**p, 0xFF, np.uint8)) for p in range(6, 24)]
        jax.block_until_ready(rubbish)
        del rubbish
        assert_same_bits(clean, run_tactic(variant, problem, tactic))


@every_variant
def test_poisoned_output(variant):
    problem = problems.random_problem(replace(BIG, routing="out_of_range", dtype="bfloat16"))
    clean = run(problem, variant)
    x, experts, ids, weights = problem.call_args()
    experts = prepared(experts, variant, True)

    def with_poison(poison, x, experts, ids, weights):
        y = jaxmoe.moe_mlp(x, experts, ids, weights, implementation=variant)
        return y, jnp.isnan(poison[0, 0])

    poison = jnp.full_like(x, jnp.nan)
    y, was_nan = jax.jit(with_poison, donate_argnums=0)(poison, x, experts, ids, weights)
    assert poison.is_deleted(), "the output was to reuse the NaN-filled buffer"
    assert was_nan
    assert_same_bits(clean, np.asarray(y))


@every_variant
@every_half
def test_layers_in_a_row_may_become_a_cuda_graph(variant, dtype):
    """A chain of calls, run often enough for XLA to record and replay it, with changing inputs."""
    spec = Spec(tokens=33, num_experts=16, top_k=4, hidden_size=256, intermediate_size=96)
    batch = [problems.random_problem(replace(spec, dtype=dtype, seed=s)) for s in range(4)]
    calls = [p.call_args() for p in batch]
    weights = prepared(calls[0][1], variant, True)

    def layer(x, ids, w):
        return jnp.tanh(x + jaxmoe.moe_mlp(x, weights, ids, w, implementation=variant))

    def model(x, ids, w):
        for _ in range(6):  # XLA records sequences of at least five commands by default
            x = layer(x, ids, w)
        return x

    def by_steps(x, ids, w):
        for _ in range(6):
            x = jax.jit(layer)(x, ids, w)
        return x

    inputs = [(x, ids, w) for x, _, ids, w in calls]
    want = [np.asarray(by_steps(*values)) for values in inputs]
    graphs = {"xla_gpu_graph_min_graph_size": 1}
    fast = jax.jit(model).lower(*inputs[0]).compile(compiler_options=graphs)
    for _ in range(3):
        for values, expected in zip(inputs, want, strict=True):
            got = np.asarray(fast(*values)).astype(np.float64)
            assert relative_l2(got, expected.astype(np.float64)) <= TOLERANCE[dtype]
    first = np.asarray(fast(*inputs[0]))
    for _ in range(5):
        assert_same_bits(first, np.asarray(fast(*inputs[0])))


@every_variant
def test_calls_from_many_threads_at_once_give_the_bits_of_one(variant):
    specs = [replace(BIG, dtype="bfloat16", tokens=20 + 9 * i, seed=i) for i in range(6)]
    batch = [problems.random_problem(spec) for spec in specs]
    want = [run(problem, variant) for problem in batch]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            got = pool.map(functools.partial(run, implementation=variant), batch)
            for ours, expected in zip(got, want, strict=True):
                assert_same_bits(ours, expected)


@every_variant
def test_independent_calls_in_one_program(variant):
    """XLA may put the two on streams of their own: their workspaces must not meet."""
    batch = [problems.random_problem(replace(BIG, dtype="bfloat16", seed=s)) for s in range(2)]
    args = [(p.call_args(), prepared(p.call_args()[1], variant, True)) for p in batch]

    def both(args):
        return [
            jaxmoe.moe_mlp(x, experts, ids, weights, implementation=variant)
            for (x, _, ids, weights), experts in args
        ]

    call = jax.jit(both)
    want = [run(problem, variant) for problem in batch]
    for _ in range(20):
        for ours, expected in zip(call(args), want, strict=True):
            assert_same_bits(np.asarray(ours), expected)


@every_tactic
def test_many_experts_beside_few_from_two_threads(variant, tactic):
    """They share kernels and the limits set on them, not tables: 1024 experts' need more memory."""
    spec = replace(BIG, dtype="bfloat16", hidden_size=96, intermediate_size=64, top_k=2)
    batch = [
        problems.random_problem(fit(replace(spec, num_experts=n, num_total=n), tactic))
        for n in (1024, 8)
    ]
    want = [run_tactic(variant, problem, tactic) for problem in batch]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            got = pool.map(lambda problem: run_tactic(variant, problem, tactic), batch)
            for ours, expected in zip(got, want, strict=True):
                assert_same_bits(ours, expected)


@every_variant
@pytest.mark.parametrize("tokens", [1, 33, 2000])
def test_the_first_call_of_a_process_may_be_recorded(tokens, variant):
    """Nothing that a kernel needs at its first launch is forbidden while a graph is recorded."""
    script = f"""
import jax, numpy as np, problems, dataclasses, jaxmoe
from suite import prepared
spec = problems.Spec(tokens={tokens}, num_experts=16, top_k=4, hidden_size=256,
                     intermediate_size=96, dtype="bfloat16", weight_format="mxfp4")
x, experts, ids, weights = problems.random_problem(spec).call_args()
experts = prepared(experts, "{variant}", True)
def model(x, ids, w):
    for _ in range(6):
        x = jax.numpy.tanh(x + jaxmoe.moe_mlp(x, experts, ids, w, implementation="{variant}"))
    return x
lowered = jax.jit(model).lower(x, ids, weights)
compiled = [lowered.compile(compiler_options=o) for o in (
    {{"xla_gpu_graph_min_graph_size": 1}}, {{"xla_gpu_enable_command_buffer": ""}})]
recorded, plain = (np.asarray(f(x, ids, weights)).view(np.uint16) for f in compiled)
assert (recorded == plain).all()
"""
    folders = [str(Path(__file__).parent.parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def two_devices():
    """The first two GPUs; skips where there is one."""
    devices = jax.local_devices(backend="cuda")[:2]
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    return devices


@every_variant
def test_two_devices_at_once(variant):
    devices = two_devices()
    batch = [
        problems.random_problem(replace(BIG, dtype="bfloat16", tokens=tokens, seed=tokens))
        for tokens in (1, 20, 150, 700)
    ]
    want = [run(problem, variant) for problem in batch]

    def on(device, problem):
        with jax.default_device(device):
            return run(problem, variant)

    pairs = list(itertools.product(devices, range(len(batch))))
    with concurrent.futures.ThreadPoolExecutor(len(pairs)) as pool:
        for _ in range(10):
            got = pool.map(lambda pair: on(pair[0], batch[pair[1]]), pairs)
            for (_, index), ours in zip(pairs, got, strict=True):
                assert_same_bits(ours, want[index])


@every_variant
def test_experts_spread_over_two_devices(variant):
    """Each device has half of the experts; the sum over the devices is the whole layer."""
    problem = problems.random_problem(replace(BIG, dtype="bfloat16"))
    x, experts, ids, weights = problem.call_args()
    packed = prepared(experts, variant, True)
    mesh = Mesh(np.asarray(two_devices()), ("experts",))
    packed = jax.device_put(packed, NamedSharding(mesh, P("experts")))

    def shard(x, packed, ids, weights):
        first = jax.lax.axis_index("experts") * (BIG.num_experts // 2)
        y = jaxmoe.moe_mlp(x, packed, ids, weights, expert_offset=first, implementation=variant)
        return jax.lax.psum(y.astype(jnp.float32), "experts")

    whole = jax.jit(
        jax.shard_map(
            shard, mesh=mesh, in_specs=(P(), P("experts"), P(), P()), out_specs=P(), check_vma=False
        )
    )
    got = np.asarray(whole(x, packed, ids, weights))
    assert_matches(got, problem.pairs(), TOLERANCE["bfloat16"])
