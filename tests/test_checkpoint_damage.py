"""Damaged checkpoints: one clear error that names the file and the tensor, and nothing written."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from folders import (
    E4M3,
    FP8,
    GPT_OSS,
    MODELOPT,
    PREFIX,
    SHAPES,
    E,
    H,
    I,
    as_packed,
    fp8,
    gpt_oss,
    modelopt,
    packed,
    plain,
    write,
    write_shards,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmoe import checkpoint
from jaxmoe.checkpoint import CheckpointError, open_folder
from jaxmoe.cli import main

GATE, UP, DOWN = SHAPES
MODULE = f"{PREFIX}.2.{UP}"
NVFP4 = packed("nvfp4-pack-quantized")
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def build(path, kind="modelopt", change=None, quantization=None, config=None):
    """A folder of one kind; `change` may edit its tensors first."""
    make, default, more = {
        "plain": (plain, None, {}),
        "modelopt": (modelopt, MODELOPT, {}),
        "packed": (lambda: as_packed(modelopt()), NVFP4, {}),
        "gpt-oss": (gpt_oss, GPT_OSS, {"model_type": "gpt_oss"}),
        "fp8": (fp8, FP8, {}),
    }[kind]
    tensors = make()
    if change is not None:
        change(tensors)
    return write(path, tensors, quantization or default, {**more, **(config or {})})


def read(path):
    with open_folder(path) as folder:
        folder.load_experts(PREFIX, num_experts=E)
        for name in folder.names:
            folder.tensor(name)


def header(path, change):
    """Edits the header of a safetensors file as text."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = json.loads(content[8 : 8 + length])
    text["__metadata__"].pop("crc32", None)
    new = change(text)
    new = new if isinstance(new, bytes) else json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# --- damage to a tensor: kind of folder, what is done to the tensors, what the error must say -----


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def poke(name, index, value):
    """One element of a scale, as bits."""

    def change(tensors):
        array = tensors[name].copy()
        array.reshape(-1).view(np.uint8 if array.itemsize == 1 else array.dtype)[index] = value
        tensors[name] = array

    return change


def zero_scale(tensors):
    poke(f"{MODULE}.weight_scale", 0, 0)(tensors)
    poke(f"{MODULE}.weight", 0, 0x11)(tensors)


