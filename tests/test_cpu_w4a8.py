"""compute="w4a8" on CPUs: every variant against the oracle that rounds rows to 8-bit integers."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from problems import EDGES, GROUPED_EDGES, GroupedSpec, Spec
from suite import (
    DTYPES,
    FORMATS,
    NATIVE,
    assert_exact,
    assert_matches,
    assert_same_bits,
    refusal,
    relative_l2,
    run,
    run_grouped,
)

import jaxmoe
from jaxmoe import kernels, tuning
from jaxmoe.capability import Problem, Target, UnsupportedError, resolve
from jaxmoe.capability.table import TABLE
from jaxmoe.kernels import judge

replace = dataclasses.replace
every_variant = pytest.mark.parametrize("variant", NATIVE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_format = pytest.mark.parametrize("weight_format", FORMATS)

# Of x rounded as the oracle rounds it. The activation is float32 where the oracle has float64, and
# one value in ten thousand falls to the other side of a half: a unit of at most 1/64 of its block.
TOLERANCE = {"float32": 1e-3, "bfloat16": 4e-3}
ROW_TOLERANCE = 2e-2


def require(variant, dtype):
    if why := refusal(variant, dtype):
        pytest.skip(why)


def w4a8(problem, variant):
    return run(problem, variant, compute="w4a8")


def assert_right(problem, variant):
    got = w4a8(problem, variant)
    dtype = problem.x.dtype.name
    assert_matches(got, problem.pairs("int8"), TOLERANCE[dtype], ROW_TOLERANCE)
    return got


# --- the rule -------------------------------------------------------------------------------------


def test_rows_become_integers_by_the_rule():
    x = np.random.default_rng(0).standard_normal((40, 64)) * np.exp2(np.arange(-20, 20))[:, None]
    x[3, 16:32] = 0
    got = oracle.int8_rows(x)
    for row, rounded in zip(x.reshape(-1, 16), got.reshape(-1, 16), strict=True):
        # The least e, by trying them all.
        fits = [e for e in range(-125, 105) if np.abs(np.rint(row / 2.0**e)).max() <= 127]
        np.testing.assert_array_equal(rounded, np.rint(row / 2.0 ** fits[0]) * 2.0 ** fits[0])
        assert np.abs(rounded - row).max() <= np.abs(row).max() / 127
    edge = np.zeros((4, 16))
    edge[:, 1] = 127.5, np.nextafter(127.5, 0), 2.0**-126, 3 * 2.0**-127
    np.testing.assert_array_equal(oracle.int8_rows(edge)[:, 1], [128, 127, 0, 2.0**-125])
    for bad in (np.nan, -np.inf, 127.5 * 2.0**104):
        edge[0, 1] = bad
        assert np.isnan(oracle.int8_rows(edge)[0]).all()


# --- numbers --------------------------------------------------------------------------------------


@every_variant
@every_dtype
@every_format
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_moe_mlp(variant, dtype, weight_format, tokens):
    require(variant, dtype)
    spec = Spec(tokens=tokens, dtype=dtype, weight_format=weight_format, bias=True, seed=tokens)
    assert_right(problems.random_problem(spec), variant)


@every_variant
@every_dtype
@every_format
@pytest.mark.parametrize("tactic", ["integer", "stream", "tiles"])
def test_every_tactic(variant, dtype, weight_format, tactic):
    require(variant, dtype)
    if tactic not in kernels.tactics(variant, "w4a8"):
        pytest.skip(f"{variant} has no tactic {tactic!r}")
    spec = Spec(tokens=70, dtype=dtype, weight_format=weight_format, bias=True, seed=2)
    problem = problems.random_problem(spec)
    with tuning.override(tactic):
        assert_right(problem, variant)


# Each edge takes its turn among variants and dtypes.
@pytest.mark.parametrize(("index", "edge"), list(enumerate(EDGES)))
def test_edges(index, edge):
    able = [(v, d) for v in NATIVE for d in DTYPES if refusal(v, d) is None]
    variant, dtype = able[index % len(able)]
    assert_right(problems.random_problem(replace(EDGES[edge], dtype=dtype, seed=1)), variant)


@pytest.mark.parametrize(("index", "edge"), list(enumerate(GROUPED_EDGES)))
def test_grouped_edges(index, edge):
    able = [(v, d) for v in NATIVE for d in DTYPES if refusal(v, d, "grouped_matmul") is None]
    variant, dtype = able[index % len(able)]
    problem = problems.random_grouped(replace(GROUPED_EDGES[edge], dtype=dtype))
    got = run_grouped(problem, variant, "float32", compute="w4a8")
    # x is rounded exactly as by the oracle, and the sums are float32.
    assert_matches(got, problem.expected("int8")[:, None], 1e-5, 1e-4)


@every_variant
@every_format
def test_integers_and_their_sums_are_exact(variant, weight_format):
    """Values that the integers hold, and sums that float32 holds: every variant has the same."""
    require(variant, "bfloat16")
    problem = problems.exact_grouped(GroupedSpec(weight_format=weight_format, dtype="bfloat16"))
    np.testing.assert_array_equal(oracle.int8_rows(problem.x), problem.x.astype(np.float64))
    assert_exact(run_grouped(problem, variant, compute="w4a8"), problem.expected())


@every_variant
def test_rounding_is_there_and_of_its_size(variant):
    require(variant, "float32")
    problem = problems.random_problem(Spec(tokens=40, hidden_size=256, intermediate_size=256))
    exact = problem.expected()
    error = relative_l2(w4a8(problem, variant), exact)
    assert 5e-3 < error < 2.5e-2
    assert relative_l2(run(problem, variant), exact) < 1e-5


@every_variant
@every_dtype
def test_zero_blocks_and_rows_of_very_different_sizes(variant, dtype):
    require(variant, dtype)
    spec = Spec(tokens=60, activation_name="identity", dtype=dtype)
    problem = problems.random_problem(spec)
    sizes = np.exp2(np.resize([0, -20, 20, -60, 40], 60))[:, None] * (np.arange(60) != 7)[:, None]
    x = problem.x.astype(np.float64) * sizes
    x[:, 16:32] = 0
    problem = replace(problem, x=x.astype(problem.x.dtype))
    got, pairs = w4a8(problem, variant), problem.pairs("int8")
    assert not got[7].astype(np.float32).any()
    for row in range(60):
        assert_matches(got[row : row + 1], pairs[row : row + 1], ROW_TOLERANCE)


@every_variant
@every_dtype
@pytest.mark.parametrize("tokens", [6, 90])
def test_a_nan_or_an_infinity_makes_its_row_nan_and_no_other(variant, dtype, tokens):
    require(variant, dtype)
    problem = problems.random_problem(Spec(tokens=tokens, dtype=dtype))
    clean = w4a8(problem, variant)
    for value in (np.nan, np.inf, -np.inf, 1e37):
        x = problem.x.copy()
        x[3, 5] = value
        got = w4a8(replace(problem, x=x), variant)
        assert np.isnan(got[3].astype(np.float32)).all()
        others = np.delete(np.arange(tokens), 3)
        assert_same_bits(got[others], clean[others])


# --- the same bits --------------------------------------------------------------------------------

# What every variant makes of one problem, as hexadecimal digests.
_DIGESTS = """
import hashlib, sys
sys.path.insert(0, "tests")
import problems
from problems import Spec
from suite import NATIVE, refusal, run
for tokens in (5, 200):
    problem = problems.random_problem(
        Spec(tokens=tokens, hidden_size=256, intermediate_size=256, dtype="bfloat16"))
    for variant in NATIVE:
        if refusal(variant) is None:
            for _ in range(3):
                y = run(problem, variant, compute="w4a8")
                print(variant, hashlib.sha256(y.tobytes()).hexdigest())
