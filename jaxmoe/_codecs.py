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


def decode_signed_e2m1(code: jax.Array) -> jax.Array:
    """Values of 4-bit codes, sign in bit 3: 0, 0.5, 1, 1.5, 2, 3, 4, 6 for codes 0 to 7."""
    magnitude = code & 7
    # From code 2 on, e2m1's exponent and mantissa are f32's after a shift and a change of bias
    # (127 - 1 = 126); codes 0 and 1 are 0 and 0.5 (bits 0x3F000000).
    bits = jnp.where(magnitude >= 2, (magnitude << 22) + (126 << 23), magnitude * 0x3F000000)
    return float_from_bits(bits | (code & 8) << 28)


def encode_e2m1(x: jax.Array) -> jax.Array:
    """Code of the nearest e2m1 value, ties to the even code, saturating at 6; NaN gives 0."""
    above = [x > 0.25, x >= 0.75, x > 1.25, x >= 1.75, x > 2.5, x >= 3.5, x > 5.0]
    return sum((bit.astype(jnp.int32) for bit in above), jnp.zeros(x.shape, jnp.int32))


def decode_signed_e4m3(code: jax.Array) -> jax.Array:
    """Values of 8-bit codes, sign in bit 7; 127 and 255 are NaN."""
    magnitude = code & 127
    bits = float_bits(E4M3.decode(magnitude)) | (code & 128) << 24
    return float_from_bits(jnp.where(magnitude == 127, 0x7FC00000, bits))


def encode_e4m3(x: jax.Array) -> jax.Array:
    """Code of the nearest e4m3 value, ties to the even code, saturating at 448; NaN gives 0."""
    bits = float_bits(jnp.minimum(x, np.float32(448.0)))
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = lax.round(x * np.float32(512.0), lax.RoundingMethod.TO_NEAREST_EVEN)
    code = jnp.where(x < np.float32(2.0**-6), subnormal.astype(jnp.int32), normal)
    return jnp.where(jnp.isnan(x), 0, code)


@dataclass(frozen=True)
class Codec:
    """Magnitudes of an element or scale dtype; values ascend over the codes 0 to `last`.

    Args:
        encode: code of the nearest value to f32 magnitudes.
        decode_signed: values of codes with a sign.
        mantissa_bits: width of the mantissa field.
        unit_log2: the smallest value above 0, of which all values are multiples, is 2^unit_log2.
        last: code of the largest value.
    """

    encode: Callable[[jax.Array], jax.Array]
    decode_signed: Callable[[jax.Array], jax.Array]
    mantissa_bits: int
    unit_log2: int
    last: int

    @property
    def sign_bit(self) -> int:
        """The sign of a signed code."""
        return 8 if self.last == 7 else 128

    @property
    def max_exponent(self) -> int:
        """floor(log2(largest value))."""
        return (self.last >> self.mantissa_bits) + self.mantissa_bits - 1 + self.unit_log2

    def multiple(self, code: jax.Array) -> jax.Array:
        """The value in units of 2^unit_log2, an int32."""
        one = 1 << self.mantissa_bits
        normal = (one | (code & (one - 1))) << ((code >> self.mantissa_bits) - 1 & 31)
        return jnp.where(code < one, code, normal)

    def decode(self, code: jax.Array) -> jax.Array:
        """The value in f32."""
        return self.multiple(code).astype(jnp.float32) * np.float32(2.0**self.unit_log2)


E2M1 = Codec(encode_e2m1, decode_signed_e2m1, 1, -1, 7)
E4M3 = Codec(encode_e4m3, decode_signed_e4m3, 3, -9, 126)
CODECS = {FLOAT4_E2M1: E2M1, FLOAT8_E4M3: E4M3}


def round_quotient(
    x: jax.Array, multiple: jax.Array | int, unit: jax.Array, codec: Codec
) -> jax.Array:
    """Code of the value nearest to x / (multiple * unit), ties to the even code, saturating.

    The rule in full: the answer is the code c for which x lies between the midpoints of c's value
    with its neighbours' values, times `multiple` (exact), times `unit` (rounded to f32). The first
    product is one of integers, so that no compiler can reassociate the two. A backend's quotient
    may be off by a few ulp, so it only proposes a code, which the comparisons then correct.

    Args:
        x: f32 magnitudes, normal or 0.
        multiple: int32 >= 0, up to 2^18 for e2m1 and 32 for e4m3, so that its product with twice a
            value stays below 2^24; 0 gives code 0.
        unit: f32 in [2^-121, 2^117].
        codec: of the quotient.
    """
    multiple = jnp.asarray(multiple, jnp.int32)
    half_unit = unit * np.float32(2.0 ** (codec.unit_log2 - 1))

    def midpoint(code: jax.Array, neighbour: jax.Array) -> jax.Array:
        doubled = codec.multiple(code) + codec.multiple(neighbour)
        return (doubled * multiple).astype(jnp.float32) * half_unit

    code = codec.encode(x / (jnp.maximum(multiple, 1).astype(jnp.float32) * unit))
    above = midpoint(code, jnp.minimum(code + 1, codec.last))
    below = midpoint(code, jnp.maximum(code - 1, 0))
    odd = (code & 1) == 1
    up = (code < codec.last) & ((x > above) | ((x == above) & odd))
    down = (code > 0) & ((x < below) | ((x == below) & odd))
    code = code + up.astype(jnp.int32) - down.astype(jnp.int32)
    return jnp.where(multiple > 0, code, 0)


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


def divide(x: jax.Array, d: jax.Array) -> jax.Array:
    """x / d in f32, correctly rounded, for magnitudes x (normal or 0) and normal d > 0.

    A backend's quotient, which may be off by a few ulp, proposes 26 bits; what is then left of the
    long division corrects them, and becomes a sticky bit. The products wrap around, their
    difference does not. Quotients beyond f32's normal numbers are infinite or 0.
    """
    x_bits, d_bits = jnp.broadcast_arrays(float_bits(x), float_bits(d))
    a = (x_bits & 0x7FFFFF) | 0x800000
    b = (d_bits & 0x7FFFFF) | 0x800000
    shift = jnp.where(a < b, 26, 25)  # the quotient then has 26 bits
    proposed = times_power_of_two(a.astype(jnp.float32) / b.astype(jnp.float32), shift)
    quotient = proposed.astype(jnp.int32)
    left = (a << shift) - quotient * b
    more = left // b
    quotient, left = quotient + more, left - more * b
    rounded = (quotient | (left != 0).astype(jnp.int32)).astype(jnp.float32)
    exponent = jnp.clip((x_bits >> 23) - (d_bits >> 23) - shift, -252, 254)
    return jnp.where(x_bits == 0, 0.0, times_power_of_two(rounded, exponent))


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """int32 codes `[..., K]` of bytes `[..., K/2]`; even k is the low nibble."""
    codes = jnp.repeat(packed, 2, axis=-1).astype(jnp.int32)
    k = lax.broadcasted_iota(jnp.int32, codes.shape, codes.ndim - 1)
    return codes >> (k & 1) * 4 & 15


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Bytes `[..., K/2]` of 4-bit codes `[..., K]`; even k is the low nibble."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).astype(jnp.uint8)
