"""A model as a folder: its shape, what all formats share, and the experts once per format.

config.json                   the fields of `DecoderConfig`
decoder.safetensors           embeddings, attention, norms, routers
experts-<format>.safetensors  the experts' matrices, e.g. experts-nvfp4.safetensors
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe import checkpoint
from jaxmoe.checkpoint import CheckpointError
from jaxmoe.formats import FORMATS, get_format
from jaxmoe.models._config import DecoderConfig
from jaxmoe.models._decoder import Decoder
from jaxmoe.nn._variables import value as variable_value
from jaxmoe.quantization import QuantizedTensor

_CONFIG = "config.json"
_DECODER = "decoder.safetensors"
_MODEL_TYPE = "jaxmoe-decoder"
_EXPERT_LEAVES = ("gate_up", "down")

Path_: TypeAlias = tuple[Any, ...]


def _experts_file(weight_format: str) -> str:
    return f"experts-{weight_format}.safetensors"


def bundled() -> Path:
    """Returns the folder of the small model that comes with the package (see its README.md).

    >>> bundled().name
    'tiny'
    """
    return Path(__file__).parents[1] / "data" / "tiny"


def is_own(folder: str | os.PathLike[str]) -> bool:
    """Whether `load` is to read a folder, and not `load_pretrained`.

    >>> is_own(bundled())
    True
    """
    folder = Path(folder)
    return (folder / _DECODER).exists() or not (folder / _CONFIG).exists()


def available_formats(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the names of the formats in which a folder holds the experts.

    >>> "nvfp4" in available_formats(bundled())                                # doctest: +SKIP
    True
    """
    return tuple(name for name in FORMATS if (Path(folder) / _experts_file(name)).is_file())


def _names(path: Path_, model: Decoder) -> list[str]:
    """The tensors of a variable: one, or one for each of the layers that it stacks."""
    if path[0] != "layers":
        return [".".join(map(str, path))]
    # ("layers", "stacks", number, "blocks", block, ...)
    stack, rest = model.layers.stacks[path[2]], path[5:]
    before = sum(s.count * len(s.blocks) for s in model.layers.stacks[: path[2]])
    indices = (before + path[4] + i * len(stack.blocks) for i in range(stack.count))
    return [".".join(("layers", str(i), *map(str, rest))) for i in indices]


def _join(tensors: list[Any], expected: Any) -> Any:
    """The value of a variable from its tensors; in NumPy, where nothing has to be compiled."""

    def one(expected: Any, *arrays: Any) -> jax.Array:
        host = [np.asarray(array) for array in arrays]
        joined = np.stack(host) if len(host) > 1 else host[0]
        return jax.device_put(joined.astype(expected.dtype))

    return jax.tree.map(one, expected, *tensors)


def _is_expert(path: Path_) -> bool:
    return path[-1] in _EXPERT_LEAVES


def _variables(model: Decoder) -> dict[Path_, nnx.Variable]:
    flat: Any = nnx.to_flat_state(nnx.state(model))
    return dict(flat)


