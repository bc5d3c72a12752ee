"""Weight formats: what an element is, how many share a scale, and what a scale is.

A format is data. Code that depends on one reads its fields instead of comparing names, so that a
new format is a new row of `FORMATS`.

Sources: OCP Microscaling Formats (MX) v1.0 for MXFP4, MXFP8, e2m1 and e8m0; OCP 8-bit Floating
Point (OFP8) v1.0 for e4m3; NVIDIA's NVFP4 (e2m1 in blocks of 16 with e4m3 scales and one f32
scale per tensor), as ModelOpt checkpoints store it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np

FLOAT4_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
FLOAT8_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Format:
    """How a weight matrix `[..., N, K]` is stored, block after block along K.

    >>> NVFP4.bits_per_element, NVFP4.max
    (4.5, 6.0)

    Args:
        name: the key in `FORMATS`.
        element: dtype of one element.
        block_size: consecutive elements along K that share a block scale; None without blocks.
        scale: dtype of a block scale; None without blocks.
        has_global_scale: whether each matrix `[N, K]` has an f32 factor of its own.
    """

    name: str
    element: np.dtype
    block_size: int | None
    scale: np.dtype | None
    has_global_scale: bool

    @property
    def is_fp4(self) -> bool:
        """Whether two elements share a byte."""
        return self.element == FLOAT4_E2M1

    @property
    def element_bits(self) -> int:
        """Bits of one element, without its share of the scales."""
        return 4 if self.is_fp4 else 8 * self.element.itemsize

    @property
    def bits_per_element(self) -> float:
        """Bits of storage for each element, block scales included."""
        if self.block_size is None or self.scale is None:
            return float(self.element_bits)
        return self.element_bits + 8 * self.scale.itemsize / self.block_size

    @property
    def max(self) -> float:
        """Largest finite value of one element."""
        return float(ml_dtypes.finfo(self.element).max)

    def __str__(self) -> str:
        return self.name


NVFP4 = Format("nvfp4", FLOAT4_E2M1, 16, FLOAT8_E4M3, True)
MXFP4 = Format("mxfp4", FLOAT4_E2M1, 32, FLOAT8_E8M0, False)
MXFP8 = Format("mxfp8", FLOAT8_E4M3, 32, FLOAT8_E8M0, False)
FP8 = Format("fp8", FLOAT8_E4M3, None, None, True)
BF16 = Format("bf16", BFLOAT16, None, None, False)

FORMATS: Mapping[str, Format] = MappingProxyType(
    {format.name: format for format in (NVFP4, MXFP4, MXFP8, FP8, BF16)}
)


def get_format(format: str | Format) -> Format:
    """Returns the format of that name; a `Format` is returned as it is.

    >>> get_format("mxfp4").block_size
    32

    Args:
        format: a key of `FORMATS`, in any case, or a `Format`.

    Raises:
        ValueError: no format has that name; the message lists those that exist.
        TypeError: neither a name nor a `Format`.
    """
    if isinstance(format, Format):
        return format
    if not isinstance(format, str):
        raise TypeError(f"format: expected a name or a Format, got {type(format).__name__}.")
    try:
        return FORMATS[format.lower()]
    except KeyError:
        names = ", ".join(FORMATS)
        raise ValueError(f"format: unknown name {format!r}; choose one of {names}.") from None
