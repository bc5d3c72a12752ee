"""Safetensors files of `QuantizedTensor`s and plain arrays.

A safetensors file is an 8-byte little-endian header length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). It is read and written here with NumPy alone:
the NumPy bindings of the `safetensors` package have no type for e8m0 scales, and a damaged file
should be refused with its name and the cause. Files written here open in that package.

A `QuantizedTensor` called `w` is stored as `w.data` (U8, two elements a byte for FP4), `w.scale`
and `w.global_scale`, as far as its format has them; which names are quantised, and how, stands in
the header's metadata under `quantized`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np

from jaxmoe.formats import FORMATS, get_format
from jaxmoe.quantization import QuantizedTensor

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_PARTS = ("data", "scale", "global_scale")
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint. The message names the file and the cause."""

    def __init__(self, path: os.PathLike[str] | str, cause: str):
        super().__init__(f"{os.fspath(path)}: {cause}")


@contextlib.contextmanager
def atomic_write(path: os.PathLike[str] | str) -> Iterator[BinaryIO]:
    """Opens a binary file that takes its name only when it is complete.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "greeting"
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"hello")
    >>> path.read_bytes()
    b'hello'

    If the block raises, or the process dies, whatever stood under the name before is untouched.

    Args:
      path: the file to write; its folder must exist.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes private files; give this one the usual permissions
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _flatten(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Stored arrays by name, and the format of each quantised tensor by name."""
    arrays: dict[str, Any] = {}
    formats = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            formats[name] = tensor.format.name
            data = tensor.packed() if tensor.format.is_fp4 else tensor.data
            parts = (data, tensor.scale, tensor.global_scale)
            new = {f"{name}.{p}": a for p, a in zip(_PARTS, parts, strict=True) if a is not None}
        else:
            new = {name: tensor}
        if clash := arrays.keys() & new.keys():
            raise ValueError(f"two tensors would be stored as {min(clash)!r}; rename one of them")
        arrays.update(new)
    for name, array in arrays.items():
        if np.dtype(array.dtype) not in _NAMES:
            raise ValueError(
                f"tensors[{name!r}] has dtype {array.dtype}, which safetensors cannot hold; use "
                f"one of {', '.join(str(dtype) for dtype in _NAMES)}, or a QuantizedTensor"
            )
    return arrays, formats


def _host(array: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)


