"""moe_mlp under jit, scan and vmap; offsets, prepared weights and expert parallelism."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from problems import EDGES, Spec
from suite import (
    NATIVE,
    TOLERANCE,
    assert_matches,
    assert_same_bits,
    batch_of_problems,
    compiled,
    every_dtype,
    every_fp4,
    every_implementation,
    relative_l2,
    require,
    run,
    widest_dtype,
)

import jaxmoe

replace = dataclasses.replace


# --- jit, offsets, prepared weights ---------------------------------------------------------------


@every_implementation
@every_dtype
def test_eager_and_jit_agree(implementation, dtype):
    require(implementation, dtype)
    problem = problems.random_problem(Spec(dtype=dtype, bias=True, params="per_expert"))
    eager = jaxmoe.moe_mlp(
        *problem.call_args(), **problem.call_kwargs(), implementation=implementation
    )
    jitted = run(problem, implementation)
    if implementation in NATIVE:
        assert_same_bits(np.asarray(eager), jitted)
    else:  # XLA fuses differently
        assert relative_l2(jitted, np.asarray(eager).astype(np.float64)) <= TOLERANCE[dtype] / 2


@every_implementation
def test_auto_takes_what_a_name_would(implementation):
    require(implementation)
    problem = problems.random_problem(Spec(dtype="bfloat16"))
    want = run(problem, implementation)
    assert_same_bits(want, run(problem, ("no_such_thing_here",) and (implementation, "xla")))
    with jaxmoe.override(implementation=implementation):
        x, experts, ids, weights = problem.call_args()
        assert_same_bits(want, np.asarray(jax.jit(jaxmoe.moe_mlp)(x, experts, ids, weights)))


@every_implementation
def test_static_offset_and_parameters_equal_traced_ones(implementation):
    """`run` passes both as arrays; here they are Python numbers, constants of the compilation."""
    require(implementation)
    spec = replace(EDGES["shard"], dtype="bfloat16", params="per_expert")
    problem = problems.random_problem(spec)
    call = functools.partial(jaxmoe.moe_mlp, **problem.call_kwargs(), implementation=implementation)
    assert_same_bits(np.asarray(jax.jit(call)(*problem.call_args())), run(problem, implementation))


@every_implementation
@every_fp4
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_prepared_weights_give_the_same_bits(implementation, weight_format, activation):
    require(implementation)
    spec = Spec(
        weight_format=weight_format, dtype="bfloat16", activation_name=activation, bias=True,
        hidden_size=160, intermediate_size=96,
    )  # fmt: skip
    problem = problems.random_problem(spec)
    x, experts, ids, weights = problem.call_args()
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(experts)]
    prepared = jaxmoe.prepare(experts, implementation, gated=spec.gated)
    for old, leaf in zip(before, jax.tree.leaves(experts), strict=True):
        assert_same_bits(old, np.asarray(leaf))
    want = run(problem, implementation, experts)
    assert_same_bits(want, run(problem, implementation, prepared))
    assert_same_bits(want, run(problem, implementation))  # and so does prepare under jit
    if (weight_format, activation) != ("nvfp4", "swiglu"):
        return  # the backward pass takes long to compile

    def loss(x, experts):
        call = compiled(activation, False, implementation)
        return call(x, experts, ids, weights, 0, ()).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss))
    canonical, other = (gradient(x, w) for w in (experts, prepared))
    assert_same_bits(np.asarray(canonical), np.asarray(other))


@every_implementation
def test_scan_over_stacked_layers(implementation):
    require(implementation)
    spec = Spec(dtype=widest_dtype(implementation))
    layers = [problems.random_problem(replace(spec, seed=s)) for s in range(3)]
    x = jnp.asarray(layers[0].x)
    args = [p.call_args()[1:] for p in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *args)

    def step(x, layer):
        return jaxmoe.moe_mlp(x, *layer, implementation=implementation), None

    got, _ = jax.jit(lambda x, s: jax.lax.scan(step, x, s))(x, stacked)
    want = x
    for layer in args:
        want = compiled("swiglu", False, implementation)(want, *layer, 0, ())
    assert relative_l2(got, np.asarray(want).astype(np.float64)) <= 1e-6


@every_implementation
def test_works_with_64_bit_types_enabled(implementation):
    require(implementation)
    problem = problems.random_problem(Spec(dtype="bfloat16", bias=True))
    want = run(problem, implementation)
    with jax.enable_x64(True):
        y = jax.jit(functools.partial(jaxmoe.moe_mlp, implementation=implementation))(
            *problem.call_args()
        )
    assert_same_bits(want, np.asarray(y))


# --- expert parallelism ---------------------------------------------------------------------------


def shards(problem, count):
    """The problem cut into `count` contiguous shards of experts, as Problems."""
    size = problem.spec.num_experts // count

    def cut(leaf, s):
        return None if leaf is None else leaf[s * size : (s + 1) * size]

    def cut_bits(w, s):
        return oracle.Bits(w.format, cut(w.data, s), cut(w.scale, s), cut(w.global_scale, s))

    for s in range(count):
        yield replace(
            problem,
            spec=replace(problem.spec, num_experts=size, expert_offset=s * size),
            gate_up=cut_bits(problem.gate_up, s),
            down=cut_bits(problem.down, s),
            gate_up_bias=cut(problem.gate_up_bias, s),
            down_bias=cut(problem.down_bias, s),
            params=tuple(p if np.ndim(p) == 0 else cut(p, s) for p in problem.params),
        )


@every_implementation
@every_fp4
@pytest.mark.parametrize("count", [2, 4, 8])
def test_every_shard_summed_is_the_whole(implementation, weight_format, count):
    dtype = widest_dtype(implementation)
    spec = Spec(
        tokens=29, num_experts=8, top_k=3, bias=True, params="per_expert", dtype=dtype,
        weight_format=weight_format,
    )  # fmt: skip
    exact = problems.exact_problem(spec)
    parts = [run(p, implementation).astype(np.float64) for p in shards(exact, count)]
    if dtype == "float32":
        np.testing.assert_array_equal(sum(parts), exact.expected())
    problem = problems.random_problem(spec)
    parts = [run(p, implementation).astype(np.float64) for p in shards(problem, count)]
    assert_matches(sum(parts), problem.pairs(), TOLERANCE[dtype])


# --- vmap -----------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize(
    "axes",
    [
        (0, None, 0, 0),
        (0, None, None, None),
        (None, None, 0, 0),
        (None, None, None, 0),
        (None, 0, None, None),
        (0, 0, 0, 0),
        (0, 0, None, 0),
    ],
    ids=lambda axes: "".join("b" if a == 0 else "-" for a in axes),
)
def test_vmap(implementation, axes):
    dtype = widest_dtype(implementation)
    spec = Spec(tokens=7, dtype=dtype, bias=True, top_k=3)
    _, stacked = batch_of_problems(spec, 3)
    args = tuple(
        s if axis == 0 else jax.tree.map(lambda leaf: leaf[0], s)
        for s, axis in zip(stacked, axes, strict=True)
    )
    call = functools.partial(jaxmoe.moe_mlp, implementation=implementation)
    got = jax.jit(jax.vmap(call, in_axes=axes))(*args)
    for b in range(3):
        one = tuple(
            jax.tree.map(lambda leaf: leaf[b], a) if axis == 0 else a  # noqa: B023
            for a, axis in zip(args, axes, strict=True)
        )
        want = compiled("swiglu", False, implementation)(*one, 0, ())
        tolerance = 1e-6 if dtype == "float32" else TOLERANCE[dtype]
        assert relative_l2(got[b], np.asarray(want).astype(np.float64)) <= tolerance


@every_implementation
def test_vmap_over_another_axis_and_out_axis(implementation):
    require(implementation)
    _, (x, experts, ids, weights) = batch_of_problems(Spec(tokens=5, dtype="bfloat16"), 4)
    call = functools.partial(jaxmoe.moe_mlp, implementation=implementation)
    first = jax.tree.map(lambda leaf: leaf[0], experts)
    want = jax.vmap(call, in_axes=(0, None, 0, 0))(x, first, ids, weights)
    got = jax.vmap(call, in_axes=(1, None, 1, 2), out_axes=1)(
        x.swapaxes(0, 1), first, ids.swapaxes(0, 1), jnp.moveaxis(weights, 0, 2)
    )
    assert_same_bits(np.asarray(want), np.asarray(got.swapaxes(0, 1)))


@every_implementation
def test_vmap_over_offsets_gives_every_shard(implementation):
    dtype = widest_dtype(implementation)
    problem = problems.random_problem(Spec(tokens=9, dtype=dtype, top_k=4))
    x, experts, ids, weights = problem.call_args()
    sharded = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), experts)

    def shard(experts, offset):
        return jaxmoe.moe_mlp(
            x, experts, ids, weights, expert_offset=offset, implementation=implementation
        )

    parts = jax.jit(jax.vmap(shard))(sharded, jnp.arange(0, 8, 2))
    assert_matches(np.asarray(parts).astype(np.float64).sum(0), problem.pairs(), TOLERANCE[dtype])


@every_implementation
def test_nested_vmap_with_an_empty_batch_of_tokens(implementation):
    require(implementation)
    _, (x, experts, ids, weights) = batch_of_problems(Spec(tokens=0, dtype="bfloat16"), 3)
    first = jax.tree.map(lambda leaf: leaf[0], experts)
    call = functools.partial(jaxmoe.moe_mlp, implementation=implementation)
    assert jax.vmap(call, in_axes=(0, None, 0, 0))(x, first, ids, weights).shape == (3, 0, 96)
