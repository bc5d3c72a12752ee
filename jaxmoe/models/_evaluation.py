"""How well a model predicts text it has not seen."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmoe.models._decoder import Decoder
from jaxmoe.models._text import ByteText, Text

_CONTEXT = 2048  # a window's tokens by default, for models that take more
_WIDTH = 64  # windows of short texts are a multiple of this, so that few widths are compiled
_LOGITS = 1 << 26  # at once: a whole window's could be larger than the model


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model needs for some text; every token and byte counts once.

    >>> score = Score(tokens=4, bytes=8, nats=4 * math.log(2))
    >>> score.perplexity, score.bits_per_token, score.bits_per_byte
    (2.0, 1.0, 0.5)

    Attributes:
      tokens: how many were predicted.
      bytes: of the text.
      nats: minus the natural logarithm of the text's probability.
      documents: the same of each document, in order.
    """

    tokens: int
    bytes: int
    nats: float
    documents: tuple[Score, ...] = ()

    @property
    def nats_per_token(self) -> float:
        """The mean over tokens, also called cross-entropy or loss."""
        return self.nats / self.tokens

    @property
    def bits_per_token(self) -> float:
        """`nats_per_token` to base 2."""
        return self.nats_per_token / math.log(2)

    @property
    def nats_per_byte(self) -> float:
        """The mean over bytes, which does not depend on the tokenizer."""
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """`nats_per_byte` to base 2."""
        return self.nats_per_byte / math.log(2)

    @property
    def perplexity(self) -> float:
        """e to `nats_per_token`."""
        return math.exp(self.nats_per_token)


@functools.partial(jax.jit, static_argnums=0)
def _nats(graph: Any, state: Any, windows: jax.Array) -> jax.Array:
    """Negative log-likelihood `f32[B, C]` of the tokens of `windows[B, C + 1]` after the first."""
    model = nnx.merge(graph, state)
    hidden, _, _ = model.hidden(windows[:, :-1])

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, token = pair
        return -jax.nn.log_softmax(model.logits(hidden))[token]

    batch, context = windows.shape[0], windows.shape[1] - 1
    pairs = (hidden.reshape(batch * context, -1), windows[:, 1:].reshape(-1))
    few = max(1, _LOGITS // model.architecture.vocab_size)
    return jax.lax.map(one, pairs, batch_size=min(few, batch * context)).reshape(batch, context)


def _windows(tokens: np.ndarray, context: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows `[N, context + 1]` and which of their predictions count `[N, context]`."""
    last = max(1, len(tokens) - 1 - (context - stride)) if len(tokens) > 1 else 0
    starts = range(0, last, stride)
    windows = np.zeros((len(starts), context + 1), np.int32)
    scored = np.zeros((len(starts), context), bool)
    for row, start in enumerate(starts):
        part = tokens[start : start + context + 1]
        windows[row, : len(part)] = part
        scored[row, (0 if row == 0 else context - stride) : len(part) - 1] = True
    return windows, scored


def evaluate(
    model: Decoder,
    documents: bytes | str | Iterable[bytes | str],
    *,
    text: Text | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Measures how well a model predicts some documents: perplexity, bits per byte.

    >>> evaluate(model, "def main():\\n    pass\\n").bits_per_byte               # doctest: +SKIP
    >>> evaluate(model, text, text=Tokenizer(folder)).perplexity               # doctest: +SKIP

    Every token is predicted once, the first after the tokenizer's start token (`Text.start`); where
    a tokenizer has none, the first token is given. A document is read in windows of `context`
    tokens, each `stride` after the last, in which positions start anew. The first window predicts
    all its tokens, every other one the last `stride`, so that a token has at least
    `context - stride` tokens before it, or all of the document that there is.

    Args:
      model: any `Decoder`.
      documents: one or several; bytes are UTF-8, but for byte-level models.
      text: makes tokens of them; `ByteText` by default, for byte-level models.
      context: tokens that a window shows; by default as many as the model takes, at most 2048.
      stride: from window to window; half of `context` by default.
      batch: windows per device call.
      progress: called with the number of windows done, and of all.

    Returns:
      The `Score` of all documents together, with that of each (zeros for an empty one).

    Raises:
      ValueError: if there is no token to predict, a token is unknown to the model, or an argument
        is out of range.
    """
    limit = model.architecture.max_length
    context = min(limit, _CONTEXT) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    for name, value, least, most in (
        ("context", context, 1, limit),
        ("stride", stride, 1, context),
        ("batch", batch, 1, math.inf),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {value}")
    encoder: Text = ByteText() if text is None else text
    vocab_size = model.architecture.vocab_size
    if isinstance(documents, bytes | str):
        documents = [documents]
    streams, sizes = [], []
    for document in documents:
        tokens, size = _encode(encoder, document, vocab_size)
        streams.append(tokens)
        sizes.append(size)
    longest = max(map(len, streams), default=0) - 1
    if longest < 1:
        raise ValueError("documents must hold at least one token to predict, got none")

    if longest < context:  # then there is one window for each
        context = stride = min(context, -(-longest // _WIDTH) * _WIDTH)
    parts = [_windows(tokens, context, stride) for tokens in streams]
    nats = _run(model, np.concatenate([windows for windows, _ in parts]), batch, progress)
    scores, row = [], 0
    for (_, scored), size in zip(parts, sizes, strict=True):
        own = nats[row : row + len(scored)][scored]
        row += len(scored)
        scores.append(Score(own.size, size, float(own.sum(dtype=np.float64))))
    return Score(
        sum(score.tokens for score in scores),
        sum(score.bytes for score in scores),
        math.fsum(score.nats for score in scores),
        tuple(scores),
    )


def _encode(text: Text, document: bytes | str, vocab_size: int) -> tuple[np.ndarray, int]:
    """Tokens of a document, the first of which is given, and how many bytes it has."""
    data = document.encode() if isinstance(document, str) else document
    own = text.encode_document(data)
    if own and not 0 <= min(own) <= max(own) < vocab_size:
        raise ValueError(
            f"text must give tokens from 0 to {vocab_size - 1}, which the model knows, got "
            f"{min(own)} to {max(own)}; take the model's own tokenizer"
        )
    first = [] if text.start is None else [text.start]
    return np.array([*first, *own], np.int32), len(data)


def _run(
    model: Decoder,
    windows: np.ndarray,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    graph, state = nnx.split(model)
    count = len(windows)
    batch = min(batch, count)
    windows = np.pad(windows, ((0, -count % batch), (0, 0)))
    done = []
    for start in range(0, count, batch):
        done.append(np.asarray(_nats(graph, state, windows[start : start + batch])))
        if progress is not None:
            progress(min(start + batch, count), count)
    return np.concatenate(done)[:count]
