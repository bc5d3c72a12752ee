"""What the tests of the GPU variants share: the obstacle, and calls by a named tactic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import COMPUTE, activation_arrays, prepared, run, run_grouped

import jaxmoe
from jaxmoe.capability import TABLE
from jaxmoe.kernels import FAMILIES
from jaxmoe.kernels.xla import MlpConfig

DTYPES = ("bfloat16", "float16")
ROWS = {row.variant: row for row in TABLE}

# Around the edges of every tile of tokens, and beyond several.
EDGE_TOKENS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257)


def family(variant):
    """The module of a variant's kernels."""
    return FAMILIES[ROWS[variant].family]


@functools.cache
def obstacle(variant):
    """Why a variant cannot run here, or ""."""
    module, why = family(variant).library()
    if module is None:
        return why
    if variant not in module.manifest()["variants"]:
        return f"the library that was built has no {variant}"
    sms = ", ".join(map(str, sorted(ROWS[variant].sms)))
    return "" if family(variant)._device() is not None else f"needs an NVIDIA GPU of SM {sms}"


def tactics(variant):
    """ "" for the library's own choice, then every name; the choice alone where it cannot run."""
    return ("", *(() if obstacle(variant) else family(variant).tactics(variant)))


def marked(variant, *values):
    """A parameter that is skipped, with the reason, where the variant cannot run."""
    why = obstacle(variant)
    return pytest.param(variant, *values, marks=[pytest.mark.skip(reason=why)] if why else [])


@functools.cache
def by_tactic(variant: str, activation: str, weight_on_input: bool, tactic: str):
    """jit of the kernel's own call with a named tactic."""
    config = MlpConfig(jaxmoe.activations.ACTIVATIONS[activation], weight_on_input)
    return jax.jit(functools.partial(family(variant).moe_mlp, config, variant, tactic=tactic))


def run_tactic(variant, problem, tactic):
    """moe_mlp by one tactic; "" runs the public function."""
    if not tactic:
        return run(problem, variant)
    spec, (x, experts, ids, weights) = problem.spec, problem.call_args()
    params = activation_arrays(problem)
    params = jnp.stack(params) if params else jnp.zeros((0, spec.num_experts), jnp.float32)
    y = by_tactic(variant, spec.activation_name, spec.weight_on_input, tactic)(
        x,
        prepared(experts, variant, spec.gated),
        ids,
        weights,
        params,
        jnp.int32(spec.expert_offset),
    )
    assert y.shape == problem.x.shape
    assert y.dtype == problem.x.dtype
    return np.asarray(y)


@functools.cache
def grouped_by_tactic(variant: str, tactic: str, out_dtype: str):
    def call(*operands):
        return family(variant).grouped_matmul(variant, *operands, out_dtype, tactic=tactic)

    return jax.jit(call)


def run_grouped_tactic(variant, problem, tactic):
    """grouped_matmul by one tactic; "" runs the public function."""
    if not tactic:
        return run_grouped(problem, variant)
    x, w, sizes = problem.call_args()
    kwargs = problem.call_kwargs()
    y = grouped_by_tactic(variant, tactic, x.dtype.name)(
        x,
        jaxmoe.prepare(w, variant, compute=COMPUTE.get(variant, "auto")),
        sizes,
        kwargs["bias"],
        jnp.int32(kwargs["group_offset"] or 0),
    )
    return np.asarray(y)


def raw_call(variant, weight_format, problem):
    """Operands and attributes of the bare custom call, by name: for calls that must be refused."""
    x, experts, ids, weights = problem.call_args()
    experts = prepared(experts, variant, True)
    values = {
        "x": x, "gate_up": experts.gate_up.data, "gate_up_global": experts.gate_up.global_scale,
        "down": experts.down.data, "down_global": experts.down.global_scale,
        "gate_up_bias": np.zeros(0, np.float32), "down_bias": np.zeros(0, np.float32),
        "params": jaxmoe.SwiGLU().params(8), "ids": ids, "weights": weights,
        "expert_offset": np.int32(0),
    }  # fmt: skip
    attrs = {
        "variant": variant, "format": weight_format, "activation": "swiglu", "tactic": "",
        "hidden_size": np.int64(96), "intermediate_size": np.int64(64), "weight_on_input": False,
    }  # fmt: skip
    return values, attrs


def assert_refused(variant, values, attrs, message, workspace=1 << 22):
    module = family(variant)
    module._native()
    out = jax.ShapeDtypeStruct(values["x"].shape, values["x"].dtype)
    results = (out, jax.ShapeDtypeStruct((workspace,), jnp.uint8))
    call = jax.ffi.ffi_call(module.MOE_MLP, results)
    with pytest.raises(Exception, match=rf"moe_mlp \({ROWS[variant].family}\): " + message):
        jax.block_until_ready(call(*map(jnp.asarray, values.values()), **attrs))
