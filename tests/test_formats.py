"""Format specs, and the codecs on every code and around every rounding boundary."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference_formats as reference

from jaxmoe import _codecs as codecs
from jaxmoe.formats import BF16, FORMATS, FP8, MXFP4, MXFP8, NVFP4, get_format
from jaxmoe.quantization import unpack_e2m1

CODECS = {
    "e2m1": (codecs.E2M1, reference.E2M1, ml_dtypes.float4_e2m1fn, 8),
    "e4m3": (codecs.E4M3, reference.E4M3, ml_dtypes.float8_e4m3fn, 128),
}
MODES = {"eager": lambda f: f, "jit": jax.jit}


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize(
    ("format", "element_bits", "total_bits", "largest"),
    [
        (NVFP4, 4, 4.5, 6.0),
        (MXFP4, 4, 4.25, 6.0),
        (MXFP8, 8, 8.25, 448.0),
        (FP8, 8, 8.0, 448.0),
        (BF16, 16, 16.0, (2 - 2**-7) * 2.0**127),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_spec(format, element_bits, total_bits, largest):
    assert format.element_bits == element_bits
    assert format.bits_per_element == total_bits
    assert format.max == largest
    assert format.is_fp4 == (element_bits == 4)
    assert FORMATS[format.name] is format
    assert get_format(format.name.upper()) is format
    assert get_format(format) is format
    assert str(format) == format.name


def test_specs_are_hashable_and_fixed():
    assert len({*FORMATS.values()}) == 5
    with pytest.raises(TypeError):
        FORMATS["new"] = NVFP4
    with pytest.raises(AttributeError):
        NVFP4.block_size = 32


def test_unknown_format():
    with pytest.raises(ValueError, match="'fp3'; choose one of nvfp4, mxfp4, mxfp8, fp8, bf16"):
        get_format("fp3")
    with pytest.raises(TypeError, match="name or a Format, got int"):
        get_format(4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CODECS)
def test_decode_every_code(name, mode):
    codec, table, dtype, sign_bit = CODECS[name]
    codes = np.arange(2 * sign_bit, dtype=np.uint8)
    ours = np.asarray(MODES[mode](codec.decode_signed)(jnp.arange(2 * sign_bit)))
    expected = codes.view(dtype).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(bits(ours)[~nan], bits(expected)[~nan])
    assert np.isnan(ours[nan]).all()
    np.testing.assert_array_equal(ours, reference.decode(codes, table, sign_bit).astype(np.float32))
    positive = np.asarray(MODES[mode](codec.decode)(jnp.arange(codec.last + 1)))
    np.testing.assert_array_equal(positive, table.astype(np.float32))
    assert codec.sign_bit == sign_bit
    assert codec.max_exponent == np.floor(np.log2(table[-1]))


def boundaries(table):
    """Every value and midpoint, its f32 neighbours, and the ends of f32's range."""
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf))])
    points = np.concatenate([points, np.nextafter(points, np.float32(0))])
    top = np.array([table[-1] * 1.03, 1e4, 3.4028235e38, np.inf, 2.0**-126], np.float32)
    points = np.concatenate([points, top])
    return points[(points == 0) | (points >= 2.0**-126)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CODECS)
def test_encode_at_every_boundary(name, mode):
    codec, table, dtype, sign_bit = CODECS[name]
    rng = np.random.default_rng(0)
    random = np.exp2(rng.uniform(-14, 12, 100_000)).astype(np.float32)
    x = np.concatenate([boundaries(table), random])
    ours = np.asarray(MODES[mode](codec.encode)(jnp.asarray(x)))
    np.testing.assert_array_equal(ours, reference.encode(x, table))
    # ml_dtypes' e4m3 overflows to NaN: saturation is ours.
    expected = np.minimum(x, np.float32(table[-1])).astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(ours, expected)
    assert int(MODES[mode](codec.encode)(jnp.float32(np.nan))) == 0
    assert (expected < sign_bit).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CODECS)
def test_round_quotient(name, mode):
    codec, table, _, _ = CODECS[name]
    rng = np.random.default_rng(1)
    multiple = rng.integers(0, {"e2m1": 2**18, "e4m3": 32}[name], 20_000, endpoint=True)
    multiple[:1000] = 0
    unit = np.exp2(rng.uniform(-110, 100, multiple.size)).astype(np.float32)
    # Half of the inputs lie on a boundary or one f32 next to it.
    value = np.exp2(rng.uniform(-3, np.log2(table[-1]) + 1, multiple.size))
    midpoint = rng.choice((table[1:] + table[:-1]) / 2, multiple.size)
    x = (np.where(rng.random(multiple.size) < 0.5, midpoint, value) * multiple * unit).astype(
        np.float32
    )
    x = np.where(rng.random(x.size) < 0.3, np.nextafter(x, np.float32(0)), x)
    x = np.where(x < 2.0**-126, np.float32(0), x)
    function = MODES[mode](lambda *operands: codecs.round_quotient(*operands, codec))
    ours = function(jnp.asarray(x), jnp.asarray(multiple), jnp.asarray(unit))
    expected = reference.encode(x, table, multiple * unit.astype(np.float64))
    np.testing.assert_array_equal(np.asarray(ours), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("odd", "log2"), [(7, 6), (21, 7)])
def test_divide_exactly(odd, log2, mode):
    rng = np.random.default_rng(2)
    x = np.concatenate(
        [
            np.exp2(rng.uniform(-100, 127.9, 200_000)).astype(np.float32),
            np.arange(1, 70_000, dtype=np.float32),
            np.array([0, 3.4028235e38], np.float32),
        ]
    )
    function = MODES[mode](lambda x: codecs.divide_exactly(codecs.magnitude_bits(x), odd, log2))
    np.testing.assert_array_equal(
        bits(function(jnp.asarray(x))), bits(x / np.float32(odd * 2**log2))
    )


@pytest.mark.parametrize("mode", MODES)
def test_unpack_e2m1_every_byte(mode):
    packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
    ours = MODES[mode](unpack_e2m1)(jnp.asarray(packed))
    expected = reference.unpack(packed).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert ours.shape == (2, 256)
    np.testing.assert_array_equal(bits(ours), bits(expected))


def test_nibbles_round_trip():
    codes = np.random.default_rng(3).integers(0, 16, (3, 5, 8))
    packed = codecs.pack_nibbles(jnp.asarray(codes))
    np.testing.assert_array_equal(np.asarray(packed), reference.pack(codes))
    np.testing.assert_array_equal(np.asarray(codecs.unpack_nibbles(packed)), codes)


@pytest.mark.parametrize("mode", MODES)
def test_times_power_of_two_passes_through_subnormal_factors(mode):
    n = np.arange(-252, 255)
    function = MODES[mode](codecs.times_power_of_two)
    for start in (2.0**-126, 1.5, 2.0**127):
        with np.errstate(over="ignore"):
            expected = np.ldexp(start, n).astype(np.float32)
        expected = np.where(expected < 2.0**-126, np.float32(0), expected)
        ours = np.asarray(function(jnp.full(n.shape, start, jnp.float32), jnp.asarray(n)))
        np.testing.assert_array_equal(bits(ours), bits(expected))
