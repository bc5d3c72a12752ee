"""The public functions: `moe_mlp` and `grouped_matmul`, with their gradients and batching rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe import kernels, tuning
from jaxmoe.activations import Activation, SwiGLU
from jaxmoe.capability import Problem, Resolution
from jaxmoe.experts import (
    ExpertWeights,
    Matrix,
    check_bias,
    check_experts,
    check_input_scale,
    check_matrix,
    format_of,
    is_plain,
)
from jaxmoe.kernels import xla
from jaxmoe.kernels.xla import MlpConfig

Implementation = str | Sequence[str] | None

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def moe_mlp(
    x: jax.Array,
    experts: ExpertWeights,
    expert_ids: jax.Array,
    weights: jax.Array,
    *,
    activation: Activation = SwiGLU(),  # noqa: B008  (frozen)
    compute: str = "auto",
    expert_offset: int | jax.Array = 0,
    weight_on_input: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """Applies each token's experts and adds up their weighted results.

    >>> import jax, jaxmoe
    >>> key = jax.random.key(0)
    >>> experts = jaxmoe.ExpertWeights(
    ...     jaxmoe.quantize(jax.random.normal(key, (8, 128, 64)), "nvfp4"),
    ...     jaxmoe.quantize(jax.random.normal(key, (8, 64, 64)), "nvfp4"))
    >>> x = jax.random.normal(key, (5, 64))
    >>> route = jaxmoe.routing.get_router("renormalize", top_k=2)
    >>> ids, weights = route(jax.random.normal(key, (5, 8)))
    >>> jaxmoe.moe_mlp(x, experts, ids, weights).shape
    (5, 64)

    For token t and choice j with expert `e = expert_ids[t, j] - expert_offset`:

        h = activation(x[t] @ gate_up[e].T + gate_up_bias[e])
        y[t] += weights[t, j] * (h @ down[e].T + down_bias[e])

    No token is dropped and no routing is special: experts may be empty or take every token, an
    expert may stand twice in a row, and ids outside `[expert_offset, expert_offset + E)`
    contribute zero, so that the shards of expert parallelism add up to the whole. The same inputs
    give the same bits.

    With `compute="w4a16"` the weights are exact (but for one case: with float16 x on Hopper, MXFP4
    blocks whose scale is below 2^-29 of the matrix's largest count as zeros), sums are float32, and
    the result is rounded once to x's dtype. Other arithmetic rounds x and h too:

    - `"w4a4"`: NVFP4 weights and activations, on SM 100, 103, 120 and 121.
    - `"w4a8"`, MXFP4 weights: MXFP8 activations on those SMs. On Hopper a row of x or h is rounded
      to e4m3 times the least power of two that keeps it within 448, and a block of weights whose
      scale is more than 2^11 below the largest of its row as `jaxmoe.kernels.fragment_fp8` says.
    - `"w4a8"` on CPUs: 16 values of x or h become integers of at most 127 times a power of two,
      between exact weights of either format and float32 sums. Faster with few rows for each expert,
      and without AMX with many; only for who asks for it, whatever the weights declare.

    `jaxmoe.kernels.operands` states the rules of NVFP4 and MXFP8, and the implementations
    `"xla_w4a4"` and `"xla_w4a8"` follow them on any device. Gradients are those of w4a16 on the
    weights that are multiplied, as if x and h had not been rounded. `docs/accuracy.md` has the
    errors.

    Args:
      x: tokens, `[T, H]`, float32, bfloat16 or float16.
      experts: weights of the local experts; `prepare` them once where speed matters.
      expert_ids: `i32[T, k]`, global ids.
      weights: routing weights, floating-point `[T, k]`.
      activation: what stands between the two products.
      compute: `"w4a16"`, `"w4a8"`, `"w4a4"`, or `"auto"`, which takes what the weights declare
        (`ExpertWeights.declared_compute`) where this target has it, else the nearest more accurate
        arithmetic, and never w4a8 on a CPU. Weights that declare nothing run as w4a16: anything
        else has to be asked for, here and in `prepare`.
      expert_offset: id of the first local expert; an int or an `i32[]` array.
      weight_on_input: multiply x by the routing weight before the first product, and leave the
        result unweighted (Llama 4); for k = 1.
      implementation: None (the best that this target has; always works), the name of a provider or
        variant (that one or an error), or a sequence of names (the first that is supported).

    Returns:
      `[T, H]` in x's dtype. Differentiable in x, weights, the biases, and unquantised matrices.

    Raises:
      ValueError: an argument does not fit; the message names it.
      UnsupportedError: a requested implementation cannot run this; it carries every reason.

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017, equation 1.
    """
    check_experts(experts, activation.gated)
    _check_tokens(x, experts.hidden_size, "x", "[T, H]")
    _check_routing(expert_ids, weights, x.shape[0])
    if weight_on_input and expert_ids.shape[1] != 1:
        raise ValueError(
            "weight_on_input must be False, or expert_ids have one choice per token, got "
            f"{expert_ids.shape[1]}: with several choices the weights belong on the outputs"
        )
    expert_offset = _scalar(expert_offset, "expert_offset")
    resolution = kernels.select(
        moe_mlp_problem(x.dtype, experts, expert_ids.shape[1], activation, compute), implementation
    )
    call = _MlpCall(tuning.Key.of(resolution), MlpConfig(type(activation), weight_on_input))
    return _moe_mlp_jit(
        call,
        x,
        kernels.lay_out(experts, resolution, activation.gated),
        expert_ids,
        weights,
        activation.params(experts.num_experts),
        expert_offset,
    )


def moe_mlp_problem(
    dtype: Any, experts: ExpertWeights, top_k: int, activation: Activation, compute: str
) -> Problem:
    """The `Problem` that `moe_mlp` resolves for these arguments."""
    return Problem(
        op="moe_mlp",
        weight_format=experts.format.name,
        compute=compute,
        activation_dtype=str(jnp.dtype(dtype)),
        activation=activation.name,
        bias=experts.gate_up_bias is not None or experts.down_bias is not None,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        num_experts=experts.num_experts,
        top_k=top_k,
        declared_compute=experts.declared_compute,
        input_scales=experts.has_input_scales,
    )


def grouped_matmul(
    x: jax.Array,
    w: Matrix,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    group_offset: int | jax.Array | None = None,
    preferred_element_type: Any = None,
    compute: str = "auto",
    implementation: Implementation = None,
) -> jax.Array:
    """Multiplies each group of rows by its own FP4 matrix: `jax.lax.ragged_dot` for FP4 weights.

    >>> import jax, jax.numpy as jnp, jaxmoe
    >>> w = jaxmoe.quantize(jax.random.normal(jax.random.key(0), (3, 64, 32)), "mxfp4")
    >>> x = jnp.ones((10, 32))
    >>> jaxmoe.grouped_matmul(x, w, jnp.array([4, 0, 5])).shape   # row 9 is zero
    (10, 64)

    Unlike `ragged_dot`, whose right-hand side is `[G, K, N]`, the matrices are `[E, N, K]`: FP4
    blocks run along K, which therefore comes last.

    Args:
      x: `[M, K]`, rows sorted by group; float32, bfloat16 or float16.
      w: `[E, N, K]`; `prepare(w)` it once where speed matters.
      group_sizes: `i32[G]`, rows of each group, `G = E` without `group_offset`. Rows past their sum
        give zero.
      bias: floating-point `[E, N]`, added to the rows of each group.
      input_scale: `f32[]`, the static scale of x for kernels that quantise it; see `ExpertWeights`.
      group_offset: w holds the matrices of groups `group_offset ... group_offset + E - 1`, and the
        rows of all other groups give zero; an int or an `i32[]` array. None is 0.
      preferred_element_type: dtype of the result; x's by default.
      compute: as in `moe_mlp`.
      implementation: as in `moe_mlp`.

    Returns:
      `[M, N]`. Differentiable in x, bias, and an unquantised w.

    Raises:
      ValueError: an argument does not fit; the message names it.
      UnsupportedError: a requested implementation cannot run this; it carries every reason.
    """
    check_matrix(w, "w")
    e, n, k = w.shape
    _check_tokens(x, k, "x", "[M, K]")
    check_bias(bias, (e, n), "bias")
    check_input_scale(input_scale, "input_scale")
    if group_sizes.ndim != 1 or group_sizes.dtype != jnp.int32:
        raise ValueError(
            "group_sizes must be an int32 array with one axis, got "
            f"{group_sizes.dtype}{list(group_sizes.shape)}; convert it with .astype(jnp.int32)"
        )
    if group_offset is None and group_sizes.shape[0] != e:
        raise ValueError(
            f"group_sizes must have one size for each of w's {e} matrices, got "
            f"{group_sizes.shape[0]}; pass group_offset if w holds only some of the groups"
        )
    out_dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
    if out_dtype not in _FLOATS:
        raise ValueError(
            f"preferred_element_type must be float32, bfloat16 or float16, got {out_dtype}"
        )
    offset = _scalar(0 if group_offset is None else group_offset, "group_offset")
    problem = Problem(
        op="grouped_matmul",
        weight_format=format_of(w).name,
        compute=compute,
        activation_dtype=str(x.dtype),
        result_dtype=out_dtype.name,
        activation="identity",
        bias=bias is not None,
        hidden_size=k,
        intermediate_size=n,
        num_experts=e,
        top_k=1,
        input_scales=input_scale is not None,
    )
    resolution = kernels.select(problem, implementation)
    call = _GroupedCall(tuning.Key.of(resolution), out_dtype.name)
    return _grouped_matmul_jit(
        call, x, kernels.lay_out(w, resolution, False), group_sizes, bias, input_scale, offset
    )


def _check_tokens(x: jax.Array, k: int, name: str, axes: str) -> None:
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(
            f"{name} must have shape {axes} with {axes[-2]} = {k} as in the weights, got "
            f"{tuple(x.shape)}; fold leading axes with reshape, or use jax.vmap"
        )
    if x.dtype not in _FLOATS:
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16, got {x.dtype}; convert it with .astype"
        )


def _check_routing(expert_ids: jax.Array, weights: jax.Array, tokens: int) -> None:
    if expert_ids.ndim != 2 or expert_ids.shape[0] != tokens or expert_ids.shape[1] == 0:
        raise ValueError(
            f"expert_ids must have shape [T, k] with T = {tokens} as in x and k >= 1, got "
            f"{tuple(expert_ids.shape)}"
        )
    if expert_ids.dtype != jnp.int32:
        raise ValueError(
            f"expert_ids must be int32, got {expert_ids.dtype}; convert with .astype(jnp.int32)"
        )
    if weights.shape != expert_ids.shape:
        raise ValueError(
            f"weights must have the shape of expert_ids {tuple(expert_ids.shape)}, got "
            f"{tuple(weights.shape)}"
        )
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"weights must be floating-point, got {weights.dtype}")


def _scalar(value: int | jax.Array, name: str) -> jax.Array:
    array = jnp.asarray(value)
    if array.shape != () or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be an int or an integer scalar array, got {array.dtype}"
            f"{list(array.shape)}"
        )
    return array.astype(jnp.int32)


# --- one call: custom_vjp outside, custom_vmap inside -----------------------------------------


@dataclasses.dataclass(frozen=True)
class _MlpCall:
    key: tuning.Key  # without the number of tokens, which vmap may still raise
    config: MlpConfig


@dataclasses.dataclass(frozen=True)
class _GroupedCall:
    key: tuning.Key
    out_dtype: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moe_mlp(
    call: _MlpCall,
    x: jax.Array,
    experts: ExpertWeights,
    expert_ids: jax.Array,
    weights: jax.Array,
    params: jax.Array,
    expert_offset: jax.Array,
) -> jax.Array:
    return _mlp_forward(call)((x, expert_ids, weights), (experts, params, expert_offset))


def _moe_mlp_fwd(call: _MlpCall, *args: Any) -> tuple[jax.Array, Any]:
    return _moe_mlp(call, *args), args


def _moe_mlp_bwd(call: _MlpCall, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    x, experts, expert_ids, weights, params, expert_offset = residuals
    g = _mlp_backward(call)((x, expert_ids, weights, cotangent), (experts, params, expert_offset))
    # A subtree that is None stands for frozen weights.
    experts_g = ExpertWeights(
        g.gate_up,  # type: ignore[arg-type]
        g.down,  # type: ignore[arg-type]
        g.gate_up_bias,
        g.down_bias,
        declared_compute=experts.declared_compute,
    )
    return g.x, experts_g, None, g.weights, None, None


_moe_mlp.defvjp(_moe_mlp_fwd, _moe_mlp_bwd)
_moe_mlp_jit = jax.jit(_moe_mlp, static_argnums=0)  # outside jit, a second call is not traced again


@functools.cache
def _mlp_forward(call: _MlpCall) -> Callable[..., jax.Array]:
    def forward(tokens: Any, shared: Any) -> jax.Array:
        (x, expert_ids, weights), (experts, params, offset) = tokens, shared
        return kernels.moe_mlp(
            call.key, call.config, x, experts, expert_ids, weights, params, offset
        )

    return _batched_by_folding(forward, foldable=lambda shared: True)


@functools.cache
def _mlp_backward(call: _MlpCall) -> Callable[..., xla.MlpGradients]:
    def backward(tokens: Any, shared: Any) -> xla.MlpGradients:
        (x, expert_ids, weights, cotangent), (experts, params, offset) = tokens, shared
        return xla.moe_mlp_gradients(
            call.config, x, experts, expert_ids, weights, params, offset, cotangent
        )

    def only_per_token(shared: Any) -> bool:
        # Gradients of matrices and biases are sums over one batch entry's own tokens.
        experts = shared[0]
        biased = experts.gate_up_bias is not None or experts.down_bias is not None
        return not (biased or is_plain(experts.down))

    return _batched_by_folding(backward, foldable=only_per_token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    call: _GroupedCall,
    x: jax.Array,
    w: Matrix,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    input_scale: jax.Array | None,
    group_offset: jax.Array,
) -> jax.Array:
    return _grouped_forward(call)(x, w, group_sizes, bias, input_scale, group_offset)


def _grouped_fwd(call: _GroupedCall, *args: Any) -> tuple[jax.Array, Any]:
    return _grouped_matmul(call, *args), args


def _grouped_bwd(call: _GroupedCall, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    x, w, group_sizes, bias, _, group_offset = residuals
    dx, dw, db = _grouped_backward(x, w, group_sizes, bias, group_offset, cotangent)
    return dx, dw, None, db, None, None


_grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)
_grouped_matmul_jit = jax.jit(_grouped_matmul, static_argnums=0)


@functools.cache
def _grouped_forward(call: _GroupedCall) -> Callable[..., jax.Array]:
    def forward(*operands: Any) -> jax.Array:
        return kernels.grouped_matmul(call.key, *operands, jnp.dtype(call.out_dtype))

    return jax.custom_batching.sequential_vmap(forward)


_grouped_backward = jax.custom_batching.sequential_vmap(xla.grouped_matmul_gradients)


def _batched_by_folding(
    f: Callable[[Any, Any], Any], foldable: Callable[[Any], bool]
) -> Callable[[Any, Any], Any]:
    """`f(tokens, shared)` with a batching rule that makes one call of a whole batch.

    Every leaf of `tokens` starts with the axis T, which takes up the batch. Where `shared` is
    batched too, or is not `foldable`, the batch runs in order instead.
    """
    folded = jax.custom_batching.custom_vmap(f)

    @folded.def_vmap
    def rule(size: int, batched: Any, tokens: Any, shared: Any) -> tuple[Any, Any]:
        in_tokens, in_shared = batched
        rows = jax.tree.leaves(tokens)[0].shape[1 if jax.tree.leaves(in_tokens)[0] else 0]

        def flat(leaf: jax.Array, is_batched: bool) -> jax.Array:
            if not is_batched:
                leaf = jnp.broadcast_to(leaf, (size, *leaf.shape))
            return leaf.reshape(size * rows, *leaf.shape[2:])

        def unflat(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(size, rows, *leaf.shape[1:])

        if any(jax.tree.leaves(in_shared)) or not foldable(shared):
            out = _in_turn(folded, size, batched, tokens, shared)
        else:
            out = jax.tree.map(unflat, folded(jax.tree.map(flat, tokens, in_tokens), shared))
        return out, jax.tree.map(lambda _: True, out)

    return folded


def _in_turn(f: Callable[..., Any], size: int, batched: Any, *args: Any) -> Any:
    leaves: list[jax.Array]
    leaves, tree = jax.tree.flatten(args)
    flags = jax.tree.leaves(batched)
    moving = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

    def one(moving: list[jax.Array]) -> Any:
        rest = iter(moving)
        whole = [next(rest) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
        return f(*jax.tree.unflatten(tree, whole))

    return jax.lax.map(one, moving)


def explain(problem: Problem, implementation: Implementation = None) -> Resolution:
    """Which variant the current target would run for `problem`, and why no other.

    Where `problem.tokens` is given, also by which tactic, and where that choice comes from.
    """
    return kernels.select(problem, implementation)
