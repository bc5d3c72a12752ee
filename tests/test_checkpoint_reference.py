"""What the real tools write, we read; what we write, the real tools read.

The first part reads the folders in tests/data/checkpoints, which `make_checkpoints.py` beside them
wrote with those tools. The second part runs the tools and needs `pip install 'jaxmoe[reference]'`.
"""

import contextlib
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from folders import plain

import jaxmoe
from jaxmoe import checkpoint
from jaxmoe.checkpoint import open_folder
from jaxmoe.cli import main

DATA = Path(__file__).parent / "data" / "checkpoints"
PREFIX = "model.layers.0.mlp.experts"
NAMES = ("gate_proj", "up_proj", "down_proj")
FOLDERS = {
    "modelopt-nvfp4": ("modelopt", "w4a4"),
    "compressed-tensors-nvfp4": ("compressed-tensors", "w4a4"),
    "compressed-tensors-nvfp4a16": ("compressed-tensors", "w4a16"),
    "compressed-tensors-mxfp4": ("compressed-tensors", "w4a16"),
    "gpt-oss-mxfp4": ("mxfp4", None),
    "fp8-blocks": ("fp8", None),
}


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8)


def values(weight):
    if isinstance(weight, jaxmoe.QuantizedTensor):
        weight = jaxmoe.dequantize(weight)
    return np.asarray(weight)


def apart(rows):
    return np.concatenate([rows[0::2], rows[1::2]])


@pytest.fixture(params=FOLDERS)
def name(request):
    return request.param


def test_all_folders_are_here():
    assert {path.name for path in DATA.iterdir()} == set(FOLDERS)
    assert all((DATA / name / "versions.json").exists() for name in FOLDERS)


def test_values_are_those_of_the_tool(name):
    expected = np.load(DATA / name / "expected.npz")
    with open_folder(DATA / name) as folder:
        assert (folder.scheme.method, folder.scheme.compute) == FOLDERS[name]
        experts = folder.experts(PREFIX, num_experts=3, dtype=np.float32)
    if "gate_up_proj" in expected:
        gate_up, down = apart(expected["gate_up_proj"].T), expected["down_proj"].T
    else:
        gate_up = np.concatenate([expected["gate_proj"], expected["up_proj"]])
        down = expected["down_proj"]
    assert np.abs(gate_up).max() > 0
    # The tools multiply the two scales first; that product is rounded.
    rtol = 2.0**-22 if "nvfp4" in name else 0
    np.testing.assert_allclose(values(experts.gate_up)[1], gate_up, rtol=rtol, atol=0)
    np.testing.assert_allclose(values(experts.down)[1], down, rtol=rtol, atol=0)


def test_bits_are_those_of_the_file(name):
    if name == "fp8-blocks":
        pytest.skip("FP8 is dequantised: its values are compared")
    with open_folder(DATA / name) as folder:
        loaded = folder.load_experts(PREFIX, num_experts=3)
    experts = loaded.weights
    assert loaded.report is None
    raw = checkpoint.load(DATA / name / "model.safetensors")
    for e in range(3):
        if name == "gpt-oss-mxfp4":
            parts = {
                part: [raw[f"{PREFIX}.{n}{part}"][e] for n in ("gate_up_proj", "down_proj")]
                for part in ("_blocks", "_scales", "_bias")
            }
            for loaded_part, stored in (
                (experts.gate_up.data[e], apart(parts["_blocks"][0].reshape(64, -1))),
                (experts.gate_up.scale[e], apart(parts["_scales"][0])),
                (experts.down.data[e], parts["_blocks"][1]),
                (experts.down.scale[e], parts["_scales"][1]),
            ):
                np.testing.assert_array_equal(bits(loaded_part), bits(stored))
            biases = [np.asarray(b).astype(np.float32) for b in parts["_bias"]]
            np.testing.assert_array_equal(experts.gate_up_bias[e], apart(biases[0]))
            np.testing.assert_array_equal(experts.down_bias[e], biases[1])
            continue
        data = "weight" if name.startswith("modelopt") else "weight_packed"
        stored = {
            (n, part): raw[f"{PREFIX}.{e}.{n}.{part}"]
            for n in NAMES
            for part in (data, "weight_scale")
        }
        for part, gate_up, down in (
            (data, experts.gate_up.data[e], experts.down.data[e]),
            ("weight_scale", experts.gate_up.scale[e], experts.down.scale[e]),
        ):
            upper = np.concatenate([bits(stored[n, part]) for n in NAMES[:2]])
            np.testing.assert_array_equal(bits(gate_up), upper)
            np.testing.assert_array_equal(bits(down), bits(stored[NAMES[2], part]))
        if name == "modelopt-nvfp4":
            for n, w in zip(NAMES, (experts.gate_up, experts.gate_up, experts.down), strict=True):
                assert w.global_scale[e] == raw[f"{PREFIX}.{e}.{n}.weight_scale_2"]
        elif "nvfp4" in name:
            for n, w in zip(NAMES, (experts.gate_up, experts.gate_up, experts.down), strict=True):
                inverse = float(raw[f"{PREFIX}.{e}.{n}.weight_global_scale"][0])
                assert w.global_scale[e] == np.float32(1 / inverse)  # float64 division, rounded


