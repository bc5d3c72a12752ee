"""The Flax layers: numbers against the oracle, training, conversion, and every transformation."""

import dataclasses
import doctest
import importlib
import inspect
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import reference_routing
from flax import linen, nnx

import jaxmoe
from jaxmoe import activations, routing
from jaxmoe.nn import CorrectionBias, LinenMoE, MoE, QuantizedParam
from jaxmoe.nn import _variables as variables_module
from jaxmoe.nn._variables import value

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_experts": 6, "top_k": 2}
FP4 = ("nvfp4", "mxfp4")


def make(seed=0, **options):
    return MoE(**{**SIZES, **options}, rngs=nnx.Rngs(seed))


def tokens(*shape, dtype=jnp.float32, seed=1):
    return jax.random.normal(jax.random.key(seed), (*shape, SIZES["hidden_size"])).astype(dtype)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(leaves(a), leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()


def bits(variable):
    """A layer's expert matrix as the oracle reads it."""
    w = value(variable)
    if not isinstance(w, jaxmoe.QuantizedTensor):
        return np.asarray(w)
    return oracle.Bits(
        w.format.name,
        np.asarray(w.packed()),
        None if w.scale is None else np.asarray(w.scale).view(np.uint8),
        None if w.global_scale is None else np.asarray(w.global_scale),
    )


def numpy_layer(layer, x, route, params=()):
    """The whole layer in float64, from its parameters and a routing method of one token."""

    def f64(variable):
        return None if variable is None else np.asarray(variable[...]).astype(np.float64)

    x = np.asarray(x).astype(np.float64).reshape(-1, layer.hidden_size)
    logits = x @ f64(layer.router).T
    if layer.router_bias is not None:
        logits = logits + f64(layer.router_bias)
    routes = [route(list(row), layer.top_k) for row in logits]
    name = layer.activation.name
    out = oracle.moe_mlp(
        x,
        bits(layer.gate_up),
        bits(layer.down),
        np.array([[expert for expert, _ in r] for r in routes]),
        np.array([[weight for _, weight in r] for r in routes]),
        activation=name,
        params=params,
        gate_up_bias=f64(layer.gate_up_bias),
        down_bias=f64(layer.down_bias),
        weight_on_input=layer.routing.weight_on_input,
    )
    if layer.shared_experts:
        hidden, _, _ = oracle.activate(name, x @ f64(layer.shared_gate_up).T, params)
        shared = hidden @ f64(layer.shared_down).T
        if layer.shared_gate is not None:
            shared = shared / (1 + np.exp(-x @ f64(layer.shared_gate).T))
        out = out + shared
    return out


def relative_error(got, expected):
    got = np.asarray(got).astype(np.float64).reshape(expected.shape)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def randomize_biases(layer, seed=5):
    """Zero biases hide a bias that is not used."""
    key = jax.random.key(seed)
    for name in ("router_bias", "gate_up_bias", "down_bias"):
        if (variable := getattr(layer, name)) is not None:
            key, part = jax.random.split(key)
            variable[...] = jax.random.normal(part, variable[...].shape)


NORM = reference_routing.renormalize
CASES = {
    "plain": ({}, NORM, ()),
    "all biases": ({"use_bias": True, "router_bias": True}, NORM, ()),
    "gpt-oss": (
        {"use_bias": True, "activation": activations.SwiGLU.gpt_oss()},
        NORM,
        (1.702, 1.0, 7.0),
    ),
    "shared experts": ({"shared_experts": 2}, NORM, ()),
    "shared experts with a gate": ({"shared_experts": 1, "shared_gate": True}, NORM, ()),
    "no gate, shared": ({"activation": "relu2", "shared_experts": 1, "use_bias": True}, NORM, ()),
    "weight on input": (
        {"router": "llama4", "top_k": 1},
        lambda row, k: [
            (e, reference_routing.sigmoid(row[e])) for e in reference_routing.best(row, k)
        ],
        (),
    ),
    "softmax before top-k": ({"router": "renormalize_naive", "top_k": 3}, NORM, ()),
}


@pytest.mark.parametrize(
    ("case", "weight_format"),
    [("plain", "bf16"), ("all biases", "bf16"), ("plain", "mxfp4"), *((c, "nvfp4") for c in CASES)],
)
def test_layer_agrees_with_the_oracle(case, weight_format):
    options, route, params = CASES[case]
    layer = make(weight_format=weight_format, implementation="xla", **options)
    randomize_biases(layer)
    x = tokens(3, 7)
    assert relative_error(layer(x), numpy_layer(layer, x, route, params)) < 1e-6


def test_bfloat16_computation_with_float32_router():
    layer = make(weight_format="nvfp4", implementation="xla")
    x = tokens(40, dtype=jnp.bfloat16)
    out = layer(x)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, numpy_layer(layer, x, NORM)) < 4e-3
    # dtype decides the computation, whatever x is; the router still sees x itself.
    wide = tokens(40)
    typed = make(weight_format="nvfp4", implementation="xla", dtype=jnp.bfloat16)
    assert typed(wide).dtype == jnp.bfloat16
    np.testing.assert_array_equal(typed.logits(wide), layer.logits(wide))
    assert layer.logits(x).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4), (0, 5)])
