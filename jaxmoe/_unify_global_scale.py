"""One global scale for two matrices that a kernel reads as one, such as gate and up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmoe import _codecs as codecs
from jaxmoe._quantize import _quantize, dequantize
from jaxmoe._quantized_tensor import QuantizedTensor, check


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["max_error", "relative_l2"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class UnifyReport:
    """What `unify_global_scale` changed; zeros mean that every weight kept its value.

    Args:
        max_error: f32 `[...]`, one for each matrix: the largest change of a weight, relative to the
            largest weight of its block (of its matrix for a format without blocks).
        relative_l2: f32 `[...]`: root of the summed squares of the changes over that of the
            weights.
    """

    max_error: Any
    relative_l2: Any

    def __str__(self) -> str:
        error, l2 = np.atleast_1d(self.max_error), np.atleast_1d(self.relative_l2)
        changed = int((error > 0).sum())
        if not changed:
            return f"global scales unified exactly in all {error.size} matrices"
        return (
            f"global scales unified: {changed} of {error.size} matrices requantised, "
            f"relative L2 change at most {l2.max():.2g}, one weight by at most "
            f"{error.max():.2g} of its block's largest"
        )


def unify_global_scale(
    gate: QuantizedTensor, up: QuantizedTensor
) -> tuple[QuantizedTensor, UnifyReport]:
    """Joins two tensors along N under one global scale for each matrix; usually `[gate; up]`.

    >>> gate = quantize(jnp.full((4, 32, 64), 1.0), "nvfp4")
    >>> up = quantize(jnp.full((4, 32, 64), 0.25), "nvfp4")
    >>> joined, report = unify_global_scale(gate, up)
    >>> joined.shape, str(report)
    ((4, 64, 64), 'global scales unified exactly in all 4 matrices')

    A block whose scale can take up the ratio of the global scales without rounding (a power of
    two that neither overflows nor underflows e4m3) keeps its elements and every value. Any other
    block is dequantised and quantised again by the scale of least squared error. The shared scale
    is the larger of the two, or the smaller if that changes less.

    Args:
        gate: `[..., I, K]`, the first rows of the result.
        up: `[..., J, K]` in the same format.

    Returns:
        The tensor `[..., I + J, K]` and a report of what changed. Formats without a global scale
        are only joined.

    Raises:
        ValueError: formats or shapes that do not fit together.
    """
    check(gate, "gate")
    check(up, "up")
    if gate.format != up.format:
        raise ValueError(
            f"up: must have gate's format {gate.format}, got {up.format}; quantise one anew."
        )
    fits = gate.shape[:-2] == up.shape[:-2] and gate.shape[-1] == up.shape[-1]
    if not fits:
        raise ValueError(
            f"up: must have gate's shape {list(gate.shape)} but for N, got {list(up.shape)}."
        )
    leading = gate.shape[:-2]
    if not gate.format.has_global_scale:
        zeros = jnp.zeros(leading, jnp.float32)
        return _join(gate, up, None), UnifyReport(zeros, zeros)
    joined, report = _unify(_with_leading(gate, (-1,)), _with_leading(up, (-1,)))
    return _with_leading(joined, leading), jax.tree.map(lambda x: x.reshape(leading), report)


def _with_leading(q: QuantizedTensor, leading: tuple[int, ...]) -> QuantizedTensor:
    keep = q.ndim - 2
    if leading == (-1,):
        leading = (int(np.prod(q.shape[:-2])),)
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[keep:]), q)


def _join(gate: QuantizedTensor, up: QuantizedTensor, global_scale: Any) -> QuantizedTensor:
    def rows(a: Any, b: Any) -> Any:
        return None if a is None else jnp.concatenate([a, b], axis=-2)

    gate_data, up_data = gate.data, up.data
    if gate.format.is_fp4:
        gate_data, up_data = gate.packed(), up.packed()
    return QuantizedTensor(
        rows(gate_data, up_data), rows(gate.scale, up.scale), global_scale, gate.format
    )


@jax.jit
def _unify(gate: QuantizedTensor, up: QuantizedTensor) -> tuple[QuantizedTensor, UnifyReport]:
    # Matrix by matrix, so that only one is ever held in f32.
    return lax.map(lambda pair: _unify_matrix(*pair), (gate, up))


def _unify_matrix(
    gate: QuantizedTensor, up: QuantizedTensor
) -> tuple[QuantizedTensor, UnifyReport]:
    scales = gate.global_scale, up.global_scale
    targets = jnp.stack([jnp.maximum(*scales), jnp.minimum(*scales)])
    tensors, reports = lax.map(lambda target: _join_at(gate, up, target), targets)
    best = jnp.argmin(reports.relative_l2)  # the first, larger one if both change as much
    return jax.tree.map(lambda leaf: leaf[best], (tensors, reports))


def _join_at(
    gate: QuantizedTensor, up: QuantizedTensor, target: jax.Array
) -> tuple[QuantizedTensor, UnifyReport]:
    old = jnp.concatenate([dequantize(gate), dequantize(up)])
    before = [jnp.full((part.shape[0], 1), part.global_scale) for part in (gate, up)]
    joined = _rescale(_join(gate, up, None), jnp.concatenate(before), old, target)
    new = dequantize(joined)
    # The comparison sees rounded values; a compiler may contract the difference alone.
    change = jnp.where(new == old, 0.0, jnp.abs(new - old))
    block = gate.format.block_size or old.size
    blocks = (old.size // max(block, 1), block)
    largest = jnp.abs(old).reshape(blocks).max(-1, initial=0)
    error = change.reshape(blocks).max(-1, initial=0) / jnp.where(largest > 0, largest, 1.0)
    # Relative to the largest weight, so that no square under- or overflows.
    unit = largest.max(initial=0)
    unit = jnp.where(unit > 0, unit, 1.0)
    norm = jnp.sqrt(jnp.square(old / unit).sum())
    l2 = jnp.sqrt(jnp.square(change / unit).sum()) / jnp.where(norm > 0, norm, 1.0)
    return joined, UnifyReport(error.max(initial=0), l2)


def _rescale(
    q: QuantizedTensor, before: jax.Array, old: jax.Array, target: jax.Array
) -> QuantizedTensor:
    """`q`, whose values are `old` under the rows' global scales `before`, at the scale `target`.

    A block stays as it is where its scale can take up the ratio without changing a value.
    """
    if q.format.scale is None:
        return _quantize(old, target, q.format)
    new = _quantize(old, target, q.format, "mse")
    code = lax.bitcast_convert_type(q.scale, jnp.uint8).astype(jnp.int32)
    code = codecs.E4M3.encode(codecs.E4M3.decode(code) * (before / new.global_scale))
    bits = code.astype(jnp.uint8)
    kept = QuantizedTensor(
        q.packed(), lax.bitcast_convert_type(bits, q.format.scale), new.global_scale, q.format
    )
    assert q.format.block_size is not None
    same = dequantize(kept) == old
    same = same.reshape(*bits.shape, q.format.block_size).all(-1, keepdims=True)
    bytes_of = (*bits.shape, q.format.block_size // 2)
    data = jnp.where(same, kept.packed().reshape(bytes_of), new.packed().reshape(bytes_of))
    bits = jnp.where(same[..., 0], bits, lax.bitcast_convert_type(new.scale, jnp.uint8))
    scale = lax.bitcast_convert_type(bits, q.format.scale)
    return QuantizedTensor(data.reshape(kept.data.shape), scale, new.global_scale, q.format)
