"""Self-attention: grouped-query and latent, both through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.models import _architecture as architecture
from jaxmoe.models._cache import Place, RingCache, SlotCache
from jaxmoe.models._linear import Linear
from jaxmoe.models._rope import rotate

Implementation: TypeAlias = Literal["xla", "cudnn"] | None


def visible(query: jax.Array, key: jax.Array, window: int | None, chunk: int | None) -> jax.Array:
    """`bool[B, 1, T, slots]`: which slots, of positions `key[B, slots]`, tokens may look at.

    The tokens are at `query[B, T]`; all of them look at slots with a position below 0.
    """
    query, key = query[:, None, :, None], key[:, None, None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if chunk is not None:
        seen &= key // chunk == query // chunk
    return seen | (key < 0)


def rms(x: jax.Array, eps: float) -> jax.Array:
    """`x` over the root of its last axis' mean square; in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm(features: int, eps: float, dtype: Any, rngs: Any) -> nnx.RMSNorm:
    """An RMS norm; its scale is float32 whatever the other weights are."""
    return nnx.RMSNorm(features, epsilon=eps, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


class Attention(nnx.Module):
    """`jaxmoe.models.Attention` with its weights."""

    def __init__(
        self,
        config: architecture.Attention,
        hidden_size: int,
        *,
        norm_eps: float,
        out_init: Any,
        implementation: Implementation,
        dtype: Any,
        param_dtype: Any,
        rngs: Any,
    ):
        self.config = c = config
        self.norm_eps = norm_eps
        self.implementation = implementation
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = Linear(hidden_size, queries * (1 + c.gated), use_bias=c.bias, **options)
        self.key = Linear(hidden_size, keys, use_bias=c.bias, **options)
        self.value = Linear(hidden_size, keys, use_bias=c.bias, **options)
        self.out = Linear(
            queries, hidden_size, kernel_init=out_init, use_bias=c.out_bias, **options
        )

        def norm(width: int) -> Any:
            if c.norm not in ("head", "all"):
                return nnx.data(None)
            width = c.head_dim if c.norm == "head" else width
            return nnx.data(rms_norm(width, norm_eps, dtype, rngs))

        self.query_norm, self.key_norm = norm(queries), norm(keys)
        self.sinks = nnx.data(nnx.Param(jnp.zeros(c.num_heads, param_dtype)) if c.sinks else None)

    def init_cache(self, layers: int, batch: int, length: int, dtype: Any) -> SlotCache | RingCache:
        """An empty cache."""
        c = self.config
        slots = min(length, c.window or length, c.chunk or length)
        shape = (layers, batch, c.num_kv_heads, slots + c.sinks, c.head_dim)
        make = RingCache if slots < length else SlotCache
        return make((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), int(c.sinks))

    def __call__(
        self,
        x: jax.Array,
        place: Place,
        cache: SlotCache | RingCache | None,
        layer: jax.Array | int,
    ) -> tuple[jax.Array, SlotCache | RingCache | None]:
        """`x[B, T, H]`, where it stands, cache, which layer of it -> `[B, T, H]`, cache."""
        c = self.config
        b, t, _ = x.shape
        q, gate = self.query(x), None
        if c.gated:
            q, gate = jnp.split(q.reshape(b, t, c.num_heads, 2 * c.head_dim), 2, axis=-1)
            q, gate = q.reshape(b, t, -1), gate.reshape(b, t, -1)
        q = self._heads(q, c.num_heads, self.query_norm, place)
        k = self._heads(self.key(x), c.num_kv_heads, self.key_norm, place)
        v = self.value(x).reshape(b, t, c.num_kv_heads, c.head_dim)
        if c.temperature is not None:
            scale, floor = c.temperature
            steps = jnp.floor((place.position.astype(jnp.float32) + 1) / floor)
            q = (q * (1 + scale * jnp.log1p(steps))[:, :, None, None]).astype(q.dtype)
        y, cache = self._attend(q, k, v, place, cache, layer)
        y = y.reshape(b, t, -1)
        return self.out(y if gate is None else y * jax.nn.sigmoid(gate)), cache

    def _heads(self, x: jax.Array, heads: int, norm: Any, place: Place) -> jax.Array:
        """Queries or keys `[B, T, heads, head_dim]`, normalised and rotated."""
        c = self.config
        if c.norm == "all":
            x = norm(x)
        x = x.reshape(*x.shape[:2], heads, c.head_dim)
        if c.norm == "head":
            x = norm(x)
        if c.rope is not None:
            x = rotate(x, place.position, c.rope)
        return rms(x, self.norm_eps) if c.norm == "l2" else x

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        place: Place,
        cache: SlotCache | RingCache | None,
        layer: jax.Array | int,
    ) -> tuple[jax.Array, SlotCache | RingCache | None]:
        c = self.config
        if cache is not None:
            cache, (k, v), key = cache.extend(layer, place, (k, v))
            # The cache's layout is the one in which products read it: nothing long is transposed.
            k, v = k.swapaxes(1, 2).astype(q.dtype), v.swapaxes(1, 2).astype(q.dtype)
        elif not (c.window or c.chunk or c.sinks):
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation=self.implementation
            ), None
        else:
            key = place.position
            if c.sinks:
                k, v = (jnp.pad(a, ((0, 0), (1, 0), (0, 0), (0, 0))) for a in (k, v))
                key = jnp.pad(key, ((0, 0), (1, 0)), constant_values=-1)
        mask = visible(place.position, key, c.window, c.chunk)
        bias = None
        if self.sinks is not None:
            # Slot 0 has key and value zero: its score is its bias, and it adds nothing.
            sinks = self.sinks[...].astype(jnp.float32)[None, :, None, None]
            bias = jnp.where(jnp.arange(k.shape[1]) == 0, sinks, 0.0)
        y = jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask, implementation=self.implementation
        )
        return y, cache


