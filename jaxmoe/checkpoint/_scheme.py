"""What the configuration of a folder says about quantisation: a known scheme, or a refusal by name.

Read from `config.json` (`quantization_config`) and ModelOpt's `hf_quant_config.json`. A weight is
never read as dense because a scheme was not understood.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmoe.checkpoint._safetensors import CheckpointError
from jaxmoe.checkpoint._storage import (
    BLOCK_FP8,
    GPT_OSS,
    MODELOPT_FP8,
    MODELOPT_MXFP4,
    MODELOPT_NVFP4,
    OWN,
    PACKED_MXFP4,
    PACKED_NVFP4,
    Storage,
)

_READABLE = (
    "jaxmoe reads modelopt (NVFP4, W4A16_NVFP4, FP8, MXFP4, W4A8_MXFP4_FP8), compressed-tensors "
    "(nvfp4-pack-quantized, mxfp4-pack-quantized), mxfp4 (gpt-oss), fp8 (with weight_block_size) "
    "and unquantised weights"
)

_MODELOPT: Mapping[str, tuple[Storage, str | None]] = {
    "NVFP4": (MODELOPT_NVFP4, "w4a4"),
    "W4A16_NVFP4": (MODELOPT_NVFP4, "w4a16"),
    "FP8": (MODELOPT_FP8, None),
    "MXFP4": (MODELOPT_MXFP4, None),
    "W4A8_MXFP4_FP8": (MODELOPT_MXFP4, "w4a8"),
}
_PACKED = {
    "nvfp4-pack-quantized": PACKED_NVFP4,
    "mxfp4-pack-quantized": PACKED_MXFP4,
}


@dataclass(frozen=True)
class Scheme:
    """What a folder declares as quantised, and how.

    Args:
      method: "modelopt", "compressed-tensors", "mxfp4", "fp8", or "jaxmoe" for its own layout.
      algorithms: the method's names for what was done, such as "NVFP4".
      compute: the arithmetic that the checkpoint was made for ("w4a4", "w4a8", "w4a16"), as
        `moe_mlp` names it; None where nothing is declared, or several.
      source: the file that says so.
      exclude: patterns of modules that are not quantised, in the method's own language.
      storages: how quantised weights are stored.
      block: rows and columns that share a scale of block-scaled FP8.
    """

    method: str
    algorithms: tuple[str, ...]
    compute: str | None
    source: str
    exclude: tuple[str, ...] = ()
    storages: tuple[Storage, ...] = ()
    block: tuple[int, int] = (128, 128)

    def excludes(self, module: str) -> str | None:
        """The pattern that says that a module is not quantised; None if there is none."""
        return next((text for text, regex in self._regexes if regex.match(module)), None)

    @functools.cached_property
    def _regexes(self) -> list[tuple[str, re.Pattern[str]]]:
        return [(text, re.compile(_LANGUAGE[self.method](text))) for text in self.exclude]

    def __str__(self) -> str:
        return f"{self.method} {', '.join(self.algorithms)}"


def own_scheme(formats: tuple[str, ...]) -> Scheme:
    """The scheme of folders that `jaxmoe quantize` wrote in jaxmoe's own layout."""
    return Scheme("jaxmoe", formats, None, "the metadata of the files", storages=OWN)


def read_scheme(
    folder: os.PathLike[str] | str, config: Mapping[str, Any], separate: Mapping[str, Any] | None
) -> Scheme | None:
    """The scheme of a folder; None if nothing is quantised.

    Args:
      folder: for messages.
      config: what config.json holds.
      separate: what hf_quant_config.json holds, if it is there.

    Raises:
      CheckpointError: if the scheme is unknown, contradicts itself or makes no sense.
    """
    where = os.path.join(folder, "config.json")
    inside = _quantization(config)
    try:
        scheme = None if inside is None else _checked(_parse(where, inside))
        if separate is None:
            return scheme
        where = os.path.join(folder, "hf_quant_config.json")
        other = _checked(_modelopt(where, separate))
    except (TypeError, AttributeError, KeyError, re.error) as error:
        raise CheckpointError(
            where, f"quantization makes no sense: {type(error).__name__}: {error}"
        ) from error
    if inside is None or scheme == other:
        return other
    if scheme is None or other is None or scheme.algorithms != other.algorithms:
        raise CheckpointError(
            where, f"declares {other or 'nothing quantised'}, but config.json {scheme or 'nothing'}"
        )
    return other


def _checked(scheme: Scheme | None) -> Scheme | None:
    if scheme is not None:
        scheme.excludes("")  # compiles the patterns
    return scheme


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for place in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key) is not None:
                return place[key]
    return None


def _parse(where: str, quantization: Mapping[str, Any]) -> Scheme | None:
    method = quantization.get("quant_method")
    producer = quantization.get("producer") or {}
    if method is None and producer.get("name") == "modelopt":
        method = "modelopt"
    if method is None:
        raise CheckpointError(
            where, f"quantization_config has no quant_method; {_READABLE}; name the one it is"
        )
    if method not in _PARSERS:
        raise CheckpointError(
            where, f"quantization method {method!r} is not supported; {_READABLE}; convert it"
        )
    return _PARSERS[method](where, quantization)


def _refuse(where: str, method: str, what: str) -> CheckpointError:
    return CheckpointError(where, f"{method} with {what} is not supported; {_READABLE}; convert it")


