"""Bad input is answered with a message that names the argument, what was required, what came."""

import dataclasses

import jax
import jax.numpy as jnp
import problems
import pytest
from problems import GroupedSpec, Spec
from suite import (
    require,
)

import jaxmoe

replace = dataclasses.replace


def good():
    """Arguments that work, to be spoiled one at a time."""
    problem = problems.random_problem(Spec(bias=True))
    x, experts, ids, weights = problem.call_args()
    return {"x": x, "experts": experts, "expert_ids": ids, "weights": weights}


def change(name, function):
    """Spoils one argument."""
    return lambda arguments: {name: function(arguments[name])}


def change_experts(field, function):
    """Spoils one field of the experts."""
    return change("experts", lambda e: replace(e, **{field: function(getattr(e, field))}))


def change_matrix(matrix, field, function):
    """Spoils one field of `gate_up` or `down`."""
    return change_experts(matrix, lambda w: replace(w, **{field: function(getattr(w, field))}))


def give(**arguments):
    """Adds or replaces arguments."""
    return lambda _: arguments


def block_scale(value):
    return change_matrix(
        "down",
        "scale",
        lambda s: s.astype(jnp.float32).at[1, 2, 1].set(value).astype(jnp.float8_e4m3fn),
    )


def global_scale(value):
    return change_matrix("gate_up", "global_scale", lambda s: s.at[3].set(value))


def as_type(dtype):
    return lambda array: array.astype(dtype)


def missing(_):
    return None


def mxfp4_down():
    return problems.jax_weight(problems.random_problem(Spec(weight_format="mxfp4")).down)


ReLU2, SwiGLU = jaxmoe.activations.ReLU2, jaxmoe.activations.SwiGLU

# name: (what to spoil, words that the message must hold)
BAD = {
    "x_int": (change("x", as_type("int32")), ("x", "float32", "int32")),
    "x_float8": (change("x", as_type("float8_e4m3fn")), ("x", "float8_e4m3fn")),
    "x_three_axes": (change("x", lambda x: x[None]), ("x", "T, H", "vmap")),
    "x_width": (change("x", lambda x: x[:, :64]), ("x", "96", "64")),
    "ids_float": (
        change("expert_ids", as_type("float32")),
        ("expert_ids", "int32", "float32"),
    ),
    "ids_int8": (change("expert_ids", as_type("int8")), ("expert_ids", "int32", "int8")),
    "ids_uint32": (change("expert_ids", as_type("uint32")), ("expert_ids", "int32", "uint32")),
    "ids_one_axis": (change("expert_ids", lambda i: i[:, 0]), ("expert_ids", "T, k")),
    "ids_tokens": (change("expert_ids", lambda i: i[:-1]), ("expert_ids", "17", "16")),
    "ids_no_slots": (
        give(expert_ids=jnp.zeros((17, 0), jnp.int32), weights=jnp.zeros((17, 0))),
        ("expert_ids", "k >= 1"),
    ),
    "weights_shape": (change("weights", lambda w: w[:, :1]), ("weights", "(17, 2)", "(17, 1)")),
    "weights_int": (change("weights", as_type("int32")), ("weights", "float", "int32")),
    "experts_type": (
        change("experts", lambda e: (e.gate_up, e.down)),
        ("experts", "ExpertWeights", "tuple"),
    ),
    "gate_up_rows": (change_experts("gate_up", lambda w: w[:, :64]), ("gate_up", "128", "64")),
    "down_experts": (change_experts("down", lambda w: w[:4]), ("gate_up", "4", "8")),
    "gate_up_bias_shape": (
        change_experts("gate_up_bias", lambda b: b[:, :96]),
        ("gate_up_bias", "(8, 128)", "8, 96"),
    ),
    "down_bias_shape": (change_experts("down_bias", lambda b: b[0]), ("down_bias", "(8, 96)")),
    "down_bias_int": (
        change_experts("down_bias", as_type("int32")),
        ("down_bias", "float", "int32"),
    ),
    "formats_differ": (
        change_experts("down", lambda _: mxfp4_down()),
        ("gate_up", "down", "nvfp4", "mxfp4"),
    ),
    "raw_bytes": (
        change_experts("down", lambda w: w.data),
        ("down", "uint8", "QuantizedTensor"),
    ),
    "data_dtype": (
        change_matrix("down", "data", as_type("int16")),
        ("down", "int16", "uint8"),
    ),
    "scale_dtype": (
        change_matrix("down", "scale", as_type("float32")),
        ("down", "scale", "float8_e4m3fn", "float32"),
    ),
    "scale_shape": (change_matrix("down", "scale", lambda s: s[..., :-1]), ("down", "scale")),
    "scale_missing": (change_matrix("down", "scale", missing), ("down", "scale")),
    "global_scale_missing": (
        change_matrix("down", "global_scale", missing),
        ("down", "global_scale"),
    ),
    "global_scale_shape": (
        change_matrix("down", "global_scale", lambda s: s[0]),
        ("down", "global_scale"),
    ),
    "k_not_whole_blocks": (
        change_matrix("down", "data", lambda d: d[..., :-4]),
        ("down", "16", "56"),
    ),
    "block_scale_nan": (block_scale(jnp.nan), ("down", "scale", "finite")),
    "block_scale_zero": (block_scale(0.0), ("down", "scale", "0")),
    "block_scale_negative": (block_scale(-1.0), ("down", "scale", "negative")),
    "global_scale_nan": (global_scale(jnp.nan), ("gate_up", "global_scale")),
    "global_scale_zero": (global_scale(0.0), ("gate_up", "global_scale")),
    "global_scale_infinite": (global_scale(jnp.inf), ("gate_up", "global_scale")),
    "global_scale_negative": (global_scale(-1.0), ("gate_up", "global_scale")),
    "activation_ungated": (give(activation=ReLU2()), ("gate_up", "128", "64")),
    "activation_parameters": (give(activation=SwiGLU(limit=(1.0, 2.0))), ("limit", "8", "2")),
    "implementation_unknown": (
        give(implementation="cuda_magic"),
        ("cuda_magic", "xla", "cpu_portable"),
    ),
    "implementation_in_sequence": (
        give(implementation=("xla", "cuda_magic")),
        ("cuda_magic", "xla"),
    ),
    "compute_unknown": (give(compute="w2a2"), ("w2a2", "w4a16")),
    "offset_float": (give(expert_offset=1.5), ("expert_offset", "int", "float32")),
    "offset_vector": (give(expert_offset=jnp.arange(3)), ("expert_offset", "3")),
    "weight_on_input_top_2": (give(weight_on_input=True), ("weight_on_input", "2")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    spoil, words = BAD[name]
    arguments = good()
    arguments |= spoil(arguments)
    with pytest.raises((ValueError, TypeError)) as caught:
        jaxmoe.moe_mlp(**arguments)
    absent = [word for word in words if word not in str(caught.value)]
    assert not absent, f"{absent} not in: {caught.value}"


def test_mxfp4_nan_scale_is_named():
    experts = problems.random_problem(Spec(weight_format="mxfp4")).experts()
    scale = experts.down.scale.view(jnp.uint8).at[0, 0, 0].set(0xFF).view(jnp.float8_e8m0fnu)
    with pytest.raises(ValueError, match=r"(?s)down.*scale.*NaN"):
        jaxmoe.moe_mlp(
            **good() | {"experts": replace(experts, down=replace(experts.down, scale=scale))}
        )


def test_a_problem_that_works_is_not_refused():
    """The control of `test_bad_input_is_named`: unspoiled, the arguments are accepted."""
    assert jnp.isfinite(jaxmoe.moe_mlp(**good())).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, w, s: (x, w, s.astype(jnp.float32)), ("group_sizes", "int32", "float32")),
        (lambda x, w, s: (x, w, s[None]), ("group_sizes", "one axis")),
        (lambda x, w, s: (x[:, :64], w, s), ("x", "96", "64")),
        (lambda x, w, s: (x.astype(jnp.int8), w, s), ("x", "int8")),
        (lambda x, w, s: (x, w[0], s), ("w", "E, N, K")),
        (lambda x, w, s: (x, w.data, s), ("w", "uint8", "QuantizedTensor")),
        (lambda x, w, s: (x, w, s[:3]), ("group_sizes", "3", "6")),
    ],
    ids=["sizes_dtype", "sizes_axes", "x_width", "x_dtype", "w_axes", "w_raw", "too_few_groups"],
)
def test_bad_grouped_input_is_named(change, words):
    args = change(*problems.random_grouped(GroupedSpec()).call_args())
    with pytest.raises((ValueError, TypeError)) as caught:
        jaxmoe.grouped_matmul(*args)
    absent = [word for word in words if word not in str(caught.value)]
    assert not absent, f"{absent} not in: {caught.value}"


