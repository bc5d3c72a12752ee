"""Flax layers: `MoE` for NNX, `LinenMoE` for Linen, and the conversion of whole models to FP4."""

from __future__ import annotations

try:
    import flax.nnx  # noqa: F401
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "flax":
        raise
    raise ModuleNotFoundError(
        'jaxmoe.nn needs Flax 0.12 or newer, which is not installed; pip install "jaxmoe[flax]"',
        name=error.name,
    ) from error

from jaxmoe.nn._convert import prepare, quantize
from jaxmoe.nn._linen import LinenMoE
from jaxmoe.nn._moe import MoE
from jaxmoe.nn._variables import CorrectionBias, InputScale, QuantizedParam

__all__ = [
    "CorrectionBias",
    "InputScale",
    "LinenMoE",
    "MoE",
    "QuantizedParam",
    "prepare",
    "quantize",
]
