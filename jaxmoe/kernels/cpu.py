"""The native CPU library: loading, lazy registration, and the lowering to its custom calls."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax

from jaxmoe.kernels import native
from jaxmoe.kernels.xla import MlpConfig

MOE_MLP = "jaxmoe_moe_mlp_cpu_v1"
GROUPED_MATMUL = "jaxmoe_grouped_matmul_cpu_v1"


@functools.cache
def library() -> native.Library:
    """The native module, or None and a sentence that says why there is none."""
    return native.load(
        "_cpu",
        "reinstall jaxmoe with a C++ compiler at hand: "
        "pip install --force-reinstall --no-deps jaxmoe",
    )


@functools.cache
def _native() -> ModuleType:
    return native.register(library(), platform="cpu", backend="cpu")


def features() -> frozenset[str]:
    """Features of this machine that the table's rows may require."""
    module, _ = library()
    return frozenset() if module is None else frozenset(module.cpu_features())


@functools.cache
def self_test(variant: str) -> str:
    """Runs a tiny problem once; "" if the numbers are right, else what was wrong with them."""
    return _native().self_test(variant)


def use_huge_pages(data: jax.Array) -> None:
    """Moves an array in this machine's memory to huge pages, where the system does that.

    XLA allocates on pages of 4 KB, from which weights stream 10 to 25 % slower.
    """
    module, _ = library()
    if module is None or isinstance(data, jax.core.Tracer):
        return
    for shard in data.addressable_shards:
        if shard.device.platform == "cpu":
            module.use_huge_pages(
                shard.data.block_until_ready().unsafe_buffer_pointer(), shard.data.nbytes
            )


def moe_mlp(
    config: MlpConfig, variant: str, *operands: Any, compute: str = "w4a16", tactic: str = ""
) -> jax.Array:
    """One custom call for the whole expert MLP; the operands are those of `xla.moe_mlp`.

    `compute` is the arithmetic, of which every variant here has two. `tactic` names the kernels;
    "" leaves the choice to the library, by the rows of each expert.
    """
    return native.moe_mlp(
        _native(), MOE_MLP, config, variant, *operands, compute=compute, tactic=tactic
    )


def grouped_matmul(
    variant: str, *operands: Any, compute: str = "w4a16", tactic: str = ""
) -> jax.Array:
    """One custom call for the grouped product; the operands are those of `xla.grouped_matmul`.

    `compute` and `tactic` as in `moe_mlp`.
    """
    return native.grouped_matmul(
        _native(), GROUPED_MATMUL, variant, *operands, compute=compute, tactic=tactic
    )
