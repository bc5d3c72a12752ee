"""Gradients of moe_mlp: the oracle, finite differences, autodiff of a dense layer, vmap."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import problems
import pytest
from jax.test_util import check_grads
from problems import ACTIVATIONS, EDGES, Spec
from suite import (
    NATIVE,
    batch_of_problems,
    every_dtype,
    relative_l2,
    require,
)

import jaxmoe

replace = dataclasses.replace


def split_experts(experts):
    """(biases that gradients go to, function putting them back)."""
    biases = (experts.gate_up_bias, experts.down_bias)
    return biases, lambda b: replace(experts, gate_up_bias=b[0], down_bias=b[1])


def loss_of(problem, implementation, cotangent):
    """sum(cotangent * moe_mlp) as f(x, weights, biases), and the arguments to differentiate at."""
    x, experts, ids, weights = problem.call_args()
    biases, with_biases = split_experts(experts)

    def loss(x, weights, biases):
        y = jaxmoe.moe_mlp(
            x, with_biases(biases), ids, weights, **problem.call_kwargs(),
            implementation=implementation,
        )  # fmt: skip
        return (jnp.asarray(cotangent) * y.astype(jnp.float32)).sum()

    return loss, (x, weights, biases)


# The backward pass recomputes in the activations' dtype; bfloat16 rounds the cotangent, the
# activation's derivative and the result, one after the other.
GRADIENT_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

GRADIENT_SPECS = {
    **{name: Spec(activation_name=name, params="per_expert", bias=True) for name in ACTIVATIONS},
    "mxfp4": Spec(weight_format="mxfp4", bias=True),
    "bias_less": Spec(),
    "weight_on_input": Spec(weight_on_input=True, top_k=1, bias=True),
    "weight_on_input_out_of_range": Spec(weight_on_input=True, top_k=1, routing="out_of_range"),
    "shard": replace(EDGES["shard"], tokens=31),
    "out_of_range": Spec(routing="out_of_range", top_k=4, bias=True),
    "nothing_in_range": Spec(routing="none", bias=True),
    "duplicates": Spec(routing="duplicates", num_experts=3, top_k=5, bias=True),
    "hot_expert": Spec(routing="single", tokens=70, bias=True),
    "empty_experts": Spec(num_experts=32, routing="sparse", bias=True),
    "default_clamps": Spec(activation_name="swiglu", bias=True),
}


BACKWARD = ("xla", "cpu_portable")
one_native_and_xla = pytest.mark.parametrize("implementation", BACKWARD)

# Every variant's backward pass is the `xla` one, compiled anew: all cases there, one elsewhere.
GRADIENT_CASES = [
    *(("xla", "float32", name) for name in GRADIENT_SPECS),
    *(("xla", "bfloat16", name) for name in ("swiglu", "relu2", "mxfp4", "shard", "hot_expert")),
] + [(native, "bfloat16", "shard") for native in NATIVE]


@pytest.mark.parametrize(("implementation", "dtype", "name"), GRADIENT_CASES)
def test_gradients_agree_with_the_oracle(implementation, dtype, name):
    require(implementation, dtype)
    problem = problems.random_problem(replace(GRADIENT_SPECS[name], dtype=dtype, seed=5))
    cotangent = np.random.default_rng(9).standard_normal(problem.x.shape).astype(np.float32)
    if dtype == "bfloat16":
        cotangent = cotangent.astype(ml_dtypes.bfloat16).astype(np.float32)
    loss, args = loss_of(problem, implementation, cotangent)
    gx, gw, gb = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
    want = problem.gradients(cotangent)
    got = {"x": gx, "weights": gw, "gate_up_bias": gb[0], "down_bias": gb[1]}
    for key, value in got.items():
        if value is None:
            assert not problem.spec.bias
            continue
        assert value.dtype == (dtype if key == "x" else "float32"), key
        assert np.isfinite(np.asarray(value).astype(np.float64)).all(), key
        error = relative_l2(value, want[key])
        assert error <= GRADIENT_TOLERANCE[dtype], f"{key}: relative L2 {error:.2e}"


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("xla", name) for name in ("swiglu", "situ", "gelu", "weight_on_input")]
    + [("cpu_portable", "swiglu")],
)
def test_gradients_agree_with_finite_differences(implementation, name):
    require(implementation, "float32")
    spec = replace(GRADIENT_SPECS[name], tokens=5, hidden_size=32, intermediate_size=32)
    loss, args = loss_of(problems.random_problem(spec), implementation, 1.0)
    check_grads(jax.jit(loss), args, order=1, modes=["rev"], eps=1e-2, atol=3e-2, rtol=3e-2)


def dense_layer(x, gate_up, down, biases, ids, weights):
    """The same layer as dense jnp over all experts, for autodiff to differentiate."""
    f32 = jnp.float32
    hidden = jnp.einsum("th,enh->ten", x.astype(f32), gate_up.astype(f32)) + biases[0]
    gate, up = jnp.split(hidden, 2, axis=-1)
    y = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, down.astype(f32)) + biases[1]
    mask = jax.nn.one_hot(ids, gate_up.shape[0], dtype=f32)  # out of range: a zero row
    return jnp.einsum("teh,tke,tk->th", y, mask, weights)


@every_dtype
@pytest.mark.parametrize("routing", ["uniform", "duplicates", "out_of_range"])
def test_unquantised_gradients_agree_with_autodiff_of_the_dense_layer(dtype, routing):
    """bf16 and f32 matrices are trainable: their gradients too must be autodiff's."""
    spec = Spec(weight_format="bf16", dtype=dtype, routing=routing, top_k=3, bias=True)
    problem = problems.random_problem(spec)
    x, experts, ids, weights = problem.call_args()
    matrices = (experts.gate_up.astype(dtype), experts.down.astype(dtype))
    biases = (experts.gate_up_bias, experts.down_bias)

    def sparse(x, gate_up, down, biases, weights):
        return jaxmoe.moe_mlp(x, jaxmoe.ExpertWeights(gate_up, down, *biases), ids, weights)

    def dense(x, gate_up, down, biases, weights):
        return dense_layer(x, gate_up, down, biases, ids, weights)

    args = (x, *matrices, biases, weights)
    argnums = (0, 1, 2, 3, 4)

    def squared(f):
        return jax.jit(jax.grad(lambda *a: (f(*a).astype(jnp.float32) ** 2).sum(), argnums))

    ours, autodiff = (jax.tree.leaves(squared(f)(*args)) for f in (sparse, dense))
    for got, want in zip(ours, autodiff, strict=True):
        assert got.dtype == want.dtype
        error = relative_l2(got, np.asarray(want).astype(np.float64))
        assert error <= GRADIENT_TOLERANCE[dtype], error


