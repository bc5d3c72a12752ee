"""Layouts to write FP4 weights in: the tensors' names, and what the configuration says of them."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmoe.checkpoint._storage import (
    GPT_OSS,
    MODELOPT_NVFP4,
    OWN,
    PACKED_MXFP4,
    PACKED_NVFP4,
    Storage,
)
from jaxmoe.formats import Format

_OWN = {storage.format: storage for storage in OWN if storage.data == ".data"}


@dataclass(frozen=True)
class Layout:
    """A layout for weights of one format.

    Args:
      name: as the command line has it.
      storage: the tensors of one weight.
      ending: what a plain weight's name has after the module's.
      rank: axes that a weight may have: (2,) for modules, (3,) for fused experts.
      shared: modules whose weights share one global scale, since kernels read them as one.
      describe: makes the `quantization_config` of config.json from the names of quantised and of
        plain modules, and whether the activations have scales; None for jaxmoe's own layout.
    """

    name: str
    storage: Storage
    ending: str
    rank: tuple[int, ...]
    shared: tuple[tuple[str, ...], ...] = ()
    describe: Callable[[Sequence[str], Sequence[str], bool], dict[str, Any]] | None = None

    @property
    def format(self) -> Format:
        """Format of the weights."""
        assert self.storage.format is not None
        return self.storage.format

    def module(self, tensor: str) -> str:
        """The module of a plain weight's tensor."""
        return tensor.removesuffix(self.ending)

    def parts(self, tensor: str, shape: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors that a weight `[..., N, K]` is stored as."""
        *rows, k = shape
        format, storage, module = self.format, self.storage, self.module(tensor)
        assert format.block_size is not None
        blocks = k // format.block_size
        data = (*rows, blocks, format.block_size // 2) if storage is GPT_OSS else (*rows, k // 2)
        parts = {
            module + storage.data: (storage.data_dtype, data),
            module + storage.scale: (storage.scale_dtypes[0], (*rows, blocks)),
        }
        if storage.global_scale is not None:
            leading = tuple(rows[:-1])
            parts[module + storage.global_scale] = ("F32", (1,) if storage.inverse else leading)
        return parts

    def siblings(self, tensor: str) -> tuple[str, ...]:
        """Tensors that share the global scale of this one, itself among them."""
        head, dot, last = self.module(tensor).rpartition(".")
        for group in self.shared:
            if last in group:
                return tuple(f"{head}{dot}{name}{self.ending}" for name in group)
        return (tensor,)


def get_layout(name: str, format: Format) -> Layout:
    """The layout of a name for a format.

    Raises:
      ValueError: if the layout has no such format.
    """
    if name == "jaxmoe":
        return Layout(name, _OWN[format], "", (2, 3))
    found = {layout.format: layout for layout in _LAYOUTS if layout.name == name}
    if format not in found:
        known = ", ".join(str(f) for f in found) or "none: there is no such layout"
        raise ValueError(f"layout {name} is for {known}, got {format}; choose another layout")
    return found[format]


def exclude_patterns(plain: Iterable[str], quantised: Iterable[str]) -> list[str]:
    """Few patterns with `*` at the end that match all plain modules and no quantised one.

    >>> exclude_patterns(["a.0.attn.q", "a.0.attn.k", "a.1.attn.q", "head"], ["a.0.mlp.up"])
    ['a.0.attn*', 'a.1*', 'head']
    """
    ordered = sorted(quantised)

    def free(prefix: str) -> bool:
        at = bisect.bisect_left(ordered, prefix)
        return at == len(ordered) or not ordered[at].startswith(prefix)

    patterns = set()
    for name in plain:
        steps = name.split(".")
        for count in range(1, len(steps)):
            prefix = ".".join(steps[:count])
            if free(prefix) or free(f"{prefix}."):
                patterns.add(f"{prefix}*" if free(prefix) else f"{prefix}.*")
                break
        else:
            patterns.add(name)
    return sorted(patterns)


def _describe_modelopt(
    quantised: Sequence[str], plain: Sequence[str], input_scales: bool
) -> dict[str, Any]:
    scheme = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group: dict[str, Any] = {"weights": scheme, "targets": ["Linear"]}
    if input_scales:
        group = {"input_activations": scheme, **group}
    return {
        "config_groups": {"group_0": group},
        "ignore": exclude_patterns(plain, quantised),
        "quant_algo": "NVFP4" if input_scales else "W4A16_NVFP4",
        "quant_method": "modelopt",
    }


def modelopt_file(config: Mapping[str, Any], producer: Mapping[str, str]) -> dict[str, Any]:
    """What hf_quant_config.json holds beside ModelOpt's `quantization_config`."""
    return {
        "producer": dict(producer),
        "quantization": {
            "quant_algo": config["quant_algo"],
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": config["ignore"],
        },
    }


def _describe_packed(
    format: str, quantised: Sequence[str], plain: Sequence[str], input_scales: bool
) -> dict[str, Any]:
    nvfp4 = format == "nvfp4-pack-quantized"
    weights: dict[str, Any] = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": "tensor_group" if nvfp4 else "group",
        "group_size": 16 if nvfp4 else 32,
        "scale_dtype": "torch.float8_e4m3fn" if nvfp4 else "torch.uint8",
        "zp_dtype": "torch.float8_e4m3fn" if nvfp4 else "torch.uint8",
    }
    activations = None
    if input_scales:  # block scales found from the activations, their global scale given
        activations = {**weights, "dynamic": "local", "observer": "static_minmax"}
    group = {
        "format": format,
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": format,
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _describe_gpt_oss(
    quantised: Sequence[str], plain: Sequence[str], input_scales: bool
) -> dict[str, Any]:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": [*kept, "lm_head"]}


# Kernels of vLLM and TensorRT-LLM read these as one matrix, with one global scale.
SHARED = (
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)

_LAYOUTS = (
    Layout("modelopt", MODELOPT_NVFP4, ".weight", (2,), SHARED, _describe_modelopt),
    *(
        Layout(
            "compressed-tensors", storage, ".weight", (2,), shared,
            functools.partial(_describe_packed, format),
        )
        for format, storage, shared in (
            ("nvfp4-pack-quantized", PACKED_NVFP4, SHARED),
            ("mxfp4-pack-quantized", PACKED_MXFP4, ()),
        )
    ),
    Layout("gpt-oss", GPT_OSS, "", (3,), (), _describe_gpt_oss),
)  # fmt: skip
