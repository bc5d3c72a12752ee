"""The kernels in JAX alone: any device, any format, and the gradients of every other variant.

Rows are sorted by expert and cut into blocks (`blocks.py`); a loop over the blocks in use
dequantises a few experts at a time. Work is proportional to the rows, not to rows times experts,
and at no time are all dequantised experts in memory.

Given the name of an arithmetic in `operands.OPERANDS`, the rows are quantised as the block-scaled
kernels do, for its numbers and not for speed; gradients are those of W4A16 all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.activations import Activation
from jaxmoe.experts import ExpertWeights, Matrix, PreparedMatrix, is_plain
from jaxmoe.kernels import blocks as blk
from jaxmoe.kernels import layouts, operands
from jaxmoe.quantization import QuantizedTensor, dequantize


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """What is static about one `moe_mlp` call."""

    activation: type[Activation]
    weight_on_input: bool


def _dequantize(w: Matrix, expert: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Weights `[C, N, K]` of the given experts, and the f32 factor `[C]` that belongs to each.

    For bf16 activations the factor is the global scale and the weights are e2m1 * block scale,
    which bf16 holds exactly; for wider activations the factor is 1.
    """
    one = jnp.ones(expert.shape, jnp.float32)
    if isinstance(w, PreparedMatrix):
        part = layouts.unpack(w, expert)
    elif isinstance(w, QuantizedTensor):
        part = w[expert]
    else:
        return w[expert].astype(dtype), one
    if dtype != jnp.bfloat16 or part.global_scale is None:
        return dequantize(part).astype(dtype), one
    unscaled = dataclasses.replace(part, global_scale=jnp.ones_like(part.global_scale))
    return dequantize(unscaled).astype(dtype), part.global_scale


