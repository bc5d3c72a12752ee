"""Quantisation, dequantisation and fake quantisation; `jaxmoe.quantization` states the rules."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxmoe import _codecs as codecs
from jaxmoe._quantized_tensor import QuantizedTensor
from jaxmoe.formats import FLOAT8_E4M3, Format, get_format

Method = Literal["amax", "mse"]
Nonfinite = Literal["error", "saturate"]

# Below: the smallest weight, 2^-9 * 2^-1 times the global scale, and the midpoint below it stay
# normal. Above: what f32's largest amax needs, rounded up to a power of two.
_GLOBAL_SCALE_RANGE = (2.0**-112, 2.0**117)


def quantize(
    x: ArrayLike,
    format: str | Format,
    *,
    method: Method = "amax",
    global_scale: ArrayLike | None = None,
    nonfinite: Nonfinite = "error",
) -> QuantizedTensor:
    """Quantises matrices `[..., N, K]`; `jaxmoe.quantization` states the rules.

    >>> w = quantize(jax.random.normal(jax.random.key(0), (8, 64, 32)), "nvfp4")
    >>> w, w.nbytes
    (QuantizedTensor(nvfp4[8, 64, 32]), 9248)

    Works under jit, vmap and scan; it is not differentiable (see `fake_quantize`).

    Args:
        x: floating-point `[..., N, K]`; K a multiple of the format's block size.
        format: a `Format` or its name.
        method: how block scales are chosen. "amax": by the rules above. "mse": the scale with the
            least squared error of the block among the rule's and its neighbours (from 0.7 to 1.5
            times it for e4m3, half and twice for e8m0), which may clip the largest element.
        global_scale: f32 `[...]` or a scalar to use instead of the rule's, within
            [2^-112, 2^117]; larger blocks saturate. Only for formats that have one.
        nonfinite: what an infinity or NaN in x does. "error": raises; where x is traced, and so
            cannot be looked at, it makes the matrix (MX formats: the block) NaN. "saturate": an
            infinity counts as the largest finite magnitude of its matrix, with its sign, and a
            NaN as 0.

    Returns:
        A `QuantizedTensor` with uint8 data for FP4.

    Raises:
        ValueError: a shape, an option or a value that is not allowed.
        TypeError: x is not floating-point.
    """
    format = get_format(format)
    x = jnp.asarray(x)
    _check_input(x, format, method, nonfinite)
    if global_scale is not None:
        global_scale = _check_global_scale(global_scale, format, x.shape[:-2])
    if nonfinite == "error" and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable:
        with jax.ensure_compile_time_eval():
            if bad := int(jnp.sum(~jnp.isfinite(x))):
                raise ValueError(
                    f"x: must be finite, but {bad} of {x.size} elements are infinite or NaN; pass "
                    'nonfinite="saturate" to clamp them.'
                )
    return _quantize(x, global_scale, format, method, nonfinite)


def _check_input(x: jax.Array, format: Format, method: str, nonfinite: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: must be floating-point, got {x.dtype}; convert it first.")
    if x.ndim < 2:
        raise ValueError(f"x: must have shape [..., N, K], got {list(x.shape)}.")
    if format.block_size and x.shape[-1] % format.block_size:
        raise ValueError(
            f"x: K must be a multiple of {format.block_size} for {format}, got shape "
            f"{list(x.shape)}; pad K with zeros."
        )
    for name, value, allowed in (
        ("method", method, get_args(Method)),
        ("nonfinite", nonfinite, get_args(Nonfinite)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: must be one of {', '.join(allowed)}, got {value!r}.")
    if method == "mse" and format.scale is None:
        raise ValueError(
            f'method: "mse" searches block scales, and {format} has none; use method="amax".'
        )


def _check_global_scale(
    global_scale: ArrayLike, format: Format, leading: tuple[int, ...]
) -> jax.Array:
    if not format.has_global_scale:
        raise ValueError(f"global_scale: {format} has none; leave it out.")
    value = jnp.asarray(global_scale, jnp.float32)
    if value.shape not in ((), leading):
        raise ValueError(
            f"global_scale: must be a scalar or of shape {list(leading)}, got {list(value.shape)}."
        )
    if not isinstance(value, jax.core.Tracer) and value.is_fully_addressable:
        low, high = _GLOBAL_SCALE_RANGE
        with jax.ensure_compile_time_eval():
            if bad := int(jnp.sum(~((value >= low) & (value <= high)))):
                raise ValueError(
                    f"global_scale: must be within [2^-112, 2^117], but {bad} of {value.size} are "
                    "not; leave it out to have it computed."
                )
    return jnp.broadcast_to(value, leading)


@partial(jax.jit, static_argnames=("format", "method", "nonfinite"))
def _quantize(
    x: jax.Array,
    global_scale: jax.Array | None,
    format: Format,
    method: str = "amax",
    nonfinite: str = "error",
) -> QuantizedTensor:
    x = x.astype(jnp.float32)
    bits = codecs.magnitude_bits(x)
    negative = codecs.float_bits(x) < 0
    finite = codecs.is_finite_bits(bits)
    poisoned = ~finite
    if nonfinite == "saturate":
        # The largest finite magnitude of each matrix stands for its infinities.
        largest = jnp.where(finite, bits, 0).max((-2, -1), keepdims=True, initial=0)
        bits = jnp.where(finite, bits, jnp.where(jnp.isinf(x), largest, 0))
        poisoned = jnp.zeros_like(finite)
    bits = jnp.where(poisoned, 0, bits)
    if format.scale is not None:
        return _quantize_blocks(bits, negative, poisoned, global_scale, format, method)
    if format.has_global_scale:
        return _quantize_matrices(bits, negative, poisoned, global_scale, format)
    # Without scales: the element is the value, unless rounding would overflow.
    largest = jnp.asarray(format.max, format.element)
    value = jnp.minimum(codecs.float_from_bits(bits), largest.astype(jnp.float32))
    value = jnp.where(negative, -value, value)
    return QuantizedTensor(jnp.where(poisoned, x, value).astype(format.element), None, None, format)


def _global_scale(
    bits: jax.Array,
    poisoned: jax.Array,
    given: jax.Array | None,
    divisor: tuple[int, int],
) -> jax.Array:
    """f32 `[...]`: the given one, or amax / (odd * 2^log2) at least 2^-112; NaN if poisoned."""
    low, _ = _GLOBAL_SCALE_RANGE
    if given is None:
        amax = bits.max((-2, -1), initial=0)
        given = codecs.divide_exactly(amax, *divisor)
    scale = jnp.maximum(given, np.float32(low))
    return jnp.where(poisoned.any((-2, -1)), jnp.float32(jnp.nan), scale)


def _quantize_matrices(
    bits: jax.Array,
    negative: jax.Array,
    poisoned: jax.Array,
    given: jax.Array | None,
    format: Format,
) -> QuantizedTensor:
    codec = codecs.CODECS[format.element]
    global_scale = _global_scale(bits, poisoned, given, (7, 6))  # 448
    unit = global_scale[..., None, None]
    codes = codecs.round_quotient(codecs.float_from_bits(bits), 1, unit, codec)
    return QuantizedTensor(_pack(codes, negative, format), None, global_scale, format)


def _quantize_blocks(
    bits: jax.Array,
    negative: jax.Array,
    poisoned: jax.Array,
    given: jax.Array | None,
    format: Format,
    method: str,
) -> QuantizedTensor:
    assert format.block_size is not None
    assert format.scale is not None
    codec = codecs.CODECS[format.element]
    shape = bits.shape
    blocks = (*shape[:-1], shape[-1] // format.block_size, format.block_size)
    global_scale = None
    scales: _BlockScales = _PowerScales(codec)
    if format.has_global_scale:
        global_scale = _global_scale(bits, poisoned, given, (21, 7))  # 448 * 6
        scales = _FloatScales(codec, global_scale[..., None, None])
    bits = bits.reshape(blocks)
    amax = bits.max(-1)
    x = codecs.float_from_bits(bits)
    code = scales.rule(amax)
    if method == "mse":
        code = _search(scales, code, x, amax)
    elements = scales.encode(x, code).reshape(shape)
    if global_scale is None:  # otherwise the global scale carries the NaN
        code = jnp.where(poisoned.reshape(blocks).any(-1), 255, code)
    scale = lax.bitcast_convert_type(code.astype(jnp.uint8), format.scale)
    return QuantizedTensor(_pack(elements, negative, format), scale, global_scale, format)


@dataclass(frozen=True)
class _BlockScales(abc.ABC):
    """Codes of block scales: int32 `[..., N, K / block_size]`; `codec` is that of the elements."""

    codec: codecs.Codec
    last: ClassVar[int]  # largest code
    # Offsets from the rule's code that method="mse" tries, nearest first, so that a tie keeps it.
    search: ClassVar[tuple[int, ...]]

    @abc.abstractmethod
    def rule(self, amax: jax.Array) -> jax.Array:
        """The code for the bits of a block's largest magnitude."""

    @abc.abstractmethod
    def encode(self, x: jax.Array, code: jax.Array) -> jax.Array:
        """Element codes of magnitudes `[..., N, K / block_size, block_size]`."""

    @abc.abstractmethod
    def step(self, code: jax.Array, exponent: jax.Array) -> jax.Array:
        """Value of an element 1, divided by 2^exponent."""


