"""Activations against their formulas in f64, written out here from the definitions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import activations
from jaxmoe.activations import ACTIVATIONS, Situ, SwiGLU, SwiGLUStep, get_activation

erf = np.vectorize(math.erf)


def sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), 1 - 1 / (1 + np.exp(-np.abs(x))))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def swiglu(g, u, alpha=1.0, beta=0.0, limit=np.inf):
    g = np.where(g > limit, limit, g)
    u = np.where(u > limit, limit, np.where(u < -limit, -limit, u))
    return g * sigmoid(alpha * g) * (u + beta)


def swiglu_step(g, u, limit=7.0):
    s = silu(g)
    return np.where(s > limit, limit, s) * np.clip(u, -limit, limit)


def situ(g, u, b=4.0, c=25.0):
    return b * np.tanh(g / b) * sigmoid(g) * c * np.tanh(u / c)


# name -> (gated, f64 formula, parameter names and defaults in order)
REFERENCE = {
    "swiglu": (True, swiglu, {"alpha": 1.0, "beta": 0.0, "limit": np.inf}),
    "swiglu_step": (True, swiglu_step, {"limit": 7.0}),
    "geglu": (True, lambda g, u: gelu(g) * u, {}),
    "geglu_tanh": (True, lambda g, u: gelu_tanh(g) * u, {}),
    "situ": (True, situ, {"gate_softcap": 4.0, "up_softcap": 25.0}),
    "relu2": (False, lambda x: np.where(x > 0, x, 0) ** 2, {}),
    "silu": (False, silu, {}),
    "gelu": (False, gelu, {}),
    "gelu_tanh": (False, gelu_tanh, {}),
    "relu": (False, lambda x: np.where(x > 0, x, 0), {}),
    "identity": (False, lambda x: x, {}),
}
VARIANTS = [
    *[(name, ()) for name in REFERENCE],
    ("swiglu", (1.702, 1.0, 7.0)),
    ("swiglu", (1.0, 0.0, 10.0)),
    ("swiglu", (0.5, -2.0, 0.25)),
    ("swiglu_step", (0.5,)),
    ("situ", (1.5, 3.0)),
]


def operands(name, shape=(64, 33), seed=0, scale=5.0):
    rng = np.random.default_rng(seed)
    count = 2 if REFERENCE[name][0] else 1
    return [rng.normal(scale=scale, size=shape).astype(np.float32) for _ in range(count)]


def test_the_activations_are_these():
    assert set(ACTIVATIONS) == set(REFERENCE)
    for name, cls in ACTIVATIONS.items():
        gated, _, parameters = REFERENCE[name]
        assert (cls.name, cls.gated) == (name, gated)
        assert {f.name: f.default for f in dataclasses.fields(cls)} == parameters
        assert getattr(activations, cls.__name__) is cls
        assert get_activation(name) == cls()
        assert len(repr(cls())) < 80


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_value_equals_the_formula(name, parameters):
    inputs = operands(name)
    inputs[0][0, :7] = [0, -0.0, 7.0, -7.0, 0.25, 1e-30, -1e-30]
    got = ACTIVATIONS[name](*parameters)(*inputs)
    want = REFERENCE[name][1](*(x.astype(float) for x in inputs), *parameters)
    assert got.dtype == jnp.float32
    # Measured: 9e-7 relative above 1e-2 (erf), 6e-9 absolute below, where the f64 formulas cancel.
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-8)


def test_the_tails_of_gelu_keep_their_relative_accuracy():
    x = np.float32([-3.0, -4.0, -5.0])
    exact = [v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.astype(float)]
    np.testing.assert_allclose(ACTIVATIONS["gelu"]()(x), exact, rtol=3e-6)
    z = [math.sqrt(2 / math.pi) * (v + 0.044715 * v**3) for v in x.astype(float)]
    tanh = [v / (1 + math.exp(-2 * w)) for v, w in zip(x.astype(float), z, strict=True)]
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"]()(x), tanh, rtol=3e-6)


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_gradient_equals_finite_differences_of_the_formula(name, parameters):
    inputs = operands(name, shape=(200,), scale=3.0)
    parameters = parameters or tuple(REFERENCE[name][2].values())
    cls, formula = ACTIVATIONS[name], REFERENCE[name][1]
    values = [x.astype(float) for x in inputs]
    count = len(values)
    everything = [*values, *parameters]

    @jax.jit
    def gradients(*args):
        def summed(*args):
            return cls.formula(*args).sum()

        return jax.grad(summed, tuple(range(len(args))))(*args)

    got = gradients(*inputs, *map(np.float32, parameters))
    step = 1e-6
    for i, value in enumerate(everything):
        if not np.isfinite(value).all():
            assert np.isfinite(got[i])
            continue

        def at(d, i=i):
            return formula(*(v + d * (j == i) for j, v in enumerate(everything)))

        finite = (at(step) - at(-step)) / (2 * step)
        if i < count:
            largest = np.abs(finite).max()
            np.testing.assert_allclose(got[i], finite, rtol=3e-6, atol=3e-6 * largest)
        else:  # a sum over all elements, whose terms are differences of numbers of order 1
            total = np.abs(finite).sum()
            np.testing.assert_allclose(got[i], finite.sum(), rtol=0, atol=1e-6 * total + 2e-6)


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_no_nan_in_value_or_gradient(name, parameters):
    """Up to 1e18: squares and products of two inputs still fit in f32."""
    edge = np.float32([0, -0.0, 1e-45, 1e-38, 1, 16, 17, 88, 89, 104, 200, 1e4, 1e9, 1e18])
    edge = np.concatenate([edge, -edge])
    inputs = [edge]
    if ACTIVATIONS[name].gated:
        inputs = [a.ravel() for a in np.meshgrid(edge, edge)]
    activation = ACTIVATIONS[name](*parameters)

    @jax.jit
    def value_and_gradients(*xs):
        value, pullback = jax.vjp(activation, *xs)
        return value, *pullback(jnp.ones_like(value))

    for result in value_and_gradients(*inputs):
        assert np.isfinite(result).all()


@pytest.mark.parametrize(("name", "parameters"), [v for v in VARIANTS if v[0] != "relu2"])
def test_the_largest_gates(name, parameters):
    """Squares and cubes of the gate overflow; gate·(up + beta) fits, and so do the gradients."""
    gate = np.float32([1e19, 1e25, 1e38])
    gate = np.concatenate([gate, -gate])
    inputs = [gate, np.ones_like(gate)][: 1 + ACTIVATIONS[name].gated]
    value, pullback = jax.vjp(ACTIVATIONS[name](*parameters), *inputs)
    for result in (value, *pullback(jnp.ones_like(value))):
        assert np.isfinite(result).all()


def test_gpt_oss():
    assert SwiGLU.gpt_oss() == SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
    got = SwiGLU.gpt_oss()(jnp.float32([100.0, -100.0]), jnp.float32([-100.0, 100.0]))
    np.testing.assert_allclose(got, [7 / (1 + math.exp(-11.914)) * -6, 0], rtol=1e-6)


def test_the_gate_is_clamped_before_silu_in_swiglu_and_after_it_in_swiglu_step():
    gate, up = jnp.float32([3.0]), jnp.float32([1.0])
    before, after = SwiGLU(limit=2.0)(gate, up), SwiGLUStep(limit=2.0)(gate, up)
    assert before[0] == pytest.approx(2 / (1 + math.exp(-2)), rel=1e-6)
    assert after[0] == 2.0


@pytest.mark.parametrize("kind", [tuple, list, np.array, jnp.array])
def test_a_parameter_per_expert(kind):
    gate, up = operands("swiglu", shape=(3, 5, 7))
    limit = [1.0, np.inf, 4.0]
    activation = SwiGLU(alpha=1.702, beta=1.0, limit=kind(limit))
    got = activation(gate, up)
    for e in range(3):
        np.testing.assert_allclose(got[e], SwiGLU(1.702, 1.0, limit[e])(gate[e], up[e]), rtol=1e-6)
    np.testing.assert_array_equal(activation.params(3), np.float32([[1.702] * 3, [1.0] * 3, limit]))
    if kind is not jnp.array:
        assert activation == SwiGLU(1.702, 1.0, tuple(limit))
        assert hash(activation) == hash(SwiGLU(1.702, 1.0, tuple(limit)))


def test_params_are_in_the_order_of_the_formula():
    for name, cls in ACTIVATIONS.items():
        defaults = list(REFERENCE[name][2].values())
        assert cls().params(4).shape == (len(defaults), 4)
        assert cls().params(4).dtype == jnp.float32
        assert cls().params(1)[:, 0].tolist() == defaults
    rows = Situ(gate_softcap=(1.0, 2.0), up_softcap=3.0).params(2)
    assert rows.tolist() == [[1.0, 2.0], [3.0, 3.0]]
    gate, up = operands("situ", shape=(2, 9))
    by_row = Situ.formula(gate, up, *rows[..., None])
    np.testing.assert_array_equal(by_row, Situ((1.0, 2.0), 3.0)(gate, up))


def test_numbers_are_static_and_arrays_are_leaves():
    assert jax.tree.leaves(SwiGLU.gpt_oss()) == []
    count = 0

    @jax.jit
    def call(activation, x):
        nonlocal count
        count += 1
        return activation(x, x)

    x = jnp.ones((2, 3))
    call(SwiGLU(), x)
    call(SwiGLU(), x)
    call(SwiGLU(limit=7), x)
    assert count == 2
    static = jax.jit(lambda a, x: a(x, x), static_argnums=0)
    np.testing.assert_array_equal(static(SwiGLU(), x), SwiGLU()(x, x))

    learned = SwiGLU(beta=jnp.float32([1.0, 2.0]))
    np.testing.assert_array_equal(call(learned, x), learned(x, x))
    gradient = jax.grad(lambda a: call(a, x).sum())(learned)
    silu_of_1 = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(gradient.beta, [3 * silu_of_1] * 2, rtol=1e-6)
    assert gradient.alpha == 1.0, "a static parameter has no gradient"
    stacked = jax.tree.map(lambda b: jnp.stack([b, b]), learned)
    assert jax.vmap(lambda a: a(x, x))(stacked).shape == (2, 2, 3)
    assert jax.tree.map(lambda _: None, learned).beta is None


def test_classes_with_equal_fields_differ():
    assert ACTIVATIONS["silu"]() != ACTIVATIONS["gelu"]()
    assert SwiGLU(limit=7) == SwiGLU(limit=np.float32(7)) == SwiGLU(limit=np.array(7))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", REFERENCE)
def test_narrow_inputs_are_computed_in_f32_and_rounded_once(name, dtype):
    inputs = [jnp.asarray(x, dtype) for x in operands(name)]
    got = ACTIVATIONS[name]()(*inputs)
    want = ACTIVATIONS[name]()(*(x.astype(jnp.float32) for x in inputs)).astype(dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)


NUMBER = "must be a number, or one number per expert; got"


@pytest.mark.parametrize(
    ("cls", "parameters", "message"),
    [
        (SwiGLU, {"limit": 0}, r"SwiGLU: limit must be > 0; got 0\.0"),
        (SwiGLU, {"limit": (7.0, -1.0)}, r"SwiGLU: limit must be > 0; got -1\.0"),
        (SwiGLU, {"limit": math.nan}, r"SwiGLU: limit must be > 0; got nan"),
        (SwiGLU, {"alpha": math.inf}, r"SwiGLU: alpha must be finite; got inf"),
        (SwiGLU, {"beta": np.array([0.0, math.nan])}, r"SwiGLU: beta must be finite; got nan"),
        (SwiGLU, {"alpha": "1"}, rf"SwiGLU: alpha {NUMBER} '1'"),
        (SwiGLU, {"alpha": None}, rf"SwiGLU: alpha {NUMBER} None"),
        (SwiGLU, {"alpha": (1.0, "x")}, rf"SwiGLU: alpha {NUMBER} \(1\.0, 'x'\)"),
        (SwiGLU, {"alpha": ()}, r"SwiGLU: alpha .*got shape \(0,\)"),
        (SwiGLU, {"beta": np.zeros((2, 2))}, r"shape \[num_experts\]; got shape \(2, 2\)"),
        (SwiGLU, {"beta": jnp.zeros((2, 2))}, r"shape \[num_experts\]; got shape \(2, 2\)"),
        (SwiGLUStep, {"limit": -7.0}, r"SwiGLUStep: limit must be > 0; got -7\.0"),
        (Situ, {"gate_softcap": 0.0}, r"Situ: gate_softcap must be finite and > 0; got 0\.0"),
        (Situ, {"up_softcap": math.inf}, r"Situ: up_softcap must be finite and > 0; got inf"),
    ],
)
def test_bad_parameters(cls, parameters, message):
    with pytest.raises(ValueError, match=message):
        cls(**parameters)


def test_bad_arguments():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"swiglu takes \(gate, up\); got 1 inputs"):
        SwiGLU()(x)
    with pytest.raises(ValueError, match=r"relu2 takes \(x\); got 2 inputs"):
        ACTIVATIONS["relu2"]()(x, x)
    per_expert = SwiGLU(limit=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"limit holds 3 .*gate must be \[3, \.\.\.\]; got .*2, 3"):
        per_expert(x, x)
    with pytest.raises(ValueError, match=r"one value for each of num_experts=2; got shape \(3,\)"):
        per_expert.params(2)
    with pytest.raises(ValueError, match=r"one value for each of num_experts=4; got shape \(1,\)"):
        SwiGLU(limit=(1.0,)).params(4)
    with pytest.raises(ValueError, match=r"one of swiglu, swiglu_step, .*; got 'swish'"):
        get_activation("swish")
    assert get_activation(per_expert) is per_expert