def test_leading_axes_are_tokens(shape):
    layer = make(shared_experts=1)
    x = tokens(*shape)
    out, aux = layer(x, return_aux=True)
    assert out.shape == x.shape
    flat = layer(x.reshape(-1, 64))
    np.testing.assert_array_equal(out.reshape(-1, 64), flat)
    assert aux.expert_counts.sum() == 2 * np.prod(shape, dtype=int)


def test_router_logits_replace_the_router():
    layer = make()
    x = tokens(2, 5)
    own = layer.logits(x)
    np.testing.assert_array_equal(layer(x, router_logits=own), layer(x))
    assert not np.allclose(layer(x, router_logits=-own), layer(x))


def test_correction_bias_moves_the_choice_and_not_the_weights():
    layer = make(router="deepseek_v3")
    assert type(layer.correction_bias) is CorrectionBias
    x = tokens(8)
    _, before = layer(x, return_aux=True)
    layer.correction_bias[...] = jnp.zeros(6).at[3].set(100.0)
    out, after = layer(x, return_aux=True)
    assert before.expert_counts[3] < after.expert_counts[3] == 8
    chosen = layer.routing(layer.logits(x), selection_bias=layer.correction_bias[...])
    np.testing.assert_allclose(chosen.weights.sum(-1), 1.0, rtol=1e-6)
    expected = oracle.moe_mlp(
        x, bits(layer.gate_up), bits(layer.down), chosen.expert_ids, chosen.weights
    )
    assert relative_error(out, expected) < 1e-6
    # Neither gradients nor optimizers see it.
    grads = nnx.grad(lambda m: m(x).sum())(layer)
    assert "correction_bias" not in grads
    assert make().correction_bias is None


def test_activation_with_array_parameters_is_traced():
    limit = jnp.linspace(0.1, 0.6, 6)
    layer = make(activation=activations.SwiGLU(limit=limit))
    x = tokens(9)
    expected = numpy_layer(layer, x, NORM, (1.0, 0.0, np.asarray(limit)))
    assert relative_error(jax.jit(lambda m, x: m(x))(layer, x), expected) < 1e-6
    with pytest.raises(ValueError, match="uniform parameters when shared_experts"):
        make(activation=activations.SwiGLU(limit=limit), shared_experts=1)


