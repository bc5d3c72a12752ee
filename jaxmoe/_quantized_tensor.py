"""`QuantizedTensor`: packed elements with their scales, as one JAX pytree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmoe.formats import FLOAT4_E2M1, FLOAT8_E4M3, FLOAT8_E8M0, Format, get_format

_UINT8 = np.dtype(np.uint8)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "global_scale"],
    meta_fields=["format"],
)
@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A matrix, or a stack of matrices `[..., N, K]`, in a low-precision format.

    >>> w = quantize(jnp.ones((8, 64, 32)), "nvfp4")
    >>> w
    QuantizedTensor(nvfp4[8, 64, 32])
    >>> w.data.shape, w.scale.shape, w.global_scale.shape, w[3].shape
    ((8, 64, 16), (8, 64, 2), (8,), (64, 32))

    It is a pytree whose leaves are `data`, `scale` and `global_scale` and whose static part is
    `format`. The logical shape is derived from `data`, so that vmap, scan and slicing keep it
    right. The class itself checks nothing, because a leaf may be a tracer, a
    `ShapeDtypeStruct` or a sharding; build one from arrays with `QuantizedTensor.create`.

    Args:
        data: FP4: uint8 `[..., N, K/2]`, two e2m1 codes a byte, even k in the low nibble, or
            float4_e2m1fn `[..., N, K]` (the same bits). Else the format's element dtype
            `[..., N, K]`.
        scale: `[..., N, K / block_size]` in the format's scale dtype; None without block scales.
        global_scale: f32 `[...]`, one for each matrix; None where the format has none.
        format: the `Format`.
    """

    data: Any
    scale: Any
    global_scale: Any
    format: Format

    @classmethod
    def create(
        cls,
        format: str | Format,
        data: Any,
        scale: Any = None,
        global_scale: Any = None,
        *,
        name: str = "w",
    ) -> QuantizedTensor:
        """Builds a tensor from arrays and checks it (see `check`).

        >>> QuantizedTensor.create("mxfp4", np.zeros((4, 16), np.uint8), np.ones((4, 1), np.uint8))
        QuantizedTensor(mxfp4[4, 32])

        Args:
            format: a `Format` or its name.
            data: the elements; 8-bit elements may also be given as their bits in uint8.
            scale: the block scales in the format's scale dtype or as their bits in uint8.
            global_scale: float `[...]`, `[..., 1]` or `[..., 1, 1]`; None gives ones for a
                format that has one.
            name: what to call the tensor in an error.

        Raises:
            ValueError: a dtype, a shape or a value that the format does not allow.
        """
        format = get_format(format)
        data = jnp.asarray(data)
        if data.dtype == _UINT8 and format.element.itemsize == 1 and not format.is_fp4:
            data = data.view(format.element)
        if scale is not None:
            scale = jnp.asarray(scale)
            if scale.dtype == _UINT8 and format.scale is not None:
                scale = scale.view(format.scale)
        leading = data.shape[:-2]
        if global_scale is not None:
            global_scale = jnp.asarray(global_scale)
            if global_scale.size == math.prod(leading):
                global_scale = global_scale.astype(jnp.float32).reshape(leading)
        elif format.has_global_scale:
            global_scale = jnp.ones(leading, jnp.float32)
        return check(cls(data, scale, global_scale, format), name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `[..., N, K]`."""
        *rows, last = self.data.shape
        return (*rows, 2 * last if self._is_packed else last)

    @property
    def ndim(self) -> int:
        """Number of logical dimensions."""
        return len(self.data.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of storage: elements (packed), block scales and global scales."""
        scales = [leaf for leaf in (self.scale, self.global_scale) if leaf is not None]
        return self.size * self.format.element_bits // 8 + sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in scales
        )

    @property
    def _is_packed(self) -> bool:
        return self.format.is_fp4 and self.data.dtype == _UINT8

    def packed(self) -> jax.Array:
        """FP4 elements as uint8 `[..., N, K/2]`, even k in the low nibble.

        Raises:
            ValueError: the format's elements are not FP4.
        """
        self._require_fp4("packed")
        if self._is_packed:
            return self.data
        *rows, k = self.shape
        pairs = jnp.asarray(self.data).reshape(*rows, k // 2, 2)
        return lax.bitcast_convert_type(pairs, jnp.uint8)

    def elements(self) -> jax.Array:
        """FP4 elements as float4_e2m1fn `[..., N, K]`: the same bits as `packed()`.

        Raises:
            ValueError: the format's elements are not FP4.
        """
        self._require_fp4("elements")
        if not self._is_packed:
            return self.data
        return lax.bitcast_convert_type(jnp.asarray(self.data), FLOAT4_E2M1).reshape(self.shape)

    def _require_fp4(self, method: str) -> None:
        if not self.format.is_fp4:
            raise ValueError(
                f"{method}() needs FP4 elements, but the format is {self.format}; its elements "
                "are whole bytes: read `data`."
            )

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """Selects matrices by the leading axes, then rows of them by a slice.

        >>> w = quantize(jnp.ones((8, 64, 32)), "mxfp4")
        >>> w[2:4].shape, w[0, :16].shape
        ((2, 64, 32), (16, 32))

        Raises:
            IndexError: K is indexed, or a row is picked by an integer (a single row has no place
                for a global scale: take a slice of one row).
        """
        index = _expand(index, self.ndim)
        leading, rows = index[: self.ndim - 2], index[self.ndim - 2 : self.ndim - 1]
        for row in rows:
            if not isinstance(row, slice):
                raise IndexError(f"rows must be selected by a slice, got {row!r}; use [n : n + 1].")
        return QuantizedTensor(
            self.data[index],
            None if self.scale is None else self.scale[index],
            None if self.global_scale is None else self.global_scale[leading],
            self.format,
        )

    def tensors(self, prefix: str = "") -> dict[str, jax.Array]:
        """The leaves by name, for a file: `from_tensors` is the inverse.

        >>> sorted(quantize(jnp.ones((4, 32)), "nvfp4").tensors("down."))
        ['down.data', 'down.global_scale', 'down.scale']

        Args:
            prefix: put before each name.

        Returns:
            `data` (FP4 as uint8, for most file formats know no 4-bit type), and `scale` and
            `global_scale` where the format has them, in their own dtypes.
        """
        data = self.packed() if self.format.is_fp4 else self.data
        leaves = {"data": data, "scale": self.scale, "global_scale": self.global_scale}
        return {prefix + name: leaf for name, leaf in leaves.items() if leaf is not None}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Any], format: str | Format, prefix: str = ""
    ) -> QuantizedTensor:
        """Builds a tensor from what `tensors` returned; 8-bit floats may have become uint8.

        >>> w = quantize(jnp.ones((4, 32)), "mxfp4")
        >>> QuantizedTensor.from_tensors(w.tensors("up."), "mxfp4", "up.")
        QuantizedTensor(mxfp4[4, 32])

        Raises:
            KeyError: a tensor that the format needs is missing.
            ValueError: a dtype, a shape or a value that the format does not allow.
        """
        format = get_format(format)
        needed = {"data": True, "scale": format.scale is not None}
        needed["global_scale"] = format.has_global_scale
        for name in (name for name, need in needed.items() if need):
            if prefix + name not in tensors:
                raise KeyError(
                    f"{prefix + name!r} is missing: {format} needs it; "
                    f"there are {sorted(n for n in tensors if n.startswith(prefix))}."
                )
        leaves = {name: tensors[prefix + name] for name, need in needed.items() if need}
        return cls.create(format, **leaves, name=prefix.rstrip(".") or "w")

    def __repr__(self) -> str:
        try:
            return f"QuantizedTensor({self.format}{list(self.shape)})"
        except (AttributeError, TypeError):  # leaves that are no arrays
            return f"QuantizedTensor({self.format}, data={self.data!r})"


