"""The Hopper tactic that runs a whole MLP of few tokens in one kernel."""

import dataclasses
import functools
import itertools

import families
import numpy as np
import problems
import pytest
from families import DTYPES, obstacle
from problems import GroupedSpec, Spec
from suite import TOLERANCE, assert_exact, assert_matches, assert_same_bits, every_fp4

VARIANT, FUSED = "sm90_w4a16", "fused"
WHY_NOT = obstacle(VARIANT)
run_tactic = functools.partial(families.run_tactic, VARIANT)
run_grouped_tactic = functools.partial(families.run_grouped_tactic, VARIANT)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "runs here")]
every_half = pytest.mark.parametrize("dtype", DTYPES)
replace = dataclasses.replace

FUSED_CASES = [(1, 1), (1, 8), (2, 3), (3, 8), (5, 2), (8, 1), (8, 8), (4, 13)]  # tokens, top_k


@pytest.mark.parametrize(("tokens", "top_k"), FUSED_CASES)
@pytest.mark.parametrize("routing", problems.ROUTINGS)
def test_fused_for_every_routing(routing, tokens, top_k):
    """Shared, repeated, remote and no experts; sizes that fill no block, with and without bias."""
    sizes = [(96, 64, "nvfp4"), (160, 224, "mxfp4"), (96, 32, "nvfp4"), (224, 160, "nvfp4")]
    for index, (hidden, inner, weight_format) in enumerate(sizes):
        spec = Spec(
            tokens=tokens, top_k=top_k, routing=routing, hidden_size=hidden, dtype="bfloat16",
            intermediate_size=inner, weight_format=weight_format, num_experts=13, num_total=20,
            expert_offset=5, bias=index % 2 == 1, seed=index,
        )  # fmt: skip
        problem = problems.exact_problem(spec)
        assert_exact(run_tactic(problem, FUSED), problem.pairs().sum(axis=1))


@every_half
@every_fp4
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
def test_fused_on_random_problems(activation, weight_format, dtype):
    for tokens, top_k in FUSED_CASES:
        spec = Spec(
            tokens=tokens, top_k=top_k, num_experts=64, hidden_size=1056, intermediate_size=544,
            activation_name=activation, weight_format=weight_format, dtype=dtype, bias=True,
        )  # fmt: skip
        problem = problems.random_problem(spec)
        assert_matches(run_tactic(problem, FUSED), problem.pairs(), TOLERANCE[dtype])


def test_fused_on_one_deep_matrix():
    """More rows and blocks of K than a round of all multiprocessors and their rings holds."""
    for hidden, inner in ((96, 9216), (9216, 96), (4096, 2048)):
        spec = Spec(
            tokens=2, top_k=2, num_experts=3, hidden_size=hidden, intermediate_size=inner,
            dtype="bfloat16",
        )  # fmt: skip
        problem = problems.random_problem(spec)
        assert_matches(run_tactic(problem, FUSED), problem.pairs(), TOLERANCE["bfloat16"])


def test_fused_without_a_local_expert_is_zero():
    problem = problems.random_problem(Spec(tokens=5, dtype="bfloat16", bias=True))
    for away in (-(2**31), -1, 8, 2**31 - 1):
        ids = np.full_like(problem.expert_ids, away)
        got = run_tactic(replace(problem, expert_ids=ids), FUSED)
        assert not got.astype(np.float32).any()


@every_half
def test_fused_with_weight_on_input(dtype):
    for tokens, bias in itertools.product((1, 3, 8), (False, True)):
        spec = Spec(tokens=tokens, weight_on_input=True, top_k=1, bias=bias, dtype=dtype)
        problem = problems.random_problem(spec)
        assert_matches(run_tactic(problem, FUSED), problem.pairs(), TOLERANCE[dtype])


def test_fused_keeps_a_nan_in_its_row():
    problem = problems.random_problem(Spec(tokens=8, dtype="bfloat16"))
    clean = run_tactic(problem, FUSED)
    x, weights = problem.x.copy(), problem.weights.copy()
    x[3, 5], weights[6, 1] = np.nan, np.nan
    got = run_tactic(replace(problem, x=x, weights=weights), FUSED)
    assert np.isnan(got[[3, 6]]).all()
    others = np.delete(np.arange(8), [3, 6])
    assert_same_bits(got[others], clean[others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 9, "top_k": 1}, r"at most 8 tokens and 64 pairs .* got 9 tokens with top_k 1;"),
        ({"tokens": 8, "top_k": 9}, r"at most 8 tokens and 64 pairs .* got 8 tokens with top_k 9;"),
        (
            {"tokens": 8, "top_k": 1, "hidden_size": 16384, "intermediate_size": 32},
            r"in shared memory, for which 8 tokens of hidden_size 16384 are too much;",
        ),
    ],
)
def test_fused_refuses_what_it_cannot_hold(change, message):
    problem = problems.random_problem(Spec(num_experts=12, dtype="bfloat16", **change))
    with pytest.raises(Exception, match=message):
        run_tactic(problem, FUSED)


def test_fused_is_no_tactic_of_a_single_product():
    problem = problems.random_grouped(GroupedSpec(dtype="bfloat16"))
    with pytest.raises(Exception, match=r"one of decode, .*, got 'fused'"):
        run_grouped_tactic(problem, FUSED)
