"""Calibration against a decoder in NumPy, written from the model's description in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import write, write_wide_model
from test_evaluation import Given

from jaxmoe import checkpoint, models
from jaxmoe.checkpoint import CheckpointError
from jaxmoe.models import _calibration

DATA = Path(__file__).parent / "data" / "models"
TEXT = bytes(np.random.default_rng(5).integers(0, 48, 61).tolist()).decode()


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def rotated(x):
    """Positions along the first axis; pairs are the halves of the last."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def silu(x):
    return x / (1 + np.exp(-x))


def reference(folder, windows):
    """Qwen3-MoE: the largest |input| of each expert's and MLP's matrix, and who got tokens."""
    stored = checkpoint.load(folder / "model.safetensors")
    w = {name: np.asarray(value).astype(np.float64) for name, value in stored.items()}
    config = json.loads((folder / "config.json").read_text())
    heads, kv, width = 4, 2, config["head_dim"]
    amax = {}

    def note(module, x):
        amax[module] = max(amax.get(module, 0.0), float(np.abs(x).max()))

    for tokens in windows:
        x = w["model.embed_tokens.weight"][tokens]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            y = rms(x, w[f"{layer}.input_layernorm.weight"])
            q, k, v = (
                (y @ w[f"{layer}.self_attn.{n}_proj.weight"].T).reshape(len(x), -1, width)
                for n in "qkv"
            )
            q = rotated(rms(q, w[f"{layer}.self_attn.q_norm.weight"]))
            k = rotated(rms(k, w[f"{layer}.self_attn.k_norm.weight"]))
            out = np.zeros((len(x), heads, width))
            for t in range(len(x)):
                for h in range(heads):
                    score = k[: t + 1, h * kv // heads] @ q[t, h] / np.sqrt(width)
                    p = np.exp(score - score.max())
                    out[t, h] = p / p.sum() @ v[: t + 1, h * kv // heads]
            x = x + out.reshape(len(x), -1) @ w[f"{layer}.self_attn.o_proj.weight"].T
            y = rms(x, w[f"{layer}.post_attention_layernorm.weight"])

            def mlp(prefix, y):
                gate, up, down = (w[f"{prefix}.{n}_proj.weight"] for n in ("gate", "up", "down"))
                hidden = silu(y @ gate.T) * (y @ up.T)
                for name, value in (("gate", y), ("up", y), ("down", hidden)):
                    note(f"{prefix}.{name}_proj", value)
                return hidden @ down.T

            if i in config["mlp_only_layers"]:
                x = x + mlp(f"{layer}.mlp", y)
                continue
            logits = y @ w[f"{layer}.mlp.gate.weight"].T
            z = np.zeros_like(x)
            for t in range(len(x)):
                chosen = np.argsort(-logits[t])[:2]
                p = np.exp(logits[t][chosen] - logits[t].max())
                for e, share in zip(chosen, p / p.sum(), strict=True):
                    z[t] += share * mlp(f"{layer}.mlp.experts.{e}", y[t])
            x = x + z
    return amax


def starve(folder, path):
    """The model with a router that leaves out expert 3 of layer 0; tokens are never like that."""
    tensors = {k: np.asarray(v) for k, v in checkpoint.load(folder / "model.safetensors").items()}
    gate = "model.layers.0.mlp.gate.weight"
    # No choice of a token's two: less than the worst of the others in every direction.
    tensors[gate] = tensors[gate].copy()
    tensors[gate][3] = 0
    tensors[gate][4] = -tensors[gate][5]  # one of 4 and 5 is at least 0 ...
    tensors[gate][1] = -tensors[gate][2]  # ... and one of 1 and 2
    config = json.loads((folder / "config.json").read_text())
    return write(path, tensors, config=config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration")
    return starve(write_wide_model(path / "wide"), path / "m")


@pytest.fixture(scope="module")
def expected(folder):
    return reference(folder, [[7, *TEXT.encode()]])


def test_amax_is_that_of_a_decoder_in_numpy(folder, expected):
    seen = []
    amax = models.input_amax(
        folder, [TEXT], Given(start=7), progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    names = {n.removesuffix(".weight") for n in checkpoint.load(folder / "model.safetensors")}
    assert set(amax) == {n for n in names if n.endswith("_proj") and ".mlp." in n}
    assert set(amax) == models.calibrated_modules(folder)
    missing = set(amax) - set(expected)
    assert {f"model.layers.0.mlp.experts.3.{n}_proj" for n in ("gate", "up", "down")} <= missing
    for module, value in amax.items():
        want = expected.get(module)
        if module in missing:  # the layer's largest
            layer, kind = module.split(".experts.")[0], module.split(".")[-1]
            want = max(v for k, v in expected.items() if k.startswith(layer) and k.endswith(kind))
        assert value == pytest.approx(want, rel=1e-5), module


def test_windows_and_batches_do_not_count_padding(folder, monkeypatch):
    """Windows of 20, 20, 20 and 2 tokens, in batches of 3."""
    monkeypatch.setattr(_calibration, "_CONTEXT", 20)
    monkeypatch.setattr(_calibration, "_BATCH", 3)
    tokens = [7, *TEXT.encode()]
    expected = reference(folder, [tokens[i : i + 20] for i in range(0, 62, 20)])
    before = _calibration._layer._cache_size()
    amax = models.input_amax(folder, [TEXT], Given(start=7))
    assert _calibration._layer._cache_size() == before + 2  # three layers of two kinds
    for module, value in expected.items():
        assert amax[module] == pytest.approx(value, rel=1e-5), module


def test_texts_are_read_one_by_one_up_to_the_limit(folder):
    texts = [TEXT[:30], TEXT[40:]]
    expected = reference(folder, [[7, *text.encode()] for text in (texts[0], TEXT[40:49])])
    amax = models.input_amax(folder, texts, Given(start=7), max_tokens=41)
    for module, value in expected.items():
        assert amax[module] == pytest.approx(value, rel=1e-5), module


def test_arguments_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="at least one token"):
        models.input_amax(folder, [""], Given())
    with pytest.raises(ValueError, match="tokens from 0 to 47"):
        models.input_amax(folder, ["z"], Given())
    tensors = checkpoint.load(folder / "model.safetensors")
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    norm = "model.layers.0.post_attention_layernorm.weight"
    config = json.loads((folder / "config.json").read_text())
    for value, complaint in ((0, "only zeros"), (np.nan, "not finite")):
        write(tmp_path / "m", {**tensors, norm: 0 * tensors[norm] + value}, config=config)
        with pytest.raises(CheckpointError, match=rf"layers.0.mlp: .*{complaint}"):
            models.input_amax(tmp_path / "m", [TEXT[:5]], Given(start=7))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(folder):
    """The model with a tokenizer whose start token is 0, and a text that it can read."""
    from test_text import write_tokenizer

    write_tokenizer(folder, vocab_size=48)
    (folder.parent / "text.txt").write_text("AB&%$(BA)" * 5 + "#!*+,-./0123456789")
    return folder


def command(source, dst, layout="modelopt", *more):
    text = source.parent / "text.txt"
    arguments = ["quantize", source, dst, "--format", "nvfp4", "--layout", layout]
    return [*arguments, "--calibrate", text, "--calibration-tokens", 50, *more]


@pytest.mark.parametrize(
    ("layout", "ending", "inverse"),
    [("modelopt", "input_scale", False), ("compressed-tensors", "input_global_scale", True)],
)
def test_quantize_with_calibration(run, source, tmp_path, layout, ending, inverse):
    """amax / (448 · 6) of every module, as the decoder in NumPy has it; and on to the layer."""
    pytest.importorskip("typer", reason="needs the cli extra")
    dst = tmp_path / "dst"
    assert run(*command(source, dst, layout))[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]
    text = models.Tokenizer(source)
    tokens = [0, *text.encode_document((source.parent / "text.txt").read_bytes())][:50]
    expected = reference(source, [tokens])
    stored = {}
    with checkpoint.open_folder(dst) as opened:
        assert opened.scheme.compute == "w4a4"
        for name in opened.names:
            if name.endswith(ending):
                value = opened.tensor(name)
                assert value.dtype == np.float32
                stored[name.removesuffix(f".{ending}")] = float(value.reshape(()))
    assert set(stored) == models.calibrated_modules(source)
    for module, amax in expected.items():
        scale = amax / (448 * 6)
        assert stored[module] == pytest.approx(1 / scale if inverse else scale, rel=1e-5)
    moe = models.load_pretrained(dst, prepare=False).layers[0].moe
    largest = max(v for k, v in expected.items() if k.startswith("model.layers.0.mlp.experts"))
    both = max(float(moe.gate_up_input_scale[...]), float(moe.down_input_scale[...]))
    assert both == pytest.approx(largest / (448 * 6), rel=1e-5)


def test_calibration_is_kept_until_the_folder_is_done(run, source, tmp_path, monkeypatch):
    pytest.importorskip("typer", reason="needs the cli extra")
    from jaxmoe.cli import _quantize_write

    def full(*arguments, **options):
        raise OSError("no space left")

    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(_quantize_write, "_check_folder", full)
        code, _, err = run(*command(source, dst))
    assert (code, "no space left" in err, dst.exists()) == (1, True, False)
    assert (tmp_path / ".dst.calibration.json").exists()
    with monkeypatch.context() as patch:  # it is not run again, unless it would give something else
        patch.setattr(models, "input_amax", full)
        code, _, err = run(*command(source, dst, "modelopt", "--calibration-tokens", 49))
        assert (code, "no space left" in err) == (1, True)
        code, _, err = run(*command(source, dst))
        assert (code, "files were there from before" in err) == (0, True)
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


KILLED = """
import sys, time
from jaxmoe import models
from jaxmoe.cli import main
from jaxmoe.models import _calibration
named = _calibration._named

def slowly(path, names, index, part, amax):
    if index == 1 and amax.max() != 1:
        print("now", flush=True)
        time.sleep(60)
    return named(path, names, index, part, amax)

_calibration._named = slowly
main(sys.argv[1:])
"""


def test_killed_while_calibrating(run, source, tmp_path):
    """kill -9 leaves nothing, and the same command begins anew."""
    pytest.importorskip("typer", reason="needs the cli extra")
    arguments = [str(a) for a in command(source, tmp_path / "dst")]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    reached = process.stdout.readline() == b"now\n"
    process.kill()
    process.wait(60)
    process.stdout.close()
    assert reached
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--layout", "jaxmoe"], "stores no activation scales"),
        (["--layout", "compressed-tensors", "--format", "mxfp4"], "stores no activation scales"),
        (["--input-scales", "{text}"], "give one of them"),
        (["--calibrate", "{empty}"], "is empty"),
        (["--calibrate", "{latin}"], "not UTF-8"),
        (["--include", "_proj.weight$"], "12 of 51 modules are no matrices of experts or MLPs"),
        (["--include", "nothing"], "none of"),
    ],
)
def test_calibration_that_cannot_be(run, source, tmp_path, more, complaint):
    pytest.importorskip("typer", reason="needs the cli extra")
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"\xe9")
    names = {"text": source.parent / "text.txt"}
    names |= {name: tmp_path / name for name in ("empty", "latin")}
    more = [argument.format(**names) for argument in more]
    code, _, err = run(*command(source, tmp_path / "dst", "modelopt", *more))
    assert code in (1, 2)
    assert complaint in " ".join(err.replace("│", " ").split()), err
    assert not (tmp_path / "dst").exists()