def test_prepared_for_another_layout_is_an_error_at_trace_time():
    require("cpu_portable")
    arguments = good()
    arguments["experts"] = jaxmoe.prepare(arguments["experts"], "cpu_portable")
    with pytest.raises(ValueError, match=r"(?s)panel32.*canonical|canonical.*panel32"):
        jax.eval_shape(lambda: jaxmoe.moe_mlp(**arguments, implementation="xla"))


def test_prepared_for_a_gated_activation_refuses_an_ungated_one():
    require("cpu_portable")
    arguments = good()
    arguments["experts"] = jaxmoe.prepare(arguments["experts"], "cpu_portable", gated=True)
    with pytest.raises(ValueError, match="gated"):
        jaxmoe.moe_mlp(**arguments, activation=ReLU2())


def test_preparing_twice_is_an_error():
    require("cpu_portable")
    prepared = jaxmoe.prepare(good()["experts"], "cpu_portable")
    with pytest.raises(ValueError, match="canonical"):
        jaxmoe.prepare(prepared, "cpu_portable")


@pytest.mark.parametrize("implementation", ["sm90_w4a16", "sm100_w4a4", "trtllm_gen", "cute_dsl"])
def test_a_strict_name_that_cannot_run_says_why(implementation):
    with pytest.raises(jaxmoe.UnsupportedError, match=implementation) as caught:
        jaxmoe.moe_mlp(**good(), implementation=implementation)
    assert isinstance(caught.value, NotImplementedError)
    assert [row[0] for row in caught.value.resolution.rejected].count(implementation) == 1


def test_a_sequence_of_the_unsupported_carries_every_reason():
    names = ("sm90_w4a16", "sm120_w4a4")
    with pytest.raises(jaxmoe.UnsupportedError) as caught:
        jaxmoe.moe_mlp(**good(), implementation=names)
    for name in names:
        assert name in str(caught.value)


def test_bad_input_is_named_under_jit_too():
    arguments = good()
    arguments["expert_ids"] = arguments["expert_ids"].astype(jnp.float32)
    with pytest.raises(ValueError, match="expert_ids"):
        jax.jit(jaxmoe.moe_mlp)(*arguments.values())