def save(
    path: os.PathLike[str] | str,
    tensors: Mapping[str, QuantizedTensor | jax.Array | np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to a safetensors file, atomically.

    >>> import jax, jaxmoe, tempfile
    >>> w = jaxmoe.quantize(jax.random.normal(jax.random.key(0), (4, 64, 32)), "nvfp4")
    >>> path = tempfile.mkdtemp() + "/w.safetensors"
    >>> save(path, {"experts.down": w})
    >>> load(path)["experts.down"].format.name
    'nvfp4'

    The same tensors give the same bytes.

    Args:
      path: the file to write; its folder must exist.
      tensors: the tensors by name.
      metadata: strings to keep in the header; `quantized` and `crc32` are taken.

    Raises:
      ValueError: if a dtype cannot be stored, two names clash or a metadata key is taken.
    """
    arrays, formats = _flatten(tensors)
    # Wide types first keeps every tensor aligned to its own type.
    names = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    checksum = 0
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        array = arrays[name]
        checksum = zlib.crc32(_host(array).data, checksum)
        start, end = end, end + math.prod(array.shape) * np.dtype(array.dtype).itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    own = {"quantized": json.dumps(formats, sort_keys=True), "crc32": f"{checksum:08x}"}
    if taken := own.keys() & (metadata or {}).keys():
        raise ValueError(f"metadata must not use the key {min(taken)!r}, which jaxmoe writes")
    text = json.dumps({"__metadata__": {**(metadata or {}), **own}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            file.write(_host(arrays[name]).data)


def _read_header(file: BinaryIO, path: os.PathLike[str] | str) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset of the first tensor; the file's size fits them."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise CheckpointError(path, f"truncated safetensors file: only {size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > _LARGEST_HEADER:
        raise CheckpointError(path, f"not a safetensors file: its header would have {length} bytes")
    if size < 8 + length:
        raise CheckpointError(
            path,
            f"truncated safetensors file: the header needs {8 + length} bytes, there are {size}",
        )
    try:
        header = json.loads(file.read(length))
        end = 0
        for name, entry in sorted(
            ((n, e) for n, e in header.items() if n != "__metadata__"),
            key=lambda item: item[1]["data_offsets"],
        ):
            first, last = entry["data_offsets"]
            itemsize = np.dtype(_DTYPES[entry["dtype"]]).itemsize
            if first != end or last - first != math.prod(entry["shape"]) * itemsize:
                raise CheckpointError(
                    path,
                    f"corrupt safetensors header: tensor {name!r} of {entry['dtype']} and shape "
                    f"{entry['shape']} cannot lie at bytes {first} to {last}",
                )
            end = last
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            path, f"corrupt safetensors header: {type(error).__name__}: {error}"
        ) from error
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "corrupt"
        raise CheckpointError(
            path,
            f"{state} safetensors file: the header describes {8 + length + end} bytes, there are "
            f"{size}",
        )
    return header, 8 + length


def _open(path: os.PathLike[str] | str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error


def read_metadata(path: os.PathLike[str] | str) -> dict[str, str]:
    """Returns the strings in the header of a safetensors file, without reading the tensors.

    >>> import tempfile, numpy as np
    >>> path = tempfile.mkdtemp() + "/a.safetensors"
    >>> save(path, {"a": np.zeros(3)}, {"note": "zeros"})
    >>> read_metadata(path)["note"]
    'zeros'

    Raises:
      CheckpointError: if the file is missing, truncated or corrupt.
    """
    with _open(path) as file:
        return dict(_read_header(file, path)[0].get("__metadata__", {}))


def load(
    path: os.PathLike[str] | str, names: Iterable[str] | None = None
) -> dict[str, QuantizedTensor | jax.Array]:
    """Reads the tensors of a safetensors file.

    >>> import tempfile, numpy as np
    >>> path = tempfile.mkdtemp() + "/a.safetensors"
    >>> save(path, {"a": np.arange(3, dtype=np.int32)})
    >>> load(path)["a"]
    Array([0, 1, 2], dtype=int32)

    Args:
      path: a file that `save` wrote, or any other safetensors file.
      names: which tensors to read; all by default. The file's checksum is verified only when all
        of it is read.

    Returns:
      Arrays, and a `QuantizedTensor` for each name that the file declares quantised. 64-bit types
      become 32-bit ones unless `jax_enable_x64` is set.

    Raises:
      CheckpointError: if the file is missing, truncated or corrupt, a name is not in it, or
        quantised tensors have scales that make no sense.
    """
    with _open(path) as file:
        header, base = _read_header(file, path)
        metadata = header.pop("__metadata__", {})
        formats = _formats(path, metadata, header)
        known = _logical_names(header, formats)
        wanted = known if names is None else list(names)
        for name in wanted:
            if name not in known:
                raise CheckpointError(path, f"holds no tensor {name!r}, only {', '.join(known)}")
        if names is None and "crc32" in metadata:
            _verify(file, path, base, metadata["crc32"])

        def read(name: str) -> jax.Array:
            entry = header[name]
            first, last = entry["data_offsets"]
            file.seek(base + first)
            flat = np.frombuffer(file.read(last - first), np.dtype(_DTYPES[entry["dtype"]]))
            return jax.device_put(flat.reshape(entry["shape"]))  # compiles nothing

        return {
            name: _quantized(path, name, formats[name], header, read)
            if name in formats
            else read(name)
            for name in wanted
        }


def _formats(
    path: os.PathLike[str] | str, metadata: Mapping[str, str], header: Mapping[str, Any]
) -> dict[str, str]:
    try:
        formats = dict(json.loads(metadata.get("quantized", "{}")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, f"corrupt metadata 'quantized': {error}") from error
    for name, format in formats.items():
        if format not in FORMATS:
            raise CheckpointError(
                path, f"tensor {name!r} has format {format!r}; known are {', '.join(FORMATS)}"
            )
        spec = get_format(format)
        present = (True, spec.scale is not None, spec.has_global_scale)
        for part, expected in zip(_PARTS, present, strict=True):
            if (f"{name}.{part}" in header) != expected:
                state = "lacks" if expected else "must not have"
                raise CheckpointError(path, f"{format} tensor {name!r} {state} {name}.{part}")
    return formats


def _logical_names(header: Mapping[str, Any], formats: Mapping[str, str]) -> list[str]:
    parts = {f"{name}.{part}" for name in formats for part in _PARTS}
    return sorted([name for name in header if name not in parts] + list(formats))


def _verify(file: BinaryIO, path: os.PathLike[str] | str, base: int, expected: str) -> None:
    file.seek(base)
    checksum = 0
    while block := file.read(1 << 24):
        checksum = zlib.crc32(block, checksum)
    if f"{checksum:08x}" != expected:
        raise CheckpointError(
            path, f"corrupt safetensors file: its checksum is {checksum:08x}, not {expected}"
        )


def _quantized(
    path: os.PathLike[str] | str, name: str, format: str, header: Mapping[str, Any], read: Any
) -> QuantizedTensor:
    parts = {part: read(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in header}
    try:
        return QuantizedTensor.create(format, **parts, name=name)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
