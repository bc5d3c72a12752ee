"""Quantisation and dequantisation, bit for bit the same eagerly, under jit and on every backend.

The rules, for a matrix `x[N, K]` in f32 (inputs of other dtypes are converted; f32 subnormals
count as zeros of their sign):

- NVFP4: `global_scale = amax(x) / (448 * 6)`, correctly rounded; `scale = e4m3(amax(block) /
  (6 * global_scale))`; element = `e2m1(x / (scale * global_scale))`. ModelOpt's conventions; the
  global scale is a factor of the decoded value (`weight_scale_2`).
- MXFP4, MXFP8: `scale = 2^(floor(log2(amax(block))) - m)`, where 2^m is the element's largest power
  of two (4 for e2m1, 256 for e4m3), clamped to 2^-127..2^127; element = `x / scale` rounded
  (OCP MX v1.0, section 6.3).
- FP8: `global_scale = amax(x) / 448`; element = `e4m3(x / global_scale)`.
- BF16: rounded.

Rounding is to nearest, ties to the even code, saturating at the largest value. A quotient such as
`x / (scale * global_scale)` is rounded by comparing |x| with the midpoints of neighbouring values
times `scale` (exact) times `global_scale` (rounded to f32), so that no backend's division is
involved. Two edges need a rule of their own:

- A global scale that `quantize` chooses is at least 2^-112, so that no midpoint and no dequantised
  weight is subnormal. A matrix of zeros gets 2^-112.
- A block so small that its e4m3 scale rounds to 0 has scale 0 and elements 0: it dequantises to 0.
  A zero block in an MX format has scale 2^-127 (e8m0 has no zero).

x that is infinite or NaN is an error, or saturates: see `quantize`.
"""

from jaxmoe._quantize import dequantize, fake_quantize, quantize, unpack_e2m1
from jaxmoe._quantized_tensor import QuantizedTensor, check
from jaxmoe._qwix import from_qarray, to_qarray
from jaxmoe._unify_global_scale import UnifyReport, unify_global_scale

__all__ = [
    "QuantizedTensor",
    "UnifyReport",
    "check",
    "dequantize",
    "fake_quantize",
    "from_qarray",
    "quantize",
    "to_qarray",
    "unify_global_scale",
    "unpack_e2m1",
]
