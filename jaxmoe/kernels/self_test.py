"""The self-test of the GPU variants: a tiny problem, once, against numbers worked out here."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.activations import SwiGLU
from jaxmoe.capability import TABLE
from jaxmoe.experts import ExpertWeights, PreparedMatrix
from jaxmoe.formats import FLOAT4_E2M1, Format, get_format
from jaxmoe.kernels.xla import MlpConfig
from jaxmoe.quantization import QuantizedTensor

_EXPERTS, _TOP_K, _TOKENS, _HIDDEN, _INTERMEDIATE = 4, 2, 5, 96, 64
# bfloat16 rounds inputs of the second product and the result, 2^-9 each. Sums of e4m3 products keep
# about 14 bits: one in hundreds of the values between the products then falls to the other side of
# its rounding to e4m3, and is off by 2^-4 or so.
_TOLERANCE = 1e-2

# As a family's `moe_mlp`.
MoeMlp = Callable[..., jax.Array]


def _as_they_are(rows: np.ndarray) -> np.ndarray:
    return rows


@dataclasses.dataclass(frozen=True)
class Tested:
    """How a variant is tested: its formats, how it packs them, and the rows that it multiplies."""

    formats: tuple[str, ...]
    pack: Callable[[QuantizedTensor, bool], PreparedMatrix]
    rows: Callable[[np.ndarray], np.ndarray] = _as_they_are


def first_device(variant: str) -> Any:
    """The first GPU of this process that is one of the variant's SMs, or None."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    sms = next(row.sms for row in TABLE if row.variant == variant) or ()
    names = {f"{sm // 10}.{sm % 10}" for sm in sms}
    return next((d for d in devices if d.compute_capability in names), None)


def run(moe_mlp: MoeMlp, variant: str, tested: Tested, device: Any) -> str:
    """Runs the tiny problem; "" if the numbers are right, else what was wrong with them."""

    def try_all() -> str:
        with jax.default_device(device):
            reasons = (_try(moe_mlp, variant, tested, get_format(n)) for n in tested.formats)
            return next(filter(None, reasons), "")

    # A variant is first selected while a caller's function is traced, perhaps for a mesh: another
    # thread knows nothing of either.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(try_all).result()


def _try(moe_mlp: MoeMlp, variant: str, tested: Tested, fmt: Format) -> str:
    rng = np.random.default_rng(0)
    gate_up, gate_up_values = _random_weight(rng, 2 * _INTERMEDIATE, _HIDDEN, fmt)
    down, down_values = _random_weight(rng, _HIDDEN, _INTERMEDIATE, fmt)
    x = np.asarray(rng.standard_normal((_TOKENS, _HIDDEN)), jnp.bfloat16)
    ids = rng.integers(0, _EXPERTS, (_TOKENS, _TOP_K)).astype(np.int32)
    weights = rng.uniform(0.5, 1.0, ids.shape).astype(np.float32)
    want, rows = np.zeros(x.shape), tested.rows(x.astype(np.float64))
    for t, j in np.ndindex(*ids.shape):
        gate, up = np.split(gate_up_values[ids[t, j]] @ rows[t], 2)
        h = (gate / (1 + np.exp(-gate)) * up).astype(x.dtype).astype(np.float64)
        want[t] += weights[t, j] * (down_values[ids[t, j]] @ tested.rows(h))
    activation = SwiGLU()
    try:
        y = moe_mlp(
            MlpConfig(type(activation), weight_on_input=False),
            variant,
            jnp.asarray(x),
            ExpertWeights(tested.pack(gate_up, True), tested.pack(down, False)),
            jnp.asarray(ids),
            jnp.asarray(weights),
            activation.params(_EXPERTS),
            jnp.int32(0),
        )
        got = np.asarray(y).astype(np.float64)
    except Exception as error:  # whatever it was, this variant does not work here
        return f"{type(error).__name__}: {error}"
    off = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    if off <= _TOLERANCE:
        return ""
    return f"a relative error of {off:.1e} with {fmt} weights, where {_TOLERANCE:.0e} is allowed"


def _random_weight(
    rng: np.random.Generator, n: int, k: int, fmt: Format
) -> tuple[QuantizedTensor, np.ndarray]:
    """Random codes and scales near 2^-5, and their values `f64[E, N, K]`."""
    assert fmt.block_size is not None
    codes = rng.integers(0, 16, (_EXPERTS, n, k)).astype(np.uint8)
    scale = 2.0 ** rng.integers(-6, -3, (_EXPERTS, n, k // fmt.block_size))
    values = codes.view(FLOAT4_E2M1).astype(np.float64) * np.repeat(scale, fmt.block_size, axis=-1)
    factor = 2.0**-3 if fmt.has_global_scale else 1.0
    w = QuantizedTensor(
        jnp.asarray(codes[..., 0::2] | codes[..., 1::2] << 4),
        jnp.asarray((scale / factor).astype(fmt.scale)),
        jnp.full(_EXPERTS, factor, jnp.float32) if fmt.has_global_scale else None,
        fmt,
    )
    return w, values
