"""How well a model predicts text it has not seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.models._decoder import Decoder
from jaxmoe.models._generation import SEPARATOR


@functools.partial(jax.jit, static_argnums=0)
def _nats(graph: Any, state: Any, windows: jax.Array, scored: jax.Array) -> jax.Array:
    """Negative log-likelihood `f32[B]` of the scored tokens of `windows[B, C + 1]`."""
    logits = nnx.merge(graph, state)(windows[:, :-1])
    target = windows[:, 1:, None]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), target, axis=-1)[..., 0]
    return -jnp.sum(chosen * scored, axis=-1)


def _windows(document: bytes, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows `[N, context + 1]` and which of their predictions count `[N, context]`."""
    stream = np.concatenate([[SEPARATOR], np.frombuffer(document, np.uint8)]).astype(np.int32)
    stride = max(1, context // 2)
    starts = range(0, max(1, len(stream) - 1 - (context - stride)), stride)
    windows = np.full((len(starts), context + 1), SEPARATOR, np.int32)
    scored = np.zeros((len(starts), context), np.float32)
    for row, start in enumerate(starts):
        part = stream[start : start + context + 1]
        windows[row, : len(part)] = part
        scored[row, (0 if row == 0 else context - stride) : len(part) - 1] = 1
    return windows, scored


def bits_per_byte(
    model: Decoder,
    documents: bytes | str | Iterable[bytes | str],
    *,
    context: int | None = None,
    batch: int = 16,
) -> float:
    """Mean bits that a byte-level model needs for each byte of some documents.

    >>> bits_per_byte(model, "def main():\\n    pass\\n")                        # doctest: +SKIP

    Every byte counts once. A document starts after a separator; its windows of `context` bytes
    overlap by half, so that after the first window each byte has at least half a window before it.

    Args:
      model: a `Decoder` with 256 tokens.
      documents: one document or several.
      context: window in bytes; `config.max_length` by default.
      batch: windows per device call.

    Raises:
      ValueError: if there is no text.
    """
    if isinstance(documents, bytes | str):
        documents = [documents]
    texts = [d.encode() if isinstance(d, str) else d for d in documents]
    total = sum(len(text) for text in texts)
    if not total:
        raise ValueError("documents must hold at least one byte, got none")
    parts = [_windows(text, context or model.architecture.max_length) for text in texts if text]
    windows = np.concatenate([part[0] for part in parts])
    scored = np.concatenate([part[1] for part in parts])
    if int(scored.sum(dtype=np.float64)) != total:
        raise AssertionError("every byte must be scored once")
    padding = -len(windows) % batch
    windows = np.pad(windows, ((0, padding), (0, 0)))
    scored = np.pad(scored, ((0, padding), (0, 0)))
    graph, state = nnx.split(model)
    nats = [
        _nats(graph, state, windows[i : i + batch], scored[i : i + batch])
        for i in range(0, len(windows), batch)
    ]
    return float(np.concatenate(nats).sum(dtype=np.float64)) / math.log(2) / total
