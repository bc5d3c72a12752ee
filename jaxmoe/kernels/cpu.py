"""The native CPU library: loading, lazy registration, and the lowering to its custom calls."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.experts import ExpertWeights, PreparedMatrix
from jaxmoe.kernels.xla import MlpConfig

MOE_MLP = "jaxmoe_moe_mlp_cpu_v1"
GROUPED_MATMUL = "jaxmoe_grouped_matmul_cpu_v1"


@functools.cache
def library() -> tuple[ModuleType | None, str]:
    """The native module, or None and a sentence that says why there is none."""
    try:
        return importlib.import_module("jaxmoe._cpu"), ""
    except ImportError as error:
        return None, (
            f"the CPU library jaxmoe._cpu could not be loaded ({error}); reinstall jaxmoe with a "
            "C++ compiler at hand: pip install --force-reinstall --no-deps jaxmoe"
        )


@functools.cache
def _native() -> ModuleType:
    """The native module with its targets registered.

    Registration waits for the first use and for a live backend: a target that is refused before
    the backend exists would take all of JAX down with it.
    """
    module, why = library()
    if module is None:
        raise RuntimeError(why)
    jax.local_devices(backend="cpu")
    for name, target in module.registrations().items():
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    return module


@functools.cache
def self_test(variant: str) -> str:
    """Runs a tiny problem once; "" if the numbers are right, else what was wrong with them."""
    return _native().self_test(variant)


def _bias(bias: jax.Array | None) -> jax.Array:
    """The C++ side reads an array without elements as "no bias"."""
    return jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32)


def _call(
    name: str, out: jax.ShapeDtypeStruct, workspace: int, *operands: Any, **attrs: Any
) -> Any:
    # The workspace is an output because XLA's CPU runtime offers no scratch allocator.
    results = (out, jax.ShapeDtypeStruct((workspace,), jnp.uint8))
    return jax.ffi.ffi_call(name, results)(*operands, **attrs)[0]


def moe_mlp(
    config: MlpConfig,
    variant: str,
    x: jax.Array,
    experts: ExpertWeights,
    expert_ids: jax.Array,
    weights: jax.Array,
    params: jax.Array,
    expert_offset: jax.Array,
) -> jax.Array:
    """One custom call for the whole expert MLP; see `jaxmoe.moe_mlp`."""
    assert isinstance(experts.gate_up, PreparedMatrix)
    assert isinstance(experts.down, PreparedMatrix)
    t, k = expert_ids.shape
    if t * k == 0:
        return jnp.zeros_like(x)
    workspace = _native().workspace_bytes(
        "moe_mlp",
        tokens=t,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        num_experts=experts.num_experts,
        top_k=k,
        gated=experts.gate_up.gated,
        x_dtype=str(x.dtype),
        variant=variant,
    )
    return _call(
        MOE_MLP,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        workspace,
        x,
        experts.gate_up.data,
        experts.gate_up.global_scale,
        experts.down.data,
        experts.down.global_scale,
        _bias(experts.gate_up_bias),
        _bias(experts.down_bias),
        params,
        expert_ids,
        weights.astype(jnp.float32),
        expert_offset,
        variant=variant,
        format=experts.format.name,
        activation=config.activation.name,
        hidden_size=np.int64(experts.hidden_size),
        intermediate_size=np.int64(experts.intermediate_size),
        weight_on_input=config.weight_on_input,
    )


def grouped_matmul(
    variant: str,
    x: jax.Array,
    w: PreparedMatrix,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    group_offset: jax.Array,
    out_dtype: Any,
) -> jax.Array:
    """One custom call for the grouped product; see `jaxmoe.grouped_matmul`."""
    e, n, k = w.shape
    if x.shape[0] == 0:
        return jnp.zeros((0, n), out_dtype)
    workspace = _native().workspace_bytes(
        "grouped_matmul",
        rows=x.shape[0],
        n=n,
        k=k,
        num_experts=e,
        x_dtype=str(x.dtype),
        variant=variant,
    )
    return _call(
        GROUPED_MATMUL,
        jax.ShapeDtypeStruct((x.shape[0], n), out_dtype),
        workspace,
        x,
        w.data,
        w.global_scale,
        _bias(bias),
        group_sizes,
        group_offset,
        variant=variant,
        format=w.format.name,
        n=np.int64(n),
        k=np.int64(k),
    )
