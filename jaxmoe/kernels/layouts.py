"""The layouts of prepared weights: one module each, with `pack` and its inverse `unpack`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType

import jax

from jaxmoe.experts import PreparedMatrix
from jaxmoe.kernels import block_scaled, fragment, fragment_fp8, panel
from jaxmoe.quantization import QuantizedTensor

LAYOUTS: Mapping[str, ModuleType] = MappingProxyType(
    {module.NAME: module for module in (panel, fragment, fragment_fp8, block_scaled)}
)


def pack(w: QuantizedTensor, layout: str, gated: bool) -> PreparedMatrix:
    """The matrices `[E, N, K]` in a layout."""
    return LAYOUTS[layout].pack(w, gated)


def unpack(w: PreparedMatrix, expert: jax.Array) -> QuantizedTensor:
    """The matrices `[C, N, K]` of the experts `i32[C]` in canonical order."""
    return LAYOUTS[w.layout].unpack(w, expert)
