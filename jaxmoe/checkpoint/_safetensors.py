"""The safetensors format: headers checked before anything believes them, files written atomically.

A safetensors file is an 8-byte little-endian header length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). It is read and written here with NumPy alone:
the NumPy bindings of the `safetensors` package have no type for e8m0 scales, and a damaged file
should be refused with its name and the cause.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
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
    }.items()
}
"""NumPy's dtype for each name of the format."""

DTYPE_NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"

_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_ALIGNMENT = 8  # bytes of the widest dtype


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint. The message names the file and the cause."""

    def __init__(self, path: os.PathLike[str] | str, cause: str):
        super().__init__(f"{os.fspath(path)}: {cause}")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """What a file holds: its tensors, in the order of the header, and the metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int
    """Offset of the first tensor."""


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


def open_file(path: os.PathLike[str] | str) -> BinaryIO:
    """Opens a file to read; what goes wrong is a `CheckpointError`."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error


def read_header(file: BinaryIO, path: os.PathLike[str] | str) -> Header:
    """Reads the header of an open file, and checks that the file's size fits it.

    Raises:
      CheckpointError: if the file is truncated, corrupt or no safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    if len(first) < 8:
        raise CheckpointError(path, f"truncated safetensors file: only {size} bytes")
    (length,) = struct.unpack("<Q", first)
    if length > _LARGEST_HEADER:
        raise CheckpointError(path, f"not a safetensors file: its header would have {length} bytes")
    start = 8 + length
    if size < start:
        raise CheckpointError(
            path, f"truncated safetensors file: the header needs {start} bytes, there are {size}"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        metadata = {str(k): str(v) for k, v in header.pop(METADATA, {}).items()}
        entries = {name: _entry(name, value, start) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            path, f"corrupt safetensors header: {type(error).__name__}: {error}"
        ) from error
    end = start
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].offset, e[1].nbytes)):
        needed = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if entry.offset != end or entry.nbytes != needed:
            raise CheckpointError(
                path,
                f"corrupt safetensors header: tensor {name!r} of {entry.dtype} and shape "
                f"{list(entry.shape)} cannot lie at bytes {entry.offset - start} to "
                f"{entry.offset - start + entry.nbytes}",
            )
        end += needed
    if size != end:
        state = "truncated" if size < end else "corrupt"
        raise CheckpointError(
            path,
            f"{state} safetensors file: the header describes {end} bytes, there are {size}",
        )
    return Header(entries, metadata, start)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands there twice")
    return made


def _entry(name: str, value: Mapping[str, Any], start: int) -> Entry:
    first, last = value["data_offsets"]
    numbers = [first, last, *value["shape"]]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"tensor {name!r} has a shape or an offset that is no natural number")
    if value["dtype"] not in DTYPES:
        raise KeyError(value["dtype"])
    return Entry(value["dtype"], tuple(value["shape"]), start + first, last - first)


def layout_of(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[Header, bytes]:
    """Places tensors in a new file.

    Args:
      tensors: dtype and shape by name.
      metadata: for the header.

    Returns:
      The header, and the bytes that the file begins with.
    """
    placed: dict[str, tuple[int, int]] = {}
    end = 0
    # Wide types first keeps every tensor aligned to its own type.
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
        dtype, shape = tensors[name]
        size = math.prod(shape) * DTYPES[dtype].itemsize
        placed[name] = (end, size)
        end += size
    described = {
        name: {
            "dtype": tensors[name][0],
            "shape": list(tensors[name][1]),
            "data_offsets": [offset, offset + size],
        }
        for name, (offset, size) in placed.items()
    }
    text = json.dumps({METADATA: dict(metadata), **described}).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    entries = {n: Entry(*tensors[n], start + offset, size) for n, (offset, size) in placed.items()}
    return Header(entries, metadata, start), struct.pack("<Q", len(text)) + text


def bytes_of(array: Any) -> memoryview:
    """The bytes of an array as a file holds them."""
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data
