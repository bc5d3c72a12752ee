"""Every family of `load_pretrained` against logits that `transformers` computed.

The folders in `tests/data/models` were written by `tests/reference_models.py`; where torch and
transformers are installed, new ones are made with other weights.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from reference_models import CONFIGS, PROMPTS

from jaxmoe import checkpoint, models

DATA = Path(__file__).parent / "data" / "models"


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def run(graph, state, tokens, cache, valid):
    model = nnx.merge(graph, state)
    hidden, cache, _ = model.hidden(tokens, cache, valid=valid)
    return model.logits(hidden), cache


@functools.cache
def loaded(family, weight_format=None):
    return models.load_pretrained(DATA / family, weight_format=weight_format)


def recorded(family):
    tensors = checkpoint.load(DATA / f"{family}.safetensors")
    rows = range(len(PROMPTS))
    return [np.asarray(tensors[f"tokens.{i}"]) for i in rows], [
        np.asarray(tensors[f"logits.{i}"]) for i in rows
    ]


def padded(rows, side):
    """Rows as `[B, T]` with padding on one side, and which are tokens."""
    width = max(map(len, rows))
    tokens = np.full((len(rows), width), 7, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, at], valid[i, at] = row, True
    return tokens, valid


def assert_close(got, expected, tolerance):
    """Largest difference, relative to the largest logit of the row."""
    error = max(np.abs(g - e).max() / np.abs(e).max() for g, e in zip(got, expected, strict=True))
    assert error < tolerance, f"relative error {error:.1e}"


def check_prefill(model, rows, expected, side, tolerance=1e-4):
    tokens, valid = padded(rows, side)
    logits, _ = run(*nnx.split(model), tokens, None, valid)
    assert_close([np.asarray(logits[i])[valid[i]] for i in range(len(rows))], expected, tolerance)


def check_decode(model, rows, expected, side, tolerance=1e-4):
    """Prompts of different lengths at once, then one token of each row at a time."""
    graph, state = nnx.split(model)
    prompts = [row[:length] for row, length in zip(rows, PROMPTS, strict=True)]
    tokens, valid = padded(prompts, side)
    logits, cache = run(graph, state, tokens, model.init_cache(len(rows), 64), valid)
    got = [[np.asarray(logits[i])[valid[i]]] for i in range(len(rows))]
    for step in range(len(rows[0]) - PROMPTS[0]):
        tokens = np.array([[row[n + step]] for row, n in zip(rows, PROMPTS, strict=True)])
        logits, cache = run(graph, state, tokens, cache, None)
        for row, one in zip(got, np.asarray(logits), strict=True):
            row.append(one)
    assert_close([np.concatenate(row) for row in got], expected, tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
def test_prefill_matches_transformers(family, side):
    check_prefill(loaded(family), *recorded(family), side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
def test_decode_matches_transformers(family, side):
    check_decode(loaded(family), *recorded(family), side)