def _expand(index: Any, ndim: int) -> tuple[Any, ...]:
    """`index` as a tuple without an ellipsis, which must leave K alone."""
    index = index if isinstance(index, tuple) else (index,)
    for position, item in enumerate(index):
        if isinstance(item, EllipsisType):
            fill = ndim - len(index) + 1
            index = (*index[:position], *(slice(None),) * fill, *index[position + 1 :])
            if index[-1:] == (slice(None),):
                index = index[:-1]
            break
    if any(item is None for item in index) or len(index) > ndim - 1:
        raise IndexError(
            f"a QuantizedTensor of {ndim} dimensions takes at most {ndim - 1} indices "
            "(leading axes, then a slice of rows; never K), got " + repr(index) + "."
        )
    return index


def check(q: QuantizedTensor, name: str = "w") -> QuantizedTensor:
    """Checks dtypes and shapes, and the scales' values where they are known; returns `q`.

    >>> check(quantize(jnp.ones((4, 32)), "nvfp4"), name="down")
    QuantizedTensor(nvfp4[4, 32])

    Values are checked unless a leaf is traced or lives on other hosts: global scales must be
    finite and > 0, block scales finite and > 0. One exception: an e4m3 block scale may be 0 if all
    elements of its block are 0 (what `quantize` makes of a block too small for any scale).

    Args:
        q: the tensor to check.
        name: what to call it in an error.

    Raises:
        ValueError: what is wrong, what was required, what came.
    """
    _check_layout(q, name)
    if all(_is_concrete(leaf) for leaf in (q.data, q.scale, q.global_scale) if leaf is not None):
        _check_values(q, name)
    return q


