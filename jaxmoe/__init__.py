"""FP4 Mixture-of-Experts for JAX.

`moe_mlp` and `grouped_matmul` run experts whose weights are NVFP4 or MXFP4; `jaxmoe.nn.MoE` is the
Flax layer around them; `jaxmoe.capability` says which kernel runs, and why no other does.
"""

from jaxmoe import activations, capability, routing, tuning
from jaxmoe.activations import (
    GELU,
    Activation,
    GeGLU,
    GeGLUTanh,
    GELUTanh,
    Identity,
    ReLU,
    ReLU2,
    SiLU,
    Situ,
    SwiGLU,
    SwiGLUStep,
)
from jaxmoe.capability import Problem, Resolution, Target, UnsupportedError, override, resolve
from jaxmoe.experts import ExpertWeights, PreparedMatrix, prepare
from jaxmoe.formats import BF16, FP8, MXFP4, MXFP8, NVFP4, Format
from jaxmoe.ops import explain, grouped_matmul, moe_mlp
from jaxmoe.quantization import QuantizedTensor, dequantize, fake_quantize, quantize
from jaxmoe.routing import Router

__version__ = "0.1.0"

__all__ = [
    "BF16",
    "FP8",
    "GELU",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "Activation",
    "ExpertWeights",
    "Format",
    "GELUTanh",
    "GeGLU",
    "GeGLUTanh",
    "Identity",
    "PreparedMatrix",
    "Problem",
    "QuantizedTensor",
    "ReLU",
    "ReLU2",
    "Resolution",
    "Router",
    "SiLU",
    "Situ",
    "SwiGLU",
    "SwiGLUStep",
    "Target",
    "UnsupportedError",
    "activations",
    "capability",
    "dequantize",
    "explain",
    "fake_quantize",
    "grouped_matmul",
    "moe_mlp",
    "override",
    "prepare",
    "quantize",
    "resolve",
    "routing",
    "tuning",
]
