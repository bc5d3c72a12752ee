"""The native library for every SM from 80 on: loading, self-test, and its custom calls."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from jaxmoe.kernels import fragment, native
from jaxmoe.kernels import self_test as tests
from jaxmoe.kernels.xla import MlpConfig

MOE_MLP = "jaxmoe_moe_mlp_sm80_v1"
GROUPED_MATMUL = "jaxmoe_grouped_matmul_sm80_v1"


@functools.cache
def library() -> native.Library:
    """The native module, or None and a sentence that says why there is none.

    Loading it needs neither a GPU nor a CUDA installation.
    """
    return native.load(
        "_sm80", "build jaxmoe from source with nvcc and -C cmake.define.JAXMOE_CUDA_FAMILIES=sm80"
    )


@functools.cache
def _native() -> ModuleType:
    return native.register(library(), platform="CUDA", backend=None)


def features() -> frozenset[str]:
    """Nothing beyond the SM, which the target knows."""
    return frozenset()


def tactics(variant: str) -> Mapping[str, int]:
    """Kernels that `moe_mlp` and `grouped_matmul` can be told to take, with their shared memory."""
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


_VARIANT = "sm80_w4a16"
_TESTED = tests.Tested(("nvfp4", "mxfp4"), fragment.pack)


def _device() -> Any:
    """The first GPU of this process that the library has code for, or None."""
    return tests.first_device(_VARIANT)


@functools.cache
def self_test(variant: str) -> str:
    """Runs a tiny problem once; "" if the numbers are right, else what was wrong with them.

    "" also where no such GPU is here: then the program is only lowered for one.
    """
    device = _device()
    return "" if device is None else tests.run(moe_mlp, variant, _TESTED, device)