def test_initial_values_have_the_fan_in_of_one_expert():
    layer = make(hidden_size=256, intermediate_size=512, shared_experts=2)
    for name, fan_in in (("router", 256), ("gate_up", 256), ("down", 512), ("shared_down", 1024)):
        np.testing.assert_allclose(jnp.std(getattr(layer, name)[...]), fan_in**-0.5, rtol=0.05)
    first, second = layer.gate_up[...][:2]
    assert not np.array_equal(first, second)
    assert make(param_dtype=jnp.bfloat16).gate_up[...].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 7}, "top_k must be at most num_experts=6, got 7"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"shared_experts": -1}, "shared_experts must be at least 0, got -1"),
        ({"router": routing.default(3)}, "router must have top_k=2"),
        ({"router": "no such"}, "router must be a Router or one of"),
        ({"activation": "no such"}, "activation must be an Activation or one of"),
        ({"weight_format": "fp3"}, "fp3"),
        ({"weight_format": "nvfp4", "qat": "nvfp4"}, "qat must be None for frozen nvfp4"),
        ({"weight_format": "mxfp4", "hidden_size": 48}, "hidden_size must be a multiple of 32"),
        ({"qat": "nvfp4", "intermediate_size": 8}, "intermediate_size must be a multiple of 16"),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_call_errors():
    layer = make()
    with pytest.raises(ValueError, match=r"x must be .*hidden_size=64.*float32\[3, 32\]"):
        layer(jnp.ones((3, 32)))
    with pytest.raises(ValueError, match=r"x must be .*int32"):
        layer(jnp.ones((3, 64), jnp.int32))
    with pytest.raises(ValueError, match=r"router_logits must have shape \(3, 6\)"):
        layer(tokens(3), router_logits=jnp.ones((4, 6)))
    with pytest.raises(jaxmoe.UnsupportedError):
        make(implementation="cpu")(tokens(3))  # unquantised experts run on xla alone


# --- auxiliary values --------------------------------------------------------------------------


def test_aux_is_that_of_the_router():
    layer = make(router="sigmoid")
    x = tokens(4, 5)
    _, aux = layer(x, return_aux=True)
    logits = layer.logits(x.reshape(-1, 64))
    expected = routing.aux(logits, layer.routing(logits), score_fn="sigmoid")
    assert_same_bits(aux, expected)


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="this Flax has no nnx.capture")
def test_aux_is_sown_only_while_captured():
    model = nnx.Sequential(make(0), make(1))
    x = tokens(5)
    out, sown = nnx.capture(model, nnx.Intermediate)(x)
    auxes = [value(layer["router_aux"])[0] for layer in sown["layers"].values()]
    assert [int(aux.expert_counts.sum()) for aux in auxes] == [10, 10]
    _, first = make(0)(x, return_aux=True)
    assert_same_bits(auxes[0], first)
    plain = nnx.Sequential(make(0), make(1))
    np.testing.assert_array_equal(plain(x), out)  # no warning, and nothing stored
    assert not jax.tree.leaves(nnx.state(plain, nnx.Intermediate))


# --- quantised weights -------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", FP4)
def test_quantize_makes_the_layer_that_the_format_initialises(weight_format):
    options = {"use_bias": True, "shared_experts": 1}
    layer = make(3, **options)
    before = leaves(nnx.state(layer))
    fp4 = layer.quantize(weight_format)
    assert type(fp4.gate_up) is type(fp4.down) is QuantizedParam
    assert fp4.weight_format == weight_format
    assert fp4.layout == "canonical"
    assert_same_bits(nnx.state(fp4), nnx.state(make(3, weight_format=weight_format, **options)))
    assert layer.weight_format == "bf16"  # the original keeps its weights
    for a, b in zip(before, leaves(nnx.state(layer)), strict=True):
        np.testing.assert_array_equal(a, b)
    x = tokens(20)
    assert 0.01 < relative_error(fp4(x), np.asarray(layer(x), np.float64)) < 0.25


def test_quantize_searches_scales_by_mse():
    layer = make()

    def error(quantized):
        return float(jnp.mean((jaxmoe.dequantize(value(quantized.down)) - layer.down[...]) ** 2))

    assert error(layer.quantize("nvfp4", method="mse")) < error(layer.quantize("nvfp4"))


