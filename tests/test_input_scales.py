"""Static scales of activations: from checkpoints of several tools to the kernels that take them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from folders import (
    E4M3,
    MODELOPT,
    PREFIX,
    SHAPES,
    E,
    H,
    as_packed,
    modelopt,
    packed,
    write,
    write_wide_model,
)
from suite import relative_l2
from test_text import write_tokenizer

import jaxmoe
from jaxmoe import models
from jaxmoe.checkpoint import CheckpointError, open_folder

# Of gate, up and down of every expert; the largest are not of one expert.
SCALES = {"gate_proj": [2, 5, 3, 1], "up_proj": [2, 6, 3, 4], "down_proj": [1, 2, 7, 3]}


def scaled_modelopt():
    tensors = modelopt(lambda e, name: 2.0**-9)
    for e in range(E):
        for name in SHAPES:
            scale = np.float32(1e-3 * SCALES[name][e])
            tensors[f"{PREFIX}.{e}.{name}.input_scale"] = scale
    return tensors


def read(path):
    with open_folder(path) as folder:
        return folder.experts(PREFIX, num_experts=E)


@pytest.mark.parametrize("tool", ["modelopt", "compressed-tensors"])
def test_scales_of_a_checkpoint_are_those_of_w4a4(tmp_path, tool):
    """The largest of the layer, against the oracle; the scales of each token are others."""
    tensors = scaled_modelopt()
    if tool == "modelopt":
        write(tmp_path, tensors, MODELOPT)
    else:
        local = {"num_bits": 4, "type": "float", "dynamic": "local"}
        write(tmp_path, as_packed(tensors), packed("nvfp4-pack-quantized", **local))
    experts = read(tmp_path)
    assert experts.declared_compute == "w4a4"
    r = np.random.default_rng(0)
    x = r.standard_normal((20, H)).astype(ml_dtypes.bfloat16)
    ids = r.integers(0, E, (20, 2), np.int32)
    weights = r.random((20, 2), np.float32)

    def bits(*names):
        parts = [[tensors[f"{PREFIX}.{e}.{n}.weight"] for n in names] for e in range(E)]
        scales = [[tensors[f"{PREFIX}.{e}.{n}.weight_scale"] for n in names] for e in range(E)]
        return oracle.Bits(
            "nvfp4",
            np.stack([np.concatenate(p) for p in parts]),
            np.stack([np.concatenate(s) for s in scales]).view(np.uint8),
            np.full(E, 2.0**-9, np.float32),
        )

    def expected(scales):
        return oracle.moe_mlp(
            x, bits("gate_proj", "up_proj"), bits("down_proj"), ids, weights,
            arithmetic="w4a4", input_scales=scales,
        )  # fmt: skip

    y = jaxmoe.moe_mlp(jnp.asarray(x), experts, ids, weights, implementation="xla_w4a4")
    y = np.asarray(y, np.float64)
    assert relative_l2(y, expected((np.float32(6e-3), np.float32(7e-3)))) < 5e-3
    assert relative_l2(y, expected((np.float32(5e-3), np.float32(7e-3)))) > 2e-2
    assert relative_l2(y, expected((None, None))) > 2e-2


def test_scales_of_mxfp4_for_fp8_activations(tmp_path):
    tensors = {k: v for k, v in scaled_modelopt().items() if not k.endswith("weight_scale_2")}
    for name in list(tensors):
        if name.endswith("weight_scale"):
            tensors[name] = np.full(
                (len(tensors[name]), tensors[name].shape[1] // 2), 120, np.uint8
            )
    write(tmp_path, tensors, {**MODELOPT, "quant_algo": "W4A8_MXFP4_FP8"})
    experts = read(tmp_path)
    assert experts.declared_compute == "w4a8"
    assert experts.gate_up_input_scale == np.float32(6e-3)
    assert experts.down_input_scale == np.float32(7e-3)
    problem = jaxmoe.ops.moe_mlp_problem(jnp.bfloat16, experts, 2, jaxmoe.SwiGLU(), "auto")
    hopper = jaxmoe.Target.from_name("h100", built=["sm90_w4a8", "sm90_w4a16"])
    with jaxmoe.override(target=hopper):
        found = jaxmoe.explain(problem)
        assert found.input_scales == "sm90_w4a8 quantises activations by them"


def test_scales_of_dequantised_weights_are_not_taken(tmp_path):
    tensors = scaled_modelopt()
    for e in range(E):
        for name, shape in SHAPES.items():
            module = f"{PREFIX}.{e}.{name}"
            tensors[f"{module}.weight"] = np.ones(shape, E4M3)
            tensors[f"{module}.weight_scale"] = np.float32(0.5)
            del tensors[f"{module}.weight_scale_2"]
    write(tmp_path, tensors, {**MODELOPT, "quant_algo": "FP8"})
    with open_folder(tmp_path) as folder:
        assert folder.input_scale(f"{PREFIX}.0.up_proj") == np.float32(2e-3)
        for quantize in (None, "nvfp4"):
            experts = folder.experts(PREFIX, num_experts=E, quantize=quantize)
            assert (experts.has_input_scales, experts.declared_compute) == (False, None)


def test_a_scale_without_a_reciprocal_is_refused(tmp_path):
    tensors = scaled_modelopt()
    for e in range(E):
        tensors[f"{PREFIX}.{e}.down_proj.input_scale"] = np.float32(1e-31)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.experts.*of down must be .* 2\^-100"):
        read(write(tmp_path, tensors, MODELOPT))


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A tiny model in ModelOpt NVFP4 with input scales."""
    pytest.importorskip("typer", reason="needs the cli extra")
    from jaxmoe.cli import main

    path = tmp_path_factory.mktemp("scaled")
    write_wide_model(path / "src")
    (path / "scales.json").write_text(json.dumps({"*.down_proj": 1e-6, "*": 1e-3}))
    arguments = ["quantize", path / "src", path / "m", "--format", "nvfp4"]
    arguments += ["--layout", "modelopt", "--input-scales", path / "scales.json"]
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert ended.value.code == 0
    return path / "m"


