"""Checkpoint folders of other tools: the right bits, the right order, nothing read as dense."""

import json
import logging
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from folders import (
    CONFIG,
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

import jaxmoe
from jaxmoe import checkpoint
from jaxmoe.checkpoint import CheckpointError, _experts, open_folder

GATE, UP, DOWN = SHAPES


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8)


def decode(data, scale, global_scale, block):
    """The values of packed FP4 in float64; `scale` as values."""
    elements = oracle.decode_e2m1(oracle.unpack_nibbles(np.asarray(data)))
    return elements * np.repeat(scale, block, -1) * np.float64(global_scale)


def decode_modelopt(tensors, module):
    scale = oracle.decode_e4m3(tensors[f"{module}.weight_scale"].view(np.uint8))
    return decode(tensors[f"{module}.weight"], scale, tensors[f"{module}.weight_scale_2"], 16)


def values(weight):
    """The values of what was loaded, in float64."""
    if isinstance(weight, jaxmoe.QuantizedTensor):
        weight = jaxmoe.dequantize(weight)
    return np.asarray(weight).astype(np.float64)


# --- plain folders ------------------------------------------------------------------------------


def test_a_plain_folder(tmp_path):
    tensors = plain()
    path = write(tmp_path, tensors)
    with open_folder(path) as folder:
        assert folder.config == CONFIG
        assert folder.scheme is None
        assert folder.names == tuple(sorted(tensors))
        assert "lm_head.weight" in folder
        assert "lm_head" not in folder
        for name, tensor in tensors.items():
            read = folder.tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            np.testing.assert_array_equal(bits(read), bits(tensor))
            assert not read.flags.writeable
            assert not read.flags.owndata
        assert folder.linear("lm_head").base is not None  # mapped, not copied
    np.testing.assert_array_equal(bits(read), bits(tensor))  # valid after the folder is closed


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_experts(tmp_path, dtype):
    tensors = plain(dtype)
    with open_folder(write(tmp_path, tensors)) as folder:
        experts = folder.experts(PREFIX, num_experts=E, dtype=dtype)
    assert experts.gate_up.dtype == dtype
    assert experts.gate_up.shape == (E, 2 * I, H)
    assert experts.down.shape == (E, H, I)
    assert experts.gate_up_bias is None
    for e in range(E):
        upper = [tensors[f"{PREFIX}.{e}.{name}.weight"] for name in (GATE, UP)]
        np.testing.assert_array_equal(bits(experts.gate_up[e]), bits(np.concatenate(upper)))
        np.testing.assert_array_equal(
            bits(experts.down[e]), bits(tensors[f"{PREFIX}.{e}.{DOWN}.weight"])
        )


def test_names_of_mixtral_biases_and_experts_without_gate(tmp_path):
    new = {GATE: "w1", UP: "w3", DOWN: "w2"}
    tensors = {}
    for name, tensor in plain(np.float32).items():
        head, _, last = name.removesuffix(".weight").rpartition(".")
        tensors[f"{head}.{new.get(last, last)}.weight"] = tensor
    for e in range(E):
        for i, (name, size) in enumerate((("w1", I), ("w3", I), ("w2", H))):
            tensors[f"{PREFIX}.{e}.{name}.bias"] = np.full(size, 10 * e + i, np.float32)
    with open_folder(write(tmp_path, tensors)) as folder:
        experts = folder.experts(PREFIX, ("w1", "w3", "w2"), num_experts=E, dtype=np.float32)
        ungated = folder.experts(PREFIX, (None, "w3", "w2"), num_experts=E, dtype=np.float32)
    np.testing.assert_array_equal(experts.gate_up[2, :I], tensors[f"{PREFIX}.2.w1.weight"])
    np.testing.assert_array_equal(experts.gate_up_bias[3], [30.0] * I + [31.0] * I)
    np.testing.assert_array_equal(experts.down_bias[1], [12.0] * H)
    np.testing.assert_array_equal(ungated.gate_up[1], tensors[f"{PREFIX}.1.w3.weight"])
    assert ungated.gate_up_bias.shape == (E, I)