def test_quantize_converts_every_layer_of_a_model():
    model = nnx.Sequential(make(0), nnx.Linear(64, 64, rngs=nnx.Rngs(1)), make(2))
    fp4 = jaxmoe.nn.quantize(model, "mxfp4")
    assert [layer.weight_format for layer in (fp4.layers[0], fp4.layers[2])] == ["mxfp4", "mxfp4"]
    assert model.layers[0].weight_format == "bf16"
    np.testing.assert_array_equal(fp4.layers[1].kernel[...], model.layers[1].kernel[...])
    x = tokens(3)
    by_hand = make(2).quantize("mxfp4")(fp4.layers[1](make(0).quantize("mxfp4")(x)))
    np.testing.assert_array_equal(fp4(x), by_hand)


def test_quantize_errors():
    with pytest.raises(ValueError, match="weights are nvfp4 already"):
        make(weight_format="nvfp4").quantize("mxfp4")
    with pytest.raises(ValueError, match="format must be a quantised one"):
        make().quantize("bf16")
    with pytest.raises(ValueError, match="intermediate_size must be a multiple of 32"):
        make(intermediate_size=80).quantize("mxfp4")
    with pytest.raises(ValueError, match=r"at least one jaxmoe.nn.MoE layer, but Linear has none"):
        jaxmoe.nn.quantize(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "nvfp4")


def cpu_library():
    """A target with the portable CPU kernel, also where this installation was built without it."""
    target = jaxmoe.Target.from_name("cpu", built=frozenset({"cpu_portable"}))
    return jaxmoe.override(target=target)


def test_prepare_changes_the_layout_and_no_number():
    layer = make(weight_format="nvfp4", use_bias=True)
    randomize_biases(layer)
    with cpu_library():
        panels = layer.prepare("cpu_portable")
    assert (layer.layout, panels.layout) == ("canonical", "panel32")
    assert type(panels.down) is QuantizedParam
    with pytest.raises(ValueError, match="prepared already, for layout 'panel32'"):
        panels.prepare()
    assert make().prepare().layout == "canonical"  # unquantised weights have one layout
    ready = layer.prepare()
    assert ready.explain().selected == layer.explain().selected
    x = tokens(4, 5)
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(ready, x), layer(x))


def test_prepare_is_for_the_layers_own_arithmetic():
    target = jaxmoe.Target.from_name("h100", built={"sm90_w4a16", "sm90_w4a8"})
    with jaxmoe.override(target=target):
        for compute, layout in (("auto", "sm90_fragment"), ("w4a8", "sm90_fragment_fp8")):
            layer = make(weight_format="mxfp4", compute=compute)
            assert layer.prepare().layout == layer.explain("bfloat16").layout == layout
        with pytest.raises(jaxmoe.UnsupportedError, match="6 significant bits"):
            make(weight_format="nvfp4", compute="w4a8").prepare()


def test_prepared_layer_repacks_nothing():
    """Inside jit, the call of a prepared layer touches no weight byte outside its kernel."""
    layer = make(weight_format="nvfp4")
    selected = layer.explain().selected
    if selected == "xla":
        pytest.skip("no native library: xla reads canonical weights")
    ready = layer.prepare()
    text = str(jax.make_jaxpr(lambda m, x: m(x))(ready, tokens(2)))
    canonical = str(jax.make_jaxpr(lambda m, x: m(x))(layer, tokens(2)))
    shape = "u8[" + ",".join(map(str, value(ready.down).data.shape)) + "]"
    assert canonical.count(shape) > 0
    assert text.count("= transpose") < canonical.count("= transpose")


def test_explain_names_the_kernel_and_the_reasons():
    layer = make(weight_format="nvfp4")
    with jaxmoe.override(target="sm_110"):
        resolution = layer.explain()
    assert resolution.selected == "xla"
    assert len(resolution.rejected) > 3
    assert make().explain().selected == "xla"
    assert make(weight_format="mxfp4", implementation="xla").explain().selected_by != "auto"
    abstract = nnx.eval_shape(lambda: make(weight_format="nvfp4"))
    assert abstract.explain(jnp.float32).selected == layer.explain(jnp.float32).selected