def test_a_models_layers_run_w4a4_where_it_is_there(scaled):
    layer = models.load_pretrained(scaled, prepare=False).layers[0].moe
    assert layer.declared_compute == "w4a4"
    assert float(layer.gate_up_input_scale[...]) == np.float32(1e-3)
    assert float(layer.down_input_scale[...]) == np.float32(1e-6)
    here = layer.explain()
    assert (here.compute, here.degraded_from) == ("w4a16", "w4a4")
    assert here.input_scales.startswith("ignored: ")
    machine = jaxmoe.Target.from_name("rtx 5090", built=["sm120_w4a4"])
    with jaxmoe.override(target=machine):
        there = layer.explain("bfloat16")
    assert (there.selected, there.degraded_from) == ("sm120_w4a4", None)
    assert there.input_scales == "sm120_w4a4 quantises activations by them"

    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 32), np.float32))
    exact = layer(x)
    a = jnp.einsum("th,enh->ten", x, jaxmoe.dequantize(layer.experts().gate_up))
    amax = jnp.abs(jax.nn.silu(a[..., :32]) * a[..., 32:]).max()  # of any token by any expert

    def error():
        return float(jnp.linalg.norm(layer(x) - exact) / jnp.linalg.norm(exact))

    with jaxmoe.override(implementation="xla_w4a4"):
        assert layer.explain("float32").compute == "w4a4"
        assert error() > 0.5  # 1e-6 saturates
        layer.gate_up_input_scale[...] = jnp.abs(x).max() / 2688
        layer.down_input_scale[...] = amax / 2688
        assert 1e-3 < error() < 0.3


def test_commands_say_what_becomes_of_them(run, scaled):
    pytest.importorskip("tokenizers", reason="needs the text extra")
    from jaxmoe.cli import _model

    write_tokenizer(scaled, vocab_size=48)
    (lines,) = _model.kernels(_model.load(scaled, None).resolutions)
    assert lines.startswith("layers 0, 2: kernel: ")
    assert "the checkpoint declares w4a4; w4a16 is more accurate" in lines
    assert "static input scales: ignored: " in lines
    code, out, _ = run("explain", "--target", "cpu", "--input-scales", "--declared", "w4a4")
    assert code == 0
    assert "static input scales: ignored: " in out
