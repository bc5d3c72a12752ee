"""Tiny models of every family, made and run by `transformers`: the judge of `load_pretrained`.

    python tests/reference_models.py tests/data/models

writes a folder for each family, what `save_pretrained` makes of random bf16 weights, and a file
with texts and the float32 logits that `transformers` computes for each text alone, the prompt at
once and then token by token with its cache; and again with the experts' weights rounded to FP4.
`test_families.py` reads them where torch is not installed, and makes new ones where it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 48
PROMPTS = (11, 4, 7)  # tokens of each row's prompt
STEPS = 32  # tokens that follow one by one

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "rope_theta": 10000.0,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "rope_parameters": {**_YARN, "rope_theta": 150000.0, "truncate": False},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "head_dim": 16,
            "intermediate_size": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rotary_dim": 8,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "linear_conv_kernel_dim": 4,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 16,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "floor_scale": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    ),
}


FP4 = {family: "mxfp4" if family == "gpt_oss" else "nvfp4" for family in CONFIGS}
"""The format that each family's experts are rounded to."""


def make(family: str, folder: Path, seed: int = 0) -> Any:
    """Writes a random bf16 checkpoint, and returns the model that reads it back in float32."""
    import torch
    import transformers

    name, options = CONFIGS[family]
    torch.manual_seed(seed)  # what stays as the model makes it
    config_class = getattr(transformers, f"{name}{'Text' if family == 'llama4' else ''}Config")
    config = config_class(**{**_COMMON, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("inv_freq") or name.endswith("A_log"):
                continue
            if name.endswith(("norm.weight", "layernorm.weight")):
                value.copy_(value + 0.3 * noise)
            elif value.ndim == 1 or name.endswith("bias"):
                value.copy_(0.3 * noise)
            elif "embed" in name:
                value.copy_(noise)
            else:
                fan_in = value.shape[-1]
                if value.ndim == 3 and family in ("gpt_oss", "llama4"):
                    fan_in = value.shape[1]
                value.copy_(noise * fan_in**-0.5 * (3 if "gate.weight" in name else 1))
    model.to(torch.bfloat16).save_pretrained(folder)
    return read(folder)


def read(folder: Path) -> Any:
    """The model of a folder in float32, with attention written out."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def texts(seed: int = 0) -> list[np.ndarray]:
    """Rows of tokens: each prompt and what follows it."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length + STEPS).astype(np.int32) for length in PROMPTS]


def logits(model: Any, rows: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row alone: the logits of the whole row, and of the row read with the cache.

    With the cache the prompt is read at once, and then one token after the other.
    """
    import torch

    out = []
    with torch.no_grad():
        for row, length in zip(rows, PROMPTS, strict=True):
            ids = torch.tensor(row[None].astype(np.int64))
            whole = model(ids).logits[0]
            step = model(ids[:, :length], use_cache=True)
            parts = [step.logits[0]]
            for i in range(length, len(row)):
                step = model(
                    ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True
                )
                parts.append(step.logits[0])
            out.append((whole.numpy(), torch.cat(parts).numpy()))
    return out


def round_experts(family: str, source: Path, target: Path) -> Any:
    """Writes a checkpoint in float32 with experts rounded to FP4; returns the model that reads it.

    The rounding is that of `load_pretrained(source, weight_format=FP4[family])`.
    """
    import shutil

    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from jaxmoe import checkpoint, dequantize, models

    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    tensors = {
        name: np.asarray(value, np.float32)
        for name, value in checkpoint.load(source / "model.safetensors").items()
    }
    rounded = models.load_pretrained(source, weight_format=FP4[family], prepare=False)
    separate = ("w1", "w3", "w2")
    if any(name.endswith("gate_proj.weight") for name in tensors):
        separate = ("gate_proj", "up_proj", "down_proj")
    replaced = set()
    for index, block in enumerate(rounded.layers):
        if block.moe is None:
            continue
        weights = block.moe.experts()
        gate_up, down = (
            np.asarray(dequantize(w, jnp.float32)) for w in (weights.gate_up, weights.down)
        )
        (prefix,) = {
            name.split(".experts.")[0] + ".experts"
            for name in tensors
            if f".layers.{index}." in name and ".experts." in name
        }
        if f"{prefix}.gate_up_proj" in tensors:
            if family == "gpt_oss":
                gate_up = np.stack(np.split(gate_up, 2, 1), 2).reshape(gate_up.shape)
            new = {"gate_up_proj": gate_up.swapaxes(1, 2), "down_proj": down.swapaxes(1, 2)}
        else:
            parts = (*np.split(gate_up, 2, 1), down)
            new = {
                f"{e}.{name}.weight": part[e]
                for name, part in zip(separate, parts, strict=True)
                for e in range(len(down))
            }
        for name, value in new.items():
            assert tensors[f"{prefix}.{name}"].shape == value.shape, name
            tensors[f"{prefix}.{name}"] = np.ascontiguousarray(value)
            replaced.add(f"{prefix}.{name}")
    experts = {name for name in tensors if ".experts." in name and not name.endswith("bias")}
    assert replaced == experts
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return read(target)


def main(folder: Path) -> None:
    """Writes the folders of all families."""
    import tempfile

    from safetensors.numpy import save_file

    for family in CONFIGS:
        model = make(family, folder / family)
        (folder / family / "generation_config.json").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            rounded = round_experts(family, folder / family, Path(scratch) / "fp4")
        rows = texts()
        tensors = {f"tokens.{i}": row for i, row in enumerate(rows)}
        for name, judge in (("logits", model), ("fp4", rounded)):
            for i, (whole, cached) in enumerate(logits(judge, rows)):
                change = np.abs(whole - cached).max() / np.abs(whole).max()
                print(f"{family} {name} row {i}: the cache changes {change:.1e}")
                tensors[f"{name}.{i}"] = cached
        # Not beside the checkpoint: a loader reads every safetensors file of a folder.
        save_file(tensors, folder / f"{family}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