@pytest.mark.parametrize(
    ("model_type", "transposed", "interleaved"),
    [("qwen3_moe", False, False), ("llama4_text", True, False), ("gpt_oss", True, True)],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_fused_plain_experts(tmp_path, model_type, transposed, interleaved, explicit):
    tensors = plain(np.float32)
    stacked = {
        name: np.stack([tensors[f"{PREFIX}.{e}.{name}.weight"] for e in range(E)])
        for name in SHAPES
    }
    expected = np.concatenate([stacked[GATE], stacked[UP]], 1)
    gate_up = np.stack([stacked[GATE], stacked[UP]], 2).reshape(E, 2 * I, H)
    gate_up = gate_up if interleaved else expected
    down = stacked[DOWN]
    if transposed:
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
    bias = np.arange(E * 2 * I, dtype=np.float32).reshape(E, 2 * I)
    fused = {
        f"{PREFIX}.gate_up_proj": gate_up,
        f"{PREFIX}.down_proj": down,
        f"{PREFIX}.gate_up_proj_bias": bias,
    }
    order = {"transposed": transposed, "interleaved": interleaved} if explicit else {}
    kind = "unknown" if explicit else model_type
    with open_folder(write(tmp_path, fused, config={"model_type": kind})) as folder:
        experts = folder.experts(PREFIX, num_experts=E, dtype=np.float32, **order)
    np.testing.assert_array_equal(experts.gate_up, expected)
    np.testing.assert_array_equal(experts.down, stacked[DOWN])
    apart = np.concatenate([bias[:, 0::2], bias[:, 1::2]], 1) if interleaved else bias
    np.testing.assert_array_equal(experts.gate_up_bias, apart)


def test_fused_experts_the_other_way_round_are_refused(tmp_path):
    tensors = {
        f"{PREFIX}.gate_up_proj": np.zeros((E, H, 2 * I), np.float32),
        f"{PREFIX}.down_proj": np.zeros((E, I, H), np.float32),
    }
    with (
        open_folder(write(tmp_path, tensors, config={"model_type": "new"})) as folder,
        pytest.raises(CheckpointError, match=r"down_proj.*transposed=True|to go with"),
    ):
        folder.experts(PREFIX, num_experts=E)


# --- quantised folders --------------------------------------------------------------------------


def check_nvfp4(tensors, experts):
    """Same bits as in the file, in canonical order; `tensors` in ModelOpt's names."""
    for e in range(E):
        parts = {n: f"{PREFIX}.{e}.{n}" for n in SHAPES}
        for name, loaded in (
            (GATE, experts.gate_up[e, :I]),
            (UP, experts.gate_up[e, I:]),
            (DOWN, experts.down[e]),
        ):
            np.testing.assert_array_equal(loaded.data, tensors[f"{parts[name]}.weight"])
            np.testing.assert_array_equal(
                bits(loaded.scale), bits(tensors[f"{parts[name]}.weight_scale"])
            )
            np.testing.assert_array_equal(
                loaded.global_scale, tensors[f"{parts[name]}.weight_scale_2"]
            )
            np.testing.assert_allclose(
                values(loaded), decode_modelopt(tensors, parts[name]), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json", "both"])
def test_modelopt_nvfp4(tmp_path, where):
    tensors = modelopt()
    write(tmp_path, tensors, MODELOPT if where != "hf_quant_config.json" else None)
    if where != "config.json":
        quantization = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head", "*.self_attn*"],
        }
        text = {"producer": {"name": "modelopt"}, "quantization": quantization}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(text))
    with open_folder(tmp_path) as folder:
        assert (folder.scheme.method, folder.scheme.algorithms) == ("modelopt", ("NVFP4",))
        assert folder.scheme.compute == "w4a4"
        loaded = folder.load_experts(PREFIX, num_experts=E)
        linear = folder.linear(f"{PREFIX}.1.{DOWN}")
        assert folder.input_scale(f"{PREFIX}.1.{DOWN}") == 1.0
        assert isinstance(folder.linear("lm_head"), np.ndarray)
    check_nvfp4(tensors, loaded.weights)
    assert loaded.weights.gate_up_input_scale == 0.25 * (E + 1)
    assert loaded.weights.down_input_scale == 0.25 * (E + 2)
    assert loaded.report is None
    np.testing.assert_array_equal(linear.data, loaded.weights.down[1].data)
    assert linear.shape == (H, I)