# --- training ----------------------------------------------------------------------------------


def target_function(x):
    return jnp.roll(jnp.tanh(2 * x), 1, axis=-1)


def train(layer, steps=60, dtype=jnp.float32, rate=1e-2):
    """Fits the layer to a fixed function; returns the losses. The step is jitted."""
    optimizer = nnx.Optimizer(layer, optax.adam(rate), wrt=nnx.Param)

    def loss_fn(layer, x):
        out, aux = layer(x, return_aux=True)
        error = out.astype(jnp.float32) - target_function(x.astype(jnp.float32))
        return jnp.mean(error**2) + 1e-3 * aux.load_balance_loss + 1e-4 * aux.router_z_loss

    @nnx.jit
    def step(layer, optimizer, x):
        loss, grads = nnx.value_and_grad(loss_fn)(layer, x)
        optimizer.update(layer, grads)
        return loss

    return [
        float(step(layer, optimizer, tokens(64, dtype=dtype, seed=seed))) for seed in range(steps)
    ]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, jnp.float32),
        ({"shared_experts": 1, "use_bias": True, "router_bias": True}, jnp.bfloat16),
        ({"qat": "nvfp4"}, jnp.float32),
        ({"qat": "mxfp4"}, jnp.bfloat16),
    ],
)
def test_training_reduces_the_loss(options, dtype):
    layer = make(**options)
    start = nnx.state(make(**options), nnx.Param)
    losses = train(layer, dtype=dtype)
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    for (path, before), (_, after) in zip(
        nnx.to_flat_state(start), nnx.to_flat_state(nnx.state(layer, nnx.Param)), strict=True
    ):
        assert not np.array_equal(before[...], after[...]), path  # every parameter is trained
        assert after[...].dtype == jnp.float32


@pytest.mark.parametrize("weight_format", FP4)
def test_training_leaves_frozen_experts_alone(weight_format):
    options = {"weight_format": weight_format, "use_bias": True, "shared_experts": 1}
    layer, start = make(**options), make(**options)
    losses = train(layer)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert_same_bits(nnx.state(layer, QuantizedParam), nnx.state(start, QuantizedParam))
    for name in ("router", "gate_up_bias", "down_bias", "shared_gate_up", "shared_down"):
        assert not np.array_equal(getattr(layer, name)[...], getattr(start, name)[...]), name
    optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    assert not {"gate_up", "down"} & {
        path[-1] for path, _ in nnx.to_flat_state(nnx.state(optimizer))
    }


def test_frozen_layer_has_the_gradients_of_its_dequantised_twin():
    fp4 = make(weight_format="nvfp4", use_bias=True, shared_experts=1)
    randomize_biases(fp4)
    plain = make(use_bias=True, shared_experts=1)
    for name in ("router", "gate_up_bias", "down_bias", "shared_gate_up", "shared_down"):
        getattr(plain, name)[...] = getattr(fp4, name)[...]
    for name in ("gate_up", "down"):
        getattr(plain, name)[...] = jaxmoe.dequantize(value(getattr(fp4, name)))
    x = tokens(11)

    def loss(layer, x):
        return jnp.sum(layer(x) * jnp.cos(x))

    got, got_x = nnx.grad(loss, argnums=(0, 1))(fp4, x)
    expected, expected_x = nnx.grad(loss, argnums=(0, 1))(plain, x)
    assert set(expected) - set(got) == {"gate_up", "down"}
    np.testing.assert_allclose(got_x, expected_x, rtol=1e-5, atol=1e-6)
    for name in got:
        np.testing.assert_allclose(got[name][...], expected[name][...], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_format", FP4)
def test_qat_forward_is_that_of_the_quantised_layer(weight_format):
    layer = make(qat=weight_format)
    x = tokens(12)
    fp4 = layer.quantize(weight_format)
    assert fp4.qat is None
    np.testing.assert_allclose(layer(x), fp4(x), rtol=1e-5, atol=1e-6)
    assert relative_error(layer(x), np.asarray(make()(x), np.float64)) > 0.01
    # Straight through: the gradient is the unquantised layer's at the rounded weights.
    plain = make()
    for name in ("gate_up", "down"):
        getattr(plain, name)[...] = jaxmoe.dequantize(value(getattr(fp4, name)))

    def loss(layer):
        return jnp.sum(layer(x) ** 2)

    got, expected = nnx.grad(loss)(layer), nnx.grad(loss)(plain)
    for name in ("gate_up", "down", "router"):
        np.testing.assert_allclose(got[name][...], expected[name][...], rtol=1e-4, atol=1e-6)


# --- transformations ---------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", ["bf16", "nvfp4"])
def test_jit_and_vmap(weight_format):
    layer = make(weight_format=weight_format)
    x = tokens(3, 7)
    eager = layer(x)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), eager, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(layer, x), eager, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(layer)(x), eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_format", ["bf16", "nvfp4"])