@one_native_and_xla
def test_quantised_gradients_agree_with_autodiff_of_the_dense_layer(implementation):
    require(implementation, "float32")
    problem = problems.random_problem(Spec(routing="duplicates", top_k=3, bias=True))
    x, experts, ids, weights = problem.call_args()
    gate_up, down = jnp.float32(problem.gate_up.decode()), jnp.float32(problem.down.decode())
    biases, with_biases = split_experts(experts)

    def ours(x, biases, weights):
        y = jaxmoe.moe_mlp(x, with_biases(biases), ids, weights, implementation=implementation)
        return (y**2).sum()

    def dense(x, biases, weights):
        return (dense_layer(x, gate_up, down, biases, ids, weights) ** 2).sum()

    got = jax.jit(jax.grad(ours, (0, 1, 2)))(x, biases, weights)
    want = jax.jit(jax.grad(dense, (0, 1, 2)))(x, biases, weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_l2(a, np.asarray(b).astype(np.float64)) <= 2e-5


@one_native_and_xla
def test_gradient_with_no_tokens(implementation):
    require(implementation)
    problem = problems.random_problem(Spec(tokens=0, bias=True, dtype="bfloat16"))
    loss, args = loss_of(problem, implementation, 1.0)
    gx, gw, gb = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
    assert gx.shape == (0, 96)
    assert gw.shape == (0, 2)
    assert not np.asarray(gb[0]).any()
    assert not np.asarray(gb[1]).any()


@one_native_and_xla
@pytest.mark.parametrize("bias", [False, True])
def test_nested_vmap_of_grad(implementation, bias):
    """vmap(vmap(grad)) equals grad in a loop, with biases (summed over tokens) and without."""
    require(implementation, "float32")
    spec = Spec(tokens=5, bias=bias, top_k=3)
    _, (x, experts, ids, weights) = batch_of_problems(spec, 6)
    first = jax.tree.map(lambda leaf: leaf[0], experts)
    biases, with_biases = split_experts(first)
    x, ids, weights = (a.reshape(2, 3, *a.shape[1:]) for a in (x, ids, weights))

    def loss(x, weights, biases, ids):
        y = jaxmoe.moe_mlp(x, with_biases(biases), ids, weights, implementation=implementation)
        return (y**2).sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    axes = (0, 0, None, 0)
    got = jax.jit(jax.vmap(jax.vmap(grad, axes), axes))(x, weights, biases, ids)
    for i, j in itertools.product(range(2), range(3)):
        want = grad(x[i, j], weights[i, j], biases, ids[i, j])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert relative_l2(a[i, j], np.asarray(b).astype(np.float64)) <= 2e-6


@one_native_and_xla
def test_vmap_of_grad_over_experts(implementation):
    require(implementation, "float32")
    _, (x, experts, ids, weights) = batch_of_problems(Spec(tokens=5, bias=True), 3)

    def loss(x, experts, ids, weights):
        return (jaxmoe.moe_mlp(x, experts, ids, weights, implementation=implementation) ** 2).sum()

    got = jax.jit(jax.vmap(jax.grad(loss)))(x, experts, ids, weights)
    alone = jax.jit(jax.grad(loss))
    for b in range(3):
        want = alone(*jax.tree.map(lambda leaf: leaf[b], (x, experts, ids, weights)))  # noqa: B023
        assert relative_l2(got[b], np.asarray(want).astype(np.float64)) <= 2e-6


@one_native_and_xla
def test_grad_of_vmap_equals_grad_of_the_flat_call(implementation):
    require(implementation, "float32")
    problem = problems.random_problem(Spec(tokens=12, bias=True))
    x, experts, ids, weights = problem.call_args()
    biases, with_biases = split_experts(experts)

    def flat(x, biases):
        y = jaxmoe.moe_mlp(x, with_biases(biases), ids, weights, implementation=implementation)
        return (y**2).sum()

    def folded(x, biases):
        call = functools.partial(jaxmoe.moe_mlp, implementation=implementation)
        fold = [a.reshape(3, 4, -1) for a in (x, ids, weights)]
        y = jax.vmap(call, (0, None, 0, 0))(fold[0], with_biases(biases), *fold[1:])
        return (y**2).sum()

    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.grad(folded, (0, 1)))(x, biases)),
        jax.tree.leaves(jax.jit(jax.grad(flat, (0, 1)))(x, biases)),
        strict=True,
    ):
        assert relative_l2(a, np.asarray(b).astype(np.float64)) <= 2e-6


@one_native_and_xla
def test_remat_gives_the_same_gradient(implementation):
    require(implementation)
    problem = problems.random_problem(Spec(dtype="bfloat16", bias=True))
    loss, args = loss_of(problem, implementation, 1.0)
    want = jax.jit(jax.grad(loss))(*args)
    got = jax.jit(jax.grad(jax.checkpoint(loss)))(*args)
    assert relative_l2(got, np.asarray(want).astype(np.float64)) <= 1e-6


def test_gradient_of_clamped_infinity_is_finite():
    """limit=inf has no 0 * inf in value or gradient, also where gate and up are huge."""
    problem = problems.random_problem(Spec(bias=True))
    big = replace(problem, gate_up_bias=1e4 * problem.gate_up_bias)
    loss, args = loss_of(big, None, 1e-6)
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)
    for leaf in jax.tree.leaves((value, grads)):
        assert jnp.isfinite(leaf).all()