BLOCKS = f"{PREFIX}.gate_up_proj_blocks"
TENSORS = {
    "block scales missing": (
        "modelopt", drop(f"{MODULE}.weight_scale"), f"{MODULE}.weight", "is missing"),
    "global scale missing": (
        "modelopt", drop(f"{MODULE}.weight_scale_2"), f"{MODULE}.weight", "needs .*weight_scale_2"),
    "elements missing": (
        "modelopt", drop(f"{MODULE}.weight"), f"{MODULE}.weight_scale", "belongs to no"),
    "packed elements missing": (
        "packed", drop(f"{MODULE}.weight_packed"), f"{MODULE}.weight_scale", "belongs to no"),
    "packed scales missing": (
        "packed", drop(f"{MODULE}.weight_scale"), f"{MODULE}.weight_packed", "is missing"),
    "inverse global scale missing": (
        "packed", drop(f"{MODULE}.weight_global_scale"), f"{MODULE}.weight_packed", "is missing"),
    "expert missing": (
        "modelopt", lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{PREFIX}.2.")],
        f"{PREFIX}.2", "3 of 4 are there"),
    "one matrix of an expert missing": (
        "modelopt", lambda t: [t.pop(n) for n in list(t) if n.startswith(MODULE)],
        f"{MODULE}.weight", "holds no weight"),
    "an expert too many": (
        "modelopt", put(f"{PREFIX}.4.{UP}.weight", np.zeros((I, H), np.float32)),
        f"{PREFIX}.4", "has 4 experts"),
    "NaN block scale": (
        "modelopt", poke(f"{MODULE}.weight_scale", 3, 0x7F), f"{MODULE}.weight_scale", "NaN"),
    "negative block scale": (
        "modelopt", poke(f"{MODULE}.weight_scale", 3, 0xB8), f"{MODULE}.weight_scale", "negative"),
    "zero block scale": ("modelopt", zero_scale, f"{MODULE}.weight_scale", "1 scales of 0"),
    "NaN global scale": (
        "modelopt", put(f"{MODULE}.weight_scale_2", np.float32(np.nan)),
        f"{MODULE}.weight_scale_2", "finite and > 0, got nan"),
    "zero global scale": (
        "modelopt", put(f"{MODULE}.weight_scale_2", np.float32(0)),
        f"{MODULE}.weight_scale_2", "finite and > 0, got 0"),
    "negative global scale": (
        "modelopt", put(f"{MODULE}.weight_scale_2", np.float32(-1)),
        f"{MODULE}.weight_scale_2", "finite and > 0, got -1"),
    "infinite inverse global scale": (
        "packed", put(f"{MODULE}.weight_global_scale", np.float32([np.inf])),
        f"{MODULE}.weight_global_scale", "finite and > 0, got inf"),
    "inverse global scale without reciprocal": (
        "packed", put(f"{MODULE}.weight_global_scale", np.float32([1e-40])),
        f"{MODULE}.weight_global_scale", "reciprocal"),
    "zero input scale": (
        "modelopt", put(f"{MODULE}.input_scale", np.float32(0)), f"{MODULE}.input_scale", "> 0"),
    "NaN input scale": (
        "packed", put(f"{MODULE}.input_global_scale", np.float32([np.nan])),
        f"{MODULE}.input_global_scale", "> 0"),
    "block scales of another dtype": (
        "modelopt", put(f"{MODULE}.weight_scale", np.ones((I, H // 16), np.float32)),
        f"{MODULE}.weight_scale", "must be F8_E4M3"),
    "block scales of another shape": (
        "modelopt", put(f"{MODULE}.weight_scale", np.ones((I, H // 32), E4M3)),
        f"{MODULE}.weight_scale", r"F8_E4M3\[32, 4\]"),
    "swizzled block scales": (
        "modelopt", put(f"{MODULE}.weight_scale", np.ones((128, 4), E4M3)),
        f"{MODULE}.weight_scale", r"F8_E4M3\[32, 4\]"),
    "global scale of another shape": (
        "modelopt", put(f"{MODULE}.weight_scale_2", np.ones(7, np.float32)),
        f"{MODULE}.weight_scale_2", "must be F32"),
    "global scale of another dtype": (
        "modelopt", put(f"{MODULE}.weight_scale_2", np.float16(1)),
        f"{MODULE}.weight_scale_2", "must be F32"),
    "elements of another dtype": (
        "modelopt", put(f"{MODULE}.weight", np.ones((I, H // 2), np.int8)),
        f"{MODULE}.weight", "must be U8"),
    "elements of another shape": (
        "modelopt", put(f"{MODULE}.weight", np.ones((I, H), np.uint8)),
        f"{MODULE}.weight_scale", "to go with"),
    "no whole blocks": (
        "packed", put(f"{MODULE}.weight_packed", np.ones((I, 33), np.uint8)),
        f"{MODULE}.weight_packed", "whole blocks of 16"),
    "no matrix": (
        "modelopt", put(f"{MODULE}.weight", np.ones(H, np.uint8)), f"{MODULE}.weight", "N, K"),
    "rows of gate and up differ": (
        "plain", put(f"{MODULE}.weight", np.ones((I + 1, H), np.float32)), MODULE, "must be alike"),
    "down does not fit": (
        "plain", put(f"{PREFIX}.2.{DOWN}.weight", np.ones((H, I + 1), np.float32)),
        f"{PREFIX}.2.{DOWN}", "to go with"),
    "one expert has other shapes": (
        "plain",
        lambda t: t.update({f"{PREFIX}.2.{n}.weight": np.ones([2 * d if d == I else d for d in s])
                            for n, s in SHAPES.items()}),
        f"expert 2 of '{PREFIX}'", "must be alike"),
    "one matrix is plain": (
        "modelopt",
        lambda t: (drop(*(f"{MODULE}.{p}" for p in ("weight_scale", "weight_scale_2")))(t),
                   put(f"{MODULE}.weight", np.ones((I, H), np.float32))(t)),
        MODULE, "must be alike"),
    "packed bytes without a configuration": (
        "plain", put(f"{MODULE}.weight", np.ones((I, H // 2), np.uint8)),
        f"{MODULE}.weight", "not read as dense"),
    "FP8 without scales": (
        "plain", put(f"{MODULE}.weight", np.ones((I, H), E4M3)),
        f"{MODULE}.weight", "not read as dense"),
    "integers": (
        "plain", put(f"{MODULE}.weight", np.ones((I, H), np.int32)),
        f"{MODULE}.weight", "not read as dense"),
    "both plain and packed": (
        "packed", put(f"{MODULE}.weight", np.ones((I, H), np.float32)),
        f"{MODULE}.weight", "stands beside"),
    "only gate has a bias": (
        "plain", put(f"{PREFIX}.2.{GATE}.bias", np.ones(I, np.float32)),
        f"{PREFIX}.2.{GATE}", "both have a bias"),
    "bias of another size": (
        "plain", put(f"{PREFIX}.2.{DOWN}.bias", np.ones(I, np.float32)),
        f"{PREFIX}.2.{DOWN}", "bias of .* must have shape"),
    "FP8 block scales of another shape": (
        "fp8", put(f"{MODULE}.weight_scale_inv", np.ones((1, 1), np.float32)),
        f"{MODULE}.weight_scale_inv", r"\[2, 2\]"),
    "NaN in FP8": ("fp8", poke(f"{MODULE}.weight", 5, 0xFF), f"{MODULE}.weight", "NaN"),
    "negative FP8 scale": (
        "fp8", poke(f"{MODULE}.weight_scale_inv", 0, -1.0),
        f"{MODULE}.weight_scale_inv", "not negative"),
    "zero FP8 scale": (
        "fp8", poke(f"{MODULE}.weight_scale_inv", 0, 0.0), f"{MODULE}.weight_scale_inv", "is 0"),
    "NaN e8m0 scale": (
        "gpt-oss", poke(f"{PREFIX}.down_proj_scales", 40, 0xFF),
        f"{PREFIX}.down_proj_scales", "NaN"),
    "gpt-oss scales missing": (
        "gpt-oss", drop(f"{PREFIX}.gate_up_proj_scales"), BLOCKS, "is missing"),
    "gpt-oss blocks of another size": (
        "gpt-oss", put(BLOCKS, np.ones((E, 2 * I, H // 16, 8), np.uint8)), BLOCKS, "whole blocks"),
    "gpt-oss with fewer experts": (
        "gpt-oss",
        lambda t: [t.update({n: t[n][:3]}) for n in list(t) if PREFIX in n],
        BLOCKS, "4 experts"),
    "gpt-oss without down": (
        "gpt-oss", drop(f"{PREFIX}.down_proj_blocks", f"{PREFIX}.down_proj_scales"),
        f"{PREFIX}.down_proj", "holds no weight"),
    "gpt-oss bias of another shape": (
        "gpt-oss", put(f"{PREFIX}.down_proj_bias", np.ones((E, I), np.float32)),
        f"{PREFIX}.down_proj", "bias of .* must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("damage", TENSORS)
def test_damaged_tensors(tmp_path, damage):
    kind, change, tensor, message = TENSORS[damage]
    build(tmp_path, kind, change)
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path)
    text = str(error.value)
    assert str(tmp_path) in text
    assert tensor in text
    assert len(text.splitlines()) == 1


# --- damage to the configuration ------------------------------------------------------------------


def scheme(**values):
    return {**MODELOPT, **values}


CONFIGS = {
    "awq": ({"quant_method": "awq", "bits": 4}, "method 'awq' is not supported"),
    "gptq": ({"quant_method": "gptq"}, "method 'gptq' is not supported"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "method 'bitsandbytes' is not supported"),
    "no method": ({"bits": 4}, "has no quant_method"),
    "a method that is no string": ({"quant_method": ["fp8"]}, "makes no sense"),
    "no object": (["fp8"], "makes no sense"),
    "fp8 without blocks": ({"quant_method": "fp8"}, "fp8 with no weight_block_size"),
    "fp8 with strange blocks": (
        {"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two"),
    "fp8 of another element": (
        {"quant_method": "fp8", "weight_block_size": [16, 32], "fmt": "e5m2"}, "fmt 'e5m2'"),
    "modelopt's awq": (scheme(quant_algo="NVFP4_AWQ"), "quant_algo 'NVFP4_AWQ'"),
    "modelopt's int8": (scheme(quant_algo="W8A8_SQ_PER_CHANNEL"), "'W8A8_SQ_PER_CHANNEL'"),
    "modelopt's groups": (scheme(group_size=32), "groups of 32"),
    "modelopt's mixture": (
        scheme(quant_algo="MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "W4A16_AWQ"}}),
        "'W4A16_AWQ'"),
    "modelopt's mixture of nothing": (scheme(quant_algo="MIXED_PRECISION"), "quantized_layers"),
    "exclude list": (scheme(ignore="lm_head"), "must be a list of strings"),
    "packed integers": (packed("pack-quantized"), "format 'pack-quantized'"),
    "packed float8": (packed("float-quantized"), "format 'float-quantized'"),
    "packed groups": (
        {**NVFP4, "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32}}}},
        "group_size 32"),
    "rotated": ({**NVFP4, "transform_config": {"config_groups": {"u": {}}}}, "rotated"),
    "sparse": ({**NVFP4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "not compressed": ({**NVFP4, "quantization_status": "frozen"}, "'frozen'"),
    "a pattern that is none": ({**NVFP4, "ignore": ["re:("]}, "makes no sense"),
    "excluded, yet quantised": (scheme(ignore=["*.mlp.experts*"]), "excludes it by"),
}  # fmt: skip


@pytest.mark.parametrize("damage", CONFIGS)
def test_configurations(tmp_path, damage):
    quantization, message = CONFIGS[damage]
    kind = "packed" if quantization in (NVFP4,) else "modelopt"
    build(tmp_path, kind)
    edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config=quantization))
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_two_configurations_that_contradict_each_other(tmp_path):
    build(tmp_path)
    other = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json: declares .* but config.json"):
        open_folder(tmp_path)


def test_only_the_kv_cache_is_quantised(tmp_path):
    quantization = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    build(tmp_path, "plain", quantization=quantization)
    with open_folder(tmp_path) as folder:
        assert folder.scheme is None


# --- damage to files ------------------------------------------------------------------------------


def truncate(path, size):
    content = path.read_bytes()
    path.write_bytes(content[: size if size >= 0 else len(content) + size])


def pickled(path):
    (path / FILE).unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def twice_in_the_header(path):
    name = "model.norm.weight"

    def change(text):
        entry = json.dumps(text[name])
        return json.dumps(text).encode()[:-1] + f', "{name}": {entry}}}'.encode()

    header(path / FILE, change)


FILES = {
    "no config": (lambda p: (p / "config.json").unlink(), "config.json: cannot be opened"),
    "config is no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json: not JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "must hold a JSON object"),
    "config is binary": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe{"), "not JSON"),
    "config is deep": (lambda p: (p / "config.json").write_text("[" * 10**5), "not JSON"),
    "no weights": (lambda p: (p / FILE).unlink(), "holds no safetensors file"),
    "pickled weights": (pickled, "only pickled weights .pytorch_model.bin."),
    "empty file": (lambda p: (p / FILE).write_bytes(b""), "only 0 bytes"),
    "truncated header": (lambda p: truncate(p / FILE, 100), "truncated safetensors file"),
    "truncated data": (lambda p: truncate(p / FILE, -1), "truncated safetensors file"),
    "bytes after the data": (
        lambda p: (p / FILE).write_bytes((p / FILE).read_bytes() + b"x"), "corrupt safetensors"),
    "header length beyond the file": (
        lambda p: (p / FILE).write_bytes(struct.pack("<Q", 10**6) + b"{}"), "the header needs"),
    "header length beyond everything": (
        lambda p: (p / FILE).write_bytes(b"\xff" * 64), "not a safetensors file"),
    "a Git LFS pointer": (
        lambda p: (p / FILE).write_text("version https://git-lfs.github.com/spec/v1\n" * 3),
        "not a safetensors file"),
    "header is no JSON": (
        lambda p: header(p / FILE, lambda t: b"{nonsense"), "corrupt safetensors header"),
    "header is deep": (
        lambda p: header(p / FILE, lambda t: b'{"a":' * 10**5), "corrupt safetensors header"),
    "a name twice": (twice_in_the_header, "'model.norm.weight' stands there twice"),
    "overlapping tensors": (
        lambda p: header(p / FILE, lambda t: t["model.norm.weight"].update(data_offsets=[0, 128])),
        "cannot lie at bytes"),
    "negative sizes": (
        lambda p: header(p / FILE, lambda t: t["lm_head.weight"].update(shape=[-96, -64])),
        "no natural number"),
    "sizes that are no integers": (
        lambda p: header(p / FILE, lambda t: t["lm_head.weight"].update(shape=[96.0, 64])),
        "no natural number"),
    "unknown dtype": (
        lambda p: header(p / FILE, lambda t: t["lm_head.weight"].update(dtype="F4")), "'F4'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("command", ["open", "inspect", "quantize"])
def test_damaged_files(tmp_path, damage, command, capsys):
    change, message = FILES[damage]
    src = build(tmp_path / "src", "plain")
    change(src)
    if command == "open":
        with pytest.raises(CheckpointError, match=message) as error:
            read(src)
        text = str(error.value)
    else:
        more = ["--format", "nvfp4", "--layout", "modelopt"] if command == "quantize" else []
        where = [str(tmp_path / "dst")] if command == "quantize" else []
        with pytest.raises(SystemExit) as stop:
            main([command, str(src), *where, *more])
        assert stop.value.code == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        text = captured.err
        assert text.startswith("jaxmoe: error:")
        assert len(text.splitlines()) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["src"]
    assert str(src) in text


SHARDS = {
    "a shard is missing": (
        lambda p: (p / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002-of-00002.safetensors: is missing, though .* says that it holds"),
    "the index says too much": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].update(
            ghost="model-00001-of-00002.safetensors")),
        "says that 'ghost' is in .* which lacks it"),
    "the index says too little": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].pop("model.norm.weight")),
        "lacks 'model.norm.weight', which"),
    "the index names the wrong shard": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].update(
            {"model.norm.weight": {1: "model-00002-of-00002.safetensors",
                                   2: "model-00001-of-00002.safetensors"}[
                int(i["weight_map"]["model.norm.weight"][10])]})),
        "says that 'model.norm.weight' is in"),
    "a tensor is in two shards": (
        lambda p: checkpoint.save(
            p / "model-00001-of-00002.safetensors",
            {n: np.zeros(1) for n in checkpoint.load(p / "model-00002-of-00002.safetensors")}),
        "is in model-00001-of-00002.safetensors too"),
    "the index leads out of the folder": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].update(a="../x.safetensors")),
        "must name a safetensors file of this folder for 'a'"),
    "the index names a pickle": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].update(a="x.bin")),
        "must name a safetensors file"),
    "the index has no map": (
        lambda p: (p / INDEX).write_text("{}"), "has no weight_map"),
    "the index is no JSON": (lambda p: (p / INDEX).write_text("\0"), "not JSON"),
    "two other indices": (
        lambda p: [shutil.copy(p / INDEX, p / f"{n}.safetensors.index.json") for n in "ab"]
        + [(p / INDEX).unlink()],
        "holds several indices"),
    "no index and a shard is missing": (
        lambda p: [(p / INDEX).unlink(), (p / "model-00001-of-00002.safetensors").unlink()],
        "model-00001-of-00002.safetensors: is missing, though"),
}  # fmt: skip


@pytest.mark.parametrize("damage", SHARDS)
def test_damaged_shards(tmp_path, damage):
    change, message = SHARDS[damage]
    change(write_shards(tmp_path, plain(), 2))
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_docs_count_the_kinds_of_damage():
    count = len(TENSORS) + len(CONFIGS) + len(FILES) + len(SHARDS)
    docs = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    assert f"The tests have {count}\nkinds of damage" in docs


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="must be a folder"):
        open_folder(tmp_path / "nowhere")


def test_a_file_that_becomes_shorter_while_it_is_open(tmp_path):
    build(tmp_path)
    with open_folder(tmp_path) as folder:
        truncate(tmp_path / FILE, 3000)
        with pytest.raises(CheckpointError, match="became shorter while"):
            folder.experts(PREFIX, num_experts=E)


def test_unknown_names(tmp_path):
    with open_folder(build(tmp_path)) as folder:
        for call in (folder.tensor, folder.entry, folder.file):
            with pytest.raises(CheckpointError, match="holds no tensor 'x'"):
                call("x")
        with pytest.raises(CheckpointError, match=r"holds no weight 'x\.weight'"):
            folder.linear("x")
        with pytest.raises(ValueError, match="num_experts must be at least 1"):
            folder.experts(PREFIX, num_experts=0)
        with pytest.raises(ValueError, match="names must be"):
            folder.experts(PREFIX, ("up", "down"), num_experts=E)


def test_weights_that_cannot_be_quantised_while_reading(tmp_path):
    bad = np.ones((H, H), np.float32)
    bad[3, 3] = np.nan
    tensors = {"a.weight": bad, "b.weight": np.ones((4, 40), np.float32)}
    with open_folder(write(tmp_path, tensors)) as folder:
        with pytest.raises(CheckpointError, match="'a' has values that are not finite"):
            folder.linear("a", quantize="nvfp4")
        with pytest.raises(CheckpointError, match=r"'b' of shape .* multiple of 32"):
            folder.linear("b", quantize="mxfp4")


# --- anything at all ------------------------------------------------------------------------------

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "BOOL", "F4"]) | ANY,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | ANY,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | ANY,
    },
)
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def opens_or_complains(path):
    try:
        with open_folder(path) as folder:
            for name in folder.names:
                folder.tensor(name)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017


@FUZZ
@given(st.dictionaries(st.text(max_size=12), ENTRY | ANY, max_size=4), st.binary(max_size=64))
def test_any_header(tmp_path, entries, data):
    write(tmp_path, {})
    text = json.dumps(entries).encode()
    (tmp_path / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    opens_or_complains(tmp_path)


@FUZZ
@given(st.binary(max_size=200))
def test_any_file(tmp_path, content):
    write(tmp_path, {})
    (tmp_path / FILE).write_bytes(content)
    opens_or_complains(tmp_path)


@FUZZ
@given(st.data())
def test_any_flipped_byte(tmp_path, data):
    tensors = {"a.weight": np.ones((2, 16), ml_dtypes.bfloat16), "b": np.arange(3, dtype=np.uint8)}
    write(tmp_path, tensors)
    content = bytearray((tmp_path / FILE).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / FILE).write_bytes(content)
    opens_or_complains(tmp_path)


@FUZZ
@given(ANY, st.sampled_from(["config.json", "hf_quant_config.json", INDEX]), st.booleans())
def test_any_configuration(tmp_path, value, name, inside):
    write(tmp_path, {"a.weight": np.ones((2, 16), np.float32)})
    for other in ("hf_quant_config.json", INDEX):
        (tmp_path / other).unlink(missing_ok=True)
    if inside:
        value = {"config.json": {"quantization_config": value}, INDEX: {"weight_map": value}}.get(
            name, {"quantization": value}
        )
    (tmp_path / name).write_text(json.dumps(value))
    opens_or_complains(tmp_path)


@FUZZ
@given(
    st.sampled_from(["modelopt", "compressed-tensors", "mxfp4", "fp8"]),
    st.dictionaries(
        st.sampled_from([
            "quant_algo", "ignore", "exclude_modules", "quantized_layers", "group_size", "format",
            "config_groups", "weight_block_size", "modules_to_not_convert", "fmt",
            "sparsity_config", "quantization_status", "transform_config", "quantization",
        ]),
        ANY | st.sampled_from(["NVFP4", "MIXED_PRECISION", "nvfp4-pack-quantized", [128, 128]]),
        max_size=4,
    ),
)  # fmt: skip
def test_any_scheme(tmp_path, method, values):
    write(tmp_path, {"a.weight": np.ones((2, 16), np.float32)})
    text = {"quantization_config": {"quant_method": method, **values}}
    (tmp_path / "config.json").write_text(json.dumps(text))
    opens_or_complains(tmp_path)
