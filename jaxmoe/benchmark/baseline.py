"""What a JAX user has without jaxmoe: dequantise all experts, then `jax.lax.ragged_dot`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.experts import ExpertWeights, Matrix
from jaxmoe.quantization import QuantizedTensor, dequantize


def ragged_dot_mlp(
    x: jax.Array, experts: ExpertWeights, expert_ids: jax.Array, weights: jax.Array
) -> jax.Array:
    """`moe_mlp` with SwiGLU from `jax.lax` alone.

    >>> from jaxmoe.benchmark import TINY
    >>> from jaxmoe.benchmark.data import random_experts, random_tokens
    >>> x, ids, weights = random_tokens(TINY, 5, "float32", seed=0)
    >>> ragged_dot_mlp(x, random_experts(TINY, "nvfp4", "canonical", 0), ids, weights).shape
    (5, 256)

    Args:
      x: `[T, H]`.
      experts: canonical FP4 weights.
      expert_ids: `i32[T, k]`, within `[0, E)`.
      weights: `f32[T, k]`.

    Returns:
      `[T, H]` in x's dtype, float32 accumulation.
    """

    def matrices(w: Matrix) -> jax.Array:
        assert isinstance(w, QuantizedTensor)
        return dequantize(w, x.dtype).swapaxes(1, 2)

    wide = (matrices(experts.gate_up), matrices(experts.down))
    return dequantized_mlp(x, wide, expert_ids, weights)


def dequantized_mlp(
    x: jax.Array,
    matrices: tuple[jax.Array, jax.Array],
    expert_ids: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """The same over matrices that are not FP4.

    >>> x, ids, weights = jnp.ones((3, 8)), jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1))
    >>> dequantized_mlp(x, (jnp.ones((2, 8, 32)), jnp.ones((2, 16, 8))), ids, weights).shape
    (3, 8)

    Args:
      x: `[T, H]`.
      matrices: gate_up `[E, H, 2I]` (gate columns first) and down `[E, I, H]`, in x's dtype.
      expert_ids: `i32[T, k]`, within `[0, E)`.
      weights: `f32[T, k]`.

    Returns:
      `[T, H]` in x's dtype, float32 accumulation.
    """
    gate_up, down = matrices
    t, k = expert_ids.shape
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=len(down)).astype(jnp.int32)

    def product(rows: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, w, sizes, preferred_element_type=jnp.float32)

    gate, up = jnp.split(product(x[order // k], gate_up), 2, axis=-1)
    y = product((jax.nn.silu(gate) * up).astype(x.dtype), down)
    y = y * weights.reshape(-1)[order][:, None]
    return jnp.zeros((t, x.shape[1]), jnp.float32).at[order // k].add(y).astype(x.dtype)
