"""Codes of e2m1, e4m3 and e8m0 to f32 values and back, in integer arithmetic.

Nothing here relies on a backend's own conversions, because they differ in ways that change bits:
XLA converts float4 on a CPU at a tenth of the speed of these formulas, may fold a narrowing and a
widening conversion into nothing, flushes f32 subnormals to zero on a CPU and not on a GPU, and
replaces a division by a product with the rounded reciprocal. So subnormals are never formed, and
a quotient is rounded by comparing products (`round_quotient`). Results are the same bits
eagerly, under jit and on every backend.

Values are magnitudes and codes are int32 without a sign bit, except where a name says "signed".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmoe.formats import FLOAT4_E2M1, FLOAT8_E4M3

_MAGNITUDE = 0x7FFFFFFF
_SMALLEST_NORMAL = 0x00800000  # bits of 2^-126
_INFINITY = 0x7F800000


def float_bits(x: jax.Array) -> jax.Array:
    """Bits of f32 values as int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def float_from_bits(bits: jax.Array) -> jax.Array:
    """The f32 values with these int32 bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Bits of |x|, ordered as the values are (NaN above infinity), with subnormals as zero."""
    bits = float_bits(x) & _MAGNITUDE
    return jnp.where(bits < _SMALLEST_NORMAL, 0, bits)


def is_finite_bits(bits: jax.Array) -> jax.Array:
    """Whether magnitude bits are those of a finite value."""
    return bits < _INFINITY


def power_of_two(n: jax.Array) -> jax.Array:
    """2^n in f32 for int32 n in [-126, 127]."""
    return float_from_bits((n + 127) << 23)


def times_power_of_two(x: jax.Array, n: jax.Array) -> jax.Array:
    """x * 2^n for n in [-252, 254], exact where the result is a normal f32.

    Two factors, since 2^-127 (the smallest e8m0 scale) is itself subnormal in f32.
    """
    half = n >> 1
    return x * power_of_two(half) * power_of_two(n - half)


def decode_e2m1(code: jax.Array) -> jax.Array:
    """Values 0, 0.5, 1, 1.5, 2, 3, 4, 6 of codes 0 to 7."""
    return float_from_bits(_e2m1_bits(code))


def _e2m1_bits(code: jax.Array) -> jax.Array:
    # From code 2 on, e2m1's exponent and mantissa are f32's after a shift and a change of bias
    # (127 - 1 = 126); codes 0 and 1 are 0 and 0.5 (bits 0x3F000000).
    return jnp.where(code >= 2, (code << 22) + (126 << 23), code * 0x3F000000)


def decode_signed_e2m1(code: jax.Array) -> jax.Array:
    """Values of 4-bit codes, sign in bit 3."""
    return float_from_bits(_e2m1_bits(code & 7) | (code & 8) << 28)


def encode_e2m1(x: jax.Array) -> jax.Array:
    """Code of the nearest e2m1 value, ties to the even code, saturating at 6; NaN gives 0."""
    above = [x > 0.25, x >= 0.75, x > 1.25, x >= 1.75, x > 2.5, x >= 3.5, x > 5.0]
    return sum((bit.astype(jnp.int32) for bit in above), jnp.zeros(x.shape, jnp.int32))


def decode_e4m3(code: jax.Array) -> jax.Array:
    """Values of codes 0 to 126 (448); 127 is NaN."""
    normal = float_from_bits((code << 20) + (120 << 23))
    subnormal = code.astype(jnp.float32) * np.float32(2.0**-9)
    value = jnp.where(code < 8, subnormal, normal)
    return jnp.where(code == 127, jnp.float32(jnp.nan), value)


def decode_signed_e4m3(code: jax.Array) -> jax.Array:
    """Values of 8-bit codes, sign in bit 7."""
    bits = float_bits(decode_e4m3(code & 127))
    return float_from_bits(bits | (code & 128) << 24)


def encode_e4m3(x: jax.Array) -> jax.Array:
    """Code of the nearest e4m3 value, ties to the even code, saturating at 448; NaN gives 127."""
    bits = float_bits(jnp.minimum(x, np.float32(448.0)))
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = lax.round(x * np.float32(512.0), lax.RoundingMethod.TO_NEAREST_EVEN)
    code = jnp.where(x < np.float32(2.0**-6), subnormal.astype(jnp.int32), normal)
    return jnp.where(jnp.isnan(x), 127, code)


@dataclass(frozen=True)
class Codec:
    """The magnitudes of an element dtype: `decode(code)` ascends over codes 0 to `last`."""

    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    decode_signed: Callable[[jax.Array], jax.Array]
    last: int
    sign_bit: int
    max_exponent: int


CODECS = {
    FLOAT4_E2M1: Codec(encode_e2m1, decode_e2m1, decode_signed_e2m1, 7, 8, 2),
    FLOAT8_E4M3: Codec(encode_e4m3, decode_e4m3, decode_signed_e4m3, 126, 128, 8),
}


def round_quotient(x: jax.Array, step: jax.Array, codec: Codec) -> jax.Array:
    """Code of the value nearest to x / step, ties to the even code, saturating; 0 where step is 0.

    The rule in full: the answer is the code c for which x lies between the midpoints of c's value
    with its neighbours' values, each midpoint multiplied by `step` in f32. A backend's quotient
    may be off by a few ulp, so it only proposes a code, which the two products then correct.
    """
    code = codec.encode(x / jnp.where(step > 0, step, 1.0))
    value = codec.decode(code)
    above = (value + codec.decode(jnp.minimum(code + 1, codec.last))) * 0.5 * step
    below = (value + codec.decode(jnp.maximum(code - 1, 0))) * 0.5 * step
    odd = (code & 1) == 1
    up = (code < codec.last) & ((x > above) | ((x == above) & odd))
    down = (code > 0) & ((x < below) | ((x == below) & odd))
    code = code + up.astype(jnp.int32) - down.astype(jnp.int32)
    return jnp.where(step > 0, code, 0)


def divide_exactly(bits: jax.Array, odd: int, log2: int) -> jax.Array:
    """x / (odd * 2^log2), correctly rounded, for the bits of a normal x >= 0 and odd <= 31.

    Long division of the 24-bit significand; the remainder becomes a sticky bit below the rounding
    position. Quotients below 2^-126 are not handled: the caller clamps them.
    """
    significand = ((bits & 0x7FFFFF) | 0x800000).astype(jnp.uint32) << 8
    quotient = significand // np.uint32(odd)
    sticky = (quotient * np.uint32(odd) != significand).astype(jnp.uint32)
    rounded = (quotient | sticky).astype(jnp.int32).astype(jnp.float32)
    exponent = (bits >> 23) - 127 - 23 - 8 - log2
    return jnp.where(bits == 0, 0.0, times_power_of_two(rounded, exponent))


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """int32 codes `[..., K]` of bytes `[..., K/2]`; even k is the low nibble."""
    wide = packed.astype(jnp.int32)[..., None]
    codes = jnp.concatenate([wide & 15, wide >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Bytes `[..., K/2]` of 4-bit codes `[..., K]`; even k is the low nibble."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).astype(jnp.uint8)