def _step_weights(
    experts: ExpertWeights, expert: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return *_dequantize(experts.gate_up, expert, dtype), *_dequantize(experts.down, expert, dtype)


def _sums(a: jax.Array, w: jax.Array) -> jax.Array:
    """`a[C, B, K] @ w[C, N, K].T` with float32 accumulation."""
    return jnp.einsum("cbk,cnk->cbn", a, w, precision="highest", preferred_element_type=jnp.float32)


Quantiser = Callable[[jax.Array], operands.Operand]


def _quantiser(quantised: str | None, input_scale: jax.Array | None) -> Quantiser | None:
    if quantised is None:
        return None
    rule, scale = operands.OPERANDS[quantised], input_scale
    if scale is not None:
        scale = jnp.asarray(scale, jnp.float32)
    return lambda a: rule(a.astype(jnp.float32), scale)


def _product(
    a: jax.Array, w: jax.Array, factor: jax.Array, quantise: Quantiser | None = None
) -> jax.Array:
    """`a[C, B, K] @ w[C, N, K].T * factor[C]` in float32."""
    if quantise is None:
        return _sums(a.astype(w.dtype), w) * factor[:, None, None]
    values, of_row = quantise(a)
    return operands.round_sums(_sums(values, w)) * (factor[:, None, None] * of_row)


def _compute_dtype(x: jax.Array, quantised: str | None = None) -> Any:
    if quantised is not None:
        return jnp.bfloat16  # in which all block-scaled values are exact
    return x.dtype if x.dtype in (jnp.bfloat16, jnp.float16) else jnp.float32


def _mlp_rows(
    config: MlpConfig,
    x: jax.Array,
    weight: jax.Array,
    w1: jax.Array,
    f1: jax.Array,
    w2: jax.Array,
    f2: jax.Array,
    b1: jax.Array | None,
    b2: jax.Array | None,
    params: jax.Array,
    q1: Quantiser | None = None,
    q2: Quantiser | None = None,
) -> jax.Array:
    """The expert MLP of one step: `x[C, B, H]`, routing weight `[C, B]` -> `f32[C, B, H]`."""
    if config.weight_on_input:
        weighted = x.astype(jnp.float32) * weight[..., None]
        x = weighted.astype(x.dtype) if q1 is None else weighted
    a = _product(x, w1, f1, q1)
    if b1 is not None:
        a = a + b1[:, None, :]
    p = [params[i, :, None, None] for i in range(params.shape[0])]
    parts = jnp.split(a, 2, axis=-1) if config.activation.gated else [a]
    h = config.activation.formula(*parts, *p)
    y = _product(h, w2, f2, q2)
    if b2 is not None:
        y = y + b2[:, None, :]
    return y if config.weight_on_input else y * weight[..., None]


def _tokens(x: jax.Array, token: jax.Array) -> jax.Array:
    """Tokens in the dtype in which they are multiplied by a routing weight."""
    return blk.take_rows(x, token).astype(_compute_dtype(x))


def _optional(a: jax.Array | None, expert: jax.Array) -> jax.Array | None:
    return None if a is None else a[expert].astype(jnp.float32)


def _work(experts: ExpertWeights, gated: bool) -> blk.Work:
    elements = experts.hidden_size * experts.intermediate_size * (3 if gated else 2)
    return blk.Work(4 * elements, not is_plain(experts.down))


def moe_mlp(
    config: MlpConfig,
    x: jax.Array,
    experts: ExpertWeights,
    expert_ids: jax.Array,
    weights: jax.Array,
    params: jax.Array,
    expert_offset: jax.Array,
    *,
    quantised: str | None = None,
) -> jax.Array:
    """Sorts, gathers, multiplies, activates, multiplies, combines; see `jaxmoe.moe_mlp`.

    `quantised` is a key of `operands.OPERANDS`, or None to read x and h as they are.
    """
    t, k = expert_ids.shape
    dtype = _compute_dtype(x, quantised)
    work = _work(experts, config.activation.gated)
    blocks = blk.by_expert(expert_ids, experts.num_experts, expert_offset, work)
    flat = weights.reshape(-1).astype(jnp.float32)

    def body(expert: jax.Array, row: jax.Array, _: None) -> tuple[jax.Array, None]:
        part = _mlp_rows(
            config,
            _tokens(x, jnp.where(row < t * k, row // k, t)),
            blk.take_rows(flat, row),
            *_step_weights(experts, expert, dtype),
            _optional(experts.gate_up_bias, expert),
            _optional(experts.down_bias, expert),
            params[:, expert],
            _quantiser(quantised, experts.gate_up_input_scale),
            _quantiser(quantised, experts.down_input_scale),
        )
        return part, None

    y, _ = blk.rows_map(blocks, body, jax.ShapeDtypeStruct(x.shape[1:], jnp.float32), None)
    return _combine(y, t, k).astype(x.dtype)


def _combine(y: jax.Array, t: int, k: int) -> jax.Array:
    """Sum of the k contributions of each token, in the order of the choices."""
    y = y.reshape(t, k, y.shape[1])
    total = y[:, 0]
    for j in range(1, k):
        total = total + y[:, j]
    return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MlpGradients:
    """Cotangents of `moe_mlp`; an entry is None where the input was absent or is frozen."""

    x: jax.Array
    weights: jax.Array
    gate_up: jax.Array | None
    down: jax.Array | None
    gate_up_bias: jax.Array | None
    down_bias: jax.Array | None


def moe_mlp_gradients(
    config: MlpConfig,
    x: jax.Array,
    experts: ExpertWeights,
    expert_ids: jax.Array,
    weights: jax.Array,
    params: jax.Array,
    expert_offset: jax.Array,
    cotangent: jax.Array,
) -> MlpGradients:
    """Pulls `cotangent[T, H]` back, recomputing the forward pass block by block."""
    t, k = expert_ids.shape
    dtype = _compute_dtype(x)
    work = _work(experts, config.activation.gated)
    blocks = blk.by_expert(expert_ids, experts.num_experts, expert_offset, work)
    flat = weights.reshape(-1).astype(jnp.float32)
    trainable = is_plain(experts.down)

    def zeros(a: Any) -> jax.Array | None:
        return None if a is None else jnp.zeros(a.shape, jnp.float32)

    init = (
        zeros(experts.gate_up) if trainable else None,
        zeros(experts.down) if trainable else None,
        zeros(experts.gate_up_bias),
        zeros(experts.down_bias),
    )

    def body(expert: jax.Array, row: jax.Array, sums: Any) -> tuple[Any, Any]:
        token = jnp.where(row < t * k, row // k, t)
        w1, f1, w2, f2 = _step_weights(experts, expert, dtype)

        def forward(xb: Any, wb: Any, w: Any, b: Any) -> jax.Array:
            w1_, w2_ = w if trainable else (w1, w2)
            b1, b2 = b
            return _mlp_rows(config, xb, wb, w1_, f1, w2_, f2, b1, b2, params[:, expert])

        _, pull = jax.vjp(
            forward,
            blk.take_rows(x, token).astype(dtype),
            blk.take_rows(flat, row),
            (w1, w2) if trainable else None,
            (_optional(experts.gate_up_bias, expert), _optional(experts.down_bias, expert)),
        )
        dx, dweight, dw, (db1, db2) = pull(blk.take_rows(cotangent, token).astype(jnp.float32))

        def add(total: jax.Array | None, value: jax.Array | None) -> jax.Array | None:
            if total is None or value is None:
                return total
            return blk.add_by_expert(total, expert, value.astype(jnp.float32))

        parts = (*(dw or (None, None)), db1, db2)
        return (dx, dweight), tuple(map(add, sums, parts))

    shapes = (
        jax.ShapeDtypeStruct(x.shape[1:], jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    (dx, dweights), sums = blk.rows_map(blocks, body, shapes, init)

    def like(total: jax.Array | None, a: Any) -> jax.Array | None:
        return None if total is None else total.astype(a.dtype)

    arrays = (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias)
    return MlpGradients(
        _combine(dx, t, k).astype(x.dtype),
        dweights.reshape(t, k).astype(weights.dtype),
        *map(like, sums, arrays),
    )


def grouped_matmul(
    x: jax.Array,
    w: Matrix,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    input_scale: jax.Array | None,
    group_offset: jax.Array,
    out_dtype: Any,
    *,
    quantised: str | None = None,
) -> jax.Array:
    """Product of each group's rows with its expert's matrix; see `jaxmoe.grouped_matmul`."""
    e, n, k = w.shape
    dtype = _compute_dtype(x, quantised)
    blocks = blk.by_group(
        group_sizes, e, group_offset, x.shape[0], blk.Work(4 * n * k, not is_plain(w))
    )

    def body(expert: jax.Array, row: jax.Array, _: None) -> tuple[jax.Array, None]:
        weights = _dequantize(w, expert, dtype)
        part = _product(blk.take_rows(x, row), *weights, _quantiser(quantised, input_scale))
        if bias is not None:
            part = part + bias[expert].astype(jnp.float32)[:, None, :]
        return part, None

    return blk.rows_map(blocks, body, jax.ShapeDtypeStruct((n,), out_dtype), None)[0]


def grouped_matmul_gradients(
    x: jax.Array,
    w: Matrix,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    group_offset: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Cotangents of x, w (None if quantised) and bias (None if absent)."""
    e, n, k = w.shape
    dtype = _compute_dtype(x)
    blocks = blk.by_group(
        group_sizes, e, group_offset, x.shape[0], blk.Work(4 * n * k, not is_plain(w))
    )
    trainable = is_plain(w)
    init = (
        jnp.zeros(w.shape, jnp.float32) if trainable else None,
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )

    def body(expert: jax.Array, row: jax.Array, sums: Any) -> tuple[jax.Array, Any]:
        dw, db = sums
        dy = blk.take_rows(cotangent, row).astype(jnp.float32)
        matrix, factor = _dequantize(w, expert, dtype)
        scaled = (dy * factor[:, None, None]).astype(dtype)
        dx = jnp.einsum(
            "cbn,cnk->cbk",
            scaled,
            matrix,
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        if dw is not None:
            part = jnp.einsum(
                "cbn,cbk->cnk",
                dy.astype(dtype),
                blk.take_rows(x, row).astype(dtype),
                precision="highest",
                preferred_element_type=jnp.float32,
            )
            dw = blk.add_by_expert(dw, expert, part)
        if db is not None:
            db = blk.add_by_expert(db, expert, dy.sum(axis=1))
        return dx, (dw, db)

    shape = jax.ShapeDtypeStruct(x.shape[1:], jnp.float32)
    dx, (dw, db) = blk.rows_map(blocks, body, shape, init)
    return (
        dx.astype(x.dtype),
        dw.astype(w.dtype) if is_plain(w) else None,
        None if bias is None else db.astype(bias.dtype),
    )
