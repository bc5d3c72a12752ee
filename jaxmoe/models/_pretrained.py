"""Models from Hugging Face folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.checkpoint import CheckpointError, Folder, open_folder
from jaxmoe.formats import get_format
from jaxmoe.models import _architecture as architecture
from jaxmoe.models._attention import Implementation
from jaxmoe.models._decoder import Decoder
from jaxmoe.models._families import Names, read_config
from jaxmoe.nn import MoE
from jaxmoe.nn._variables import assign
from jaxmoe.nn._variables import value as variable_value
from jaxmoe.quantization import QuantizedTensor, dequantize

_MIXER_MODULES: dict[type, dict[str, str]] = {
    architecture.Attention: {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "query_norm": "self_attn.q_norm",
        "key_norm": "self_attn.k_norm",
    },
    architecture.LatentAttention: {
        "query_down": "self_attn.q_a_proj",
        "query_norm": "self_attn.q_a_layernorm",
        "query": "self_attn.q_b_proj",
        "latent": "self_attn.kv_a_proj_with_mqa",
        "latent_norm": "self_attn.kv_a_layernorm",
        "expand": "self_attn.kv_b_proj",
        "out": "self_attn.o_proj",
    },
    architecture.DeltaNet: {
        "mixed": "linear_attn.in_proj_qkvz",
        "rates": "linear_attn.in_proj_ba",
        "norm": "linear_attn.norm",
        "out": "linear_attn.out_proj",
    },
}
_MIXER_TENSORS = {
    "sinks": "self_attn.sinks",
    "conv": "linear_attn.conv1d.weight",
    "log_rate": "linear_attn.A_log",
    "rate_bias": "linear_attn.dt_bias",
}


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    dtype: Any = None,
    weight_format: str | None = None,
    attention: Implementation = None,
    prepare: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Reads a model from a Hugging Face folder: config.json and safetensors files.

    >>> model = load_pretrained("Qwen3-30B-A3B-NVFP4")                         # doctest: +SKIP

    The experts are read layer by layer, and brought into the layout of this machine's kernel before
    the next layer is read.

    Args:
      folder: of a Qwen3-MoE, Mixtral, gpt-oss, DeepSeek-V3, MiniMax-M2, Qwen3-Next or Llama 4 (text
        part) model.
      dtype: dtype of activations and of weights that are not experts'; by default float32 on a
        CPU, where XLA widens bfloat16 products anyway, and bfloat16 elsewhere. Matrices that are
        quantised outside of the experts are dequantised to it.
      weight_format: quantise unquantised experts to this ("nvfp4", "mxfp4", ...); None keeps the
        checkpoint's format.
      attention: as for `Decoder`.
      prepare: arrange FP4 experts for the kernel that is selected here (see `jaxmoe.nn.prepare`);
        without it they stay canonical.
      progress: called with the number of layers read, and of all.

    Returns:
      The model, every layer with arrays of its own.

    Raises:
      CheckpointError: if a file is missing, damaged or contradicts config.json, or the family is
        not known.
      ValueError: for an unknown format.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    quantize = None if weight_format is None else get_format(weight_format).name
    path = Path(folder)
    with open_folder(path) as source:
        try:
            config, names = read_config(source.config)
        except (ValueError, TypeError) as error:
            raise CheckpointError(path / "config.json", str(error)) from error
        options = {"attention": attention, "dtype": dtype, "param_dtype": dtype}
        model = nnx.eval_shape(lambda: Decoder(config, scan=False, **options, rngs=nnx.Rngs(0)))
        reader = _Reader(source, path, names, dtype, quantize)
        reader.ends(model)
        for index, layer in enumerate(config.layers):
            (block,) = model.layers.stacks[index].blocks
            reader.block(block, layer, f"{names.root}.layers.{index}", prepare)
            if progress is not None:
                progress(index + 1, config.num_layers)
    return model


_dequantize = jax.jit(dequantize, static_argnums=1)


class _Reader:
    """Puts a folder's tensors into a model's variables."""

    def __init__(self, folder: Folder, path: Path, names: Names, dtype: Any, quantize: str | None):
        self.folder = folder
        self.path = path
        self.names = names
        self.dtype = np.dtype(dtype)
        self.quantize = quantize

    def fill(self, variable: Any, value: Any, name: str) -> None:
        """Checks a value, and puts it on the device in the variable's dtype."""
        expected = variable_value(variable)
        if value.shape != expected.shape:
            raise CheckpointError(
                self.path,
                f"tensor {name!r} must have shape {expected.shape} by config.json, got "
                f"{value.shape}",
            )
        # Converted by the device: on the host it takes longer, and as much memory again.
        assign(variable, jax.device_put(value, may_alias=False).astype(expected.dtype))

    def matrix(self, name: str) -> Any:
        """A module's weight `[out, in]`, dequantised on the device if it is quantised."""
        weight = self.folder.linear(name, dtype=self.dtype)
        if isinstance(weight, QuantizedTensor):
            return _dequantize(weight, self.dtype)
        return weight

    def module(self, module: Any, name: str) -> None:
        """A linear layer or a norm."""
        if isinstance(module, nnx.RMSNorm):
            offset = 0.0 if name.endswith("linear_attn.norm") else self.names.norm_offset
            scale = self.folder.tensor(f"{name}.weight").astype(np.float32) + np.float32(offset)
            self.fill(module.scale, scale, f"{name}.weight")
            return
        self.fill(module.weight, self.matrix(name), f"{name}.weight")
        if module.bias is not None:
            self.fill(module.bias, self.folder.tensor(f"{name}.bias"), f"{name}.bias")

    def ends(self, model: Decoder) -> None:
        """What stands before and after the layers."""
        root = self.names.root
        embedding = f"{root}.embed_tokens.weight"
        self.fill(model.embed.embedding, self.folder.tensor(embedding), embedding)
        self.module(model.norm, f"{root}.norm")
        if model.head is not None:
            self.module(model.head, self.names.head)

    def block(self, block: Any, layer: architecture.Layer, prefix: str, prepare: bool) -> None:
        """One layer."""
        self.module(block.attention_norm, f"{prefix}.input_layernorm")
        self.module(block.moe_norm, f"{prefix}.post_attention_layernorm")
        mixer = layer.mixer
        for name, module in _MIXER_MODULES[type(mixer)].items():
            if isinstance(mixer, architecture.LatentAttention) and mixer.q_rank is None:
                module = module.replace("q_b_proj", "q_proj")
            if getattr(block.attention, name) is not None:
                self.module(getattr(block.attention, name), f"{prefix}.{module}")
        for name, tensor in _MIXER_TENSORS.items():
            if getattr(block.attention, name, None) is not None:
                value = self.folder.tensor(f"{prefix}.{tensor}")
                value = value[:, 0].T if name == "conv" else value
                self.fill(getattr(block.attention, name), value, f"{prefix}.{tensor}")
        prefix = f"{prefix}.{self.names.feed_forward}"
        if block.moe is None:
            for name in ("gate", "up", "down"):
                self.module(getattr(block.mlp, name), f"{prefix}.{name}_proj")
        else:
            self.experts(block.moe, prefix)
            if prepare:
                block.moe._prepare(None)

    def experts(self, moe: MoE, prefix: str) -> None:
        """A mixture of experts."""
        names = self.names
        router = f"{prefix}.{names.router}"
        self.fill(moe.router, self.matrix(router), f"{router}.weight")
        if moe.router_bias is not None:
            self.fill(moe.router_bias, self.folder.tensor(f"{router}.bias"), f"{router}.bias")
        if moe.correction_bias is not None:
            bias = f"{prefix}.{names.correction_bias}"
            self.fill(moe.correction_bias, self.folder.tensor(bias), bias)
        if moe.shared_experts:
            shared = f"{prefix}.{names.shared}"
            parts = [self.matrix(f"{shared}.{part}_proj") for part in ("gate", "up")]
            self.fill(moe.shared_gate_up, jnp.concatenate(parts), f"{shared}.gate_proj.weight")
            self.fill(moe.shared_down, self.matrix(f"{shared}.down_proj"), f"{shared}.down_proj")
        if moe.shared_gate is not None:
            scale = f"{prefix}.{names.shared}_gate"
            self.fill(moe.shared_gate, self.matrix(scale), f"{scale}.weight")
        weights = self.folder.experts(
            f"{prefix}.experts",
            names.expert_parts,
            num_experts=moe.num_experts,
            dtype=self.dtype,
            quantize=self.quantize,
        )
        expected = (moe.num_experts, moe.hidden_size, moe.intermediate_size)
        if weights.down.shape != expected:
            raise CheckpointError(
                self.path,
                f"{prefix}.experts must have [E, H, I] = {expected} by config.json, got "
                f"{weights.down.shape}",
            )
        if self.quantize not in (None, weights.format.name):
            raise CheckpointError(
                self.path,
                f"{prefix}.experts are {weights.format.name} already; load them without "
                f"weight_format={self.quantize!r}",
            )
        moe._set_experts(weights)
