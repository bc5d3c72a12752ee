"""grouped_matmul: every implementation against the oracle, its gradients and its batching."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from problems import GROUPED_EDGES, GroupedSpec
from suite import (
    TOLERANCE,
    assert_exact,
    assert_matches,
    assert_same_bits,
    compiled_grouped,
    every_dtype,
    every_fp4,
    every_implementation,
    relative_l2,
    require,
    run_grouped,
)

import jaxmoe

replace = dataclasses.replace


@every_implementation
@pytest.mark.parametrize(("weight_format", "dtype"), [("nvfp4", "float32"), ("mxfp4", "bfloat16")])
@pytest.mark.parametrize("edge", GROUPED_EDGES)
def test_grouped_edges(implementation, weight_format, dtype, edge):
    require(implementation, dtype, "grouped_matmul")
    spec = replace(GROUPED_EDGES[edge], weight_format=weight_format, dtype=dtype, seed=1)
    problem = problems.random_grouped(spec)
    got = run_grouped(problem, implementation)
    assert_matches(got, problem.expected()[:, None], TOLERANCE[dtype])
    local = problem.expected().any(1)
    assert not got[~local].astype(np.float32).any(), "rows without a matrix must be zero"


@every_implementation
@every_dtype
@every_fp4
@pytest.mark.parametrize("rows", [0, 1, 15, 64, 131])
def test_grouped_exact_grid(implementation, dtype, weight_format, rows):
    require(implementation, dtype, "grouped_matmul")
    for grouping, bias in itertools.product(problems.GROUPINGS, [False, True]):
        spec = GroupedSpec(
            rows=rows, grouping=grouping, bias=bias, dtype=dtype, weight_format=weight_format,
            num_experts=5, num_groups=9, group_offset=2, seed=rows,
        )  # fmt: skip
        problem = problems.exact_grouped(spec)
        assert_exact(run_grouped(problem, implementation), problem.expected())


@every_implementation
@pytest.mark.parametrize(("dtype", "preferred"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_grouped_preferred_element_type(implementation, dtype, preferred):
    require(implementation, dtype, "grouped_matmul")
    problem = problems.exact_grouped(GroupedSpec(dtype=dtype, bias=True))
    assert_exact(run_grouped(problem, implementation, preferred), problem.expected())


@every_implementation
def test_grouped_shards_cover_the_whole(implementation):
    require(implementation, op="grouped_matmul")
    spec = GroupedSpec(num_experts=8, rows=53, dtype="bfloat16", bias=True)
    problem = problems.random_grouped(spec)
    whole = run_grouped(problem, implementation)
    x, w, sizes = problem.call_args()
    bias = problem.call_kwargs()["bias"]
    call = compiled_grouped(implementation)
    parts = [
        np.asarray(call(x, w[lo : lo + 4], sizes, bias[lo : lo + 4], None, jnp.int32(lo)))
        for lo in (0, 4)
    ]
    alone = np.where(parts[0].astype(np.float32) != 0, parts[0], parts[1])
    assert_same_bits(alone + np.zeros_like(alone), whole + np.zeros_like(whole))


@every_implementation
@pytest.mark.parametrize("edge", ["default", "offset_last", "rows_past_the_sum", "no_rows"])
def test_grouped_gradients(implementation, edge):
    require(implementation, "float32", "grouped_matmul")
    spec = replace(GROUPED_EDGES[edge], bias=True)
    problem = problems.random_grouped(spec)
    x, w, sizes = problem.call_args()
    kwargs = problem.call_kwargs()
    rng = np.random.default_rng(3)
    cotangent = rng.standard_normal((spec.rows, spec.out_size)).astype(np.float32)

    def loss(x, bias):
        y = jaxmoe.grouped_matmul(
            x, w, sizes, bias=bias, group_offset=kwargs["group_offset"],
            implementation=implementation,
        )  # fmt: skip
        return (cotangent * y).sum()

    gx, gb = jax.jit(jax.grad(loss, (0, 1)))(x, kwargs["bias"])
    want = oracle.grouped_matmul_gradients(
        cotangent, problem.x, problem.w, problem.group_sizes, group_offset=spec.group_offset or 0
    )
    assert relative_l2(gx, want["x"]) <= 1e-5
    assert relative_l2(gb, want["bias"]) <= 1e-5


def test_grouped_gradient_of_a_plain_matrix():
    problem = problems.random_grouped(GroupedSpec(weight_format="bf16", grouping="short"))
    x, w, sizes = problem.call_args()
    w = w.astype(jnp.float32)
    cotangent = np.random.default_rng(3).standard_normal((37, 64)).astype(np.float32)
    grad = jax.grad(lambda w: (cotangent * jaxmoe.grouped_matmul(x, w, sizes)).sum())(w)
    want = oracle.grouped_matmul_gradients(cotangent, problem.x, problem.w, problem.group_sizes)
    assert relative_l2(grad, want["w"]) <= 1e-5


@every_implementation
@pytest.mark.parametrize("axes", [(0, None, 0), (0, 0, None), (None, 0, 0)], ids=str)
def test_grouped_vmap(implementation, axes):
    require(implementation, op="grouped_matmul")
    batch = [problems.random_grouped(GroupedSpec(dtype="bfloat16", seed=s)) for s in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p.call_args() for p in batch])
    args = [
        s if axis == 0 else jax.tree.map(lambda leaf: leaf[0], s)
        for s, axis in zip(stacked, axes, strict=True)
    ]
    call = functools.partial(jaxmoe.grouped_matmul, implementation=implementation)
    got = jax.jit(jax.vmap(call, in_axes=axes))(*args)
    for b in range(3):
        one = [
            jax.tree.map(lambda leaf: leaf[b], a) if axis == 0 else a  # noqa: B023
            for a, axis in zip(args, axes, strict=True)
        ]
        want = np.asarray(jax.jit(call)(*one)).astype(np.float64)
        assert relative_l2(got[b], want) <= TOLERANCE["bfloat16"] / 10


@every_implementation
@every_fp4
def test_grouped_prepared_weights_give_the_same_bits(implementation, weight_format):
    require(implementation, op="grouped_matmul")
    problem = problems.random_grouped(GroupedSpec(dtype="bfloat16", weight_format=weight_format))
    x, w, sizes = problem.call_args()
    prepared = jaxmoe.prepare(w, implementation)
    y = compiled_grouped(implementation)(x, prepared, sizes, None, None, None)
    assert_same_bits(np.asarray(y), run_grouped(problem, implementation))


def test_grouped_matmul_is_ragged_dot_on_the_decoded_weights():
    problem = problems.exact_grouped(GroupedSpec(grouping="short"))
    x, w, sizes = problem.call_args()
    rhs = jnp.float32(problem.w.decode()).swapaxes(1, 2)
    want = jax.lax.ragged_dot(x, rhs, sizes)
    np.testing.assert_array_equal(jaxmoe.grouped_matmul(x, w, sizes), want)