def test_scan_over_a_stack_of_layers(weight_format):
    options = {"weight_format": weight_format, "use_bias": True, "implementation": "xla"}
    keys = jax.random.split(jax.random.key(7), 3)

    def build(key):
        return MoE(**SIZES, **options, rngs=nnx.Rngs(key))

    stack = nnx.vmap(build)(keys)
    assert value(stack.down).shape == (3, 6, 64, 96)
    x = tokens(5)
    expected = x
    for key in keys:
        expected = expected + build(key)(expected)

    scanned = nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        x, stack
    )
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)

    graph, state = nnx.split(stack)
    looped, counts = jax.lax.scan(
        lambda x, layer: (lambda out, aux: (x + out, aux.expert_counts))(
            *nnx.merge(graph, layer)(x, return_aux=True)
        ),
        x,
        state,
    )
    np.testing.assert_array_equal(looped, scanned)
    assert counts.sum(-1).tolist() == [10, 10, 10]


def test_a_stack_is_quantised_prepared_and_explained_like_its_layers():
    keys = jax.random.split(jax.random.key(7), 3)
    stack = nnx.vmap(lambda key: MoE(**SIZES, rngs=nnx.Rngs(key)))(keys)
    fp4 = stack.quantize("nvfp4")
    with cpu_library():
        panels = fp4.prepare("cpu_portable")
    assert fp4.explain().selected == make(weight_format="nvfp4").explain().selected
    for i, key in enumerate(keys):
        layer = MoE(**SIZES, rngs=nnx.Rngs(key)).quantize("nvfp4")
        with cpu_library():
            prepared = layer.prepare("cpu_portable")
        assert_same_bits(jax.tree.map(lambda a, i=i: a[i], nnx.state(fp4)), nnx.state(layer))
        assert_same_bits(jax.tree.map(lambda a, i=i: a[i], nnx.state(panels)), nnx.state(prepared))


def test_eval_shape_allocates_nothing():
    big = {"hidden_size": 8192, "intermediate_size": 32768, "num_experts": 512, "top_k": 8}
    layer = nnx.eval_shape(lambda: MoE(**big, weight_format="mxfp4", rngs=nnx.Rngs(0)))
    w = value(layer.gate_up)
    assert w.shape == (512, 65536, 8192)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(w))
    assert w.scale.dtype == jnp.float8_e8m0fnu
    assert layer.explain().selected is not None


