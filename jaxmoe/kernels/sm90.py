"""The native Hopper library: loading, lazy registration, self-test, and its custom calls."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.activations import SwiGLU
from jaxmoe.experts import ExpertWeights, PreparedMatrix
from jaxmoe.formats import FLOAT4_E2M1, Format, get_format
from jaxmoe.kernels import fragment, fragment_fp8, native
from jaxmoe.kernels.xla import MlpConfig
from jaxmoe.quantization import QuantizedTensor

MOE_MLP = "jaxmoe_moe_mlp_sm90_v1"
GROUPED_MATMUL = "jaxmoe_grouped_matmul_sm90_v1"


@functools.cache
def library() -> native.Library:
    """The native module, or None and a sentence that says why there is none.

    Loading it needs neither a GPU nor a CUDA installation.
    """
    return native.load(
        "_sm90", "build jaxmoe from source with nvcc and -C cmake.define.JAXMOE_CUDA_FAMILIES=sm90"
    )


@functools.cache
def _native() -> ModuleType:
    return native.register(library(), platform="CUDA", backend=None)


def features() -> frozenset[str]:
    """Nothing beyond the SM, which the target knows."""
    return frozenset()


def tactics(variant: str) -> Mapping[str, int]:
    """Kernels that `moe_mlp` and `grouped_matmul` can be told to take, with their shared memory.

    `fused` runs a whole MLP of few tokens: `grouped_matmul` refuses it, and `moe_mlp` where the
    tokens are too many, with its limits.
    """
    module, why = library()
    if module is None:
        raise RuntimeError(why)
    return module.manifest()["variants"][variant]["tactics"]


def moe_mlp(config: MlpConfig, variant: str, *operands: Any, tactic: str = "") -> jax.Array:
    """One custom call for the whole expert MLP; the operands are those of `xla.moe_mlp`.

    `tactic` names the kernels; "" leaves the choice to the library, which knows the sizes.
    """
    return native.moe_mlp(_native(), MOE_MLP, config, variant, *operands, tactic=tactic)


def grouped_matmul(variant: str, *operands: Any, tactic: str = "") -> jax.Array:
    """One custom call for the grouped product; the operands are those of `xla.grouped_matmul`.

    `tactic` as in `moe_mlp`.
    """
    return native.grouped_matmul(_native(), GROUPED_MATMUL, variant, *operands, tactic=tactic)


# ---- self-test -----------------------------------------------------------------------------------

_EXPERTS, _TOP_K, _TOKENS, _HIDDEN, _INTERMEDIATE = 4, 2, 5, 96, 64
# bfloat16 rounds inputs of the second product and the result, 2^-9 each. Sums of e4m3 products keep
# about 14 bits: one in hundreds of the values between the products then falls to the other side of
# its rounding to e4m3, and is off by 2^-4 or so.
_TOLERANCE = 1e-2


def _fp8_rows(x: np.ndarray) -> np.ndarray:
    """Rows `f64[..., K]` as a W4A8 kernel multiplies them: e4m3 times a power of two for each."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    s = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 448) / 448))
    return (x / s).astype(jnp.float8_e4m3fn).astype(np.float64) * s


@dataclasses.dataclass(frozen=True)
class _Tested:
    """How a variant is tested: its formats, how it packs them, and the rows that it multiplies."""

    formats: tuple[str, ...]
    pack: Callable[[QuantizedTensor, bool], PreparedMatrix]
    rows: Callable[[np.ndarray], np.ndarray]


_TESTED: Mapping[str, _Tested] = MappingProxyType(
    {
        "sm90_w4a16": _Tested(("nvfp4", "mxfp4"), fragment.pack, lambda x: x),
        "sm90_w4a8": _Tested(("mxfp4",), fragment_fp8.pack, _fp8_rows),
    }
)


@functools.cache
def self_test(variant: str) -> str:
    """Runs a tiny problem once; "" if the numbers are right, else what was wrong with them.

    "" also where no Hopper GPU is here: then the program is only lowered for one.
    """
    device = _device()
    if device is None:
        return ""

    def run() -> str:
        with jax.default_device(device):
            reasons = (_try(variant, get_format(name)) for name in _TESTED[variant].formats)
            return next(filter(None, reasons), "")

    # A variant is first selected while a caller's function is traced, perhaps for a mesh: another
    # thread knows nothing of either.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _device() -> Any:
    """The first Hopper GPU of this process, or None."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return next((d for d in devices if d.compute_capability == "9.0"), None)


def _try(variant: str, fmt: Format) -> str:
    rng, tested = np.random.default_rng(0), _TESTED[variant]
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