def test_input_scales_are_the_largest_of_the_file(name):
    ending, inverse = {
        "modelopt-nvfp4": ("input_scale", False),
        "compressed-tensors-nvfp4": ("input_global_scale", True),
    }.get(name, (None, False))
    with open_folder(DATA / name) as folder:
        loaded = folder.load_experts(PREFIX, num_experts=3)
        if ending is None:
            assert loaded.weights.gate_up_input_scale is None
            assert loaded.weights.down_input_scale is None
            return
        for names, found in (
            (NAMES[:2], loaded.weights.gate_up_input_scale),
            (NAMES[2:], loaded.weights.down_input_scale),
        ):
            stored = [folder.tensor(f"{PREFIX}.{e}.{n}.{ending}") for e in range(3) for n in names]
            decoded = [1 / float(s.reshape(())) if inverse else float(s) for s in stored]
            assert found == np.float32(max(decoded))


# --- with the tools themselves -------------------------------------------------------------------

torch = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with contextlib.suppress(ModuleNotFoundError):
        import torch

needs_tools = [
    pytest.mark.skipif(torch is None, reason="needs the reference extra (torch)"),
    pytest.mark.filterwarnings("ignore"),  # the tools'
]


def tool(module):
    return pytest.importorskip(module, reason="needs the reference extra")


def quantize(src, dst, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(src), str(dst), *map(str, arguments)])
    assert stop.value.code in (None, 0)


def write_plain(path, model):
    """A plain folder with the modules' own names, as the hub has them."""
    path.mkdir()
    config = {"model_type": "qwen3_moe", "hidden_size": 64, "architectures": [model]}
    (path / "config.json").write_text(json.dumps(config))
    checkpoint.save(path / "model.safetensors", plain(), {"format": "pt"})
    return path


def read_torch(folder):
    return tool("safetensors.torch").load_file(folder / "model.safetensors")


def scales_file(path):
    file = path / "scales.json"
    file.write_text(json.dumps({"*.down_proj": 0.02, "*": 0.01}))
    return file