def test_graph_definition_is_static_data():
    first, second = (nnx.split(make(seed, kernel_metadata={"tag": "a"}))[0] for seed in (0, 1))
    assert first == second
    assert hash(first) == hash(second)
    assert nnx.split(make(kernel_metadata={"tag": "b"}))[0] != first


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", ["bf16", "nvfp4", "mxfp4", "mxfp8", "fp8"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
def test_orbax_round_trip_is_bit_exact(weight_format, tmp_path):
    import orbax.checkpoint as ocp

    layer = make(weight_format=weight_format, use_bias=True, router="deepseek_v3")
    randomize_biases(layer)
    _, state = nnx.split(layer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", state)
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(
            lambda: make(1, weight_format=weight_format, use_bias=True, router="deepseek_v3")
        )
        graph, target = nnx.split(abstract)
        restored = checkpointer.restore(tmp_path / "layer", target)
    assert_same_bits(jax.tree.leaves(restored), jax.tree.leaves(state))
    x = tokens(6)
    np.testing.assert_array_equal(nnx.merge(graph, restored)(x), layer(x))


# --- Linen -------------------------------------------------------------------------------------


def linen_variables(layer):
    """An NNX layer's variables as the Linen twin holds them."""
    collections = {"params": nnx.Param, "quantized": QuantizedParam, "router_state": CorrectionBias}
    return {
        name: found
        for name, kind in collections.items()
        if (
            found := {
                path[-1]: value(variable)
                for path, variable in nnx.to_flat_state(nnx.state(layer, kind))
            }
        )
    }


@pytest.mark.parametrize(
    ("weight_format", "options"),
    [
        ("bf16", {}),
        ("mxfp4", {}),
        ("nvfp4", {"use_bias": True, "shared_experts": 1, "router": "deepseek_v3"}),
    ],
)
def test_linen_twin_gives_the_same_numbers(options, weight_format):
    options = {**SIZES, **options, "weight_format": weight_format}
    layer, twin = MoE(**options, rngs=nnx.Rngs(0)), LinenMoE(**options)
    randomize_biases(layer)
    x = tokens(2, 5)
    variables = linen_variables(layer)
    initial = twin.init(jax.random.key(0), x)
    assert jax.tree.structure(initial) == jax.tree.structure(variables)
    assert [a.shape for a in leaves(initial)] == [a.shape for a in leaves(variables)]
    np.testing.assert_array_equal(twin.apply(variables, x), layer(x))
    logits = -layer.logits(x)
    out, aux = twin.apply(variables, x, router_logits=logits, return_aux=True)
    expected, expected_aux = layer(x, router_logits=logits, return_aux=True)
    np.testing.assert_array_equal(out, expected)
    assert_same_bits(aux, expected_aux)


def test_linen_twin_has_the_same_arguments():
    nnx_arguments = dict(inspect.signature(MoE.__init__).parameters)
    del nnx_arguments["self"], nnx_arguments["rngs"]
    linen_arguments = dict(inspect.signature(LinenMoE.__init__).parameters)
    del linen_arguments["self"], linen_arguments["parent"], linen_arguments["name"]
    assert list(linen_arguments) == list(nnx_arguments)
    fields = {field.name: field for field in dataclasses.fields(LinenMoE)}
    for name, argument in nnx_arguments.items():
        field = fields[name]
        if field.default_factory is not dataclasses.MISSING:
            assert field.default_factory() == dict(argument.default), name
        elif not name.endswith("_init") and field.default is not dataclasses.MISSING:
            assert field.default == argument.default, name


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm()(x)
        return x + LinenMoE(**SIZES, name="moe")(x)


def test_linen_twin_inside_a_model_sows_and_trains():
    model = LinenBlock()
    x = tokens(16)
    params = model.init(jax.random.key(0), x)["params"]
    assert set(params["moe"]) == {"router", "gate_up", "down"}
    _, sown = model.apply({"params": params}, x, mutable=["intermediates"])
    (aux,) = sown["intermediates"]["moe"]["router_aux"]
    assert aux.expert_counts.sum() == 32
    assert isinstance(model.apply({"params": params}, x), jax.Array)

    @jax.jit
    def loss(params, x):
        return jnp.mean((model.apply({"params": params}, x) - target_function(x)) ** 2)

    grads = jax.grad(loss)(params, x)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    step = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    assert loss(step, x) < loss(params, x)


def test_linen_twin_is_quantised():
    layer, twin = make(use_bias=True), LinenMoE(**SIZES, use_bias=True)
    x = tokens(4)
    fp4, variables = twin.quantize(linen_variables(layer), "nvfp4", method="mse")
    assert fp4.weight_format == "nvfp4"
    assert set(variables["params"]) == {"router", "gate_up_bias", "down_bias"}
    expected = layer.quantize("nvfp4", method="mse")(x)
    np.testing.assert_array_equal(fp4.apply(variables, x), expected)


# --- sharding ----------------------------------------------------------------------------------

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxmoe
from jaxmoe.nn import MoE
from jaxmoe.nn._variables import value

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,))
sizes = dict(hidden_size=64, intermediate_size=96, num_experts=6, top_k=2, use_bias=True)
x = jax.random.normal(jax.random.key(1), (10, 64))