@dataclass(frozen=True)
class _FloatScales(_BlockScales):
    """e4m3 scales under a global scale: NVFP4."""

    global_scale: jax.Array
    last = codecs.E4M3.last
    # Eight codes are a factor of 2: these reach from about 0.7 (the largest element is clipped) to
    # about 1.5 times the rule's scale (the largest element becomes 4 instead of 6).
    search = (0, 1, -1, 2, -2, 3, -3, 4, -4, 5)

    def rule(self, amax: jax.Array) -> jax.Array:
        largest = self.codec.multiple(jnp.int32(self.codec.last))
        unit = self.global_scale * np.float32(2.0**self.codec.unit_log2)
        return codecs.round_quotient(codecs.float_from_bits(amax), largest, unit, codecs.E4M3)

    def encode(self, x: jax.Array, code: jax.Array) -> jax.Array:
        multiple = codecs.E4M3.multiple(code)[..., None]
        unit = self.global_scale[..., None] * np.float32(2.0**codecs.E4M3.unit_log2)
        return codecs.round_quotient(x, multiple, unit, self.codec)

    def step(self, code: jax.Array, exponent: jax.Array) -> jax.Array:
        # Only the global scale's significand is multiplied, so that nothing can overflow.
        bits = codecs.float_bits(self.global_scale)
        significand = codecs.float_from_bits((bits & 0x7FFFFF) | 0x3F800000)
        log2 = (bits >> 23) - 127 + codecs.E4M3.unit_log2 - exponent
        multiple = codecs.E4M3.multiple(code).astype(jnp.float32)
        return multiple * significand * codecs.power_of_two(jnp.clip(log2, -126, 100))


