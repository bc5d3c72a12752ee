"""Writes a checkpoint folder with the tensors, shapes and config of a published model, and noise.

    python benchmarks/synthetic_checkpoint.py qwen3-30b-a3b-nvfp4 qwen3-noise
    python benchmarks/synthetic_checkpoint.py gpt-oss-20b gpt-oss-noise --layers 4
    python benchmarks/generate.py qwen3-noise

For speed and memory, which do not depend on the values. Weights are about N(0, 1/fan-in), so that
activations stay finite. A tensor repeats random values from a pool, beginning at a place of its
own. The tokenizer is one of bytes, whatever the size of the vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_POOL = 1 << 22  # random values of each kind; longer tensors repeat them
_SHARD = 1 << 30  # bytes of a file, about
_ELEMENT_RMS = math.sqrt(68.5 / 8)  # of the sixteen e2m1 codes
_SCALE_RMS = math.sqrt(1.34)  # of the NVFP4 block scales of `_pool`
_BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


class Tensor(NamedTuple):
    """A tensor to write.

    Args:
      name: in the file.
      dtype: as safetensors spells it.
      shape: its shape.
      kind: `normal` (with deviation `value`), `constant`, `elements` (packed e2m1), `e4m3` (block
        scales of 0.5 to 1.9) or `e8m0` (block scales of `value` or half of it).
      value: see there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    value: float = 0.0

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@functools.cache
def _bits() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, _POOL, np.uint8)


@functools.cache
def _normal() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(_POOL, np.float32)


@functools.cache
def _pool(dtype: str, kind: str, value: float) -> np.ndarray:
    """Bytes that tensors of one kind repeat; computed once for each kind and value."""
    if kind == "elements":
        return _bits()
    if kind == "e4m3":
        return _bits() & 0x0F | 0x30
    if kind == "e8m0":
        return (_bits() & 1) + np.uint8(126 + round(math.log2(value)))
    values = np.full(4096, value, np.float32) if kind == "constant" else _normal() * value
    return values.astype({"BF16": ml_dtypes.bfloat16, "F32": np.float32}[dtype]).view(np.uint8)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes."""
    pool, left = _pool(tensor.dtype, tensor.kind, tensor.value).data, tensor.nbytes
    start = zlib.crc32(tensor.name.encode()) % len(pool) // 64 * 64
    while left:
        chunk = pool[start : start + left]
        yield chunk
        left, start = left - len(chunk), 0


def _write_shard(path: Path, tensors: list[Tensor]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for chunk in _chunks(tensor):
                file.write(chunk)


# --- the models -----------------------------------------------------------------------------------


def _plain(name: str, rows: int, columns: int) -> Tensor:
    return Tensor(f"{name}.weight", "BF16", (rows, columns), "normal", columns**-0.5)


def _vector(name: str, size: int, *, around: float | None = None) -> Tensor:
    """A norm's scale, around 1; or a small bias."""
    if around is not None:
        return Tensor(name, "BF16", (size,), "constant", around)
    return Tensor(name, "BF16", (size,), "normal", 0.02)