def test_modelopt_without_input_scales(tmp_path):
    quantization = {**MODELOPT, "quant_algo": "W4A16_NVFP4"}
    tensors = modelopt(input_scales=False)
    with open_folder(write(tmp_path, tensors, quantization)) as folder:
        assert folder.scheme.compute == "w4a16"
        loaded = folder.load_experts(PREFIX, num_experts=E)
    assert (loaded.weights.gate_up_input_scale, loaded.weights.down_input_scale) == (None, None)
    check_nvfp4(tensors, loaded.weights)


def test_some_input_scales_are_missing(tmp_path, caplog):
    tensors = modelopt()
    del tensors[f"{PREFIX}.3.{DOWN}.input_scale"]
    with (
        caplog.at_level(logging.WARNING, "jaxmoe"),
        open_folder(write(tmp_path, tensors, MODELOPT)) as folder,
    ):
        loaded = folder.load_experts(PREFIX, num_experts=E)
    assert loaded.weights.down_input_scale == 0.25 * (E + 1)
    assert "1 of 4 activation scales are missing" in caplog.text


def test_compressed_tensors_nvfp4(tmp_path):
    tensors = modelopt()
    quantization = packed("nvfp4-pack-quantized", num_bits=4, type="float", dynamic="local")
    with open_folder(write(tmp_path, as_packed(tensors), quantization)) as folder:
        assert folder.scheme.compute == "w4a4"
        loaded = folder.load_experts(PREFIX, num_experts=E)
    check_nvfp4(tensors, loaded.weights)  # the scales are powers of two: reciprocals are exact
    assert loaded.weights.gate_up_input_scale == 0.25 * (E + 1)


def test_scales_that_come_back_from_their_reciprocals(tmp_path):
    """The same bits; a scale is at most one unit in its last place off, whatever it is."""
    drawn = 10 ** np.random.default_rng(0).uniform(-6, 0, E).astype(np.float32)
    tensors = modelopt(lambda e, name: drawn[e])
    write(tmp_path / "ours", tensors, MODELOPT)
    write(tmp_path / "theirs", as_packed(tensors), packed("nvfp4-pack-quantized"))
    with open_folder(tmp_path / "ours") as a, open_folder(tmp_path / "theirs") as b:
        ours, theirs = (folder.experts(PREFIX, num_experts=E) for folder in (a, b))
    for x, y in ((ours.gate_up, theirs.gate_up), (ours.down, theirs.down)):
        np.testing.assert_array_equal(x.data, y.data)
        np.testing.assert_array_equal(bits(x.scale), bits(y.scale))
        off = np.asarray(x.global_scale).view(np.int32) - np.asarray(y.global_scale).view(np.int32)
        assert np.abs(off).max() <= 1


def test_an_inverse_global_scale_is_rounded_once(tmp_path):
    tensors = as_packed(modelopt())
    stored = np.float32([3.0])
    tensors[f"{PREFIX}.0.{DOWN}.weight_global_scale"] = stored
    with open_folder(write(tmp_path, tensors, packed("nvfp4-pack-quantized"))) as folder:
        assert folder.scheme.compute == "w4a16"
        w = folder.linear(f"{PREFIX}.0.{DOWN}")
    assert float(w.global_scale) == float(np.float32(1 / 3))


