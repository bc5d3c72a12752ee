"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token: greedily, or at random after temperature, top-k and top-p.

    >>> import jax, jax.numpy as jnp
    >>> logits = jnp.array([[0.0, 3.0, 1.0]])
    >>> sample(logits, jax.random.key(0), Sampling(temperature=0.0))
    Array([1], dtype=int32)

    Args:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keep this many of the likeliest tokens; None keeps all.
      top_p: keep the smallest set of likeliest tokens whose probability reaches this, in (0, 1];
        computed after temperature and top_k (Holtzman et al. 2019, arXiv:1904.09751).

    Raises:
      ValueError: for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], or None for all, got {self.top_p}")


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns `f32[..., V]` logits divided by the temperature, −inf for tokens that are left out.

    Tokens that tie with the last one kept by `top_k` are kept as well.
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        smallest = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if sampling.top_p is not None:
        order = jnp.argsort(-logits, axis=-1, stable=True)
        probability = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
        # A token stays if those before it do not reach top_p yet, so the first always stays.
        before = jnp.cumsum(probability, axis=-1) - probability
        keep = jnp.take_along_axis(before < sampling.top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses a token for each row of logits.

    Args:
      logits: `[B, V]`, any float dtype.
      key: a `jax.random` key; unused at temperature 0.
      sampling: how to choose.

    Returns:
      `i32[B]`.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampling)).astype(jnp.int32)
