"""The native Hopper library: loading, lazy registration, self-test, and its custom calls."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.kernels import fragment, fragment_fp8, native
from jaxmoe.kernels import self_test as tests
from jaxmoe.kernels.xla import MlpConfig

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


def _fp8_rows(x: np.ndarray) -> np.ndarray:
    """Rows `f64[..., K]` as a W4A8 kernel multiplies them: e4m3 times a power of two for each."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    s = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 448) / 448))
    return (x / s).astype(jnp.float8_e4m3fn).astype(np.float64) * s


_TESTED: Mapping[str, tests.Tested] = MappingProxyType(
    {
        "sm90_w4a16": tests.Tested(("nvfp4", "mxfp4"), fragment.pack),
        "sm90_w4a8": tests.Tested(("mxfp4",), fragment_fp8.pack, _fp8_rows),
    }
)


def _device() -> Any:
    """The first Hopper GPU of this process, or None."""
    return tests.first_device("sm90_w4a16")


@functools.cache
def self_test(variant: str) -> str:
    """Runs a tiny problem once; "" if the numbers are right, else what was wrong with them.

    "" also where no Hopper GPU is here: then the program is only lowered for one.
    """
    device = _device()
    return "" if device is None else tests.run(moe_mlp, variant, _TESTED[variant], device)
