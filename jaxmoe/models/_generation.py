"""Writing text: prompts are read in chunks, then tokens are drawn a few per device call."""

from __future__ import annotations

import codecs
import functools
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.models._cache import Cache
from jaxmoe.models._decoder import Decoder
from jaxmoe.models._sampling import Sampling, sample
from jaxmoe.models._structure import Structure, split_known

SEPARATOR = 0
"""The byte that stands before every document a byte-level model was trained on."""

_BUCKET = 64  # the least that a chunk is padded to, so that few lengths are compiled


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _start(
    structure: Structure, arrays: list[jax.Array], batch: int, max_length: int
) -> tuple[Cache, jax.Array]:
    """An empty cache, and logits `[B, V]` that stand for nothing."""
    model = structure.module(arrays)
    vocab_size = model.architecture.vocab_size
    return model.init_cache(batch, max_length), jnp.zeros((batch, vocab_size), jnp.float32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _read(
    structure: Structure,
    arrays: list[jax.Array],
    cache: Cache,
    logits: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Reads the first `count[B]` of `tokens[B, C]`; returns the logits `[B, V]` after them.

    Where there are none to read, the logits stay.
    """
    model = structure.module(arrays)
    valid = jnp.arange(tokens.shape[1]) < count[:, None]
    hidden, cache, _ = model.hidden(tokens, cache, valid=valid)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    new = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    return cache, jnp.where(count[:, None] > 0, new, logits)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def _draw(
    structure: Structure,
    sampling: Sampling,
    count: int,
    arrays: list[jax.Array],
    cache: Cache,
    logits: jax.Array,
    seed: jax.Array,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Draws `count` tokens for each row; returns the logits after the last and `i32[count, B]`."""
    model = structure.module(arrays)
    key = jax.random.key(seed)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))

    def step(carry: tuple[Cache, jax.Array], _: None) -> Any:
        cache, logits = carry
        # The key goes by row and position, so the text is the same for every count.
        keys = jax.vmap(jax.random.fold_in)(row_keys, cache.length)
        one = jax.vmap(lambda logits, key: sample(logits[None], key, sampling)[0])
        token = one(logits, keys)
        hidden, cache, _ = model.hidden(token[:, None], cache)
        return (cache, model.logits(hidden[:, 0])), token

    (cache, logits), tokens = jax.lax.scan(step, (cache, logits), length=count)
    return cache, logits, tokens


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
    stride: int = 8,
    chunk: int = 512,
    max_length: int | None = None,
) -> Iterator[list[list[int]]]:
    """Yields the tokens that a model writes after each of some prompts, as they are drawn.

    >>> import jax.numpy as jnp
    >>>     >>> from jaxmoe.models import Decoder, DecoderConfig, generate_tokens
    >>> config = DecoderConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    ...                        head_dim=32, intermediate_size=64, num_experts=8, top_k=2)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> parts = list(generate_tokens(model, [[1, 2, 3], [4]], max_new_tokens=5, stride=4))
    >>> [[len(row) for row in part] for part in parts]
    [[4, 4], [1, 1]]

    Rows do not influence each other, but for rounding, whatever their lengths.

    Args:
      model: any `Decoder`.
      prompts: tokens of each prompt, at least one each.
      max_new_tokens: stop a row after this many.
      sampling: how to choose; `Sampling()` by default.
      seed: of the random choices.
      stop: a row ends before the first of these tokens.
      stride: tokens drawn in one device call, and the most that one yield holds of a row.
      chunk: tokens of a prompt read in one device call.
      max_length: room for a prompt and its answer; by default what this call needs, rounded up to a
        power of two, so that few sizes are compiled.

    Returns:
      An iterator over lists with the new tokens of each row; an ended row's are empty.

    Raises:
      ValueError: if a prompt is empty, has an unknown token, or does not fit with its answer.
    """
    config = model.architecture
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompts must each hold at least one token, got lengths {lengths}")
    need = max(lengths) + max_new_tokens
    if max_length is None:
        max_length = min(config.max_length, max(_BUCKET, 1 << (need - 1).bit_length()))
    if max_new_tokens < 1 or need > max_length or max_length > config.max_length:
        raise ValueError(
            f"prompt and answer must fit into {min(max_length, config.max_length)} tokens, got "
            f"{max(lengths)} + {max_new_tokens}; shorten the prompt or change max_new_tokens"
        )
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = list(prompt)
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"prompts must hold tokens from 0 to {config.vocab_size - 1}, got {tokens.min()} to "
            f"{tokens.max()}"
        )
    return _stream(
        model,
        tokens,
        np.array(lengths, np.int32),
        max_new_tokens,
        sampling or Sampling(),
        seed,
        frozenset(stop),
        stride,
        chunk,
        max_length,
    )


def _stream(
    model: Decoder,
    tokens: np.ndarray,
    lengths: np.ndarray,
    wanted: int,
    sampling: Sampling,
    seed: int,
    stop: frozenset[int],
    stride: int,
    chunk: int,
    max_length: int,
) -> Iterator[list[list[int]]]:
    structure, arrays = split_known(model)
    # NumPy numbers, since making jax ones would compile a dozen tiny programs.
    cache, logits = _start(structure, arrays, len(tokens), max_length)
    for start in range(0, tokens.shape[1], chunk):
        part = tokens[:, start : start + chunk]
        width = min(chunk, max_length, max(_BUCKET, 1 << (part.shape[1] - 1).bit_length()))
        part = np.pad(part, ((0, 0), (0, width - part.shape[1])))
        count = np.clip(lengths - start, 0, width).astype(np.int32)
        cache, logits = _read(structure, arrays, cache, logits, part, count)
    ended = [False] * len(tokens)
    drawn: deque[jax.Array] = deque()
    for start in range(0, wanted, stride):
        # The device draws the next tokens while these are looked at. What it draws past the end of
        # all texts, or past the last position, is not used.
        while len(drawn) < min(2, -(-(wanted - start) // stride)):
            cache, logits, ahead = _draw(
                structure, sampling, stride, arrays, cache, logits, np.uint32(seed % 2**32)
            )
            drawn.append(ahead)
        new = []
        for row, column in enumerate(np.asarray(drawn.popleft())[: wanted - start].T.tolist()):
            end = next((i for i, token in enumerate(column) if token in stop), len(column))
            new.append([] if ended[row] else column[:end])
            ended[row] |= end < len(column)
        if any(new):
            yield new
        if all(ended):
            return


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
    config = model.architecture
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
    parts = generate_tokens(
        model,
        [data],
        max_new_tokens=wanted,
        sampling=sampling,
        seed=seed,
        stop=() if stop is None else (stop,),
        stride=stride,
        max_length=config.max_length,
    )
    return (bytes(part[0]) for part in parts)


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
