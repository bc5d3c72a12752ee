"""A pre-norm decoder: grouped-query attention with rotary positions, then `jaxmoe.nn.MoE`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.activations import ACTIVATIONS
from jaxmoe.models._config import DecoderConfig
from jaxmoe.nn import MoE
from jaxmoe.routing import RouterAux


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far.

    Attributes:
      keys: `[num_layers, B, num_kv_heads, S, head_dim]`, rotated.
      values: likewise.
      length: `i32[]`, how many of the `S` positions are filled.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    @property
    def max_length(self) -> int:
        """`S`."""
        return self.keys.shape[3]

    def write(self, keys: jax.Array, values: jax.Array, layer: jax.Array | int) -> KVCache:
        """Puts `[B, T, num_kv_heads, head_dim]` of one layer after the tokens read so far."""
        at = (layer, 0, 0, self.length, 0)

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            new = new.swapaxes(1, 2)[None].astype(into.dtype)
            return jax.lax.dynamic_update_slice(into, new, at)

        return KVCache(put(self.keys, keys), put(self.values, values), self.length)


class DecoderAux(NamedTuple):
    """What the routers say about a batch: mean losses over layers, and counts by layer.

    Attributes:
      load_balance_loss: `f32[]`.
      router_z_loss: `f32[]`.
      expert_counts: `i32[num_layers, E]`, tokens that each expert took.
    """

    load_balance_loss: jax.Array
    router_z_loss: jax.Array
    expert_counts: jax.Array


def rotate(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves as pairs.

    Args:
      x: `[B, T, N, D]`, D even; feature i turns with feature i + D/2.
      position: `i32[T]`.
      theta: base of the frequencies `theta ** (-2i / D)`.

    Returns:
      `[B, T, N, D]` in x.dtype; computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """Grouped-query attention over a cache, in the cache's layout: nothing long is transposed.

    Args:
      q: `[B, T, num_heads, D]`.
      keys: `[B, num_kv_heads, S, D]`.
      values: likewise.
      seen: `bool[T, S]`, which positions each query may look at.

    Returns:
      `[B, T, num_heads, D]`; the softmax is computed in float32.
    """
    b, t, n, d = q.shape
    q = q.reshape(b, t, keys.shape[1], -1, d)
    score = jnp.einsum("btngd,bnsd->bngts", q, keys, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(jnp.where(seen, score / math.sqrt(d), -jnp.inf)).astype(q.dtype)
    return jnp.einsum("bngts,bnsd->btngd", p, values).reshape(b, t, n, d)


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions and an optional cache."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        attention: Literal["xla", "cudnn"] | None,
        dtype: Any,
        param_dtype: Any,
        rngs: Any,
    ):
        self.config = config
        self.implementation = attention
        h, d = config.hidden_size, config.head_dim
        queries, keys = config.num_heads * d, config.num_kv_heads * d
        options = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        # Residual branches start small, so that depth does not widen the stream (GPT-2).
        out_init = nnx.initializers.variance_scaling(
            0.5 / config.num_layers, "fan_in", "truncated_normal"
        )
        self.query = nnx.Linear(h, queries, **options)
        self.key = nnx.Linear(h, keys, **options)
        self.value = nnx.Linear(h, keys, **options)
        self.out = nnx.Linear(queries, h, kernel_init=out_init, **options)
        norm = {"epsilon": config.norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        self.query_norm = nnx.data(nnx.RMSNorm(d, rngs=rngs, **norm) if config.qk_norm else None)
        self.key_norm = nnx.data(nnx.RMSNorm(d, rngs=rngs, **norm) if config.qk_norm else None)

    def __call__(
        self, x: jax.Array, cache: KVCache | None = None, layer: jax.Array | int = 0
    ) -> tuple[jax.Array, KVCache | None]:
        """`x[B, T, H]`, cache, which layer of it -> `[B, T, H]`, cache with the new keys."""
        b, t, _ = x.shape
        c = self.config
        q = self.query(x).reshape(b, t, c.num_heads, c.head_dim)
        k = self.key(x).reshape(b, t, c.num_kv_heads, c.head_dim)
        v = self.value(x).reshape(b, t, c.num_kv_heads, c.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        start = jnp.int32(0) if cache is None else cache.length
        position = start + jnp.arange(t, dtype=jnp.int32)
        q, k = rotate(q, position, c.rope_theta), rotate(k, position, c.rope_theta)
        if cache is None:
            y = jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation=self.implementation
            )
        else:
            cache = cache.write(k, v, layer)
            keys, values = (
                jax.lax.dynamic_index_in_dim(a, layer, keepdims=False).astype(q.dtype)
                for a in (cache.keys, cache.values)
            )
            seen = jnp.arange(cache.max_length, dtype=jnp.int32) <= position[:, None]
            y = attend(q, keys, values, seen)
        return self.out(y.reshape(b, t, -1)), cache


class Block(nnx.Module):
    """Attention and experts, each after an RMS norm and around a residual connection."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        weight_format: str,
        attention: Literal["xla", "cudnn"] | None,
        dtype: Any,
        param_dtype: Any,
        rngs: Any,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = {"epsilon": config.norm_eps, **options}
        self.attention_norm = nnx.RMSNorm(config.hidden_size, **norm)
        self.attention = Attention(config, attention=attention, **options)
        self.moe_norm = nnx.RMSNorm(config.hidden_size, **norm)
        self.moe = MoE(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.top_k,
            router=config.router,
            activation=ACTIVATIONS[config.activation](),
            weight_format=weight_format,
            **options,
        )

    def __call__(
        self, x: jax.Array, cache: KVCache | None = None, layer: jax.Array | int = 0
    ) -> tuple[jax.Array, KVCache | None, RouterAux]:
        """`x[B, T, H]`, cache, which layer of it -> `[B, T, H]`, cache, router aux."""
        y, cache = self.attention(self.attention_norm(x), cache, layer)
        x = x + y
        y, aux = self.moe(self.moe_norm(x), return_aux=True)
        return x + y, cache, aux