class TestModelopt:
    pytestmark = needs_tools

    @pytest.fixture
    def folder(self, tmp_path):
        src = write_plain(tmp_path / "src", "Qwen3MoeForCausalLM")
        dst = tmp_path / "dst"
        scales = scales_file(tmp_path)
        quantize(src, dst, "--format", "nvfp4", "--layout", "modelopt", "--input-scales", scales)
        return dst

    def test_modelopt_dequantises_what_we_write(self, folder):
        NVFP4QTensor = tool("modelopt.torch.quantization.qtensor").NVFP4QTensor
        tensors = read_torch(folder)
        with open_folder(folder) as ours:
            for module in (f"{PREFIX}.0.gate_proj", f"{PREFIX}.3.down_proj"):
                data = tensors[f"{module}.weight"]
                shape = (data.shape[0], 2 * data.shape[1])
                theirs = NVFP4QTensor(shape, torch.float32, data).dequantize(
                    dtype=torch.float32,
                    scale=tensors[f"{module}.weight_scale"],
                    double_scale=tensors[f"{module}.weight_scale_2"],
                    block_sizes={-1: 16},
                )
                mine = values(ours.linear(module))
                np.testing.assert_allclose(mine, theirs.numpy(), rtol=2.0**-22, atol=0)

    def test_modelopt_quantises_to_the_same_bits(self, folder):
        """Up to its scale of blocks of zeros, and where a division is rounded another way."""
        qtensor = tool("modelopt.torch.quantization.qtensor")
        tensors = read_torch(folder)
        weight = torch.tensor(plain(np.float32)[f"{PREFIX}.2.down_proj.weight"])
        weight = weight.to(torch.bfloat16).float()
        theirs, scale, scale_2 = qtensor.NVFP4QTensor.quantize(weight.clone(), 16)
        module = f"{PREFIX}.2.down_proj"
        assert float(scale_2) == float(tensors[f"{module}.weight_scale_2"])
        same = tensors[f"{module}.weight_scale"].view(torch.uint8) == scale.view(torch.uint8)
        assert same.all()
        nibbles = (theirs._quantized_data == tensors[f"{module}.weight"]).float().mean()
        assert nibbles > 0.999  # it keeps no sign of a zero

    def test_modelopts_input_scale_is_that_of_calibration(self):
        from jaxmoe.cli._calibrate import LARGEST

        qtensor = tool("modelopt.torch.quantization.qtensor")
        nn = tool("modelopt.torch.quantization.nn")
        config = tool("modelopt.torch.quantization.config")
        block = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
        quantizer = nn.TensorQuantizer(
            config.QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=block)
        )
        quantizer.amax = torch.tensor(3.7)
        theirs = qtensor.NVFP4QTensor.get_activation_scaling_factor(quantizer)
        assert float(theirs) == pytest.approx(float(np.float32(3.7)) / LARGEST, rel=2.0**-23)

    def test_the_configuration_has_modelopts_keys(self, folder):
        converted = tool("modelopt.torch.export.convert_hf_config").convert_hf_quant_config_format(
            json.loads((folder / "hf_quant_config.json").read_text())
        )
        ours = json.loads((folder / "config.json").read_text())["quantization_config"]
        converted.pop("producer")
        assert ours == converted

    def test_compressed_tensors_converts_it(self, folder):
        converters = tool("compressed_tensors.entrypoints.convert.converters")
        converter = converters.ModelOptNvfp4Converter(
            targets=[r"re:.*experts.*_proj$"], ignore=["lm_head"]
        )
        converted = converter.validate(read_torch(folder))
        module = f"{PREFIX}.1.up_proj"
        assert converted[f"{module}.weight_packed"].dtype == torch.uint8
        assert float(converted[f"{module}.input_global_scale"]) == pytest.approx(100)


