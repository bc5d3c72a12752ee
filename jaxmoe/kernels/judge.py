"""What a kernel's numbers are held against at run time: its own arithmetic, in NumPy and float64.

Small, and independent of the other implementations: a variant that is selected runs one problem
of `TINY`, and `jaxmoe doctor --evidence` runs more of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmoe.activations import SwiGLU
from jaxmoe.capability import Row
from jaxmoe.experts import CANONICAL, ExpertWeights, Matrix
from jaxmoe.formats import FLOAT4_E2M1, Format, get_format
from jaxmoe.kernels import fragment_fp8, layouts, panel
from jaxmoe.kernels.xla import MlpConfig
from jaxmoe.quantization import QuantizedTensor

# bfloat16 rounds inputs of the second product and the result, 2^-9 each. A float32 sum in another
# order puts one in thousands of the values between the products to the other side of its rounding
# (to e4m3: one in hundreds, since tensor-core sums of FP8 keep about 14 bits), which is then off by
# up to 2^-3.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of one problem, `moe_mlp` with SwiGLU, and the seed of its values."""

    tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    seed: int = 0


# Multiples of 64, which every kernel takes, and not of 128.
TINY = Case(tokens=5, num_experts=4, top_k=2, hidden_size=192, intermediate_size=64)


# ---- arithmetic ----------------------------------------------------------------------------------


def _bf16(y: np.ndarray) -> np.ndarray:
    return y.astype(ml_dtypes.bfloat16).astype(np.float64)


def _exact(y: np.ndarray) -> np.ndarray:
    return y


def _as_it_is(x: np.ndarray) -> tuple[np.ndarray, Any]:
    return x, 1.0


def _fp8_rows(x: np.ndarray) -> tuple[np.ndarray, Any]:
    """e4m3, and the least power of two of each row that keeps it within 448."""
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    s = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 448) / 448))
    return (x / s).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), s


def _nvfp4_rows(x: np.ndarray) -> tuple[np.ndarray, Any]:
    """e2m1 * e4m3, and the global scale of each row; `jaxmoe.kernels.operands` states the rule."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    g = np.where(largest > 0, largest / np.float32(2688), np.float32(1))
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    scale = np.abs(blocks).max(axis=-1, keepdims=True, initial=0) / (np.float32(6) * g[..., None])
    scale = np.minimum(scale, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    step = scale * g[..., None]
    quotient = np.where(step > 0, blocks / np.where(step > 0, step, np.float32(1)), np.float32(0))
    elements = np.clip(quotient, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return (elements * scale).reshape(x.shape), g.astype(np.float64)


def _mxfp8_rows(x: np.ndarray) -> tuple[np.ndarray, Any]:
    """e4m3 times a power of two of 32 elements, and no factor."""
    blocks = x.astype(np.float32).astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True, initial=0)
    unit = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1))) - 8)
    elements = np.clip(blocks / unit, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return (elements.astype(np.float64) * unit).reshape(x.shape), 1.0


def _int8_rows(x: np.ndarray) -> tuple[np.ndarray, Any]:
    """Integers of at most 127 times the least power of two of 16 elements; `Int8Block` of csrc/cpu
    has the rule.
    """
    blocks = x.astype(np.float32).astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    largest = np.abs(blocks).max(axis=-1, keepdims=True, initial=0)
    fraction, exponent = np.frexp(largest)  # in [0.5, 1)
    unit = 2.0 ** np.maximum(exponent - 7 + (fraction >= 127.5 / 128), -125)
    return (np.rint(blocks / unit) * unit).reshape(x.shape), 1.0


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a product's rows are rounded (and by which factor), its sums, the activation's output."""

    rows: Callable[[np.ndarray], tuple[np.ndarray, Any]]
    sums: Callable[[np.ndarray], np.ndarray]
    inner: Callable[[np.ndarray], np.ndarray]


BF16 = Arithmetic(_as_it_is, _exact, _bf16)
FP8_ROWS = Arithmetic(_fp8_rows, _exact, _bf16)
MXFP8 = Arithmetic(_mxfp8_rows, _bf16, _exact)
NVFP4 = Arithmetic(_nvfp4_rows, _bf16, _exact)
INT8 = Arithmetic(_int8_rows, _exact, _exact)

_BY_COMPUTE: Mapping[str, Arithmetic] = MappingProxyType(
    {"w4a16": BF16, "w4a8": MXFP8, "w4a4": NVFP4}
)
_BY_LAYOUT: Mapping[tuple[str, str], Arithmetic] = MappingProxyType(
    {(fragment_fp8.NAME, "w4a8"): FP8_ROWS, (panel.NAME, "w4a8"): INT8}
)


