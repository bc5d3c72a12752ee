"""quantize, dequantize, fake_quantize: bit for bit against NumPy, and against ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference_formats as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.formats import FORMATS, get_format
from jaxmoe.quantization import QuantizedTensor, check, dequantize, fake_quantize, quantize

SCALED = ["nvfp4", "mxfp4", "mxfp8", "fp8"]
BLOCKS = ["nvfp4", "mxfp4", "mxfp8"]
INF, NAN = np.inf, np.nan
F32_MAX = np.float32(3.4028235e38)


def raw(leaf):
    return None if leaf is None else np.asarray(leaf).view(np.uint8)


def assert_same_bits(ours, expected):
    """A QuantizedTensor against one, or against a reference.Quantized."""
    for name in ("data", "scale", "global_scale"):
        ours_leaf, expected_leaf = getattr(ours, name), getattr(expected, name)
        assert (ours_leaf is None) == (expected_leaf is None), name
        if ours_leaf is not None:
            np.testing.assert_array_equal(raw(ours_leaf), raw(expected_leaf.copy()), err_msg=name)


def wide(rng, shape, low=-20, high=20):
    """Signs and magnitudes over many binades, block after block of its own size."""
    magnitude = rng.uniform(low, high, (*shape[:-1], shape[-1] // 8)).repeat(8, -1)
    return (rng.standard_normal(shape) * np.exp2(magnitude)).astype(np.float32)


def special_inputs():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((3, 8, 64)).astype(np.float32)
    tiny_blocks = normal.copy()
    tiny_blocks[:, :, :32] *= np.exp2(rng.uniform(-30, -8, (3, 8, 1))).astype(np.float32)
    spike = normal * np.float32(1e-6)
    spike[:, 0, 0] = 1e6
    negative_zero = -np.zeros((3, 8, 64), np.float32)
    subnormal = (normal * np.float32(2.0**-127)).astype(np.float32)
    mixed = normal.copy()
    mixed[1] = 0
    mixed[2, :, 32:] = 0
    huge = np.where(normal > 0, F32_MAX, -F32_MAX).astype(np.float32)
    huge[:, 1:] *= np.exp2(rng.uniform(-250, 0, (3, 7, 64))).astype(np.float32)
    grid = rng.choice(np.concatenate([reference.E2M1, -reference.E2M1]), (3, 8, 64))
    return {
        "normal": normal,
        "wide": wide(rng, (3, 8, 64)),
        "very wide": wide(rng, (3, 8, 64), -126, 126),
        "tiny blocks": tiny_blocks,
        "spike": spike,
        "zeros": np.zeros((3, 8, 64), np.float32),
        "negative zero": negative_zero,
        "f32 subnormal": subnormal,
        "near subnormal": normal * np.float32(2.0**-122),
        "small": normal * np.float32(2.0**-100),
        "zero matrix and blocks": mixed,
        "huge": huge,
        "grid": grid.astype(np.float32),
        "ties": (rng.integers(-48, 49, (3, 8, 64)) / 8).astype(np.float32),
        "one block": normal[:1, :1, :32],
        "no rows": normal[:, :0],
        "no matrices": normal[:0],
    }


INPUTS = special_inputs()


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("format", SCALED)
def test_bits_against_numpy(format, name):
    x = INPUTS[name]
    q = quantize(x, format)
    expected = reference.quantize(x, format)
    assert_same_bits(q, expected)
    check(q)
    value = dequantize(q)
    np.testing.assert_array_equal(raw(value), raw(reference.dequantize(expected, format)))
    assert value.shape == x.shape
    assert np.isfinite(np.asarray(value)).all()


def fused(x, format):
    q = quantize(x * 1.0, format)
    return q, dequantize(q)


def scanned(x, format):
    def body(carry, x):
        q = quantize(x, format)
        return carry, (q, dequantize(q))

    return jax.lax.scan(body, 0, x)[1]


def mapped(x, format):
    return jax.vmap(lambda x: fused(x, format))(x)


def shapes(tree):
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


TRANSFORMS = [jax.jit(function, static_argnums=1) for function in (fused, scanned, mapped)]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("format", list(FORMATS))
def test_same_bits_eager_jit_vmap_scan_and_fused(format, name):
    x = jnp.asarray(INPUTS[name])
    q = quantize(x, format)
    value = dequantize(q)
    with jax.disable_jit():
        assert_same_bits(quantize(x, format), q)
        np.testing.assert_array_equal(raw(dequantize(q)), raw(value))
    for function in TRANSFORMS:
        if not x.size:  # no bits, and not worth a compilation
            other = jax.eval_shape(lambda x: function(x, format), x)  # noqa: B023
            assert shapes(other) == shapes((q, value))
            continue
        other, other_value = function(x, format)
        assert_same_bits(other, q)
        np.testing.assert_array_equal(raw(other_value), raw(value))


@pytest.mark.parametrize("format", BLOCKS)
def test_mse_same_bits_eager_and_jit(format):
    x = jnp.asarray(INPUTS["wide"])
    q = quantize(x, format, method="mse")
    with jax.disable_jit():
        assert_same_bits(quantize(x, format, method="mse"), q)
    assert_same_bits(jax.jit(lambda x: quantize(x + 0.0, format, method="mse"))(x), q)
    assert_same_bits(jax.lax.map(lambda x: quantize(x, format, method="mse"), x), q)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    format=st.sampled_from(SCALED),
    low=st.integers(-126, 120),
    span=st.integers(0, 200),
)
def test_bits_against_numpy_random(seed, format, low, span):
    x = wide(np.random.default_rng(seed), (3, 8, 64), low, min(low + span, 124))
    q = quantize(x, format)
    expected = reference.quantize(x, format)
    assert_same_bits(q, expected)
    np.testing.assert_array_equal(raw(dequantize(q)), raw(reference.dequantize(expected, format)))


# --- against ml_dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize("log2", [-12, -8, -3, 0])
def test_nvfp4_against_ml_dtypes(log2):
    # A global scale of few bits makes every boundary exact, so that the rule is that of rounding
    # the exact quotient, which float64 and ml_dtypes do.
    x = INPUTS["wide"]
    total = np.float32(1.375 * 2.0**log2)
    q = quantize(x, "nvfp4", global_scale=total)
    blocks = x.reshape(3, 8, 4, 16).astype(np.float64)
    scale = np.minimum(np.abs(blocks).max(-1) / (6 * total), 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(raw(q.scale), scale.view(np.uint8))
    step = scale.astype(np.float64)[..., None] * total
    quotient = np.divide(blocks, step, where=step > 0, out=np.copysign(0, blocks))
    codes = quotient.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(x.shape)
    np.testing.assert_array_equal(np.asarray(q.packed()), reference.pack(codes))
    elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32).reshape(blocks.shape)
    value = elements * scale.astype(np.float32)[..., None] * total
    np.testing.assert_array_equal(raw(dequantize(q)), raw(value.reshape(x.shape)))


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8"])
def test_mx_against_ml_dtypes(format):
    x = INPUTS["wide"]
    spec = get_format(format)
    q = quantize(x, format)
    blocks = x.reshape(3, 8, 2, 32)
    _, exponent = np.frexp(np.abs(blocks).max(-1))
    power = np.exp2(exponent - 1.0 - np.floor(np.log2(spec.max)))
    np.testing.assert_array_equal(
        raw(q.scale), power.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    )
    quotient = np.clip(blocks / power[..., None], -spec.max, spec.max)
    codes = quotient.astype(spec.element).view(np.uint8).reshape(x.shape)
    data = reference.pack(codes) if spec.is_fp4 else codes
    np.testing.assert_array_equal(raw(q.data), data)


def test_fp8_against_ml_dtypes():
    x = INPUTS["wide"]
    total = np.float32(1.375 * 2.0**-3)
    q = quantize(x, "fp8", global_scale=total)
    quotient = np.clip(x.astype(np.float64) / total, -448, 448)
    np.testing.assert_array_equal(
        raw(q.data), quotient.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


def test_bf16_against_ml_dtypes():
    x = np.concatenate([INPUTS["wide"].ravel(), [F32_MAX, -F32_MAX, 1e-40, -0.0]])
    x = x.astype(np.float32).reshape(2, -1)
    largest = np.float32(get_format("bf16").max)
    expected = np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)
    expected = np.clip(expected, -largest, largest).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(raw(quantize(x, "bf16").data), expected.view(np.uint8))


@pytest.mark.parametrize("scale_dtype", ["float8_e4m3fn", "float8_e8m0fnu"])
def test_dequantize_every_scale_and_element(scale_dtype):
    """All 256 scale bytes times all 16 elements, subnormal scales and NaN among them."""
    format, block = {"float8_e4m3fn": ("nvfp4", 16), "float8_e8m0fnu": ("mxfp4", 32)}[scale_dtype]
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, block // 16))
    scale = np.arange(256, dtype=np.uint8)[:, None]
    total = {"global_scale": jnp.float32(0.7)} if format == "nvfp4" else {"global_scale": None}
    q = QuantizedTensor(
        jnp.asarray(reference.pack(codes)),
        jnp.asarray(scale.view(getattr(ml_dtypes, scale_dtype))),
        total["global_scale"],
        get_format(format),
    )
    elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        value = elements * scale.view(getattr(ml_dtypes, scale_dtype)).astype(np.float64)
        value = (value * np.float64(np.float32(0.7) if format == "nvfp4" else 1)).astype(np.float32)
    value = np.where(np.abs(value) < 2.0**-126, np.copysign(np.float32(0), value), value)
    for function in (dequantize, jax.jit(dequantize)):
        ours = np.asarray(function(q))
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(value))
        np.testing.assert_array_equal(
            raw(ours)[~np.isnan(value).repeat(4, -1)], raw(value)[~np.isnan(value).repeat(4, -1)]
        )


def test_dequantize_nvfp4_is_exact_in_bf16_without_a_global_scale():
    x = INPUTS["wide"]
    q = quantize(x, "nvfp4", global_scale=1.0)
    np.testing.assert_array_equal(
        np.asarray(dequantize(q, jnp.bfloat16)).astype(np.float32), np.asarray(dequantize(q))
    )
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("format", list(FORMATS))
def test_input_dtypes(format, dtype):
    x = jnp.asarray(INPUTS["normal"]).astype(dtype)
    assert_same_bits(quantize(x, format), quantize(x.astype(jnp.float32), format))


# --- edges ---------------------------------------------------------------------------------------


def test_tiny_block_is_zero():
    x = np.ones((1, 32), np.float32)
    x[0, :16] = 2.0**-20  # its scale would be 2^-20 * 448, below half of e4m3's smallest 2^-9
    q = quantize(x, "nvfp4")
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint8), [[0, 126]])
    np.testing.assert_array_equal(np.asarray(dequantize(q))[0, :16], 0)
    check(q)


def test_subnormal_block_scale_keeps_its_value():
    x = np.ones((1, 48), np.float32)
    x[0, :16], x[0, 16:32] = 3 / 448 * 2.0**-9, 1 / 448 * 2.0**-9
    q = quantize(x, "nvfp4", global_scale=1 / 2688)
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint8), [[3, 1, 126]])
    np.testing.assert_allclose(np.asarray(dequantize(q)), x, rtol=2e-7)


def test_negative_zero_keeps_its_sign():
    q = quantize(-np.zeros((1, 32), np.float32), "mxfp4")
    assert (np.asarray(q.data) == 0x88).all()
    assert np.signbit(np.asarray(dequantize(q))).all()


def test_global_scale_of_zeros_is_positive():
    for format in ("nvfp4", "fp8"):
        q = quantize(np.zeros((2, 4, 32), np.float32), format)
        np.testing.assert_array_equal(q.global_scale, np.full(2, 2.0**-112, np.float32))


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("format", list(FORMATS))
def test_nonfinite_raises(format, value):
    x = INPUTS["normal"].copy()
    x[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"1 of 1536 elements.*nonfinite=\"saturate\""):
        quantize(x, format)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("format", list(FORMATS))
def test_nonfinite_traced_becomes_nan(format, value):
    x = INPUTS["normal"].copy()
    x[1, 2, 3] = value
    result = np.asarray(jax.jit(lambda x: dequantize(quantize(x, format)))(x))
    clean = np.asarray(dequantize(quantize(np.where(np.isfinite(x), x, 0), format)))
    nan = np.zeros(x.shape, bool)
    if format in ("nvfp4", "fp8"):
        nan[1] = True
    elif format == "bf16":
        np.testing.assert_array_equal(result[1, 2, 3], value)
        result = result.copy()
        result[1, 2, 3] = clean[1, 2, 3]
    else:
        nan[1, 2, :32] = True
    assert np.isnan(result[nan]).all()
    np.testing.assert_array_equal(result[~nan], clean[~nan])


@pytest.mark.parametrize("format", SCALED)
def test_nonfinite_saturates(format):
    x = INPUTS["normal"].copy()
    x[0, 1, 2], x[1, 2, 3], x[2, 3, 4] = INF, -INF, NAN
    x[1, 7, :] = [-INF, INF] * 32
    expected = reference.quantize(reference.saturate(x), format)
    for function in (quantize, jax.jit(quantize, static_argnums=1, static_argnames="nonfinite")):
        q = function(x, format, nonfinite="saturate")
        assert_same_bits(q, expected)
    all_infinite = quantize(np.full_like(x, INF), format, nonfinite="saturate")
    np.testing.assert_array_equal(np.asarray(dequantize(all_infinite)), 0)


def test_given_global_scale_saturates():
    x = np.array([[1e30, -1e30] + [1.0] * 14 + [0.0] * 16], np.float32)
    q = quantize(x, "nvfp4", global_scale=1.0)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), [[2688.0, -2688.0] + [0.0] * 30])
    for low in (2.0**-112, 2.0**117):
        assert_same_bits(
            quantize(INPUTS["huge"], "nvfp4", global_scale=low),
            reference.quantize_nvfp4(INPUTS["huge"], np.full(3, low)),
        )
        assert_same_bits(
            quantize(INPUTS["huge"], "fp8", global_scale=low),
            reference.quantize_fp8(INPUTS["huge"], np.full(3, low)),
        )


def test_given_global_scales_per_matrix():
    x = INPUTS["wide"]
    scales = np.array([0.5, 1.7, 3e-5], np.float32)
    expected = reference.quantize_nvfp4(x, scales)
    assert_same_bits(quantize(x, "nvfp4", global_scale=scales), expected)
    traced = jax.jit(lambda x, s: quantize(x, "nvfp4", global_scale=s))
    assert_same_bits(traced(x, scales), expected)


# --- method="mse" --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal", "wide", "tiny blocks", "very wide", "ties", "zeros"])
@pytest.mark.parametrize("format", BLOCKS)
def test_mse_is_the_best_of_its_candidates(format, name):
    x = INPUTS[name]
    spec = get_format(format)
    q, rule = quantize(x, format, method="mse"), quantize(x, format)
    code, rule_code = (np.asarray(t.scale).view(np.uint8).astype(int) for t in (q, rule))
    table = reference.E2M1 if spec.is_fp4 else reference.E4M3
    blocks = np.abs(x.reshape(*code.shape, spec.block_size)).astype(np.float64)
    scales = reference.E4M3 if format == "nvfp4" else reference.E8M0[:-1]
    total = (
        np.asarray(rule.global_scale)[:, None, None].astype(np.float64) if format == "nvfp4" else 1
    )
    reach = (-4, 5) if format == "nvfp4" else (-1, 1)
    amax = blocks.max(-1)
    unit = np.where(amax > 0, 2.0 ** np.floor(np.log2(np.where(amax > 0, amax, 1))), 1)

    def error(code):
        step = (scales[code] * total)[..., None]
        near = table[reference.encode(blocks / np.where(step > 0, step, 1), table)]
        return np.square((blocks - np.where(step > 0, near * step, 0)) / unit[..., None]).sum(-1)

    offsets = range(reach[0], reach[1] + 1)
    errors = [error(np.clip(rule_code + o, 0, len(scales) - 1)) for o in offsets]
    assert (code >= rule_code + reach[0]).all()
    assert (code <= rule_code + reach[1]).all()
    # Squares are summed with 22 binary places.
    np.testing.assert_allclose(error(code), np.min(errors, 0), rtol=0, atol=32 * 2.0**-22)
    check(q)


@pytest.mark.parametrize(("format", "gain"), [("nvfp4", 0.9), ("mxfp4", 0.98), ("mxfp8", 0.95)])
def test_mse_reduces_the_error(format, gain):
    x = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32)

    def error(method):
        return np.linalg.norm(np.asarray(dequantize(quantize(x, format, method=method))) - x)

    assert error("mse") < gain * error("amax")


def test_round_trip_of_representable_values():
    """What a format can hold is kept, whichever scale it came with."""
    rng = np.random.default_rng(6)
    elements = rng.choice(reference.E2M1, (2, 16, 64)) * rng.choice([-1, 1], (2, 16, 64))
    elements[..., ::16] = 6  # so that the amax rule finds the same scales
    scale = rng.choice(reference.E4M3[8:], (2, 16, 4)).repeat(16, -1)
    scale[:, 0] = 448
    x = (elements * scale).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(dequantize(quantize(x, "nvfp4"))), x)
    mx = (elements * np.exp2(rng.integers(-120, 120, (2, 16, 2))).repeat(32, -1)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(dequantize(quantize(mx, "mxfp4"))), mx)


# --- fake_quantize -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("format", list(FORMATS))
def test_fake_quantize(format, dtype):
    x = jnp.asarray(INPUTS["normal"]).astype(dtype)
    expected = dequantize(quantize(x, format), dtype)
    for function in (fake_quantize, jax.jit(fake_quantize, static_argnums=1)):
        ours = function(x, format)
        assert ours.dtype == dtype
        np.testing.assert_array_equal(raw(ours), raw(expected))

    cotangent = jnp.asarray(np.random.default_rng(7).standard_normal(x.shape), dtype)
    _, pullback = jax.vjp(lambda x: fake_quantize(x, format), x)
    np.testing.assert_array_equal(raw(pullback(cotangent)[0]), raw(cotangent))
    _, tangent = jax.jvp(lambda x: fake_quantize(x, format), (x,), (cotangent,))
    np.testing.assert_array_equal(raw(tangent), raw(cotangent))


def test_fake_quantize_holds_the_barrier():
    text = jax.jit(fake_quantize, static_argnums=1).lower(jnp.ones((4, 32)), "mxfp4").as_text()
    assert text.count("optimization_barrier") == 2


def test_fake_quantize_accepts_nonfinite_and_vmap():
    x = jnp.asarray(INPUTS["normal"]).at[0, 0, 0].set(jnp.nan)
    ours = np.asarray(jax.vmap(lambda x: fake_quantize(x, "nvfp4"))(x))
    assert np.isnan(ours[0]).all()
    assert np.isfinite(ours[1:]).all()


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones((4, 24)), "nvfp4"), {}, ValueError, r"K must be a multiple of 16.*\[4, 24\]"),
        ((np.ones((4, 48)), "mxfp4"), {}, ValueError, "K must be a multiple of 32 for mxfp4"),
        ((np.ones(32), "mxfp4"), {}, ValueError, r"must have shape \[..., N, K\], got \[32\]"),
        ((np.ones((4, 32), np.int32), "mxfp4"), {}, TypeError, "floating-point, got int32"),
        ((np.ones((4, 32)), "int4"), {}, ValueError, "unknown name 'int4'"),
        ((np.ones((4, 32)), "nvfp4"), {"method": "l1"}, ValueError, "one of amax, mse, got 'l1'"),
        ((np.ones((4, 32)), "nvfp4"), {"nonfinite": "x"}, ValueError, "one of error, saturate"),
        ((np.ones((4, 32)), "fp8"), {"method": "mse"}, ValueError, "searches block scales"),
        ((np.ones((4, 32)), "mxfp4"), {"global_scale": 1.0}, ValueError, "mxfp4 has none"),
        ((np.ones((4, 32)), "nvfp4"), {"global_scale": 0.0}, ValueError, "within .* 1 of 1"),
        ((np.ones((4, 32)), "nvfp4"), {"global_scale": NAN}, ValueError, "within"),
        ((np.ones((4, 32)), "nvfp4"), {"global_scale": -1.0}, ValueError, "within"),
        ((np.ones((4, 32)), "nvfp4"), {"global_scale": 1e-36}, ValueError, "within"),
        (
            (np.ones((2, 4, 32)), "nvfp4"),
            {"global_scale": np.ones(3)},
            ValueError,
            r"scalar or of shape \[2\], got \[3\]",
        ),
    ],
)
def test_refusals(arguments, options, error, message):
    x, format = arguments
    x = x.astype(np.float32) if x.dtype == np.float64 else x
    with pytest.raises(error, match=message):
        quantize(x, format, **options)
