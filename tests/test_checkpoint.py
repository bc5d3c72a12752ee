"""Safetensors files: bits survive, damage is named, a write is all or nothing."""

import doctest
import importlib
import json
import os
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmoe
from jaxmoe import checkpoint
from jaxmoe.checkpoint import CheckpointError

FORMATS = ["nvfp4", "mxfp4", "mxfp8", "fp8"]


def weights(format="nvfp4", shape=(3, 8, 64), seed=0):
    return jaxmoe.quantize(jax.random.normal(jax.random.key(seed), shape), format)


def same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(
        np.asarray(a).reshape(-1).view(np.uint8), np.asarray(b).reshape(-1).view(np.uint8)
    )
    assert a.shape == b.shape


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


@pytest.fixture
def file(path):
    """A file with one tensor of each kind."""
    checkpoint.save(path, {"experts.down": weights(), "norm": jnp.arange(5.0)}, {"note": "test"})
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_of_quantized_tensors_is_exact(path, format):
    w = weights(format)
    checkpoint.save(path, {"a.b": w})
    loaded = checkpoint.load(path)
    assert list(loaded) == ["a.b"]
    assert loaded["a.b"].format is w.format
    for before, after in zip(jax.tree.leaves(w), jax.tree.leaves(loaded["a.b"]), strict=True):
        same_bits(before, after)


def test_float4_data_is_stored_packed(path):
    w = weights("mxfp4")
    elements = jaxmoe.QuantizedTensor(w.elements(), w.scale, w.global_scale, w.format)
    checkpoint.save(path, {"w": elements})
    same_bits(checkpoint.load(path)["w"].data, w.data)


@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e8m0fnu,
        np.int32,
        np.int8,
        np.uint8,
        np.bool_,
    ],
)
def test_round_trip_of_arrays(path, dtype):
    a = np.arange(6).reshape(2, 3).astype(dtype)
    arrays = {"a": a, "scalar": a[0, 1], "empty": a[:0]}
    checkpoint.save(path, arrays)
    for name, loaded in checkpoint.load(path).items():
        assert isinstance(loaded, jax.Array)
        same_bits(np.asarray(arrays[name]), loaded)


def test_safetensors_package_reads_and_writes_the_same_files(path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="extra 'hf' is not installed")
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(3, dtype=np.uint8)}
    checkpoint.save(path, arrays)
    for name, a in safetensors.load_file(path).items():
        same_bits(arrays[name], a)
    safetensors.save_file(arrays, path, {"from": "elsewhere"})
    assert checkpoint.read_metadata(path) == {"from": "elsewhere"}
    for name, a in checkpoint.load(path).items():
        same_bits(arrays[name], a)


def test_file_is_aligned_and_reproducible(path, tmp_path):
    tensors = {"b": jnp.ones(3, jnp.uint8), "a": jnp.ones(3), "w": weights()}
    checkpoint.save(path, tensors)
    again = tmp_path / "again"
    checkpoint.save(again, dict(reversed(tensors.items())))
    assert path.read_bytes() == again.read_bytes()
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    assert header["a"]["data_offsets"][0] % 4 == 0


def test_metadata_and_selection(file):
    metadata = checkpoint.read_metadata(file)
    assert metadata["note"] == "test"
    assert json.loads(metadata["quantized"]) == {"experts.down": "nvfp4"}
    assert list(checkpoint.load(file, ["norm"])) == ["norm"]
    with pytest.raises(CheckpointError, match=r"holds no tensor 'x', only experts.down, norm"):
        checkpoint.load(file, ["x"])


def test_what_cannot_be_stored_is_refused(path):
    with pytest.raises(ValueError, match=r"tensors\['c'\] has dtype complex64"):
        checkpoint.save(path, {"c": jnp.ones(2, jnp.complex64)})
    with pytest.raises(ValueError, match=r"stored as 'w\.data'"):
        checkpoint.save(path, {"w": weights(), "w.data": jnp.ones(2)})
    with pytest.raises(ValueError, match="'crc32'"):
        checkpoint.save(path, {}, {"crc32": "0"})
    assert not path.exists()


def test_truncation_at_every_length_is_an_error_that_names_the_file(file):
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for size in [*range(0, 8 + length, 97), 8 + length - 1, 8 + length, len(content) - 1]:
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(file)
        assert str(file) in str(error.value)
        assert "truncated safetensors file" in str(error.value)


def test_appended_bytes_are_an_error(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="corrupt safetensors file: the header describes"):
        checkpoint.load(file)


def test_every_flipped_byte_of_the_data_is_an_error(file):
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for position in range(8 + length, len(content), 11):
        content[position] ^= 0x10
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="its checksum is"):
            checkpoint.load(file)
        content[position] ^= 0x10


def rewrite(file, change):
    """Changes the header of a file; drops the checksum, so that other checks are reached."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"].pop("crc32")
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


HEADER_DAMAGE = {
    "unknown dtype": (lambda h: h["norm"].update(dtype="F5"), "KeyError: 'F5'"),
    "shape": (lambda h: h["norm"].update(shape=[6]), "'norm' of F32 and shape"),
    "hole": (lambda h: h["norm"].update(data_offsets=[4, 24]), "cannot lie at bytes"),
    "no shape": (lambda h: h["norm"].pop("shape"), "KeyError: 'shape'"),
    "unknown format": (
        lambda h: h["__metadata__"].update(quantized='{"experts.down": "fp3"}'),
        "format 'fp3'; known are nvfp4, mxfp4",
    ),
    "other format": (
        lambda h: h["__metadata__"].update(quantized='{"experts.down": "mxfp4"}'),
        "must not have experts.down.global_scale",
    ),
    "missing part": (
        lambda h: h["__metadata__"].update(quantized='{"norm": "mxfp4"}'),
        "lacks norm.data",
    ),
    "metadata": (lambda h: h["__metadata__"].update(quantized="{"), "corrupt metadata"),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_damaged_headers(file, damage):
    change, message = HEADER_DAMAGE[damage]
    rewrite(file, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(file)


@pytest.mark.parametrize("content", [b"\xff" * 64, struct.pack("<Q", 4) + b"[1]]", b"PK\3\4" * 9])
def test_other_files(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors"):
        checkpoint.load(path)


def test_missing_file(path):
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        checkpoint.load(path)


@pytest.mark.parametrize("bits", [0x7F, 0x80 | 0x38])
def test_scales_that_make_no_sense(file, bits):
    """NaN and negative e4m3 block scales."""
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    content[8 + length + header["experts.down.scale"]["data_offsets"][0]] = bits
    file.write_bytes(content)
    rewrite(file, lambda header: None)
    with pytest.raises(CheckpointError, match=r"experts\.down.*scale"):
        checkpoint.load(file)


def test_failed_write_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        checkpoint.save(file, {"other": jnp.zeros(100)})
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_written_file_has_the_usual_permissions(file, tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    assert file.stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("name", ["_file", "_folder", "_layouts", "_safetensors"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"jaxmoe.checkpoint.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