class TestCompressedTensors:
    pytestmark = needs_tools

    @pytest.mark.parametrize(
        ("format", "scales"), [("nvfp4", False), ("nvfp4", True), ("mxfp4", False)]
    )
    def test_it_decompresses_what_we_write(self, tmp_path, format, scales):
        tool("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        src = write_plain(tmp_path / "src", "Qwen3MoeForCausalLM")
        more = ["--input-scales", scales_file(tmp_path)] if scales else []
        quantize(src, tmp_path / "dst", "--format", format, "--layout", "compressed-tensors", *more)
        described = json.loads((tmp_path / "dst" / "config.json").read_text())
        config = QuantizationConfig.model_validate(described["quantization_config"])
        (scheme,) = config.config_groups.values()
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        assert compressor.can_compress(torch.nn.Linear, scheme)
        assert (scheme.input_activations is not None) == scales
        tensors = read_torch(tmp_path / "dst")
        module = f"{PREFIX}.1.up_proj"
        local = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{module}.")
        }
        assert set(compressor.compression_param_names(scheme)) <= set(local)
        assert ("input_global_scale" in local) == scales
        data = local["weight_packed"]
        theirs = dequantize(
            unpack_fp4_from_uint8(data, data.shape[0], 2 * data.shape[1], torch.float32),
            compressor._decompress_scale(local["weight_scale"], torch.float32),
            args=scheme.weights,
            global_scale=local.get("weight_global_scale"),
            dtype=torch.float32,
        )
        with open_folder(tmp_path / "dst") as folder:
            mine = values(folder.linear(module))
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=2.0**-22, atol=0)
        whole = compressor.decompress(local, scheme)["weight"].float().numpy()
        np.testing.assert_allclose(whole, mine, rtol=2.0**-7, atol=0)  # in bfloat16

    @pytest.mark.parametrize(
        ("family", "format"), [("Qwen3", "nvfp4"), ("Qwen3", "mxfp4"), ("Qwen3Moe", "mxfp4")]
    )
    def test_transformers_loads_a_model(self, tmp_path, family, format):
        """The whole path through transformers: modules that are Linear, and fused experts.

        Not NVFP4 experts: where transformers 5.23 fuses them, it leaves out their global scales.
        """
        transformers = tool("transformers")
        config = getattr(transformers, f"{family}Config")(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, vocab_size=32,
            **({"moe_intermediate_size": 32, "num_experts": 4} if "Moe" in family else {}),
        )  # fmt: skip
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "src")
        quantize(
            tmp_path / "src", tmp_path / "dst", "--format", format,
            "--layout", "compressed-tensors",
        )  # fmt: skip
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dst",
            quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
            dtype=torch.float32,
        )
        parameters = {n: p.detach().float().numpy() for n, p in loaded.named_parameters()}
        with open_folder(tmp_path / "dst") as folder:
            for layer in range(2):
                prefix = f"model.layers.{layer}.mlp"
                if "Moe" in family:
                    experts = folder.experts(f"{prefix}.experts", num_experts=4)
                    expected = {
                        f"{prefix}.experts.gate_up_proj": experts.gate_up,
                        f"{prefix}.experts.down_proj": experts.down,
                    }
                else:
                    expected = {
                        f"{prefix}.{n}.weight": folder.linear(f"{prefix}.{n}") for n in NAMES
                    }
                for name, weight in expected.items():
                    assert np.abs(parameters[name]).max() > 0
                    np.testing.assert_allclose(
                        parameters[name], values(weight), rtol=2.0**-7, atol=0
                    )


class TestGptOss:
    pytestmark = needs_tools

    def test_transformers_loads_what_we_write(self, tmp_path):
        transformers = tool("transformers")
        config = transformers.GptOssConfig(
            hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, vocab_size=32, num_local_experts=4,
            num_experts_per_tok=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "src")
        quantize(tmp_path / "src", tmp_path / "dst", "--format", "mxfp4", "--layout", "gpt-oss")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dst",
            quantization_config=transformers.Mxfp4Config(dequantize=True),
            dtype=torch.float32,
        )
        with open_folder(tmp_path / "dst") as folder, open_folder(tmp_path / "src") as original:
            for layer in range(2):
                theirs = loaded.model.layers[layer].mlp.experts
                prefix = f"model.layers.{layer}.mlp.experts"
                ours = folder.experts(prefix, num_experts=4)
                plain_ones = original.experts(prefix, num_experts=4)
                expected = {
                    "gate_up": theirs.gate_up_proj.detach().numpy().swapaxes(1, 2),
                    "down": theirs.down_proj.detach().numpy().swapaxes(1, 2),
                    "gate_up_bias": theirs.gate_up_proj_bias.detach().numpy(),
                    "down_bias": theirs.down_proj_bias.detach().numpy(),
                }
                for part in ("gate_up", "gate_up_bias"):
                    interleaved = expected[part]
                    expected[part] = np.concatenate(
                        [interleaved[:, 0::2], interleaved[:, 1::2]], axis=1
                    )
                for part, array in expected.items():
                    np.testing.assert_array_equal(values(getattr(ours, part)), array)
                for part in ("gate_up", "down"):
                    again = jaxmoe.quantize(
                        np.asarray(getattr(plain_ones, part)).astype(np.float32), "mxfp4"
                    )
                    for a, b in zip(
                        jax.tree.leaves(again), jax.tree.leaves(getattr(ours, part)), strict=True
                    ):
                        np.testing.assert_array_equal(bits(a), bits(b))