"""


def test_same_bits_on_every_run_and_for_every_number_of_threads(request):
    def digests(threads):
        import os

        done = subprocess.run(
            [sys.executable, "-c", _DIGESTS], capture_output=True, text=True, check=True,
            cwd=request.config.rootpath, env={**os.environ, "NPROC": str(threads)},
        )  # fmt: skip
        return done.stdout.split("\n")

    one = digests(1)
    assert len(set(one)) == 2 * len({line.split()[0] for line in one if line}) + 1
    assert digests(3) == one


# --- choice ---------------------------------------------------------------------------------------


def here(**changes):
    fields = {"weight_format": "nvfp4", "hidden_size": 64, "intermediate_size": 64}
    return Problem(**{**fields, "num_experts": 4, "top_k": 2, **changes})


CPU_ROWS = [row for row in TABLE if row.family == "cpu"]
MACHINE = Target(
    "cpu",
    features=frozenset().union(*(row.features for row in CPU_ROWS)),
    built=[row.variant for row in CPU_ROWS],
)


@every_format
@pytest.mark.parametrize("op", ["moe_mlp", "grouped_matmul"])
def test_it_has_to_be_asked_for(weight_format, op):
    asked = resolve(here(weight_format=weight_format, compute="w4a8", op=op), MACHINE)
    assert (asked.selected, asked.compute, asked.degraded_from) == ("cpu_amx", "w4a8", None)
    for declared in (None, "w4a16", "w4a8", "w4a4"):
        problem = here(weight_format=weight_format, declared_compute=declared, op=op)
        for request in (None, "cpu", "cpu_avx2"):
            by_itself = resolve(problem, MACHINE, request)
            assert by_itself.compute == "w4a16"
            assert by_itself.degraded_from == (None if declared in (None, "w4a16") else declared)


def test_what_cannot_be_had_says_what_can():
    with pytest.raises(
        UnsupportedError, match=r"cpu_avx2: COMPUTE_UNSUPPORTED: computes w4a8 or w4a16"
    ):
        resolve(here(compute="w4a4"), MACHINE, "cpu_avx2")
    with pytest.raises(UnsupportedError, match=r"with compute='auto', xla runs it as w4a16"):
        resolve(here(compute="w4a8"), Target("cpu"))


def test_the_arithmetic_is_an_attribute_of_the_call_and_of_the_key():
    problem = problems.random_problem(Spec(dtype="bfloat16"))
    x, experts, ids, weights = problem.call_args()

    def lowered(compute):
        def call(x):
            return jaxmoe.moe_mlp(
                x, experts, ids, weights, compute=compute, implementation="cpu_portable"
            )

        return jax.jit(call).lower(x).as_text()

    assert 'compute = "w4a8"' in lowered("w4a8")
    assert 'compute = "w4a16"' in lowered("auto")


def test_one_preparation_serves_both():
    problem = problems.random_problem(Spec(dtype="bfloat16"))
    x, experts, ids, weights = problem.call_args()
    layouts = {c: jaxmoe.prepare(experts, "cpu_portable", compute=c) for c in ("auto", "w4a8")}
    assert layouts["auto"].layout == layouts["w4a8"].layout == "panel32"
    both = [
        jaxmoe.moe_mlp(x, p, ids, weights, compute="w4a8", implementation="cpu_portable")
        for p in layouts.values()
    ]
    assert_same_bits(*map(np.asarray, both))


def test_the_layer_and_its_gradients():
    from flax import nnx

    from jaxmoe.nn import MoE

    layer = MoE(
        64, 64, 4, 2, weight_format="nvfp4", compute="w4a8", implementation="cpu_portable",
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (9, 64))
    y = layer(x)
    layer.compute = "w4a16"
    exact = layer(x)
    assert 1e-3 < relative_l2(np.asarray(y), np.asarray(exact, np.float64)) < 5e-2
    gradients = []
    for compute in ("w4a8", "w4a16"):
        layer.compute = compute
        gradients.append(jax.grad(lambda x: (layer(x) * jnp.sign(exact)).sum())(x))
    assert_same_bits(*map(np.asarray, gradients))  # as if nothing had been rounded


def test_self_tests_and_the_judge_know_it():
    for row in CPU_ROWS:
        if refusal(row.variant) is not None:
            continue
        assert kernels.FAMILIES["cpu"].self_test(row.variant) == ""
        run_it = kernels.implementation(row.variant)
        for weight_format in FORMATS:
            for compute in ("w4a8", "w4a16"):
                off = judge.error(row, weight_format, judge.TINY, run_it, compute=compute)
                assert off < 4e-3