@dataclass(frozen=True)
class _PowerScales(_BlockScales):
    """e8m0 scales: MXFP4 and MXFP8."""

    last = 254
    search = (0, 1, -1)

    def rule(self, amax: jax.Array) -> jax.Array:
        return jnp.clip((amax >> 23) - self.codec.max_exponent, 0, self.last)

    def encode(self, x: jax.Array, code: jax.Array) -> jax.Array:
        return self.codec.encode(codecs.times_power_of_two(x, 127 - code[..., None]))

    def step(self, code: jax.Array, exponent: jax.Array) -> jax.Array:
        return codecs.power_of_two(code - 127 - exponent)


def _search(scales: _BlockScales, rule: jax.Array, x: jax.Array, amax: jax.Array) -> jax.Array:
    """The code of least squared error, which is summed in integers: no order can change it."""
    # In units of the largest element's power of two, errors are below 2 and their squares fit.
    exponent = (amax >> 23) - 127
    magnitude = codecs.times_power_of_two(x, -exponent[..., None])

    def error(code: jax.Array) -> jax.Array:
        # A step with four low bits less makes its product with an element exact, so that it does
        # not matter whether a compiler contracts the subtraction into a fused multiply-add.
        step = codecs.float_from_bits(codecs.float_bits(scales.step(code, exponent)) & ~0xF)
        difference = magnitude - scales.codec.decode(scales.encode(x, code)) * step[..., None]
        return (difference * difference * np.float32(2.0**22)).astype(jnp.int32).sum(-1)

    offsets = jnp.asarray(scales.search, jnp.int32)

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        code = jnp.clip(rule + offsets[i], 0, scales.last)
        candidate = error(code)
        better = candidate < best[1]
        return jnp.where(better, code, best[0]), jnp.where(better, candidate, best[1])

    return lax.fori_loop(1, offsets.size, step, (rule, error(rule)))[0]