def _check_layout(q: QuantizedTensor, name: str) -> None:
    format = q.format
    allowed = (FLOAT4_E2M1, _UINT8) if format.is_fp4 else (format.element,)
    if q.data.dtype not in allowed:
        raise ValueError(
            f"{name}.data: {format} needs dtype {' or '.join(map(str, allowed))}, "
            f"got {q.data.dtype}."
        )
    if q.ndim < 2:
        raise ValueError(f"{name}.data: needs shape [..., N, K], got {list(q.data.shape)}.")
    *rows, k = q.shape
    if format.block_size and k % format.block_size:
        raise ValueError(
            f"{name}: K must be a multiple of {format.block_size} for {format}, got K = {k}; "
            "pad K with zeros."
        )
    blocks = None if format.block_size is None else (*rows, k // format.block_size)
    _check_leaf(f"{name}.scale", q.scale, format, format.scale, blocks)
    leading = tuple(rows[:-1]) if format.has_global_scale else None
    _check_leaf(f"{name}.global_scale", q.global_scale, format, np.dtype(np.float32), leading)


def _check_leaf(
    name: str, leaf: Any, format: Format, dtype: np.dtype | None, shape: tuple[int, ...] | None
) -> None:
    if shape is None:
        if leaf is not None:
            raise ValueError(f"{name}: {format} has none, got {leaf.dtype}{list(leaf.shape)}.")
        return
    came = "None" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
    if leaf is None or leaf.dtype != dtype or tuple(leaf.shape) != tuple(shape):
        raise ValueError(f"{name}: {format} needs {dtype}{list(shape)}, got {came}.")


def _is_concrete(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray)


def _check_values(q: QuantizedTensor, name: str) -> None:
    # Under an outer trace even concrete operands would be staged; these must be computed now.
    with jax.ensure_compile_time_eval():
        counts = [int(count) for count in _count_bad(q)]
    for (leaf, required), bad in zip(_required(q), counts, strict=True):
        if bad:
            total = getattr(q, leaf).size
            raise ValueError(
                f"{name}.{leaf}: must be {required}, but {bad} of {total} are not; "
                "the checkpoint is damaged or not in this format."
            )


def _required(q: QuantizedTensor) -> list[tuple[str, str]]:
    """What the scales must be, and which: in the order of `_count_bad`."""
    required = []
    if q.global_scale is not None:
        required.append(("global_scale", "finite and > 0"))
    if q.scale is not None and q.scale.dtype == FLOAT8_E8M0:
        required.append(("scale", "finite (0xFF is NaN)"))
    elif q.scale is not None and q.scale.dtype == FLOAT8_E4M3:
        required.append(("scale", "finite and not negative"))
        required.append(("scale", "> 0 where the block has an element that is not 0"))
    return required


@jax.jit
def _count_bad(q: QuantizedTensor) -> list[jax.Array]:
    """How many scales are not as `_required` says. One program: no array of the scales' size."""
    bad = []
    if q.global_scale is not None:
        bad.append(~(jnp.isfinite(q.global_scale) & (q.global_scale > 0)))
    if q.scale is not None:
        bits = q.scale.view(jnp.uint8)
        if q.scale.dtype == FLOAT8_E8M0:
            bad.append(bits == 0xFF)
        elif q.scale.dtype == FLOAT8_E4M3:
            assert q.format.block_size is not None
            bad.append(bits >= 0x7F)
            magnitude = (q.packed() & 0x77).reshape(*bits.shape, q.format.block_size // 2)
            bad.append((bits == 0) & (magnitude != 0).any(-1))
    return [mask.sum() for mask in bad]