def _names(where: str, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(where, f"{key} must be a list of strings, got {value!r}")
    return tuple(value)


def _modelopt(where: str, quantization: Mapping[str, Any]) -> Scheme | None:
    details = quantization.get("quantization", quantization)
    algorithm = details.get("quant_algo")
    if algorithm is None:
        return None  # at most the KV cache is quantised
    layers = details.get("quantized_layers") or {}
    declared = list(layers.values()) if algorithm == "MIXED_PRECISION" else [details]
    algorithms = tuple(sorted({str(layer.get("quant_algo")).upper() for layer in declared}))
    for layer in declared:
        name = str(layer.get("quant_algo")).upper()
        if name not in _MODELOPT:
            raise _refuse(where, "modelopt", f"quant_algo {layer.get('quant_algo')!r}")
        format = _MODELOPT[name][0].format
        group = layer.get("group_size")
        if format is not None and group not in (None, format.block_size):
            raise _refuse(where, "modelopt", f"{name} in groups of {group!r}")
    if not algorithms:
        raise CheckpointError(where, "MIXED_PRECISION needs quantized_layers, which is missing")
    key = "exclude_modules" if "exclude_modules" in details else "ignore"
    arithmetic = {_MODELOPT[name][1] for name in algorithms if _MODELOPT[name][0] != MODELOPT_FP8}
    return Scheme(
        "modelopt",
        algorithms,
        arithmetic.pop() if len(arithmetic) == 1 else None,
        os.path.basename(where),
        _names(where, key, details.get(key) or []),
        tuple(dict.fromkeys(_MODELOPT[name][0] for name in algorithms)),
    )


def _compressed_tensors(where: str, quantization: Mapping[str, Any]) -> Scheme | None:
    method = "compressed-tensors"
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        raise _refuse(where, method, f"quantization_status {status!r}")
    if quantization.get("transform_config"):
        raise _refuse(where, method, "transform_config (rotated weights)")
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refuse(where, method, f"sparsity format {sparsity!r}")
    groups = list((quantization.get("config_groups") or {}).values())
    formats: dict[str, None] = {}
    arithmetic = set()
    for group in groups:
        format = group.get("format") or quantization.get("format")
        weights = group.get("weights")
        if weights is None:
            continue
        if format not in _PACKED:
            raise _refuse(where, method, f"format {format!r}")
        size = _PACKED[format].format.block_size  # type: ignore[union-attr]
        expected = {"num_bits": 4, "type": "float", "group_size": size, "symmetric": True}
        for key, value in expected.items():
            if weights.get(key, value) != value:
                raise _refuse(where, method, f"{format} and {key} {weights[key]!r}")
        formats[format] = None
        activations = group.get("input_activations")
        arithmetic.add("w4a16" if activations is None else f"w4a{activations.get('num_bits')}")
    if not formats:
        return None
    exclude = _names(where, "ignore", quantization.get("ignore") or [])
    return Scheme(
        method,
        tuple(formats),
        arithmetic.pop() if len(arithmetic) == 1 else None,
        os.path.basename(where),
        exclude,
        tuple(_PACKED[format] for format in formats),
    )


def _not_converted(where: str, quantization: Mapping[str, Any]) -> tuple[str, ...]:
    key = "modules_to_not_convert"
    return _names(where, key, quantization.get(key) or [])


def _mxfp4(where: str, quantization: Mapping[str, Any]) -> Scheme:
    exclude = _not_converted(where, quantization)
    return Scheme("mxfp4", ("MXFP4",), None, os.path.basename(where), exclude, (GPT_OSS,))


def _fp8(where: str, quantization: Mapping[str, Any]) -> Scheme:
    block = quantization.get("weight_block_size")
    if block is None:
        raise _refuse(where, "fp8", "no weight_block_size")
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(n) is int and n > 0 for n in block)
    ):
        raise CheckpointError(where, f"weight_block_size must be two sizes, got {block!r}")
    element = quantization.get("fmt", "e4m3")
    if element not in ("e4m3", "float8_e4m3fn"):
        raise _refuse(where, "fp8", f"fmt {element!r}")
    return Scheme(
        "fp8",
        ("FP8",),
        None,
        os.path.basename(where),
        _not_converted(where, quantization),
        (BLOCK_FP8,),
        (block[0], block[1]),
    )


_PARSERS = {
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "modelopt_mixed": _modelopt,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
    "fp8": _fp8,
}


def _wildcard(pattern: str) -> str:
    return fnmatch.translate(pattern)


def _exact_or_regex(pattern: str) -> str:
    return pattern[3:] if pattern.startswith("re:") else rf"{re.escape(pattern)}\Z"


def _first_or_last_parts(pattern: str) -> str:
    """A regular expression for the first parts of a name, or the last parts literally."""
    return rf"(?:{pattern})(?:\.|\Z)|(?:.*\.)?{re.escape(pattern)}\Z"


# How each method's patterns for modules read as regular expressions from the start of a name.
_LANGUAGE = {
    "modelopt": _wildcard,
    "compressed-tensors": _exact_or_regex,
    "mxfp4": _first_or_last_parts,
    "fp8": _first_or_last_parts,
    "jaxmoe": _exact_or_regex,
}
