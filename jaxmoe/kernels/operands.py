"""Rows of activations as block-scaled kernels multiply them: NVFP4 or MXFP8, and a factor of each.

NVFP4, of a row x with the largest magnitude amax; all of it in float32, ties to even:

    g = amax / (448 * 6)                    1 for a row of zeros; or the static input scale
    s = e4m3(largest of 16 / (6 g))         saturating at 448
    q = e2m1(x / (s g))                     saturating at 6; 0 where s is 0
    x is multiplied as q s, and the product by g

MXFP8:

    x = x / input_scale                     only where there is a static input scale; then g is it
    e = floor(log2(largest of 32)) - 8      within [-127, 127]
    q = e4m3(x 2^-e)                        saturating at 448
    x is multiplied as q 2^e, and the product by g

Sources: OCP Microscaling Formats (MX) v1.0 section 6.3 for the exponent; ModelOpt's NVFP4
checkpoints, whose `input_scale` is amax / (448 * 6), for the global scale.

Every quotient is rounded correctly on every backend, so that results are the same bits everywhere.
Rows with an infinity or a NaN have the factor NaN: neither e2m1 nor a saturating e4m3 can hold
them. Magnitudes below 2^-126 count as zeros, and so do NVFP4 rows whose g would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import _codecs as codecs

Operand = tuple[jax.Array, jax.Array]
"""Values `bf16[..., K]`, which they hold exactly, and factors `f32[..., 1]`."""


def nvfp4(x: jax.Array, input_scale: jax.Array | None) -> Operand:
    """Rows `f32[..., K]`, K a multiple of 16, as NVFP4; `input_scale` is `f32[]` or None."""
    bits, largest = _magnitudes(x, 16)
    amax = largest.max(-1, keepdims=True, initial=0)
    if input_scale is None:
        g = codecs.divide_exactly(amax, 21, 7)  # 448 * 6
        g = jnp.where(codecs.float_bits(g) == 0, 1.0, g)
    else:
        g = jnp.broadcast_to(input_scale, amax.shape)
    ratio = codecs.divide(codecs.float_from_bits(largest), np.float32(6) * g)
    code = codecs.E4M3.encode(ratio)
    scale = codecs.E4M3.decode(code)[..., None]
    step = scale * g[..., None]
    quotient = codecs.divide(codecs.float_from_bits(bits), jnp.where(step > 0, step, 1.0))
    elements = codecs.E2M1.decode(jnp.where(step > 0, codecs.E2M1.encode(quotient), 0))
    return _signed(elements * scale, x), _poisoned(g, amax)


def mxfp8(x: jax.Array, input_scale: jax.Array | None) -> Operand:
    """Rows `f32[..., K]`, K a multiple of 32, as MXFP8; `input_scale` is `f32[]` or None."""
    g = jnp.float32(1) if input_scale is None else input_scale
    if input_scale is not None:
        x = jnp.where(jnp.isfinite(x), jnp.sign(x) * codecs.divide(jnp.abs(x), g), x)
    bits, largest = _magnitudes(x, 32)
    code = jnp.clip((largest >> 23) - codecs.E4M3.max_exponent, 0, 254)[..., None]
    scaled = codecs.times_power_of_two(codecs.float_from_bits(bits), 127 - code)
    elements = codecs.E4M3.decode(codecs.E4M3.encode(scaled))
    values = codecs.times_power_of_two(elements, code - 127)
    amax = largest.max(-1, keepdims=True, initial=0)
    return _signed(values, x), _poisoned(jnp.broadcast_to(g, amax.shape), amax)


OPERANDS: Mapping[str, Callable[[jax.Array, jax.Array | None], Operand]] = MappingProxyType(
    {"w4a4": nvfp4, "w4a8": mxfp8}
)
"""By the arithmetic that block-scaled variants have them for."""


def round_sums(sums: jax.Array) -> jax.Array:
    """float32 sums as they leave the matrix unit: rounded to bfloat16, and float32 again."""
    # A pair of conversions may be folded into nothing; this may not.
    return jax.lax.reduce_precision(sums, exponent_bits=8, mantissa_bits=7)


def _magnitudes(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Bits of |x| `[..., K / block, block]`, and the largest of each block `[..., K / block]`."""
    bits = codecs.magnitude_bits(x).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return bits, bits.max(-1, initial=0)


def _signed(magnitude: jax.Array, x: jax.Array) -> jax.Array:
    values = magnitude.reshape(x.shape)
    return jnp.where(codecs.float_bits(x) < 0, -values, values).astype(jnp.bfloat16)


def _poisoned(g: jax.Array, amax: jax.Array) -> jax.Array:
    return jnp.where(codecs.is_finite_bits(amax), g, jnp.nan)
