"""The Hopper weight layout against a slow reading of its description, byte for byte."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmoe
from jaxmoe.kernels import fragment

BLOCK = {"nvfp4": 16, "mxfp4": 32}
SIZES = [(16, 32), (40, 96), (72, 160), (136, 192)]


def random_weight(fmt, n, k, e=3, seed=0):
    """Every code and every kind of scale: zero, subnormal, smallest, largest."""
    rng = np.random.default_rng(seed)
    blocks = (e, n, k // BLOCK[fmt])
    data = rng.integers(0, 256, (e, n, k // 2), np.uint8)
    if fmt == "nvfp4":
        scale = rng.choice(np.arange(0x7F, dtype=np.uint8), blocks)
        scale = np.where(rng.random(blocks) < 0.4, rng.integers(0, 9, blocks), scale)
        zero = np.repeat(scale == 0, BLOCK[fmt] // 2, axis=-1)
        data = np.where(zero, data & 0x88, data)  # zero blocks hold zeros of either sign
        global_scale = jnp.asarray(rng.uniform(0.5, 2, e), jnp.float32)
        dtype = ml_dtypes.float8_e4m3fn
    else:
        spread = np.array([3, 120, 254])[np.arange(e) % 3]  # of the exponents, by expert
        scale = rng.integers(0, spread[:, None, None] + 1, blocks)
        global_scale, dtype = None, ml_dtypes.float8_e8m0fnu
    scale = jnp.asarray(scale.astype(np.uint8).view(dtype))
    return jaxmoe.QuantizedTensor(
        jnp.asarray(data), scale, global_scale, jaxmoe.formats.get_format(fmt)
    )


def code_at(data, row, k):
    return int(data[row, k // 2]) >> 4 * (k % 2) & 15


def nvfp4_byte(scale):
    value = float(np.uint8(scale).view(ml_dtypes.float8_e4m3fn))
    if value == 0:
        return 0
    mantissa, exponent = np.frexp(value)  # value = mantissa 2^exponent, mantissa in [0.5, 1)
    return (int(exponent) - 1 + 20) * 8 + int((2 * mantissa - 1) * 8)


PLACES = [(15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 11, 10, 13)]


def slow_pack(fmt, data, scale, gated):
    """One matrix, element by element, from the comments of layout.h and dequantize.cuh."""
    n, k = data.shape[0], 2 * data.shape[1]
    size, per_block = BLOCK[fmt], 64 // BLOCK[fmt]
    strips = -(-(n // 2) // 32) if gated else -(-n // 64)
    blocks = -(-k // 64)
    top = int(scale.max())

    def source(s, w, rr):
        if not gated:
            row = 64 * s + 16 * w + rr
            return row if row < n else None
        row = 32 * s + 8 * w + rr % 8
        return None if row >= n // 2 else row + (n // 2 if rr >= 8 else 0)

    def scale_byte(row, at):
        if row is None or at >= k:
            return 0
        code = int(scale[row, at // size])
        return nvfp4_byte(code) if fmt == "nvfp4" else max(0, code - top + 244)

    out = bytearray()
    for s in range(strips):
        for b in range(blocks):
            for w in range(4):
                for lane in range(32):
                    g, c = divmod(lane, 4)
                    for j in range(4):
                        dword = 0
                        for r in range(4):
                            row = source(s, w, g + 8 * (r & 1))
                            for half in range(2):
                                at = 64 * b + 16 * j + 2 * c + 8 * (r >> 1) + half
                                if scale_byte(row, at) == 0:
                                    continue
                                code = code_at(data, row, at)
                                for bit, place in zip((3, 2, 1, 0), PLACES[r], strict=True):
                                    dword |= (code >> bit & 1) << (place + 16 * half)
                        out += dword.to_bytes(4, "little")
            places = itertools.product(range(4), range(8), range(per_block), (0, 8))
            for w, g, i, half in places:
                out.append(scale_byte(source(s, w, g + half), 64 * b + i * size))
    return np.frombuffer(bytes(out), np.uint8)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", BLOCK)
@pytest.mark.parametrize(("n", "k"), [(80, 32), (72, 96), (64, 64)])
def test_byte_for_byte(fmt, n, k, gated):
    w = random_weight(fmt, n, k)
    packed = fragment.pack(w, gated)
    assert packed.layout == "sm90_fragment"
    assert packed.shape == w.shape
    assert packed.data.shape == (3, fragment.num_bytes(n, k, w.format, gated))
    scale = np.asarray(w.scale).view(np.uint8)
    for e in range(3):
        want = slow_pack(fmt, np.asarray(w.data[e]), scale[e], gated)
        np.testing.assert_array_equal(np.asarray(packed.data[e]), want)
    want = 2.0 ** (scale.max((1, 2)) - 127.0) if w.global_scale is None else w.global_scale
    np.testing.assert_array_equal(np.asarray(packed.global_scale), np.float32(want))


def test_scales_keep_their_values():
    """Each byte, read as the kernel reads it, is the scale that it was made from."""
    e4m3 = np.arange(0x7F, dtype=np.uint8)
    code = np.asarray(fragment._encode_nvfp4(jnp.asarray(e4m3))).astype(int)
    value = np.where(code == 0, 0, (1 + code % 8 / 8) * 2.0 ** (code // 8 - 20))
    np.testing.assert_array_equal(value, e4m3.view(ml_dtypes.float8_e4m3fn).astype(float))
    np.testing.assert_array_equal(fragment._decode_nvfp4(jnp.uint8(code)), e4m3)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", BLOCK)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_round_trip(fmt, n, k, gated):
    w = random_weight(fmt, n, k, seed=n + k)
    back = fragment.unpack(fragment.pack(w, gated), jnp.array([2, 0]))
    for place, expert in enumerate((2, 0)):
        got, want = back[place], w[expert]
        scale, data = (np.asarray(a).view(np.uint8) for a in (want.scale, want.data))
        lost = scale == 0 if fmt == "nvfp4" else scale.max().astype(int) - scale >= 244
        kept = ~np.repeat(lost, BLOCK[fmt] // 2, axis=-1)
        np.testing.assert_array_equal(np.asarray(got.data)[kept], data[kept])
        assert not np.asarray(got.data)[~kept].any()
        np.testing.assert_array_equal(np.asarray(got.scale).view(np.uint8)[~lost], scale[~lost])
        if fmt == "nvfp4":
            assert got.global_scale == want.global_scale


def test_smallest_and_largest_mxfp4_scales():
    """All scales 2^-127, then all 2^127: the global scale takes the whole exponent."""
    for code in (0, 254):
        scale = np.full((1, 64, 2), code, np.uint8).view(ml_dtypes.float8_e8m0fnu)
        data = jnp.full((1, 64, 32), 0x21, jnp.uint8)
        w = jaxmoe.QuantizedTensor(data, jnp.asarray(scale), None, jaxmoe.MXFP4)
        packed = fragment.pack(w, False)
        assert np.asarray(packed.global_scale).astype(np.float64) == 2.0 ** (code - 127)
        back = fragment.unpack(packed, jnp.arange(1))
        np.testing.assert_array_equal(np.asarray(back.scale).view(np.uint8), scale.view(np.uint8))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", BLOCK)
def test_packing_takes_less_than_one_matrix_beside_its_result(fmt, gated):
    e, n, k = 16, 768, 1024
    w = jax.eval_shape(lambda: jaxmoe.quantize(jnp.zeros((e, n, k)), fmt))
    memory = fragment.pack.lower(w, gated).compile().memory_analysis()
    assert memory.temp_size_in_bytes < fragment.num_bytes(n, k, w.format, gated)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", BLOCK)
def test_packing_in_parts_is_packing_the_whole_matrix(fmt, gated):
    """With several parts, the last of them padded."""
    w = random_weight(fmt, 64 * 12 - 8, 96)
    packed = fragment.pack(w, gated)
    scale = jax.lax.bitcast_convert_type(w.scale, jnp.uint8)
    for e in range(3):
        top = None if w.global_scale is None else w.global_scale[e]
        want, factor = fragment.pack_matrix(w.packed()[e], scale[e], top, gated)
        np.testing.assert_array_equal(packed.data[e], want)
        assert packed.global_scale[e] == factor
