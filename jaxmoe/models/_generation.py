"""Writing text: a prompt is read in one call, then tokens are drawn a few per call."""

from __future__ import annotations

import codecs
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmoe.models._decoder import Decoder, KVCache
from jaxmoe.models._sampling import Sampling, sample

SEPARATOR = 0
"""The byte that stands before every document a byte-level model was trained on."""

_BUCKET = 64  # prompts are padded to a multiple, so that few lengths are compiled


@functools.partial(jax.jit, static_argnums=0)
def _read(
    graph: Any, state: Any, tokens: jax.Array, length: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Reads `tokens[1, P]`, of which `length` count; returns the logits `[1, V]` after them."""
    model = nnx.merge(graph, state)
    hidden, cache, _ = model.hidden(tokens, model.init_cache(1))
    last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)[:, 0]
    # What the padding left in the cache is masked now and overwritten later.
    return dataclasses.replace(cache, length=length), model.logits(last)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _draw(
    graph: Any,
    sampling: Sampling,
    count: int,
    state: Any,
    cache: KVCache,
    logits: jax.Array,
    seed: jax.Array,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Draws `count` tokens; returns them `i32[count]` and the logits after the last."""
    model = nnx.merge(graph, state)
    key = jax.random.key(seed)

    def step(carry: tuple[KVCache, jax.Array], _: None) -> Any:
        cache, logits = carry
        # The key goes by the position, so the text is the same for every count.
        token = sample(logits, jax.random.fold_in(key, cache.length), sampling)
        hidden, cache, _ = model.hidden(token[:, None], cache)
        return (cache, model.logits(hidden[:, 0])), token[0]

    (cache, logits), tokens = jax.lax.scan(step, (cache, logits), length=count)
    return cache, logits, tokens


def generate(
    model: Decoder,
    prompt: str | bytes,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: int | None = SEPARATOR,
    stride: int = 8,
) -> Iterator[bytes]:
    """Yields the bytes that a byte-level model writes after a prompt, as they are drawn.

    >>> text = b"".join(generate(model, "def main(", max_new_tokens=64))       # doctest: +SKIP

    The same model, prompt, sampling and seed give the same text on one machine.

    Args:
      model: a `Decoder` with 256 tokens.
      prompt: text to continue; UTF-8 if a str. A `SEPARATOR` in front says that a document
        starts there; an empty prompt stands for one.
      max_new_tokens: stop after this many; by default as many as fit into `config.max_length`.
      sampling: how to choose; `Sampling()` by default.
      seed: of the random choices.
      stop: stop before this token; None never stops.
      stride: tokens drawn in one device call, and the most that one yield holds.

    Raises:
      ValueError: if the model is not byte-level, or prompt and answer do not fit.
    """
    config = model.config
    if config.vocab_size != 256:
        raise ValueError(f"model must be byte-level (vocab_size 256), got {config.vocab_size}")
    data = (prompt.encode() if isinstance(prompt, str) else bytes(prompt)) or bytes([SEPARATOR])
    room = config.max_length - len(data)
    wanted = room if max_new_tokens is None else max_new_tokens
    if wanted > room or room < 1:
        raise ValueError(
            f"prompt and answer must fit into {config.max_length} bytes, got {len(data)} + "
            f"{wanted}; shorten the prompt or lower max_new_tokens"
        )
    return _stream(model, data, wanted, sampling or Sampling(), seed, stop, stride)


def _stream(
    model: Decoder,
    data: bytes,
    wanted: int,
    sampling: Sampling,
    seed: int,
    stop: int | None,
    stride: int,
) -> Iterator[bytes]:
    graph, state = nnx.split(model)
    padded = min(-(-len(data) // _BUCKET) * _BUCKET, model.config.max_length)
    tokens = np.full((1, padded), SEPARATOR, np.int32)
    tokens[0, : len(data)] = np.frombuffer(data, np.uint8)
    # NumPy numbers, since making jax ones would compile a dozen tiny programs.
    cache, logits = _read(graph, state, tokens, np.int32(len(data)))
    for start in range(0, wanted, stride):
        # Drawing ahead by up to `stride` may run past the last position: its tokens are not used.
        cache, logits, drawn = _draw(
            graph, sampling, stride, state, cache, logits, np.uint32(seed % 2**32)
        )
        part = np.asarray(drawn)[: wanted - start].astype(np.uint8).tobytes()
        if stop is not None and (end := part.find(stop)) >= 0:
            if end:
                yield part[:end]
            return
        yield part


def generate_text(model: Decoder, prompt: str, **options: Any) -> Iterator[str]:
    """Yields what `generate` yields, decoded; bytes that are no UTF-8 become U+FFFD.

    >>> for part in generate_text(model, "Return a new "):                     # doctest: +SKIP
    ...     print(part, end="", flush=True)
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for part in generate(model, prompt, **options):
        if text := decoder.decode(part):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
