"""How a module's weight is stored: the names of its parts, what they are, and how they are read.

One row of `Storage` for each convention; reading and writing use the same rows. The names and
meanings were taken from what the tools themselves write (nvidia-modelopt 0.47, compressed-tensors
0.20, transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.checkpoint._safetensors import Entry
from jaxmoe.formats import FLOAT8_E4M3, MXFP4, NVFP4, Format
from jaxmoe.quantization import QuantizedTensor

FLOATS = ("F64", "F32", "F16", "BF16")
_POWERS = ("U8", "F8_E8M0")  # e8m0, also as the bits
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8_E4M3).astype(np.float32)


@dataclass(frozen=True)
class Storage:
    """One convention of storing a weight `[N, K]`, or a stack `[E, N, K]`, in several tensors.

    Args:
      name: for messages.
      format: of the weight; None for one that is dequantised when it is read (FP8).
      data, data_dtype: what the name of the elements' tensor ends with, and its dtype.
      scale, scale_dtypes: the same of the block scales.
      global_scale: the same of the f32 factor of the whole matrix; None where there is none.
      input_scale: the same of the activations' f32 scale, which need not be there.
      inverse: whether the two f32 scales are stored as their reciprocals.
    """

    name: str
    format: Format | None
    data: str
    data_dtype: str
    scale: str
    scale_dtypes: tuple[str, ...]
    global_scale: str | None = None
    input_scale: str | None = None
    inverse: bool = False


MODELOPT_NVFP4 = Storage(
    "ModelOpt NVFP4", NVFP4, ".weight", "U8", ".weight_scale", ("F8_E4M3",),
    ".weight_scale_2", ".input_scale",
)  # fmt: skip
MODELOPT_MXFP4 = Storage(
    "ModelOpt MXFP4", MXFP4, ".weight", "U8", ".weight_scale", _POWERS, input_scale=".input_scale"
)
MODELOPT_FP8 = Storage(
    "ModelOpt FP8", None, ".weight", "F8_E4M3", ".weight_scale", ("F32",),
    input_scale=".input_scale",
)  # fmt: skip
PACKED_NVFP4 = Storage(
    "compressed-tensors NVFP4", NVFP4, ".weight_packed", "U8", ".weight_scale", ("F8_E4M3",),
    ".weight_global_scale", ".input_global_scale", inverse=True,
)  # fmt: skip
PACKED_MXFP4 = Storage(
    "compressed-tensors MXFP4", MXFP4, ".weight_packed", "U8", ".weight_scale", _POWERS
)
GPT_OSS = Storage("gpt-oss MXFP4", MXFP4, "_blocks", "U8", "_scales", _POWERS)
BLOCK_FP8 = Storage(
    "block-scaled FP8",
    None,
    ".weight",
    "F8_E4M3",
    ".weight_scale_inv",
    ("F32", "F16", "BF16", "F8_E8M0"),
)
OWN = tuple(
    Storage(
        f"jaxmoe {format}", format, f"{module}.data", "U8", f"{module}.scale", dtypes,
        f"{module}.global_scale" if format.has_global_scale else None,
    )
    for format, dtypes in ((NVFP4, ("F8_E4M3",)), (MXFP4, ("F8_E8M0",)))
    for module in (".weight", "")
)  # fmt: skip


class StorageError(ValueError):
    """A weight whose parts do not fit together; `tensor` is the one to name."""

    def __init__(self, tensor: str, cause: str):
        super().__init__(cause)
        self.tensor = tensor


def check_parts(
    storage: Storage, module: str, entries: Mapping[str, Entry], block: tuple[int, int]
) -> None:
    """Raises a StorageError unless all parts are there with dtypes and shapes that fit.

    Args:
      storage: the convention.
      module: the weight's name without the part's ending.
      entries: all tensors of the folder.
      block: rows and columns that share a scale, for block-scaled FP8.
    """
    data = module + storage.data
    scale = module + storage.scale
    needed = [scale]
    if storage.global_scale is not None:
        needed.append(module + storage.global_scale)
    for name in needed:
        if name not in entries:
            raise StorageError(data, f"is {storage.name} and needs {name!r}, which is missing")
    entry = entries[data]
    if entry.dtype != storage.data_dtype:
        raise StorageError(data, f"must be {storage.data_dtype} for {storage.name}, got {entry}")
    rows = 3 if storage is GPT_OSS else 2
    if len(entry.shape) < rows or 0 in entry.shape:
        raise StorageError(data, f"must have shape [..., N, K], got {entry}")
    expected = _scale_shape(storage, entry.shape, block)
    if expected is None:
        assert storage.format is not None
        raise StorageError(
            data,
            f"must hold whole blocks of {storage.format.block_size} elements a row, got {entry}",
        )
    found = entries[scale]
    if found.dtype not in storage.scale_dtypes or found.shape not in expected:
        dtypes = " or ".join(storage.scale_dtypes)
        raise StorageError(
            scale, f"must be {dtypes}{list(expected[0])} to go with {data!r} = {entry}, got {found}"
        )
    for ending, leading in ((storage.global_scale, entry.shape[:-2]), (storage.input_scale, ())):
        scalar = entries.get(module + ending) if ending is not None else None
        allowed = (leading, (*leading, 1))
        if scalar is not None and (scalar.dtype != "F32" or scalar.shape not in allowed):
            raise StorageError(f"{module}{ending}", f"must be F32{list(leading)}, got {scalar}")


def _scale_shape(
    storage: Storage, shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[tuple[int, ...], ...] | None:
    """The shapes that the block scales may have; None if there is none that would fit."""
    *rows, last = shape
    if storage is MODELOPT_FP8:
        return ((), (1,))
    if storage.format is None:
        return ((*rows[:-1], -(-rows[-1] // block[0]), -(-last // block[1])),)
    size = storage.format.block_size
    assert size is not None
    if storage is GPT_OSS:
        return (tuple(rows),) if 2 * last == size else None
    return ((*rows, 2 * last // size),) if 2 * last % size == 0 else None


Read = Callable[[str], np.ndarray]


def read_weight(
    storage: Storage, module: str, read: Read, block: tuple[int, int], dtype: Any
) -> QuantizedTensor | np.ndarray:
    """Reads a weight whose parts `check_parts` has passed, and checks the values of its scales.

    Args:
      storage: the convention.
      module: the weight's name without the part's ending.
      read: gives a tensor by name; for stacks, what belongs to one expert.
      block: rows and columns that share a scale, for block-scaled FP8.
      dtype: of a weight that is dequantised.

    Returns:
      A `QuantizedTensor` with NumPy leaves, or the dequantised weight.
    """
    data_name, scale_name = module + storage.data, module + storage.scale
    data, scale = read(data_name), read(scale_name)
    if storage.format is None:
        return _dequantize(data, scale, block, dtype, data_name, scale_name)
    if storage is GPT_OSS:
        data = data.reshape(*data.shape[:-2], -1)
    _check_scale(storage.format, data, scale, scale_name)
    global_scale = None
    if storage.global_scale is not None:
        name = module + storage.global_scale
        global_scale = _decoded(read(name), storage.inverse, name).reshape(data.shape[:-2])
    assert storage.format.scale is not None
    return QuantizedTensor(data, scale.view(storage.format.scale), global_scale, storage.format)


def read_input_scale(storage: Storage, module: str, read: Read) -> np.float32:
    """The activations' scale as a factor of the decoded value; the tensor must be there."""
    assert storage.input_scale is not None
    name = module + storage.input_scale
    return np.float32(_decoded(read(name), storage.inverse, name).reshape(()))


