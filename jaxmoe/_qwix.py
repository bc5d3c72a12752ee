"""Conversion to and from qwix's `QArray` (https://github.com/google/qwix)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe import _codecs as codecs
from jaxmoe._quantize import _times_scale
from jaxmoe._quantized_tensor import QuantizedTensor
from jaxmoe.formats import FLOAT8_E8M0, Format, get_format


def to_qarray(q: QuantizedTensor) -> Any:
    """The same tensor as a `qwix.QArray`, whose f32 scales are `scale * global_scale`.

    >>> to_qarray(quantize(jnp.ones((4, 64)), "mxfp4")).scale.shape  # doctest: +SKIP
    (4, 2)

    Args:
        q: a tensor `[..., N, K]` in a format with scales.

    Returns:
        `QArray(qvalue[..., N, K], scale f32[..., N, K / block_size])`; FP8: `scale[..., 1, 1]`.

    Raises:
        ValueError: the format has no scales.
        ImportError: qwix is not installed.
    """
    format = q.format
    if format.scale is None and not format.has_global_scale:
        raise ValueError(f"q: a QArray needs scales, and {format} has none; use `q.data`.")
    qwix = _import_qwix()
    scale = jnp.ones((*q.shape[:-2], 1, 1), jnp.float32)
    if format.scale is not None:
        scale = _times_scale(jnp.ones(q.scale.shape, jnp.float32), q.scale)
    if format.has_global_scale:
        scale = scale * q.global_scale[..., None, None]
    return qwix.QArray(qvalue=q.elements() if format.is_fp4 else q.data, scale=scale)


def from_qarray(array: Any, format: str | Format) -> QuantizedTensor:
    """A `qwix.QArray` as a `QuantizedTensor`, if the format can hold it without loss.

    The array must be concrete. For NVFP4 the f32 scales are split into e4m3 block scales and one
    global scale for each matrix: 1, or the largest scale over one of the eight e4m3 values from
    240 to 448, whichever leaves all block scales on e4m3 values to within f32 rounding.

    >>> w = quantize(jnp.ones((4, 64)), "nvfp4")
    >>> from_qarray(to_qarray(w), "nvfp4")  # doctest: +SKIP
    QuantizedTensor(nvfp4[4, 64])

    Args:
        array: symmetric (no zero point), tiled along its last axis alone, by a multiple of the
            format's block size.
        format: a `Format` or its name.

    Raises:
        ValueError: the array's dtype, tiles or scale values do not fit the format.
    """
    format = get_format(format)
    way_out = f'quantize(qwix.dequantize(array), "{format}") accepts a loss'
    if format.scale is None and not format.has_global_scale:
        raise ValueError(f"format: a QArray has scales, and {format} has none; dequantise it.")
    if array.zero_point is not None:
        raise ValueError(f"array.zero_point: must be None, got an array; {way_out}.")
    if array.qvalue.dtype != format.element:
        raise ValueError(
            f"array.qvalue: {format} needs {format.element}, got {array.qvalue.dtype}; {way_out}."
        )
    *rows, k = array.qvalue.shape
    blocks = (*rows, k // format.block_size) if format.block_size else (*rows[:-1], 1, 1)
    scale = np.asarray(array.scale, np.float32)
    if len(scale.shape) != len(blocks) or any(
        want % have for want, have in zip(blocks, scale.shape, strict=True)
    ):
        raise ValueError(
            f"array.scale: {format} needs shape {list(blocks)} or one that tiles it, got "
            f"{list(scale.shape)}; {way_out}."
        )
    for axis, (want, have) in enumerate(zip(blocks, scale.shape, strict=True)):
        scale = np.repeat(scale, want // have, axis)
    scales = _split(scale, format)
    if scales is None:
        raise ValueError(f"array.scale: has values that {format} cannot hold exactly; {way_out}.")
    q = QuantizedTensor.create(format, array.qvalue, *scales, name="array")
    return replace(q, data=q.packed()) if format.is_fp4 else q


def _split(scale: np.ndarray, format: Format) -> tuple[Any, Any] | None:
    """Block and global scales whose products are `scale`, or None if there are none."""
    if format.scale is None:
        return None, scale[..., 0, 0]
    if format.scale == FLOAT8_E8M0:
        significand, exponent = np.frexp(scale)
        if not (significand == 0.5).all():
            return None
        return (exponent - 1 + 127).astype(np.uint8), None
    largest = scale.max((-2, -1), keepdims=True)
    values = np.asarray(codecs.E4M3.decode(jnp.arange(119, 127)))[::-1]
    globals_ = [np.ones_like(largest), *(largest / value for value in values)]
    result_scale, result_global = np.zeros(scale.shape, np.uint8), np.zeros_like(largest)
    for candidate in reversed(globals_):
        candidate = np.where(candidate > 0, candidate, 1).astype(np.float32)
        quotient = scale / candidate
        code = np.asarray(codecs.E4M3.encode(jnp.asarray(quotient)))
        nearest = np.asarray(codecs.E4M3.decode(jnp.asarray(code)))
        close = (np.abs(nearest - quotient) <= quotient * 2.0**-22).all((-2, -1), keepdims=True)
        result_scale = np.where(close, code, result_scale).astype(np.uint8)
        result_global = np.where(close, candidate, result_global)
    if not (result_global > 0).all():
        return None
    return result_scale, result_global[..., 0, 0]


def _import_qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("to_qarray needs qwix: pip install qwix") from error
    return qwix