class Layers(nnx.Module):
    """Equal blocks with their weights stacked, run by `lax.scan`, so that one is compiled for all.

    `layers[i]` is a copy of one block.

    Args:
      count: how many blocks.
      make: makes one of them.
      rngs: random streams; the stream "params" is divided over the blocks.
    """

    def __init__(self, count: int, make: Callable[[nnx.Rngs], Block], *, rngs: nnx.Rngs):
        graph: Any = None

        def one(key: jax.Array) -> Any:
            nonlocal graph  # static, and the same for every block
            graph, state = nnx.split(make(nnx.Rngs(params=key)))
            return state

        state = jax.jit(jax.vmap(one))(jax.random.split(rngs.params(), count))
        self.count = count
        self.block = nnx.merge(graph, state)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Block:
        if not -self.count <= index < self.count:
            raise IndexError(f"there are {self.count} layers, got index {index}")
        graph, state = nnx.split(self.block)
        return nnx.merge(graph, jax.tree.map(lambda a: a[index], state))

    def __call__(
        self, x: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None, RouterAux]:
        """`x[B, T, H]`, cache -> `[B, T, H]`, cache, router aux stacked over the layers."""
        graph, states = nnx.split(self.block)

        def step(carry: Any, inputs: Any) -> Any:
            layer, state = inputs
            block: Block = nnx.merge(graph, state)
            x, cache = carry
            x, cache, aux = block(x, cache, layer)
            return (x, cache), aux

        (x, cache), aux = jax.lax.scan(step, (x, cache), (jnp.arange(self.count), states))
        return x, cache, aux


class Decoder(nnx.Module):
    """A decoder language model.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxmoe.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    ...                        head_dim=32, intermediate_size=64, num_experts=8, top_k=2)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((1, 16), jnp.int32)).shape
    (1, 16, 256)

    Args:
      config: the shape.
      weight_format: format of the expert weights; anything but `"bf16"` makes placeholders that
        `jaxmoe.models.load` fills.
      attention: implementation of `jax.nn.dot_product_attention` without a cache: None, `"xla"`
        or `"cudnn"`.
      dtype: dtype of activations.
      param_dtype: dtype of unquantised weights.
      rngs: random streams that initialise the weights.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        weight_format: str = "bf16",
        attention: Literal["xla", "cudnn"] | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(1.0 if not config.tie_embeddings else 0.02),
            **options,
        )
        block = {**options, "weight_format": weight_format, "attention": attention}
        self.layers = Layers(
            config.num_layers, lambda rngs: Block(config, **{**block, "rngs": rngs}), rngs=rngs
        )
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, **options)
        self.head = nnx.data(
            None
            if config.tie_embeddings
            else nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, **options)
        )

    def init_cache(self, batch: int, max_length: int | None = None) -> KVCache:
        """Returns an empty cache for `batch` sequences of at most `max_length` tokens.

        Raises:
          ValueError: if `max_length` is beyond `config.max_length`.
        """
        c = self.config
        length = c.max_length if max_length is None else max_length
        if not 1 <= length <= c.max_length:
            raise ValueError(
                f"max_length must be from 1 to config.max_length={c.max_length}, got {length}"
            )
        shape = (c.num_layers, batch, c.num_kv_heads, length, c.head_dim)
        empty = jnp.zeros(shape, self.dtype)
        return KVCache(empty, jnp.zeros_like(empty), jnp.int32(0))

    def hidden(
        self, tokens: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None, DecoderAux]:
        """Runs the layers.

        Args:
          tokens: `i32[B, T]`.
          cache: what was read before; the tokens then stand at `cache.length` onwards, and there
            must be room for them.

        Returns:
          `[B, T, H]` after the last norm, the cache with the tokens added (None without one), and
          the routers' aux.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have 2 axes [batch, length], got shape {tokens.shape}")
        limit = self.config.max_length if cache is None else cache.max_length
        if tokens.shape[1] > limit:
            raise ValueError(
                f"tokens must have at most {limit} positions, got {tokens.shape[1]}; shorten the "
                "text, or take the last part of it"
            )
        x, cache, aux = self.layers(self.embed(tokens), cache)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + tokens.shape[1])
        means = DecoderAux(
            aux.load_balance_loss.mean(), aux.router_z_loss.mean(), aux.expert_counts
        )
        return self.norm(x), cache, means

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., H]` -> `f32[..., vocab_size]`."""
        y = self.embed.attend(hidden) if self.head is None else self.head(hidden)
        return y.astype(jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns `f32[B, T, vocab_size]` logits of the token after each of `tokens[B, T]`."""
        return self.logits(self.hidden(tokens)[0])