def _decoded(value: np.ndarray, inverse: bool, name: str) -> np.ndarray:
    if not (np.isfinite(value).all() and (value > 0).all()):
        raise StorageError(name, f"must be finite and > 0, got {_worst(value)}")
    if not inverse:
        return value
    with np.errstate(over="ignore"):
        decoded = np.float32(1) / value
    if not np.isfinite(decoded).all():
        raise StorageError(name, f"must have a finite reciprocal, got {_worst(value)}")
    return np.asarray(decoded, np.float32)


def _worst(value: np.ndarray) -> float:
    bad = value[~(np.isfinite(value) & (value > 0))]
    return float(bad.reshape(-1)[0] if bad.size else value.reshape(-1)[0])


def _check_scale(format: Format, data: np.ndarray, scale: np.ndarray, name: str) -> None:
    bits = scale.view(np.uint8)
    if format.scale != FLOAT8_E4M3:
        if (bits == 0xFF).any():
            raise StorageError(name, f"has {(bits == 0xFF).sum()} of {bits.size} scales NaN (0xFF)")
        return
    if bad := int((bits >= 0x7F).sum()):
        raise StorageError(name, f"has {bad} of {bits.size} scales NaN or negative")
    if (zero := bits == 0).any():
        assert format.block_size is not None
        blocks = data.reshape(*bits.shape, format.block_size // 2)[zero]
        if bad := int((blocks & 0x77 != 0).any(-1).sum()):
            raise StorageError(name, f"has {bad} scales of 0 for blocks with other elements")


def _dequantize(
    data: np.ndarray,
    scale: np.ndarray,
    block: tuple[int, int],
    dtype: Any,
    data_name: str,
    scale_name: str,
) -> np.ndarray:
    """FP8 times the scale of its block, in f32, then `dtype`."""
    factor = scale.astype(np.float32)
    if not (np.isfinite(factor).all() and (factor >= 0).all()):
        raise StorageError(scale_name, "must be finite and not negative everywhere")
    bits = data.view(np.uint8)
    if bad := int((bits & 0x7F == 0x7F).sum()):
        raise StorageError(data_name, f"has {bad} of {bits.size} elements NaN")
    if scale.size > 1:
        for axis in (-2, -1):
            factor = np.repeat(factor, block[axis], axis)
        factor = factor[..., : data.shape[-2], : data.shape[-1]]
    values = _E4M3_VALUES[bits]
    if (factor == 0).any() and ((values != 0) & (factor == 0)).any():
        raise StorageError(scale_name, "is 0 for a block that has other elements")
    values *= factor
    return values.astype(dtype)
