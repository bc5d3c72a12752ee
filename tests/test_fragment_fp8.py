"""The Hopper layout for W4A8 against a slow reading of its description, byte for byte."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmoe
from jaxmoe.kernels import fragment_fp8

# Odd strips, gated strips that are not full, and K before, at and after a block of 128.
SIZES = [(2, 32), (40, 96), (80, 128), (72, 160), (136, 288), (128, 256)]


def tensor(data, scale):
    """MXFP4 `[E, N, K]` from packed elements and e8m0 bytes."""
    scale = jnp.asarray(np.asarray(scale, np.uint8).view(ml_dtypes.float8_e8m0fnu))
    return jaxmoe.QuantizedTensor(jnp.asarray(data), scale, None, jaxmoe.MXFP4)


def random_bits(n, k, e=3, seed=0, spread=(4, 18, 254), zeros=0.2):
    """Every code, exponents spread differently in each expert, and blocks of zeros of any scale."""
    rng = np.random.default_rng(seed)
    blocks = (e, n, k // 32)
    data = rng.integers(0, 256, (e, n, k // 2), np.uint8)
    width = np.array(spread)[np.arange(e) % len(spread)][:, None, None]
    scale = np.uint8(rng.integers(0, width + 1, blocks) + rng.integers(0, 255 - width))
    zero = rng.random(blocks) < zeros
    data = np.where(np.repeat(zero, 16, axis=-1), data & 0x88, data)
    scale = np.where(zero, rng.integers(0, 255, blocks), scale)
    return data, scale.astype(np.uint8)


def bits(data, scale):
    return oracle.Bits("mxfp4", np.asarray(data), np.asarray(scale).view(np.uint8))


def slow_pack(data, scale, gated):
    """One matrix, element by element, from the description of the layout."""
    codes, d, exponents = oracle.rebased(bits(data, scale))
    n, k = codes.shape
    strips = -(-(n // 2) // 32) if gated else -(-n // 64)
    blocks = -(-k // 128)

    def source(s, w, g, half):
        if not gated:
            row = 64 * s + 16 * w + g + 8 * half
            return row if row < n else None
        row = 32 * s + 8 * w + g
        return None if row >= n // 2 else row + half * (n // 2)

    out = bytearray()
    for s in range(strips):
        for b in range(blocks):
            for half, w, g, c, j in itertools.product(*map(range, (2, 4, 8, 4, 4))):
                row, dword = source(s, w, g, half), 0
                for i in range(8):
                    at = 128 * b + 32 * j + 4 * c + (i if i < 4 else 16 + i - 4)
                    code = 0 if row is None or at >= k else int(codes[row, at])
                    sign = 7 + 8 * i if i < 4 else 3 + 8 * (i - 4)
                    dword |= (code & 7) << 4 * i | (code >> 3) << sign
                out += dword.to_bytes(4, "little")
            for w, g, half, j in itertools.product(*map(range, (4, 8, 2, 4))):
                row, block = source(s, w, g, half), 4 * b + j
                if block >= k // 32:
                    out.append(8)
                else:  # a row of padding is one of zeros, whose scales are 2^0
                    out.append(8 * (6 + (0 if row is None else int(d[row, block]))))
        for w, g, half in itertools.product(*map(range, (4, 8, 2))):
            row = source(s, w, g, half)
            out.append(0 if row is None else int(exponents[row]))
    assert len(out) == strips * (blocks * 4352 + 64)
    return np.frombuffer(bytes(out), np.uint8)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_byte_for_byte(n, k, gated):
    data, scale = random_bits(n, k, seed=n)
    packed = fragment_fp8.pack(tensor(data, scale), gated)
    assert packed.layout == "sm90_fragment_fp8"
    assert packed.shape == (3, n, k)
    assert packed.data.shape == (3, fragment_fp8.num_bytes(n, k, jaxmoe.MXFP4, gated))
    np.testing.assert_array_equal(np.asarray(packed.global_scale), np.ones(3, np.float32))
    for e in range(3):
        np.testing.assert_array_equal(packed.data[e], slow_pack(data[e], scale[e], gated))


def decoded(w):
    """float64 values of a canonical tensor of the package."""
    return bits(w.packed(), w.scale).decode()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_unpack_gives_what_the_kernel_multiplies(n, k, gated):
    data, scale = random_bits(n, k, seed=k)
    w = tensor(data, scale)
    back = fragment_fp8.unpack(fragment_fp8.pack(w, gated), jnp.array([2, 0]))
    assert back.shape == (2, n, k)
    for place, e in enumerate((2, 0)):
        want = oracle.decode_rebased(bits(data[e], scale[e]))
        np.testing.assert_array_equal(decoded(back)[place], want)
    # Expert 0 spreads its scales over 2^4: nothing is rebased, and every bit comes back, but for
    # the scales of zeros.
    np.testing.assert_array_equal(np.asarray(back.packed())[1], data[0])
    kept = (data[0].reshape(*scale[0].shape, 16) & 0x77).any(-1)
    np.testing.assert_array_equal(np.asarray(back.scale).view(np.uint8)[1][kept], scale[0][kept])


@pytest.mark.parametrize("code", [0, 1, 5, 6, 7, 11, 12, 127, 253, 254])
@pytest.mark.parametrize("beside", [0, 11])
def test_extreme_scales_survive(code, beside):
    """One scale, or two that are 2^11 apart, the most that is exact; 2^-127 and 2^127 are there."""
    data, _ = random_bits(64, 64, e=1, zeros=0)
    scale = np.full((1, 64, 2), code, np.uint8)
    scale[..., 1] = np.minimum(code + beside, 254)
    w = tensor(data, scale)
    packed = fragment_fp8.pack(w, False)
    back = fragment_fp8.unpack(packed, jnp.arange(1))
    np.testing.assert_array_equal(back.packed(), data)
    np.testing.assert_array_equal(np.asarray(back.scale).view(np.uint8), scale)
    top = int(scale.max())
    np.testing.assert_array_equal(packed.data[0, -64:], np.full(64, max(top - 6, 0)))


def test_every_code_is_rounded_as_the_description_says():
    """All codes, rebased by 0 ... 8, against the nearest value of the grid."""
    for shift in range(9):
        codes = np.arange(16, dtype=np.uint8)
        want = oracle.nearest_e2m1(np.ldexp(oracle._E2M1[codes % 8], -shift)) + codes // 8 * 8
        pairs = fragment_fp8._rebase(jnp.asarray(codes | (15 - codes) << 4), jnp.uint8(shift))
        np.testing.assert_array_equal(pairs, want | want[::-1] << 4)


@pytest.mark.parametrize("stray", [0, 200, 254])
def test_the_scale_of_a_block_of_zeros_costs_nothing(stray):
    data, scale = random_bits(8, 128, e=1, spread=(3,), zeros=0)
    data[..., 16:32] &= 0x88  # zeros of either sign
    scale[..., 1] = stray
    w = tensor(data, scale)
    back = fragment_fp8.unpack(fragment_fp8.pack(w, False), jnp.arange(1))
    np.testing.assert_array_equal(decoded(back), bits(data, scale).decode())
    nothing = tensor(data & 0x88, np.full_like(scale, stray))
    back = fragment_fp8.unpack(fragment_fp8.pack(nothing, True), jnp.arange(1))
    assert not decoded(back).any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.integers(0, 254), zeros=st.sampled_from([0.0, 0.5]))
def test_error_is_within_the_bound(seed, spread, zeros):
    """At most 2^-13 of the largest block scale of a row, and none within 2^11 of it."""
    data, scale = random_bits(16, 128, e=1, seed=seed, spread=(spread,), zeros=zeros)
    packed = fragment_fp8.pack(tensor(data, scale), False)
    error = np.abs(decoded(fragment_fp8.unpack(packed, jnp.arange(1))) - bits(data, scale).decode())
    zero = (data.reshape(*scale.shape, 16) & 0x77 == 0).all(-1)
    top = np.where(zero, 0, scale).astype(np.int64).max(-1)
    assert (error <= np.ldexp(1.0, top - 127 - 13)[..., None]).all()
    exact = np.repeat(zero | (top[..., None] - scale <= 11), 32, axis=-1)
    assert not error[exact].any()
    exponent = np.asarray(packed.data[0, -64:]).astype(np.int64)
    assert exponent.max() == max(top.max() - 6, 0)


def test_packing_takes_little_more_memory_than_its_result():
    e, n, k = 16, 512, 1024
    w = jax.eval_shape(lambda: jaxmoe.quantize(jnp.zeros((e, n, k)), "mxfp4"))
    memory = fragment_fp8.pack.lower(w, True).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * fragment_fp8.num_bytes(n, k, w.format, True)
