"""Formats in NumPy, from their definitions: tables of every code, and exact float64 arithmetic.

Imports neither jax nor jaxmoe nor ml_dtypes. Sources: OCP MX v1.0 (e2m1, e8m0, MXFP4, MXFP8), OCP
OFP8 v1.0 (e4m3), NVFP4 as ModelOpt checkpoints have it. Where the package defines an edge, the
definition is that of `jaxmoe.quantization`'s docstring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST_GLOBAL_SCALE = 2.0**-112
_SMALLEST_NORMAL = 2.0**-126

# e2m1: sign, 2 exponent bits (bias 1), 1 mantissa bit; no infinity, no NaN.
E2M1 = np.array(
    [(m / 2 if e == 0 else (1 + m / 2) * 2 ** (e - 1)) for e in range(4) for m in (0, 1)]
)
# e4m3fn: sign, 4 exponent bits (bias 7), 3 mantissa bits; all ones is NaN, no infinity.
E4M3 = np.array(
    [
        (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
        for e in range(16)
        for m in range(8)
    ]
)[:-1]
# e8m0: 2^(code - 127); 255 is NaN. No zero, no sign.
E8M0 = np.append(2.0 ** (np.arange(255.0) - 127), np.nan)


def decode(codes: np.ndarray, table: np.ndarray, sign_bit: int) -> np.ndarray:
    """float64 values of signed codes; codes past the table are NaN."""
    codes = codes.astype(np.int64)
    values = np.append(table, np.full(sign_bit - len(table), np.nan))[codes & (sign_bit - 1)]
    return np.where(codes & sign_bit, -values, values)


def encode(x: np.ndarray, table: np.ndarray, steps: np.ndarray | float = 1.0) -> np.ndarray:
    """Code of the table value nearest to |x| / steps, ties to even codes, saturating.

    `steps` is float64; a midpoint times a step is rounded to float32 before it is compared.
    """
    x = np.abs(np.asarray(x, np.float64))
    codes = np.zeros(x.shape, np.int64)
    for lower in range(len(table) - 1):
        midpoint = (table[lower] + table[lower + 1]) / 2
        with np.errstate(over="ignore"):
            boundary = np.asarray(midpoint * steps, np.float64).astype(np.float32)
        codes += (x > boundary) | ((x == boundary) & (lower % 2 == 1))
    return np.where(np.asarray(steps) > 0, codes, 0)


def pack(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte, even k in the low nibble."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes


@dataclass
class Quantized:
    """Raw bits: data uint8 (FP4 packed), scale uint8 or None, global_scale float32 or None."""

    data: np.ndarray
    scale: np.ndarray | None
    global_scale: np.ndarray | None


def _flush(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def saturate(x: np.ndarray) -> np.ndarray:
    """NaN becomes 0 of its sign, an infinity the largest finite magnitude of its matrix."""
    x = _flush(x)
    finite = np.isfinite(x)
    largest = np.where(finite, np.abs(x), 0).max((-2, -1), keepdims=True, initial=0)
    return np.copysign(np.where(finite, np.abs(x), np.where(np.isinf(x), largest, 0)), x)


def global_scale(x: np.ndarray, largest: float) -> np.ndarray:
    """amax / largest in float32 (one correctly rounded division), from 2^-112 up."""
    amax = np.abs(x).max((-2, -1), initial=0).astype(np.float32)
    return np.maximum(amax / np.float32(largest), np.float32(SMALLEST_GLOBAL_SCALE))


def quantize_nvfp4(x: np.ndarray, given: np.ndarray | None = None) -> Quantized:
    x = _flush(x)
    total = global_scale(x, 448 * 6) if given is None else np.asarray(given, np.float32)
    factor = np.broadcast_to(total, x.shape[:-2])[..., None, None].astype(np.float64)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    scale = encode(np.abs(blocks).max(-1), E4M3, 6 * factor)
    # e4m3 * e2m1 midpoints have few bits, so that float64 holds their product with f32 exactly.
    codes = encode(blocks, E2M1, (E4M3[scale] * factor)[..., None]).reshape(x.shape)
    codes |= np.where(np.signbit(x), 8, 0)
    return Quantized(pack(codes), scale.astype(np.uint8), np.broadcast_to(total, x.shape[:-2]))


def quantize_mx(x: np.ndarray, table: np.ndarray, sign_bit: int) -> Quantized:
    x = _flush(x)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32).astype(np.float64)
    amax = np.abs(blocks).max(-1)
    exponent = np.where(amax > 0, np.floor(np.log2(np.where(amax > 0, amax, 1))), -1000)
    exponent = np.clip(exponent - np.floor(np.log2(table[-1])), -127, 127)
    quotient = blocks / 2.0 ** exponent[..., None]
    codes = encode(quotient, table).reshape(x.shape)
    codes |= np.where(np.signbit(x), sign_bit, 0)
    scale = (exponent + 127).astype(np.uint8)
    return Quantized(pack(codes) if sign_bit == 8 else codes.astype(np.uint8), scale, None)


def quantize_fp8(x: np.ndarray, given: np.ndarray | None = None) -> Quantized:
    x = _flush(x)
    total = global_scale(x, 448) if given is None else np.asarray(given, np.float32)
    total = np.broadcast_to(total, x.shape[:-2])
    codes = encode(x, E4M3, total[..., None, None].astype(np.float64))
    return Quantized((codes | np.where(np.signbit(x), 128, 0)).astype(np.uint8), None, total)


def quantize(x: np.ndarray, name: str) -> Quantized:
    return {
        "nvfp4": lambda: quantize_nvfp4(x),
        "mxfp4": lambda: quantize_mx(x, E2M1, 8),
        "mxfp8": lambda: quantize_mx(x, E4M3, 128),
        "fp8": lambda: quantize_fp8(x),
    }[name]()


def dequantize(q: Quantized, name: str) -> np.ndarray:
    """float32: the product of element and block scale (exact), times the global scale, rounded."""
    fp4 = name in ("nvfp4", "mxfp4")
    value = decode(unpack(q.data), E2M1, 8) if fp4 else decode(q.data, E4M3, 128)
    if q.scale is not None:
        scale = decode(q.scale, E4M3, 128) if name == "nvfp4" else E8M0[q.scale]
        value = value * np.repeat(scale, value.shape[-1] // scale.shape[-1], -1)
    if q.global_scale is not None:
        value = value * q.global_scale[..., None, None].astype(np.float64)
    with np.errstate(over="ignore"):
        return _flush(value.astype(np.float32))
