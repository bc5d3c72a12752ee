"""What the tests of the Hopper variants share: the obstacle, and calls by a named tactic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from suite import COMPUTE, activation_arrays, prepared, run, run_grouped

import jaxmoe
from jaxmoe.kernels import sm90
from jaxmoe.kernels.xla import MlpConfig

DTYPES = ("bfloat16", "float16")

# Around the edges of every tile of tokens, and beyond several.
EDGE_TOKENS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257)


def obstacle(variant):
    """Why a variant cannot run here, or ""."""
    module, why = sm90.library()
    if module is None:
        return why
    if variant not in module.manifest()["variants"]:
        return f"the library jaxmoe._sm90 that was built has no {variant}"
    return "" if sm90._device() is not None else "needs an NVIDIA GPU of SM 90 (H100, H200, GH200)"


@functools.cache
def by_tactic(variant: str, activation: str, weight_on_input: bool, tactic: str):
    """jit of the kernel's own call with a named tactic."""
    config = MlpConfig(jaxmoe.activations.ACTIVATIONS[activation], weight_on_input)
    return jax.jit(functools.partial(sm90.moe_mlp, config, variant, tactic=tactic))


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
        return sm90.grouped_matmul(variant, *operands, out_dtype, tactic=tactic)

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