@pytest.mark.parametrize("scale_dtype", [np.uint8, ml_dtypes.float8_e8m0fnu])
@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt"])
def test_mxfp4_module_by_module(tmp_path, scale_dtype, method):
    r = np.random.default_rng(5)
    data_name, quantization = "weight_packed", packed("mxfp4-pack-quantized", num_bits=8)
    if method == "modelopt":
        data_name, quantization = "weight", {**MODELOPT, "quant_algo": "W4A8_MXFP4_FP8"}
    tensors = {}
    for e in range(E):
        for name, (rows, k) in SHAPES.items():
            module = f"{PREFIX}.{e}.{name}"
            tensors[f"{module}.{data_name}"] = r.integers(0, 256, (rows, k // 2), np.uint8)
            scale = r.integers(90, 150, (rows, k // 32), np.uint8)
            tensors[f"{module}.weight_scale"] = scale.view(scale_dtype)
    with open_folder(write(tmp_path, tensors, quantization)) as folder:
        assert folder.scheme.compute == "w4a8"
        experts = folder.experts(PREFIX, num_experts=E)
    for e in range(E):
        module = f"{PREFIX}.{e}.{UP}"
        scale = oracle.decode_e8m0(tensors[f"{module}.weight_scale"].view(np.uint8))
        expected = decode(tensors[f"{module}.{data_name}"], scale, 1.0, 32)
        np.testing.assert_array_equal(values(experts.gate_up[e, I:]), expected)


def test_gpt_oss(tmp_path):
    tensors = gpt_oss()
    config = {"model_type": "gpt_oss"}
    with open_folder(write(tmp_path, tensors, GPT_OSS, config)) as folder:
        assert folder.scheme.method == "mxfp4"
        experts = folder.experts(PREFIX, num_experts=E)
    for name, loaded, bias in (
        ("gate_up_proj", experts.gate_up, experts.gate_up_bias),
        ("down_proj", experts.down, experts.down_bias),
    ):
        blocks, scales = (tensors[f"{PREFIX}.{name}_{part}"] for part in ("blocks", "scales"))
        packed_rows = blocks.reshape(*blocks.shape[:2], -1)
        expected = decode(packed_rows, oracle.decode_e8m0(scales), 1.0, 32)
        stored = tensors[f"{PREFIX}.{name}_bias"].astype(np.float32)
        if name == "gate_up_proj":
            expected = np.concatenate([expected[:, 0::2], expected[:, 1::2]], 1)
            stored = np.concatenate([stored[:, 0::2], stored[:, 1::2]], 1)
        np.testing.assert_array_equal(values(loaded), expected)
        np.testing.assert_array_equal(bias, stored)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_block_scaled_fp8(tmp_path, dtype):
    tensors = fp8()
    with open_folder(write(tmp_path, tensors, FP8)) as folder:
        assert folder.scheme.method == "fp8"
        experts = folder.experts(PREFIX, num_experts=E, dtype=dtype)
        linear = folder.linear(f"{PREFIX}.2.{UP}", dtype=dtype)
    module = f"{PREFIX}.2.{UP}"
    scale = np.repeat(np.repeat(tensors[f"{module}.weight_scale_inv"], 16, 0), 32, 1)
    exact = oracle.decode_e4m3(tensors[f"{module}.weight"].view(np.uint8)) * scale[:I, :H]
    expected = exact.astype(np.float32).astype(dtype)  # one rounding in f32, then to dtype
    np.testing.assert_array_equal(linear, expected)
    np.testing.assert_array_equal(np.asarray(experts.gate_up[2, I:]), expected)


def test_modelopt_fp8_and_mixed_precision(tmp_path):
    tensors = modelopt()
    q = "model.layers.0.self_attn.q_proj"
    tensors[f"{q}.weight"] = np.arange(H * H, dtype=np.uint8).reshape(H, H).clip(0, 0x7E).view(E4M3)
    tensors[f"{q}.weight_scale"] = np.float32(0.125)
    layers = {f"{PREFIX}.{e}.{n}": {"quant_algo": "NVFP4"} for e in range(E) for n in SHAPES}
    layers[q] = {"quant_algo": "FP8"}
    quantization = {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers,
    }  # fmt: skip
    with open_folder(write(tmp_path, tensors, quantization)) as folder:
        assert folder.scheme.algorithms == ("FP8", "NVFP4")
        assert folder.scheme.compute == "w4a4"
        check_nvfp4(tensors, folder.experts(PREFIX, num_experts=E))
        linear = folder.linear(q, dtype=np.float32)
    np.testing.assert_array_equal(
        linear, oracle.decode_e4m3(tensors[f"{q}.weight"].view(np.uint8)) * 0.125
    )


def test_different_global_scales_are_unified_with_a_report(tmp_path, caplog):
    tensors = modelopt(lambda e, name: {GATE: 1.0, UP: 0.3 if e == 1 else 1.0, DOWN: 2.0}[name])
    with (
        caplog.at_level(logging.WARNING, "jaxmoe"),
        open_folder(write(tmp_path, tensors, MODELOPT)) as folder,
    ):
        loaded = folder.load_experts(PREFIX, num_experts=E)
    assert loaded.report.max_error[1] > 0
    assert loaded.report.relative_l2[1] < 0.2
    np.testing.assert_array_equal(loaded.report.max_error[[0, 2, 3]], 0)
    assert "1 of 4 matrices requantised" in caplog.text
    w = loaded.weights.gate_up
    for e in range(E):
        exact = np.concatenate(
            [decode_modelopt(tensors, f"{PREFIX}.{e}.{name}") for name in (GATE, UP)]
        )
        error = np.linalg.norm(values(w[e]) - exact) / np.linalg.norm(exact)
        assert error < (0.2 if e == 1 else 1e-6)
        assert abs(error - loaded.report.relative_l2[e]) < 1e-6


@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_quantise_while_reading(tmp_path, kind, format):
    tensors, quantization = (plain(), None) if kind == "plain" else (fp8(), FP8)
    with open_folder(write(tmp_path, tensors, quantization)) as folder:
        exact = folder.experts(PREFIX, num_experts=E, dtype=np.float32)
        experts = folder.experts(PREFIX, num_experts=E, quantize=format)
        linear = folder.linear(f"{PREFIX}.1.{DOWN}", quantize=format)
    for loaded, dense in ((experts.gate_up, exact.gate_up), (experts.down, exact.down)):
        for e in range(E):
            expected = jaxmoe.quantize(jnp.asarray(dense[e]), format)
            for a, b in zip(jax.tree.leaves(loaded[e]), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(bits(a), bits(b))
    np.testing.assert_array_equal(linear.data, experts.down[1].data)


def test_a_folder_of_jaxmoes_own_layout(tmp_path):
    w = jaxmoe.quantize(jax.random.normal(jax.random.key(0), (I, H)), "nvfp4")
    stack = jaxmoe.quantize(jax.random.normal(jax.random.key(1), (E, 2 * I, H)), "mxfp4")
    down = jaxmoe.quantize(jax.random.normal(jax.random.key(2), (E, H, I)), "mxfp4")
    tensors = {"up.weight": w, f"{PREFIX}.gate_up_proj": stack, f"{PREFIX}.down_proj": down}
    with open_folder(write(tmp_path, tensors)) as folder:
        assert folder.scheme.method == "jaxmoe"
        np.testing.assert_array_equal(folder.linear("up").data, w.data)
        assert folder.linear("up").format.name == "nvfp4"
        experts = folder.experts(PREFIX, num_experts=E)
    np.testing.assert_array_equal(experts.gate_up.data, stack.data)
    assert experts.format.name == "mxfp4"


def test_loaded_experts_compute(tmp_path):
    """From a folder to the layer's output, against the oracle's decoding in float64."""
    tensors = modelopt(lambda e, name: 2.0**-9)
    with open_folder(write(tmp_path, tensors, MODELOPT)) as folder:
        experts = folder.experts(PREFIX, num_experts=E)
    r = np.random.default_rng(0)
    x = r.standard_normal((5, H), np.float32)
    ids = r.integers(0, E, (5, 2), np.int32)
    weights = r.random((5, 2), np.float32)
    y = jaxmoe.moe_mlp(jnp.asarray(x), experts, jnp.asarray(ids), jnp.asarray(weights))
    expected = np.zeros((5, H))
    for t in range(5):
        for e, weight in zip(ids[t], weights[t], strict=True):
            gate, up, down = (decode_modelopt(tensors, f"{PREFIX}.{e}.{n}") for n in SHAPES)
            g = gate @ x[t].astype(np.float64)
            expected[t] += weight * (down @ (g / (1 + np.exp(-g)) * (up @ x[t])))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# --- shards -------------------------------------------------------------------------------------


def test_shards(tmp_path):
    tensors = modelopt()
    with open_folder(write_shards(tmp_path, tensors, quantization=MODELOPT)) as folder:
        assert folder.names == tuple(sorted(tensors))
        assert len(folder.files) == 3
        check_nvfp4(tensors, folder.experts(PREFIX, num_experts=E))


def test_shards_without_an_index(tmp_path):
    tensors = plain()
    write_shards(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").unlink()
    with open_folder(tmp_path) as folder:
        assert folder.names == tuple(sorted(tensors))


def test_files_that_the_index_does_not_name_are_ignored(tmp_path):
    write_shards(tmp_path, plain())
    checkpoint.save(tmp_path / "consolidated.safetensors", {"tok": np.zeros(3)})
    with open_folder(tmp_path) as folder:
        assert "tok" not in folder


# --- reading ahead, as for a device that is not the host ------------------------------------------


@pytest.fixture
def read_ahead(monkeypatch):
    """Groups of experts of these sizes as threads read them."""
    groups = []
    original = _experts._read_ahead

    def ahead(read, experts, size, on_host):
        assert on_host
        for group, part in original(read, experts, size, on_host=False):
            groups.append(list(group))
            yield group, part

    monkeypatch.setattr(_experts, "_read_ahead", ahead)
    return groups


@pytest.mark.parametrize("most", [0, 1, 2, 3, 100])
def test_reading_ahead_gives_the_same_bits(tmp_path, monkeypatch, read_ahead, most):
    """Also where gate and up have two global scales, which takes JAX in the threads."""
    tensors = modelopt(lambda e, name: 0.3 if (e, name) == (1, UP) else 1.0)
    with open_folder(write(tmp_path, tensors, MODELOPT)) as folder:
        monkeypatch.setattr(_experts, "_GROUP", 0)
        one = folder.load_experts(PREFIX, num_experts=E)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(one.weights)) // E
        assert read_ahead == [[e] for e in range(1, E)]
        read_ahead.clear()
        monkeypatch.setattr(_experts, "_GROUP", most * size)
        several = folder.load_experts(PREFIX, num_experts=E)
    step = {0: 1, 1: 1, 2: 2, 3: 2, 100: 64}[most]
    assert read_ahead == [list(range(e, min(e + step, E))) for e in range(1, E, step)]
    assert jax.tree.structure(one.weights) == jax.tree.structure(several.weights)
    for a, b in zip(jax.tree.leaves(one.weights), jax.tree.leaves(several.weights), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    assert one.report is not None
    np.testing.assert_array_equal(one.report.max_error, several.report.max_error)
    assert np.nonzero(one.report.max_error)[0].tolist() == [1]


def test_an_error_in_a_thread_is_the_readers(tmp_path, read_ahead):
    tensors = modelopt()
    tensors[f"{PREFIX}.2.{DOWN}.weight_scale"].view(np.uint8)[0, 0] = 0x7F
    with (
        open_folder(write(tmp_path, tensors, MODELOPT)) as folder,
        pytest.raises(CheckpointError, match=rf"experts\.2\.{DOWN}.*scales NaN"),
    ):
        folder.experts(PREFIX, num_experts=E)


# --- memory and meshes --------------------------------------------------------------------------


def python(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MEMORY = """
    import gc, sys
    import jax
    from jaxmoe.checkpoint import open_folder

    def peak():
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return 1024 * int(lines["VmHWM"].split()[0])

    def load():
        loaded = folder.load_experts("experts", num_experts=int(sys.argv[2]))
        return jax.block_until_ready(loaded.weights)

    with open_folder(sys.argv[1]) as folder:
        load()  # compiles
        gc.collect()
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before = peak()
        weights = load()
        print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(weights)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_peak_memory_is_the_result_and_a_few_experts(tmp_path):
    experts, rows, k = 16, 2048, 2048
    r = np.random.default_rng(0)
    tensors = {}
    for e in range(experts):
        for name in SHAPES:
            module = f"experts.{e}.{name}"
            tensors[f"{module}.weight"] = r.integers(0, 256, (rows, k // 2), np.uint8)
            scale = r.integers(1, 0x7F, (rows, k // 16), np.uint8)
            tensors[f"{module}.weight_scale"] = scale.view(E4M3)
            tensors[f"{module}.weight_scale_2"] = np.float32(1)
    write(tmp_path, tensors, MODELOPT)
    grown, packed_size = map(int, python(MEMORY, tmp_path, experts).split())
    one = packed_size / experts
    assert packed_size == experts * (3 * rows * (k // 2 + k // 16) + 8)
    # An expert as it is read, its gate and up joined, and pages of the allocator.
    assert grown < packed_size + 3 * one, (grown - packed_size) / one


MESH = """
    import sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxmoe.checkpoint import _experts, open_folder

    devices = np.array(jax.devices()).reshape(2, 2)
    sharding = NamedSharding(jax.sharding.Mesh(devices, ("expert", "data")), P("expert"))
    with open_folder(sys.argv[1]) as folder:
        whole = folder.experts("model.layers.0.mlp.experts", num_experts=4)
        split = folder.experts("model.layers.0.mlp.experts", num_experts=4, sharding=sharding)
        elsewhere = jax.device_put(np.float32(1), devices[1, 1])
        assert (whole.down.global_scale * elsewhere).devices() == {devices[1, 1]}
        with jax.default_device(devices[0, 1]):
            moved = folder.experts("model.layers.0.mlp.experts", num_experts=4)
        assert moved.gate_up.data.devices() == {devices[0, 1]}
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
            if b.ndim == 0:  # an input scale is everywhere
                assert b.sharding == NamedSharding(sharding.mesh, P()), b.sharding
            else:
                assert b.sharding == sharding, b.sharding
                assert {s.data.shape[0] for s in b.addressable_shards} == {2}
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        wrong = NamedSharding(sharding.mesh, P(None, "expert"))
        try:
            folder.experts("model.layers.0.mlp.experts", num_experts=4, sharding=wrong)
        except ValueError as error:
            assert "must split the experts' axis alone" in str(error), error
        else:
            raise AssertionError("not refused")

    class OneHost:  # a process that has the second half of the mesh
        def addressable_devices_indices_map(self, shape):
            every = sharding.devices_indices_map(shape)
            return {device: every[device] for device in devices[1]}

    assert _experts._local_experts(OneHost(), 4) == [2, 3]
    print("sharded")
"""


def test_experts_go_to_their_shards(tmp_path):
    write(tmp_path, modelopt(), MODELOPT)
    flag = "--xla_force_host_platform_device_count=4"
    assert python(MESH, tmp_path, XLA_FLAGS=flag).strip() == "sharded"