class LatentAttention(nnx.Module):
    """`jaxmoe.models.LatentAttention` with its weights.

    Scores are taken against the compressed keys, with the matrix that would expand them moved over
    to the queries, and the values' matrix to the output: all heads share one key of width
    `kv_rank + rope.dim`, whose first part is the value too (arXiv:2405.04434, section 2.1.2).
    """

    def __init__(
        self,
        config: architecture.LatentAttention,
        hidden_size: int,
        *,
        norm_eps: float,
        out_init: Any,
        implementation: Implementation,
        dtype: Any,
        param_dtype: Any,
        rngs: Any,
    ):
        del norm_eps  # the norms inside have an epsilon of their own, 1e-6 in the published code
        self.config = c = config
        self.implementation = implementation
        self.dtype = dtype
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        queries = c.num_heads * (c.nope_dim + c.rope.dim)
        if c.q_rank is None:
            self.query_down = self.query_norm = nnx.data(None)
            self.query = Linear(hidden_size, queries, use_bias=False, **options)
        else:
            self.query_down = nnx.data(Linear(hidden_size, c.q_rank, use_bias=c.bias, **options))
            self.query_norm = nnx.data(rms_norm(c.q_rank, 1e-6, dtype, rngs))
            self.query = Linear(c.q_rank, queries, use_bias=False, **options)
        self.latent = Linear(hidden_size, c.kv_rank + c.rope.dim, use_bias=c.bias, **options)
        self.latent_norm = rms_norm(c.kv_rank, 1e-6, dtype, rngs)
        self.expand = Linear(
            c.kv_rank, c.num_heads * (c.nope_dim + c.value_dim), use_bias=False, **options
        )
        self.out = Linear(
            c.num_heads * c.value_dim, hidden_size, kernel_init=out_init, use_bias=c.bias, **options
        )

    def init_cache(self, layers: int, batch: int, length: int, dtype: Any) -> SlotCache:
        """An empty cache."""
        c = self.config
        return SlotCache((jnp.zeros((layers, batch, 1, length, c.kv_rank + c.rope.dim), dtype),))

    def __call__(
        self, x: jax.Array, place: Place, cache: SlotCache | None, layer: jax.Array | int
    ) -> tuple[jax.Array, SlotCache | None]:
        """`x[B, T, H]`, where it stands, cache, which layer of it -> `[B, T, H]`, cache."""
        c = self.config
        b, t, _ = x.shape
        compressed = x
        if self.query_down is not None and self.query_norm is not None:
            compressed = self.query_norm(self.query_down(x))
        q = self.query(compressed).reshape(b, t, c.num_heads, c.nope_dim + c.rope.dim)
        latent = self.latent(x)[:, :, None]
        value = self.latent_norm(latent[..., : c.kv_rank])
        rotated = rotate(latent[..., c.kv_rank :], place.position, c.rope)
        key = jnp.concatenate([value, rotated], axis=-1)
        position = place.position
        if cache is not None:
            cache, (key,), position = cache.extend(layer, place, (key,))
            key = key.swapaxes(1, 2).astype(q.dtype)

        expand = self.expand.weight[...].astype(q.dtype)
        expand = expand.reshape(c.num_heads, c.nope_dim + c.value_dim, c.kv_rank)
        to_key, to_value = jnp.split(expand, [c.nope_dim], axis=1)
        q_latent = jnp.einsum("btnd,ndc->btnc", q[..., : c.nope_dim], to_key)
        q = jnp.concatenate(
            [q_latent, rotate(q[..., c.nope_dim :], place.position, c.rope)], axis=-1
        )
        y = jax.nn.dot_product_attention(
            q,
            key,
            key,
            mask=visible(place.position, position, None, None),
            scale=c.scale,
            implementation=self.implementation,
        )
        y = jnp.einsum("btnc,ndc->btnd", y[..., : c.kv_rank], to_value)
        return self.out(y.reshape(b, t, -1)), cache
