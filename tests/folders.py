"""Small checkpoint folders in the layouts of several tools, written from their documentation."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxmoe import checkpoint

E, H, I = 4, 64, 32  # noqa: E741
PREFIX = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
CONFIG = {"model_type": "qwen3_moe", "hidden_size": H}
E4M3 = ml_dtypes.float8_e4m3fn

MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "ignore": ["lm_head", "*.self_attn*"],
}
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32], "fmt": "e4m3"}


def packed(format, **activations):
    """compressed-tensors' quantization_config."""
    size = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}.get(format, 128)
    weights = {"num_bits": 4, "type": "float", "group_size": size, "symmetric": True}
    group = {"weights": weights, "targets": ["Linear"], "input_activations": activations or None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def write(path, tensors, quantization=None, config=None):
    """Writes a folder with one file; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **(config or {})}
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    checkpoint.save(path / "model.safetensors", tensors, {"format": "pt"})
    return path


def rng(seed=0):
    return np.random.default_rng(seed)


def plain(dtype=ml_dtypes.bfloat16, num_experts=E):
    """Experts module by module, a router, attention and norms."""
    r = rng(1)

    def matrix(*shape):
        return r.standard_normal(shape, np.float32).astype(dtype)

    tensors = {
        f"{PREFIX}.{e}.{name}.weight": matrix(*shape)
        for e in range(num_experts)
        for name, shape in SHAPES.items()
    }
    tensors["model.layers.0.mlp.gate.weight"] = matrix(num_experts, H)
    tensors["model.layers.0.self_attn.q_proj.weight"] = matrix(H, H)
    tensors["model.norm.weight"] = matrix(H)
    tensors["lm_head.weight"] = matrix(96, H)
    return tensors


def nvfp4(rows, k, seed):
    """Random bits that make sense: packed elements and e4m3 scales."""
    r = rng(seed)
    return r.integers(0, 256, (rows, k // 2), np.uint8), r.integers(
        1, 0x7F, (rows, k // 16), np.uint8
    ).view(E4M3)


def modelopt(scales=lambda e, name: 2.0**-e, input_scales=True):
    """ModelOpt NVFP4: what `plain` has, with the experts quantised."""
    tensors = {k: v for k, v in plain().items() if PREFIX not in k}
    for e in range(E):
        for i, (name, shape) in enumerate(SHAPES.items()):
            module = f"{PREFIX}.{e}.{name}"
            data, scale = nvfp4(*shape, 3 * e + i)
            tensors[f"{module}.weight"] = data
            tensors[f"{module}.weight_scale"] = scale
            tensors[f"{module}.weight_scale_2"] = np.float32(scales(e, name))
            if input_scales:
                tensors[f"{module}.input_scale"] = np.float32(0.25 * (1 + e + i))
    return tensors


def as_packed(tensors):
    """The same weights as compressed-tensors stores them."""
    renamed = {}
    for name, value in tensors.items():
        if name.endswith((".weight_scale_2", ".input_scale")):
            old, new = (
                ("weight_scale_2", "weight_global_scale")
                if name.endswith("_2")
                else ("input_scale", "input_global_scale")
            )
            renamed[name.replace(old, new)] = np.float32([1]) / value
        elif value.dtype == np.uint8:
            renamed[f"{name}_packed"] = value
        else:
            renamed[name] = value
    return renamed


def gpt_oss():
    """gpt-oss MXFP4: fused, interleaved, with biases."""
    r = rng(2)
    tensors = {k: v for k, v in plain().items() if PREFIX not in k}
    for name, (rows, k) in {"gate_up_proj": (2 * I, H), "down_proj": (H, I)}.items():
        shape = (E, rows, k // 32)
        tensors[f"{PREFIX}.{name}_blocks"] = r.integers(0, 256, (*shape, 16), np.uint8)
        tensors[f"{PREFIX}.{name}_scales"] = r.integers(100, 140, shape, np.uint8)
        tensors[f"{PREFIX}.{name}_bias"] = r.standard_normal((E, rows), np.float32).astype(
            ml_dtypes.bfloat16
        )
    return tensors


def fp8(block=(16, 32)):
    """Block-scaled FP8 as DeepSeek stores it; shapes are no multiples of the block."""
    r = rng(3)
    tensors = {k: v for k, v in plain().items() if PREFIX not in k}
    for e in range(E):
        for name, (rows, k) in SHAPES.items():
            module = f"{PREFIX}.{e}.{name}"
            bits = (
                r.integers(0, 0x7F, (rows, k), np.uint8)
                | r.integers(0, 2, (rows, k), np.uint8) << 7
            )
            tensors[f"{module}.weight"] = bits.astype(np.uint8).view(E4M3)
            blocks = (-(-rows // block[0]), -(-k // block[1]))
            tensors[f"{module}.weight_scale_inv"] = r.random(blocks, np.float32) + np.float32(0.01)
    return tensors


def write_shards(path, tensors, count=3, quantization=None):
    """Writes a folder with an index and `count` files; returns it."""
    write(path, {}, quantization)
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    mapping = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        checkpoint.save(path / file, part, {"format": "pt"})
        mapping |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": mapping}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_wide_model(path):
    """The recorded tiny Qwen3-MoE with experts twice as wide: 32, a block of every format.

    The second half of the gate rows is the first times -2, so that the halves' activations differ.
    """
    source = Path(__file__).parent / "data" / "models" / "qwen3_moe"
    tensors = {k: np.asarray(v) for k, v in checkpoint.load(source / "model.safetensors").items()}
    for name, value in tensors.items():
        if ".experts." in name:
            axis = 1 if "down_proj" in name else 0
            other = -2 * value if "gate_proj" in name else value
            tensors[name] = np.concatenate([value, other.astype(value.dtype)], axis)
    config = json.loads((source / "config.json").read_text())
    return write(path, tensors, config={**config, "moe_intermediate_size": 32})
