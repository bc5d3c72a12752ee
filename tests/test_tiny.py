"""The bundled model: its size, that it is whole, how good it still is in FP4, what it writes."""

from pathlib import Path

import pytest

from jaxmoe import checkpoint, models
from jaxmoe import nn as moe_nn
from jaxmoe.models import Sampling

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "def read_lines(path):\n    "


@pytest.fixture(scope="module")
def canonical():
    return models.load(models.bundled(), "nvfp4")


@pytest.fixture(scope="module")
def prepared(canonical):
    return moe_nn.prepare(canonical)


def write(model, **options):
    options = {"max_new_tokens": 48, "sampling": Sampling(temperature=0.0), **options}
    return b"".join(models.generate(model, PROMPT, **options))


def test_files_are_small():
    sizes = {path.name: path.stat().st_size for path in models.bundled().iterdir()}
    assert sizes.keys() == {
        "README.md",
        "config.json",
        "decoder.safetensors",
        "experts-mxfp4.safetensors",
        "experts-nvfp4.safetensors",
    }
    assert sum(sizes.values()) <= 8e6


def test_files_are_whole():
    for path in models.bundled().glob("*.safetensors"):
        assert "crc32" in checkpoint.read_metadata(path)
        assert checkpoint.load(path)  # verifies the checksum, and the scales' values


def test_card_states_the_sizes():
    card = (models.bundled() / "README.md").read_text()
    for path in models.bundled().glob("*.safetensors"):
        assert f"| `{path.name}` | {path.stat().st_size:,} |" in card


def test_nvfp4_predicts_as_well_as_bf16(prepared):
    """On the first bytes of every held-out document; all of them: examples/evaluate_tiny.py."""
    folder = EXAMPLES / "tiny-bf16"
    texts = [path.read_bytes()[:256] for path in sorted((folder / "heldout").glob("*.txt"))]
    assert len(texts) == 14
    bf16 = models.load(models.bundled(), "bf16", experts=folder)
    options = {"context": 256, "batch": len(texts)}
    exact = models.evaluate(bf16, texts, **options).bits_per_byte
    rounded = models.evaluate(prepared, texts, **options).bits_per_byte
    # An untrained model needs 8 bits; openings are harder than the 1.01 of whole documents.
    assert exact < 2.5
    assert rounded == pytest.approx(exact, rel=0.02)


def test_text_is_the_same_every_time_and_looks_like_code(prepared):
    text = write(prepared)
    assert text == write(prepared)
    assert all(byte in b"\n" or 32 <= byte < 127 for byte in text)
    assert len(text) == 48
    assert text.count(b" ") >= 4
    sampled = [write(prepared, sampling=Sampling(temperature=0.8), seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_prepared_weights_write_the_same_text(canonical, prepared):
    assert prepared.layers[0].moe.layout == canonical.layers[0].moe.explain().layout
    assert write(prepared) == write(canonical)