def save(model: Decoder, folder: str | os.PathLike[str], *, dtype: Any = jnp.bfloat16) -> None:
    """Writes a model, or one more format of a model that the folder holds already.

    >>> save(model, "tiny")                                                    # doctest: +SKIP
    >>> save(jaxmoe.nn.quantize(model, "nvfp4"), "tiny")                       # doctest: +SKIP

    Each file is replaced atomically.

    Args:
      model: with canonical weights, that is before `jaxmoe.nn.prepare`.
      folder: made if it does not exist.
      dtype: in which unquantised weights are stored.

    Raises:
      ValueError: if the weights are in the layout of one kernel, or the layers are not alike.
    """
    if not isinstance(model.config, DecoderConfig):
        raise ValueError(
            "model must be of equal layers, made from a DecoderConfig, got one with an "
            "Architecture; `jaxmoe quantize` converts checkpoints of other models"
        )
    folder = Path(folder)
    parts: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for path, variable in _variables(model).items():
        value = variable_value(variable)
        if isinstance(value, jax.Array):
            value = value.astype(dtype)
        elif not isinstance(value, QuantizedTensor):
            raise ValueError(
                f"model must have canonical weights, got {type(value).__name__} for "
                f"{'.'.join(map(str, path))}; save the model that prepare() was called on"
            )
        names = _names(path, model)
        each = [value[i] for i in range(len(names))] if len(names) > 1 else [value]
        parts[_is_expert(path)].update(zip(names, each, strict=True))
    formats = {
        value.format.name if isinstance(value, QuantizedTensor) else "bf16"
        for value in parts[True].values()
    }
    if len(formats) != 1:
        raise ValueError(
            f"all layers must have one weight format, got {', '.join(sorted(formats))}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / _experts_file(formats.pop()), parts[True])
    checkpoint.save(folder / _DECODER, parts[False])
    config = {"model_type": _MODEL_TYPE, **model.config.to_dict()}
    with checkpoint.atomic_write(folder / _CONFIG) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def _read_config(folder: Path) -> DecoderConfig:
    path = folder / _CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("model_type", None) != _MODEL_TYPE:
            raise ValueError(f"model_type must be {_MODEL_TYPE!r}")
        return DecoderConfig.from_dict(values)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(path, f"not the config of a decoder: {error}") from error


def load(
    folder: str | os.PathLike[str],
    weight_format: str | None = None,
    *,
    experts: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    attention: Literal["xla", "cudnn"] | None = None,
) -> Decoder:
    """Reads a model from a folder that `save` wrote.

    >>> model = load(bundled(), "nvfp4")                                       # doctest: +SKIP

    The weights are canonical: `jaxmoe.nn.prepare(model)` arranges them for this machine's kernel.

    Args:
      folder: of the model.
      weight_format: of the experts; by default the first that the folder has, in the order
        nvfp4, mxfp4, mxfp8, fp8, bf16.
      experts: folder of the experts' file, if it is not in `folder`.
      dtype: dtype of activations, and of the weights that are not experts'; by default float32 on a
        CPU, where XLA widens bfloat16 products anyway, and bfloat16 elsewhere.
      attention: as for `Decoder`.

    Raises:
      CheckpointError: if a file is missing, damaged or does not belong to the config.
      ValueError: for an unknown format.
    """
    folder = Path(folder)
    experts = folder if experts is None else Path(experts)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config = _read_config(folder)
    if weight_format is None:
        formats = available_formats(experts)
        if not formats:
            raise CheckpointError(experts, f"holds no {_experts_file('<format>')}")
        weight_format = formats[0]
    weight_format = get_format(weight_format).name
    files = {True: experts / _experts_file(weight_format), False: folder / _DECODER}
    if not files[True].is_file() and (formats := available_formats(experts)):
        raise CheckpointError(files[True], f"missing; the folder has {', '.join(formats)}")
    tensors = {expert: checkpoint.load(path) for expert, path in files.items()}

    model = nnx.eval_shape(
        lambda: Decoder(
            config,
            weight_format=weight_format,
            attention=attention,
            dtype=dtype,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )
    )
    found: dict[Path_, list[Any]] = {}
    variables = _variables(model)
    for path, variable in variables.items():
        names, expected = _names(path, model), variable_value(variable)
        shape = tuple(expected.shape)[1 if len(names) > 1 else 0 :]
        file, rest = files[_is_expert(path)], tensors[_is_expert(path)]
        for name in names:
            if name not in rest:
                raise CheckpointError(file, f"lacks tensor {name!r}")
            value = rest.pop(name)
            if tuple(value.shape) != shape or isinstance(value, QuantizedTensor) != isinstance(
                expected, QuantizedTensor
            ):
                raise CheckpointError(
                    file,
                    f"tensor {name!r} must be {type(expected).__name__} of shape {shape}, got "
                    f"{type(value).__name__} of {tuple(value.shape)}",
                )
            found.setdefault(path, []).append(value)
    for expert, rest in tensors.items():
        if rest:
            raise CheckpointError(files[expert], f"tensor {min(rest)!r} is not part of the model")
    filled: Any = {
        path: variables[path].replace(_join(values, variable_value(variables[path])))
        for path, values in found.items()
    }
    nnx.update(model, nnx.from_flat_state(filled))
    return model
