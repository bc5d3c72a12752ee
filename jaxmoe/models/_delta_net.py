"""Gated DeltaNet: linear attention whose memory is one matrix a head, written by the delta rule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.models import _architecture as architecture
from jaxmoe.models._attention import rms_norm
from jaxmoe.models._cache import Place, StateCache
from jaxmoe.models._linear import Linear

_CHUNK = 64  # tokens that one step of the scan takes


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """For each token: S ← e^g·S, then S ← S + β·k(v − kᵀS)ᵀ, then y = qᵀS.

    Several tokens at once: with G the running sum of g in a chunk, what the tokens write solves a
    unit lower triangular system, and the rest is matrix products.

    Args:
      q: `f32[B, T, N, K]`.
      k: likewise.
      v: `f32[B, T, N, V]`.
      log_decay: g, `f32[B, T, N]`, at most 0.
      beta: `f32[B, T, N]`; 0, with g = 0, leaves the state alone.
      state: S, `f32[B, N, K, V]`.

    Returns:
      y `f32[B, T, N, V]` and the state after the last token.

    Source: Yang et al., "Gated Delta Networks", arXiv:2412.06464, equation 10 and section 3.3.
    """
    t = q.shape[1]
    size = min(_CHUNK, t)
    padding = -t % size

    def chunks(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, 0), (0, padding), *((0, 0) for _ in a.shape[2:])))
        a = a.reshape(a.shape[0], -1, size, *a.shape[2:])
        return jnp.moveaxis(a, (1, 3), (0, 2))  # [chunks, B, N, size, ...]

    earlier = jnp.tril(jnp.ones((size, size), bool))

    def step(state: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v, g, beta = chunk
        total = jnp.cumsum(g, axis=-1)
        decay = jnp.exp(jnp.where(earlier, total[..., :, None] - total[..., None, :], -jnp.inf))
        k_beta, scale = k * beta[..., None], jnp.exp(total)[..., None]
        system = jnp.einsum("bnik,bnjk->bnij", k_beta, k) * decay
        right = v * beta[..., None] - jnp.einsum("bnik,bnkv->bniv", k_beta * scale, state)
        new = jax.scipy.linalg.solve_triangular(system, right, lower=True, unit_diagonal=True)
        scores = jnp.einsum("bnik,bnjk->bnij", q, k) * decay
        y = jnp.einsum("bnik,bnkv->bniv", q * scale, state)
        y = y + jnp.einsum("bnij,bnjv->bniv", scores, new)
        left = jnp.exp(total[..., -1:] - total)[..., None]
        state = state * jnp.exp(total[..., -1])[..., None, None]
        return state + jnp.einsum("bnik,bniv->bnkv", k * left, new), y

    with jax.default_matmul_precision("highest"):
        state, y = jax.lax.scan(step, state, tuple(map(chunks, (q, k, v, log_decay, beta))))
    y = jnp.moveaxis(y, (0, 2), (1, 3))  # [B, chunks, size, N, V]
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :t], state


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


class DeltaNet(nnx.Module):
    """`jaxmoe.models.DeltaNet` with its weights, as in Qwen3-Next.

    `mixed` makes query, key, value and output gate of each key head in turn, `rates` the write
    strength β and the decay of its value heads.
    """

    def __init__(
        self,
        config: architecture.DeltaNet,
        hidden_size: int,
        *,
        norm_eps: float,
        out_init: Any,
        implementation: Any,
        dtype: Any,
        param_dtype: Any,
        rngs: Any,
    ):
        del implementation  # of dot_product_attention
        self.config = c = config
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        keys, values = c.num_key_heads * c.key_dim, c.num_value_heads * c.value_dim
        self.mixed = Linear(hidden_size, 2 * keys + 2 * values, use_bias=False, **options)
        self.rates = Linear(hidden_size, 2 * c.num_value_heads, use_bias=False, **options)
        conv = nnx.initializers.lecun_normal()(
            rngs.params(), (c.conv_width, 2 * keys + values), param_dtype
        )
        self.conv = nnx.Param(conv)
        self.log_rate = nnx.Param(jnp.zeros(c.num_value_heads, jnp.float32))
        self.rate_bias = nnx.Param(jnp.ones(c.num_value_heads, jnp.float32))
        self.norm = rms_norm(c.value_dim, norm_eps, dtype, rngs)
        self.out = Linear(values, hidden_size, kernel_init=out_init, use_bias=False, **options)

    def init_cache(self, layers: int, batch: int, length: int, dtype: Any) -> StateCache:
        """A cache of nothing read: the last inputs of the convolution, and the memory."""
        del length
        c = self.config
        width = self.conv[...].shape[-1]
        memory = (layers, batch, c.num_value_heads, c.key_dim, c.value_dim)
        inputs = jnp.zeros((layers, batch, c.conv_width - 1, width), dtype)
        return StateCache((inputs, jnp.zeros(memory, jnp.float32)))

    def __call__(
        self, x: jax.Array, place: Place, cache: StateCache | None, layer: jax.Array | int
    ) -> tuple[jax.Array, StateCache | None]:
        """`x[B, T, H]`, where it stands, cache, which layer of it -> `[B, T, H]`, cache."""
        c = self.config
        b, t, _ = x.shape
        per_key = c.num_value_heads // c.num_key_heads
        state = (cache or self.init_cache(1, b, 0, x.dtype)).read(layer if cache else 0)
        inputs, memory = state

        mixed = self.mixed(x).reshape(b, t, c.num_key_heads, -1)
        ends = (c.key_dim, 2 * c.key_dim, 2 * c.key_dim + per_key * c.value_dim)
        *qkv, gate = jnp.split(mixed, ends, axis=-1)
        strength, decay = jnp.split(
            self.rates(x).reshape(b, t, c.num_key_heads, -1).astype(jnp.float32), 2, axis=-1
        )
        row = jnp.concatenate([a.reshape(b, t, -1) for a in qkv], axis=-1)
        row = jnp.concatenate([inputs.astype(row.dtype), row], axis=1)
        kernel = self.conv[...].astype(jnp.float32)
        mixed = jax.nn.silu(sum(row[:, i : i + t] * kernel[i] for i in range(c.conv_width)))
        keys = c.num_key_heads * c.key_dim
        q, k, v = jnp.split(mixed.astype(x.dtype).astype(jnp.float32), (keys, 2 * keys), axis=-1)
        q, k = (_unit(a.reshape(b, t, c.num_key_heads, c.key_dim)) for a in (q, k))
        q, k = (jnp.repeat(a, per_key, axis=2) for a in (q * c.key_dim**-0.5, k))
        v = v.reshape(b, t, c.num_value_heads, c.value_dim)

        # Padding neither writes nor lets the memory fade.
        real = (jnp.arange(t) < place.counts[:, None])[..., None]
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))
        decay = decay.reshape(b, t, -1) + self.rate_bias[...].astype(jnp.float32)
        log_decay = jnp.where(real, -rate * jax.nn.softplus(decay), 0.0)
        beta = jnp.where(real, jax.nn.sigmoid(strength.reshape(b, t, -1)), 0.0)
        y, memory = gated_delta_rule(q, k, v, log_decay, beta, memory)
        if cache is not None:
            last = place.counts[:, None] + jnp.arange(c.conv_width - 1)
            inputs = jnp.take_along_axis(row, last[..., None], axis=1)
            cache = cache.write(layer, (inputs, memory))

        gate = gate.reshape(b, t, c.num_value_heads, c.value_dim).astype(jnp.float32)
        y = self.norm(y.astype(x.dtype)) * jax.nn.silu(gate)
        return self.out(y.reshape(b, t, -1).astype(x.dtype)), cache