def arithmetic_of(row: Row, compute: str) -> Arithmetic:
    """What a variant does with weights and rows when it runs as `compute`."""
    return _BY_LAYOUT.get((row.layout, compute)) or _BY_COMPUTE[compute]


# ---- one problem ---------------------------------------------------------------------------------


def error(
    row: Row, weight_format: str, case: Case, moe_mlp: Callable[..., jax.Array], **attributes: str
) -> float:
    """Relative L2 distance of a variant's bfloat16 result from float64 with its roundings.

    Args:
      row: the variant.
      weight_format: one of its formats.
      case: sizes.
      moe_mlp: the family's.
      **attributes: for `moe_mlp`, such as the tactic; `compute`, where the variant has several
        kinds of arithmetic, is by default the most accurate.
    """
    rng, fmt = np.random.default_rng(case.seed), get_format(weight_format)
    compute = attributes.get("compute", row.computes(weight_format)[-1])
    arithmetic = arithmetic_of(row, compute)
    e, h, i = case.num_experts, case.hidden_size, case.intermediate_size
    gate_up, first = _random_weight(rng, e, 2 * i, h, fmt)
    down, second = _random_weight(rng, e, h, i, fmt)
    x = np.asarray(rng.standard_normal((case.tokens, case.hidden_size)), ml_dtypes.bfloat16)
    score = rng.random((case.tokens, case.num_experts))
    ids = np.argsort(-score, axis=1)[:, : case.top_k].astype(np.int32)
    weights = rng.uniform(0.5, 1.0, ids.shape).astype(np.float32)

    def product(rows: np.ndarray, w: np.ndarray) -> np.ndarray:
        values, factor = arithmetic.rows(rows)
        # The factor of an expert is a power of two here, which commutes with every rounding.
        return arithmetic.sums(values @ w.T) * factor

    want = np.zeros(x.shape)
    for expert in range(e):
        token, slot = np.nonzero(ids == expert)
        gate, up = np.split(product(x[token].astype(np.float64), first[expert]), 2, axis=-1)
        inner = arithmetic.inner(gate / (1 + np.exp(-gate)) * up)
        np.add.at(want, token, weights[token, slot][:, None] * product(inner, second[expert]))
    activation = SwiGLU()
    y = moe_mlp(
        MlpConfig(type(activation), weight_on_input=False),
        row.variant,
        jnp.asarray(x),
        ExpertWeights(_lay_out(gate_up, row, True), _lay_out(down, row, False)),
        jnp.asarray(ids),
        jnp.asarray(weights),
        activation.params(e),
        jnp.int32(0),
        **attributes,
    )
    off = np.linalg.norm(np.asarray(y).astype(np.float64) - want)
    return float(off / np.linalg.norm(want)) if case.tokens else 0.0


def verdict(off: float, weight_format: str) -> str:
    """ "" if an error is small enough, else a sentence."""
    if off <= TOLERANCE:  # a NaN is not
        return ""
    return (
        f"a relative error of {off:.1e} with {weight_format} weights, where {TOLERANCE:.0e} is "
        "allowed"
    )


def _lay_out(w: QuantizedTensor, row: Row, gated: bool) -> Matrix:
    return w if row.layout == CANONICAL else layouts.pack(w, row.layout, gated)


def _random_weight(
    rng: np.random.Generator, e: int, n: int, k: int, fmt: Format
) -> tuple[QuantizedTensor, np.ndarray]:
    """Random codes and powers of two as scales, and their values `f64[E, N, K]`.

    The values are of size 1 / sqrt(K), near enough.
    """
    assert fmt.block_size is not None
    codes = rng.integers(0, 16, (e, n, k)).astype(np.uint8)
    typical = -round(np.log2(3 * k**0.5))
    scale = 2.0 ** rng.integers(typical - 1, typical + 2, (e, n, k // fmt.block_size))
    values = codes.view(FLOAT4_E2M1).astype(np.float64) * np.repeat(scale, fmt.block_size, axis=-1)
    factor = 2.0**typical if fmt.has_global_scale else 1.0
    w = QuantizedTensor(
        jnp.asarray(codes[..., 0::2] | codes[..., 1::2] << 4),
        jnp.asarray((scale / factor).astype(fmt.scale)),
        jnp.full(e, factor, jnp.float32) if fmt.has_global_scale else None,
        fmt,
    )
    return w, values