def _nvfp4(name: str, rows: int, columns: int) -> list[Tensor]:
    """What ModelOpt stores for a quantised linear layer."""
    scale = 1 / (math.sqrt(columns) * _ELEMENT_RMS * _SCALE_RMS)
    return [
        Tensor(f"{name}.weight", "U8", (rows, columns // 2), "elements"),
        Tensor(f"{name}.weight_scale", "F8_E4M3", (rows, columns // 16), "e4m3"),
        Tensor(f"{name}.weight_scale_2", "F32", (), "constant", scale),
        Tensor(f"{name}.input_scale", "F32", (), "constant", 6 / (448 * 6)),
    ]


def _mxfp4(name: str, experts: int, rows: int, columns: int) -> list[Tensor]:
    """What gpt-oss stores for one matrix of every expert."""
    top = 2.0 ** round(-math.log2(math.sqrt(columns) * _ELEMENT_RMS * 0.79))
    blocks = columns // 32
    return [
        Tensor(f"{name}_blocks", "U8", (experts, rows, blocks, 16), "elements"),
        Tensor(f"{name}_scales", "U8", (experts, rows, blocks), "e8m0", top),
        Tensor(f"{name}_bias", "BF16", (experts, rows), "normal", 0.02),
    ]


def qwen3_30b_a3b_nvfp4(layers: int = 48, *, small: bool = False) -> tuple[Any, Any, list[Tensor]]:
    """Qwen3-30B-A3B with every linear layer of the blocks but the router in ModelOpt's NVFP4."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    if small:
        config |= {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "vocab_size": 320}
        config |= {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
        config |= {"moe_intermediate_size": 64, "eos_token_id": 256}
    exclude = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(layers))]
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": exclude,
        "config_groups": {
            "group_0": {
                "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "input_activations": {
                    "dynamic": False, "num_bits": 4, "type": "float", "group_size": 16
                },
                "targets": ["Linear"],
            }
        },
    }  # fmt: skip
    separate = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {**quantization, "exclude_modules": exclude},
    }
    h, d, i = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    queries, keys = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    tensors = [_plain("model.embed_tokens", config["vocab_size"], h)]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors += [
            _vector(f"{at}.input_layernorm.weight", h, around=1.0),
            _vector(f"{at}.post_attention_layernorm.weight", h, around=1.0),
            _vector(f"{at}.self_attn.q_norm.weight", d, around=1.0),
            _vector(f"{at}.self_attn.k_norm.weight", d, around=1.0),
            _plain(f"{at}.mlp.gate", config["num_experts"], h),
        ]
        for name, rows, columns in (
            ("q", queries, h), ("k", keys, h), ("v", keys, h), ("o", h, queries)
        ):  # fmt: skip
            tensors += _nvfp4(f"{at}.self_attn.{name}_proj", rows, columns)
        for expert in range(config["num_experts"]):
            for name, rows, columns in (("gate", i, h), ("up", i, h), ("down", h, i)):
                tensors += _nvfp4(f"{at}.mlp.experts.{expert}.{name}_proj", rows, columns)
    tensors += [_vector("model.norm.weight", h, around=1.0)]
    tensors += [_plain("lm_head", config["vocab_size"], h)]
    return config, separate, tensors


def gpt_oss_20b(layers: int = 24, *, small: bool = False) -> tuple[Any, Any, list[Tensor]]:
    """gpt-oss-20b: experts in MXFP4, the rest in bfloat16."""
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": 200002,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": (["sliding_attention", "full_attention"] * layers)[:layers],
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head",
            ],
        },
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 201088,
    }  # fmt: skip
    if small:
        config |= {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32, "vocab_size": 320}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
        config |= {"num_experts_per_tok": 2, "sliding_window": 8, "eos_token_id": 256}
    h, d, i = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    heads, experts = config["num_attention_heads"], config["num_local_experts"]
    queries, keys = heads * d, config["num_key_value_heads"] * d
    tensors = [_plain("model.embed_tokens", config["vocab_size"], h)]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors += [
            _vector(f"{at}.input_layernorm.weight", h, around=1.0),
            _vector(f"{at}.post_attention_layernorm.weight", h, around=1.0),
            _vector(f"{at}.self_attn.sinks", heads),
            _plain(f"{at}.mlp.router", experts, h),
            _vector(f"{at}.mlp.router.bias", experts),
        ]
        for name, rows, columns in (
            ("q", queries, h), ("k", keys, h), ("v", keys, h), ("o", h, queries)
        ):  # fmt: skip
            module = f"{at}.self_attn.{name}_proj"
            tensors += [_plain(module, rows, columns), _vector(f"{module}.bias", rows)]
        tensors += _mxfp4(f"{at}.mlp.experts.gate_up_proj", experts, 2 * i, h)
        tensors += _mxfp4(f"{at}.mlp.experts.down_proj", experts, h, i)
    tensors += [_vector("model.norm.weight", h, around=1.0)]
    tensors += [_plain("lm_head", config["vocab_size"], h)]
    return config, None, tensors


MODELS = {"qwen3-30b-a3b-nvfp4": qwen3_30b_a3b_nvfp4, "gpt-oss-20b": gpt_oss_20b}


def byte_tokenizer(stop: int) -> dict[str, Any]:
    """A tokenizer.json whose tokens 0 to 255 are the bytes; `stop` ends a text."""
    # The usual names of bytes in such files: printable ones stand for themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    names = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = False
    end = {"id": stop, "content": "<end>", "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {name: b for b, name in enumerate(names)} | {"<end>": stop},
            "merges": [],
        },
    }


def write(model: str, folder: Path, *, layers: int | None = None, small: bool = False) -> int:
    """Writes a folder; returns the bytes of its tensors.

    Args:
      model: a key of `MODELS`.
      folder: made if it is not there; must be empty.
      layers: fewer than the model has.
      small: every size but the number of layers made small, for tests.

    Raises:
      ValueError: the folder holds something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} must be empty; name another folder, or remove what it holds")
    make = MODELS[model]
    config, separate, tensors = make(small=small) if layers is None else make(layers, small=small)
    files = {"config.json": config, "tokenizer.json": byte_tokenizer(config["eos_token_id"])}
    if separate is not None:
        files["hf_quant_config.json"] = separate
    shards = _split(tensors)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    size = sum(tensor.nbytes for tensor in tensors)
    places = {t.name: name for name, part in zip(names, shards, strict=True) for t in part}
    files["model.safetensors.index.json"] = {
        "metadata": {"total_size": size},
        "weight_map": places,
    }
    for tensor in tensors:  # the pools: once, and not in every thread
        _pool(tensor.dtype, tensor.kind, tensor.value)
    with ThreadPoolExecutor() as threads:
        list(threads.map(_write_shard, [folder / name for name in names], shards))
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return size


def _split(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each file, in their order."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=[*MODELS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--small", action="store_true", help="small sizes, for a test")
    given = parser.parse_args()
    start = time.perf_counter()
    try:
        size = write(given.model, given.folder, layers=given.layers, small=given.small)
    except ValueError as error:
        sys.exit(str(error))
    seconds = time.perf_counter() - start
    print(f"{given.folder}: {size / 1e9:.2f} GB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
