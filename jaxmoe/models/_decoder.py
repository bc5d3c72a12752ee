"""The decoder: embedding, layers, norm, output matrix; what they are is data."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.models._architecture import Architecture
from jaxmoe.models._attention import Implementation, rms_norm
from jaxmoe.models._cache import Cache, Place
from jaxmoe.models._config import DecoderConfig
from jaxmoe.models._layers import Block, Layers
from jaxmoe.models._linear import Linear


class DecoderAux(NamedTuple):
    """What the routers say about a batch: mean losses over layers, and counts by layer.

    Padding counts like any token.

    Attributes:
      load_balance_loss: `f32[]`.
      router_z_loss: `f32[]`.
      expert_counts: `i32[layers with experts, E]`, tokens that each expert took.
    """

    load_balance_loss: jax.Array
    router_z_loss: jax.Array
    expert_counts: jax.Array


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
      config: what to build, layer by layer, or the shape of a decoder with equal layers.
      weight_format: format of the expert weights; anything but `"bf16"` makes placeholders that
        `jaxmoe.models.load` fills.
      attention: implementation of `jax.nn.dot_product_attention`: None, `"xla"` or `"cudnn"`.
      scan: stack the weights of equal layers and run them with `lax.scan`, which compiles fast;
        otherwise kernels read every layer's weights in place, which runs fast.
      dtype: dtype of activations.
      param_dtype: dtype of unquantised weights but the norms' scales, which are float32.
      rngs: random streams that initialise the weights.
    """

    def __init__(
        self,
        config: Architecture | DecoderConfig,
        *,
        weight_format: str = "bf16",
        attention: Implementation = None,
        scan: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.architecture = c = (
            config.architecture() if isinstance(config, DecoderConfig) else config
        )
        self.dtype = dtype
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed = nnx.Embed(
            c.vocab_size,
            c.hidden_size,
            embedding_init=nnx.initializers.normal(1.0 if not c.tie_embeddings else 0.02),
            **options,
        )
        block: dict[str, Any] = {
            "weight_format": weight_format,
            "attention": attention,
            "dtype": dtype,
            "param_dtype": param_dtype,
        }
        self.layers = Layers(
            c, lambda layer, rngs: Block(layer, c, rngs=rngs, **block), scan=scan, rngs=rngs
        )
        self.norm = rms_norm(c.hidden_size, c.norm_eps, dtype, rngs)
        self.head = nnx.data(
            None
            if c.tie_embeddings
            else Linear(c.hidden_size, c.vocab_size, use_bias=False, **options)
        )

    def init_cache(self, batch: int, max_length: int | None = None) -> Cache:
        """Returns an empty cache for `batch` sequences of at most `max_length` tokens.

        Raises:
          ValueError: if `max_length` is beyond `architecture.max_length`.
        """
        limit = self.architecture.max_length
        length = limit if max_length is None else max_length
        if not 1 <= length <= limit:
            raise ValueError(
                f"max_length must be from 1 to config.max_length={limit}, got {length}"
            )
        layers = self.layers.init_cache(batch, length, self.dtype)
        return Cache(layers, jnp.zeros(batch, jnp.int32), length)

    def hidden(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        *,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, DecoderAux | None]:
        """Runs the layers.

        Args:
          tokens: `i32[B, T]`.
          cache: what was read before; the tokens of row b then stand at `cache.length[b]` onwards,
            and there must be room for them.
          valid: `bool[B, T]`, false for padding, which may stand anywhere in a row: a text's
            positions count its tokens only. None is true for all.

        Returns:
          `[B, T, H]` after the last norm (of no meaning where there is padding), the cache with the
          tokens added (None without one), and the routers' aux (None if no layer has experts).
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have 2 axes [batch, length], got shape {tokens.shape}")
        limit = self.architecture.max_length if cache is None else cache.max_length
        if tokens.shape[1] > limit:
            raise ValueError(
                f"tokens must have at most {limit} positions, got {tokens.shape[1]}; shorten the "
                "text, or take the last part of it"
            )
        b, t = tokens.shape
        order = None
        count = jnp.full(b, t, jnp.int32)
        if valid is not None:
            if valid.shape != tokens.shape or valid.dtype != bool:
                raise ValueError(
                    f"valid must be bool{list(tokens.shape)} like tokens, got "
                    f"{valid.dtype}{list(valid.shape)}"
                )
            # A row's tokens first: inside, all padding is on the right.
            order = jnp.argsort(~valid, axis=1, stable=True)
            tokens = jnp.take_along_axis(tokens, order, axis=1)
            count = valid.sum(axis=1, dtype=jnp.int32)
        start = jnp.zeros(b, jnp.int32) if cache is None else cache.length
        place = Place(start[:, None] + jnp.arange(t, dtype=jnp.int32), count)
        x, layers, aux = self.layers(
            self.embed(tokens), place, None if cache is None else cache.layers
        )
        if order is not None:
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
        if cache is not None and layers is not None:
            cache = dataclasses.replace(cache, layers=layers, length=cache.length + count)
        means = aux and DecoderAux(
            aux.load_balance_loss.mean(), aux.router_z_loss.mean(), aux.expert_counts
        )
        return self.norm(x), cache, means

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., H]` -> `f32[..., vocab_size]`."""
        y = self.embed.attend(hidden) if self.head is None else self.head(hidden)
        return y.astype(jnp.float32)

    def __call__(self, tokens: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        """Returns `f32[B, T, vocab_size]` logits of the token after each of `tokens[B, T]`."""
        return self.logits(self.hidden(tokens, valid=valid)[0])
