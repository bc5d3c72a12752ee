"""Writes the folders in tests/data/checkpoints with the tools whose formats jaxmoe reads.

    python tests/data/make_checkpoints.py

Needs `pip install 'jaxmoe[reference]'` (torch, transformers, compressed-tensors, nvidia-modelopt);
everything runs on a CPU. `expected.npz` in each folder holds weights of expert 1 of the first layer
as the same tool dequantises them, in float32; `versions.json` says which versions wrote it.
"""

import contextlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "checkpoints"
PREFIX = "model.layers.0.mlp.experts"
NAMES = ("gate_proj", "up_proj", "down_proj")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=32, moe_intermediate_size=32, num_experts=3,
        num_experts_per_tok=2,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def plain_experts(model):
    """The experts' weights as plain tensors, module by module."""
    experts = model.model.layers[0].mlp.experts
    tensors = {}
    for e in range(experts.num_experts):
        gate, up = experts.gate_up_proj[e].chunk(2)
        for name, weight in zip(NAMES, (gate, up, experts.down_proj[e]), strict=True):
            tensors[f"{PREFIX}.{e}.{name}"] = weight.detach().clone()
    return tensors


def rest(model):
    """Norms, router, embedding and head: what the tests need of everything else."""
    state = model.state_dict().items()
    left_out = (".experts.", ".self_attn.")
    return {n: t.detach().clone() for n, t in state if not any(part in n for part in left_out)}


def finish(folder, expected, *packages):
    np.savez_compressed(folder / "expected.npz", **expected)
    versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    for name in ("generation_config.json",):
        (folder / name).unlink(missing_ok=True)


def begin(name):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def modelopt(name="modelopt-nvfp4"):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    folder = begin(name)
    model = qwen3_moe()

    def calibrate(model):
        for _ in range(4):
            model(torch.randint(0, SIZES["vocab_size"], (2, 16)))

    with contextlib.redirect_stdout(sys.stderr):
        model = mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, calibrate)
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=folder)
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for part in NAMES:
        module = f"{PREFIX}.1.{part}"
        data = tensors[f"{module}.weight"]
        q = NVFP4QTensor((data.shape[0], 2 * data.shape[1]), torch.float32, data)
        expected[part] = q.dequantize(
            dtype=torch.float32,
            scale=tensors[f"{module}.weight_scale"],
            double_scale=tensors[f"{module}.weight_scale_2"],
            block_sizes={-1: 16},
        ).numpy()
    finish(folder, expected, "nvidia-modelopt", "transformers")


def compressed_tensors(name, preset):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    folder = begin(name)
    model = qwen3_moe()
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    nvfp4 = args.group_size == 16
    format = (
        CompressionFormat.nvfp4_pack_quantized if nvfp4 else CompressionFormat.mxfp4_pack_quantized
    )
    scheme.format = format.value
    compressor = BaseCompressor.get_value_from_registry(format.value)
    tensors, expected = rest(model), {}
    experts = plain_experts(model)
    for module, weight in experts.items():
        weight = weight.float()
        state = {"weight": weight}
        if nvfp4:
            head, _, last = module.rpartition(".")
            group = [weight] if last == "down_proj" else [
                experts[f"{head}.{n}"].float() for n in NAMES[:2]
            ]  # fmt: skip
            joined = torch.cat(group)
            state["weight_global_scale"] = generate_gparam(joined.min(), joined.max())
        blocks = weight.reshape(weight.shape[0], -1, args.group_size)
        state["weight_scale"], _ = calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), args, state.get("weight_global_scale")
        )
        packed = compressor.compress(state, scheme)
        if scheme.input_activations is not None and nvfp4:
            packed["input_global_scale"] = generate_gparam(torch.tensor(-3.0), torch.tensor(5.0))
        if module.startswith(f"{PREFIX}.1."):
            data = packed["weight_packed"]
            plain = dequantize(  # what its `decompress` does, in float32 instead of bfloat16
                unpack_fp4_from_uint8(data, data.shape[0], 2 * data.shape[1], torch.float32),
                compressor._decompress_scale(packed["weight_scale"], torch.float32),
                args=args,
                global_scale=state.get("weight_global_scale"),
                dtype=torch.float32,
            )
            expected[module.rpartition(".")[2]] = plain.numpy()
        tensors |= {f"{module}.{key}": value.contiguous() for key, value in packed.items()}
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=format.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    )
    described = {**config.to_dict(), "quant_method": "compressed-tensors"}
    text = {**json.loads(model.config.to_json_string()), "quantization_config": described}
    (folder / "config.json").write_text(json.dumps(text, indent=2, default=str) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    finish(folder, expected, "compressed-tensors", "transformers")


def gpt_oss(name="gpt-oss-mxfp4"):
    """The bits are random: transformers quantises to MXFP4 on a GPU alone, and decodes anywhere."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = begin(name)
    config = transformers.GptOssConfig(
        **SIZES, intermediate_size=32, num_local_experts=3, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    tensors, expected = rest(model), {}
    for part, (rows, k) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
        blocks = torch.randint(0, 256, (3, rows, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, (3, rows, k // 32), dtype=torch.uint8)
        tensors[f"{PREFIX}.{part}_blocks"] = blocks
        tensors[f"{PREFIX}.{part}_scales"] = scales
        tensors[f"{PREFIX}.{part}_bias"] = torch.randn(3, rows).to(torch.bfloat16)
        # [E, K, N], as its forward pass multiplies
        expected[part] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[1].numpy()
    described = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    text = {**json.loads(model.config.to_json_string()), "quantization_config": described}
    (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    finish(folder, expected, "transformers")


def fp8(name="fp8-blocks"):
    """DeepSeek's block-scaled FP8, in blocks of 32 x 32 to fit the small matrices."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    folder = begin(name)
    model = qwen3_moe()
    config = transformers.FineGrainedFP8Config(
        weight_block_size=(32, 32), modules_to_not_convert=["lm_head", "gate"]
    )
    quantizer = SimpleNamespace(quantization_config=config)
    tensors, expected = rest(model), {}
    for module, weight in plain_experts(model).items():
        stored = Fp8Quantize(quantizer)._quantize_one(f"{module}.weight", weight)
        tensors |= stored
        if module.startswith(f"{PREFIX}.1."):
            values = list(stored.values())
            plain = Fp8Dequantize(quantizer)._dequantize_one(*values, torch.float32)
            expected[module.rpartition(".")[2]] = plain.numpy()
    text = json.loads(model.config.to_json_string())
    text["quantization_config"] = json.loads(config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    finish(folder, expected, "transformers")


def main():
    modelopt()
    compressed_tensors("compressed-tensors-nvfp4", "NVFP4")
    compressed_tensors("compressed-tensors-nvfp4a16", "NVFP4A16")
    compressed_tensors("compressed-tensors-mxfp4", "MXFP4A16")
    gpt_oss()
    fp8()


if __name__ == "__main__":
    main()
