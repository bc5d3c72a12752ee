"""Perplexity: against logits that `transformers` computed, and window by window; `jaxmoe eval`."""

import io
import json
import math
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_text import write_tokenizer

from jaxmoe import checkpoint, models
from jaxmoe.models import _evaluation

DATA = Path(__file__).parent / "data" / "models"


class Given:
    """A text whose n-th token is its n-th byte."""

    def __init__(self, start=None):
        self.start = start

    def encode_document(self, document):
        return list(document)


@pytest.fixture(scope="module")
def model():
    return models.load_pretrained(DATA / "qwen3_moe")


def nats(logits, tokens):
    """Minus log-likelihood of each token after the first, in float64."""
    wide = np.asarray(logits, np.float64)
    log_p = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return np.array([-log_p[i, token] for i, token in enumerate(tokens[1:])])


@pytest.mark.parametrize("length", [2, 5, 8, 9, 11, 12, 13, 40])
@pytest.mark.parametrize(("context", "stride"), [(1, 1), (2, 1), (7, 3), (8, 4), (8, 8), (8, 1)])
def test_windows_predict_every_token_once_with_enough_before(length, context, stride):
    tokens = np.arange(1, length + 1)
    windows, scored = _evaluation._windows(tokens, context, stride)
    np.testing.assert_array_equal(windows[:, 1:][scored], tokens[1:])
    for row, window in enumerate(windows):
        part = tokens[row * stride :][: context + 1]
        np.testing.assert_array_equal(window[: len(part)], part)
        assert row == 0 or np.flatnonzero(scored[row])[0] >= context - stride


def test_scores_are_those_of_the_logits_of_transformers(model):
    recorded = checkpoint.load(DATA / "qwen3_moe.safetensors")
    texts = [np.asarray(recorded[f"tokens.{i}"]) for i in range(3)]
    expected = [nats(recorded[f"logits.{i}"], text).sum() for i, text in enumerate(texts)]
    score = models.evaluate(model, [bytes(text.tolist()) for text in texts], text=Given())
    assert [one.tokens for one in score.documents] == [len(text) - 1 for text in texts]
    np.testing.assert_allclose([one.nats for one in score.documents], expected, rtol=1e-5)
    assert score.nats == pytest.approx(sum(expected), rel=1e-5)
    count, size = sum(map(len, texts)) - 3, sum(map(len, texts))
    assert (score.tokens, score.bytes) == (count, size)
    assert score.perplexity == pytest.approx(math.exp(sum(expected) / count), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(sum(expected) / size / math.log(2), rel=1e-5)


def test_long_texts_are_read_in_windows(model, monkeypatch):
    """Each token from the window that the rule gives it, computed by itself; few logits at once."""
    monkeypatch.setattr(_evaluation, "_LOGITS", 48 * 5)
    context, stride = 8, 3
    text = np.random.default_rng(0).integers(0, 48, 30).tolist()
    tokens = [3, *text]
    graph, state = nnx.split(model)
    run = nnx.jit(lambda window: nnx.merge(graph, state)(window))
    expected = 0.0
    for i in range(1, len(tokens)):
        start = 0 if i <= context else -(-(i - context) // stride) * stride
        window = (tokens[start:] + [0] * context)[:context]
        logits = run(jnp.asarray([window]))[0]
        expected += nats(logits[i - 1 - start :], [None, tokens[i]])[0]
    seen = []
    score = models.evaluate(
        model, bytes(text), text=Given(start=3), context=context, stride=stride, batch=4,
        progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    assert score.tokens == score.bytes == 30
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_a_model_that_knows_nothing(model):
    """log 48 for each token; an empty document has none."""
    blank = nnx.merge(*nnx.split(model))
    blank.head = nnx.clone(model.head)
    blank.head.weight[...] = jnp.zeros_like(model.head.weight[...])
    score = models.evaluate(blank, [b"", bytes(range(40)), bytes(5)])
    assert [one.tokens for one in score.documents] == [0, 40, 5]
    assert score.perplexity == pytest.approx(48, rel=1e-6)
    assert score.bits_per_token == pytest.approx(math.log2(48), rel=1e-6)
    assert score.documents[0] == models.Score(0, 0, 0.0)


@pytest.mark.parametrize(
    ("documents", "options", "complaint"),
    [
        ([], {}, "at least one token"),
        (["", b""], {}, "at least one token"),
        (b"\1", {"text": Given()}, "at least one token"),
        ("A", {}, "tokens from 0 to 47"),
        (b"\1", {"context": 0}, "context must be from 1 to 256, got 0"),
        (b"\1", {"context": 257}, "context must be"),
        (b"\1", {"context": 8, "stride": 9}, "stride must be from 1 to 8"),
        (b"\1", {"batch": 0}, "batch must be"),
    ],
)
def test_arguments_are_refused_by_name(model, documents, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        models.evaluate(model, documents, **options)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    folder = write_tokenizer(tmp_path / "model", vocab_size=48)
    for path in (DATA / "qwen3_moe").iterdir():
        shutil.copy(path, folder)
    return folder


def test_eval_of_a_folder(run, folder, tmp_path, monkeypatch):
    pytest.importorskip("typer", reason="needs the cli extra")
    texts = {"a.txt": "AB&%$(BA)" * 9, "b.txt": "%%AABB"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    arguments = (folder, tmp_path / "a.txt", "-", "--context", 32, "--stride", 8, "--batch", 3)
    stdin = io.TextIOWrapper(io.BytesIO(texts["b.txt"].encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = run("eval", *arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    expected = models.evaluate(
        models.load_pretrained(folder),
        list(texts.values()),
        text=models.Tokenizer(folder),
        context=32,
        stride=8,
    )
    assert report["tokens"] == report["bytes"] == sum(map(len, texts.values()))
    assert report["perplexity"] == pytest.approx(expected.perplexity)
    assert report["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    for one, score in zip(report["documents"], expected.documents, strict=True):
        assert one["nats"] == pytest.approx(score.nats)
    assert [one["name"] for one in report["documents"]] == [str(tmp_path / "a.txt"), "-"]
    assert [one["layer"] for one in report["kernels"]] == [0, 2]

    code, out, err = run("eval", folder, tmp_path / "a.txt", "--context", 32, "--stride", 8)
    assert code == 0
    assert f"{expected.documents[0].perplexity:.4f}" in out
    assert "layers 0, 2: kernel: xla" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "Missing argument"),
        (["{folder}"], "at least one file must be named"),
        (["{folder}", "{tmp}/none.txt"], "No such file"),
        (["{tmp}"], "is a folder, and none of a model"),
        (["{folder}", "{tmp}/empty"], "is empty"),
        (["{folder}", "{tmp}/latin"], "not UTF-8"),
        (["{folder}", "{tmp}/text", "{tmp}/text"], "named once"),
        (["{folder}", "{tmp}/text", "--context", "300"], "context must be from 1 to 256"),
        (["{folder}", "{tmp}/text", "--implementation", "fast"], "unknown; the names are"),
        (["{tmp}/text", "--model", "{tmp}/none"], "there is no model"),
    ],
)
def test_eval_refuses_what_it_cannot(run, folder, tmp_path, arguments, complaint):
    pytest.importorskip("typer", reason="needs the cli extra")
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"\xe9A")
    (tmp_path / "text").write_text("AB")
    code, out, err = run("eval", *(a.format(folder=folder, tmp=tmp_path) for a in arguments))
    assert code in (1, 2)
    assert out == ""
    assert complaint in " ".join(err.replace("│", " ").split()), err