for weight_format in ("bf16", "nvfp4"):
    options = dict(sizes, weight_format=weight_format, implementation="xla")
    expected = MoE(**options, rngs=nnx.Rngs(0))(x)
    axes = {"kernel_axes": ("expert", None, None)}

    def build():
        return MoE(**options, **axes, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(build)
        shardings = nnx.get_named_sharding(nnx.state(abstract), mesh)

        @nnx.jit
        def create():
            layer = build()
            state = jax.lax.with_sharding_constraint(nnx.state(layer), shardings)
            nnx.update(layer, state)
            return layer

        layer = create()
        for name in ("gate_up", "down"):
            for leaf in jax.tree.leaves(value(getattr(layer, name))):
                assert leaf.sharding.shard_shape(leaf.shape)[0] == 3, (weight_format, name, leaf)
        assert layer.router[...].sharding.is_fully_replicated
        bias = layer.gate_up_bias[...]
        assert bias.sharding.shard_shape(bias.shape) == (3, 192)
        out = nnx.jit(lambda layer, x: layer(x))(layer, x)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        eager = build()
        leaf = jax.tree.leaves(value(eager.down))[0]
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 3
        if weight_format == "bf16":
            fp4 = layer.quantize("nvfp4")
            for leaf in jax.tree.leaves(value(fp4.gate_up)):
                assert leaf.sharding.shard_shape(leaf.shape)[0] == 3
print("sharded")
"""


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**__import__("os").environ, "JAX_PLATFORMS": "cpu", **environment},
        timeout=900,
    )


def test_parameters_are_sharded_over_a_mesh():
    flag = "--xla_force_host_platform_device_count=2"
    done = python(SHARDED, XLA_FLAGS=flag)
    assert done.stdout.strip().endswith("sharded"), done.stderr


def test_quantised_metadata_names_leading_axes_only():
    layer = nnx.eval_shape(
        lambda: make(
            weight_format="nvfp4",
            shared_experts=1,
            use_bias=True,
            kernel_axes=("exp", "embed", "mlp"),
            kernel_metadata={"eager_sharding": False},
            bias_metadata={"eager_sharding": False},
        )
    )
    names = {
        path[-1]: variable.get_metadata()[variables_module.SHARDING]
        for path, variable in nnx.to_flat_state(nnx.state(layer))
    }
    assert names == {
        "router": (None, "embed"),
        "gate_up": ("exp",),
        "down": ("exp",),
        "gate_up_bias": ("exp", "mlp"),
        "down_bias": ("exp", "embed"),
        "shared_gate_up": ("mlp", "embed"),
        "shared_down": ("embed", "mlp"),
    }


# --- the package -------------------------------------------------------------------------------


def test_a_missing_flax_is_explained():
    done = python("import sys; sys.modules['flax'] = None; import jaxmoe; import jaxmoe.nn")
    assert 'pip install "jaxmoe[flax]"' in done.stderr


@pytest.mark.parametrize("module", ["_convert", "_linen", "_moe", "_variables"])
def test_docstring_examples(module):
    found = importlib.import_module(f"jaxmoe.nn.{module}")
    result = doctest.testmod(found)
    assert result.attempted > 0
    assert result.failed == 0
