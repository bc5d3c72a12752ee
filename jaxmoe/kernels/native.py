"""What the native libraries share: loading, lazy registration, and the calls themselves."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.experts import ExpertWeights, PreparedMatrix
from jaxmoe.kernels.xla import MlpConfig

Library = tuple[ModuleType | None, str]


def load(name: str, way_out: str) -> Library:
    """The native module, or None and a sentence that says why there is none."""
    try:
        return importlib.import_module(f"jaxmoe.{name}"), ""
    except ImportError as error:
        return None, f"the library jaxmoe.{name} could not be loaded ({error}); {way_out}"


def register(library: Library, platform: str, backend: str | None) -> ModuleType:
    """The native module with its targets registered.

    Registration waits for the first use and for a live backend: a target that is refused before
    the backend exists would take all of JAX down with it.
    """
    module, why = library
    if module is None:
        raise RuntimeError(why)
    jax.local_devices(backend=backend)
    for name, target in module.registrations().items():
        jax.ffi.register_ffi_target(name, target, platform=platform)
    return module


def _optional(a: jax.Array | None) -> jax.Array:
    """The C++ side reads an array without elements as "none"."""
    return jnp.zeros(0, jnp.float32) if a is None else jnp.atleast_1d(a).astype(jnp.float32)


def _call(
    name: str, out: jax.ShapeDtypeStruct, workspace: int, *operands: Any, **attrs: Any
) -> Any:
    # The workspace is an output because XLA's CPU runtime offers no scratch allocator, and because
    # memory that XLA plans itself may be used in a CUDA graph.
    results = (out, jax.ShapeDtypeStruct((workspace,), jnp.uint8))
    return jax.ffi.ffi_call(name, results)(*operands, **attrs)[0]


def moe_mlp(
    module: ModuleType,
    target: str,
    config: MlpConfig,
    variant: str,
    x: jax.Array,
    experts: ExpertWeights,
    expert_ids: jax.Array,
    weights: jax.Array,
    params: jax.Array,
    expert_offset: jax.Array,
    *,
    input_scales: bool = False,
    compute: str | None = None,
    **attrs: Any,
) -> jax.Array:
    """One custom call for the whole expert MLP; see `jaxmoe.moe_mlp`.

    Args:
      module: the registered native module.
      target: name of its custom call.
      config: what is static.
      variant: the kernel variant.
      x: the first of the operands of `xla.moe_mlp`; the others follow.
      experts: prepared weights.
      expert_ids: as in `xla.moe_mlp`.
      weights: as in `xla.moe_mlp`.
      params: as in `xla.moe_mlp`.
      expert_offset: as in `xla.moe_mlp`.
      input_scales: whether the library's handlers take static input scales.
      compute: the arithmetic, for a library whose variants have several.
      **attrs: the library's own attributes.
    """
    assert isinstance(experts.gate_up, PreparedMatrix)
    assert isinstance(experts.down, PreparedMatrix)
    t, k = expert_ids.shape
    if t * k == 0:
        return jnp.zeros_like(x)
    scales = (experts.gate_up_input_scale, experts.down_input_scale) if input_scales else ()
    chosen = {} if compute is None else {"compute": compute}
    workspace = module.workspace_bytes(
        "moe_mlp",
        tokens=t,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        num_experts=experts.num_experts,
        top_k=k,
        gated=experts.gate_up.gated,
        x_dtype=str(x.dtype),
        variant=variant,
        **chosen,
    )
    return _call(
        target,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        workspace,
        x,
        experts.gate_up.data,
        experts.gate_up.global_scale,
        experts.down.data,
        experts.down.global_scale,
        _optional(experts.gate_up_bias),
        _optional(experts.down_bias),
        params,
        *map(_optional, scales),
        expert_ids,
        weights.astype(jnp.float32),
        expert_offset,
        variant=variant,
        format=experts.format.name,
        activation=config.activation.name,
        hidden_size=np.int64(experts.hidden_size),
        intermediate_size=np.int64(experts.intermediate_size),
        weight_on_input=config.weight_on_input,
        **chosen,
        **attrs,
    )


def grouped_matmul(
    module: ModuleType,
    target: str,
    variant: str,
    x: jax.Array,
    w: PreparedMatrix,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    input_scale: jax.Array | None,
    group_offset: jax.Array,
    out_dtype: Any,
    *,
    input_scales: bool = False,
    compute: str | None = None,
    **attrs: Any,
) -> jax.Array:
    """One custom call for the grouped product; see `jaxmoe.grouped_matmul` and `moe_mlp` here."""
    e, n, k = w.shape
    if x.shape[0] == 0:
        return jnp.zeros((0, n), out_dtype)
    chosen = {} if compute is None else {"compute": compute}
    workspace = module.workspace_bytes(
        "grouped_matmul",
        rows=x.shape[0],
        n=n,
        k=k,
        num_experts=e,
        num_groups=group_sizes.shape[0],
        x_dtype=str(x.dtype),
        variant=variant,
        **chosen,
    )
    return _call(
        target,
        jax.ShapeDtypeStruct((x.shape[0], n), out_dtype),
        workspace,
        x,
        w.data,
        w.global_scale,
        _optional(bias),
        *([_optional(input_scale)] if input_scales else []),
        group_sizes,
        group_offset,
        variant=variant,
        format=w.format.name,
        n=np.int64(n),
        k=np.int64(k),
        **chosen,
        **attrs,
    )