def _pack(codes: jax.Array, negative: jax.Array, format: Format) -> jax.Array:
    codes = codes | jnp.where(negative, codecs.CODECS[format.element].sign_bit, 0)
    if format.is_fp4:
        return codecs.pack_nibbles(codes)
    return lax.bitcast_convert_type(codes.astype(jnp.uint8), format.element)


def unpack_e2m1(packed: jax.Array) -> jax.Array:
    """Values of packed e2m1 codes.

    >>> unpack_e2m1(jnp.array([0x72, 0xF9], jnp.uint8)).tolist()
    [1.0, 6.0, -0.5, -6.0]

    Args:
        packed: uint8 `[..., K/2]`; even k is the low nibble.

    Returns:
        f32 `[..., K]`.
    """
    return codecs.decode_signed_e2m1(codecs.unpack_nibbles(packed))


def dequantize(q: QuantizedTensor, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The values of a quantised tensor: `(element * scale) * global_scale` in f32, then `dtype`.

    >>> dequantize(quantize(jnp.full((1, 32), 3.0), "mxfp4"))[0, 0]
    Array(3., dtype=float32)

    `element * scale` is exact in f32 (and in bf16 as long as it is in range), so that a value is
    rounded once by the global scale and once by `dtype`. Values below 2^-126 are zero on backends
    that flush subnormals; `quantize` produces none.

    Args:
        q: a tensor `[..., N, K]`.
        dtype: dtype of the result.

    Returns:
        `[..., N, K]` in `dtype`.
    """
    format = q.format
    if format.scale is None and not format.has_global_scale:
        return q.data.astype(dtype)
    if format.is_fp4:
        value = unpack_e2m1(q.packed())
    else:
        code = lax.bitcast_convert_type(q.data, jnp.uint8).astype(jnp.int32)
        value = codecs.CODECS[format.element].decode_signed(code)
    if format.scale is not None:
        blocks = value.reshape(*q.scale.shape, format.block_size)
        value = _times_scale(blocks, q.scale[..., None]).reshape(value.shape)
    if format.has_global_scale:
        value = value * q.global_scale[..., None, None]
    return value.astype(dtype)


def _times_scale(value: jax.Array, scale: jax.Array) -> jax.Array:
    code = lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
    if scale.dtype == FLOAT8_E4M3:
        return value * codecs.decode_signed_e4m3(code)
    nan = jnp.where(code == 255, jnp.float32(jnp.nan), 1.0)
    return codecs.times_power_of_two(value * nan, code - 127)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def fake_quantize(x: jax.Array, format: str | Format) -> jax.Array:
    """Rounds `x` to what `format` can hold; its gradient is that of the identity.

    >>> fake_quantize(jnp.linspace(0.0, 6.0, 32).reshape(1, 32), "mxfp8").dtype
    dtype('float32')

    For quantisation-aware training: the forward pass is `dequantize(quantize(x, format))`, the
    backward pass the straight-through estimator (Bengio et al., arXiv:1308.3432). An infinity or
    NaN in x makes its matrix (MX formats: its block) NaN.

    Args:
        x: floating-point `[..., N, K]`.
        format: a `Format` or its name.

    Returns:
        `[..., N, K]` in x's dtype.

    Raises:
        ValueError: K is not a multiple of the block size.
        TypeError: x is not floating-point.
    """
    format = get_format(format)
    _check_input(x, format, "amax", "error")
    # The barriers keep XLA from folding the narrowing and the widening into nothing, which it may
    # where excess precision is allowed.
    quantized = lax.optimization_barrier(_quantize(lax.optimization_barrier(x), None, format))
    return dequantize(quantized, x.dtype)


@fake_quantize.defjvp
def _fake_quantize_jvp(format, primals, tangents):
    return fake_quantize(*primals, format), tangents[0]
