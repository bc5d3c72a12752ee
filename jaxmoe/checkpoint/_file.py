"""One file of `QuantizedTensor`s and plain arrays, in jaxmoe's own layout.

A `QuantizedTensor` called `w` is stored as `w.data` (U8, two elements a byte for FP4), `w.scale`
and `w.global_scale`, as far as its format has them; which names are quantised, and how, stands in
the header's metadata under `quantized`. Files written here open in the `safetensors` package.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxmoe.checkpoint._safetensors import (
    DTYPE_NAMES,
    DTYPES,
    CheckpointError,
    Entry,
    Header,
    atomic_write,
    bytes_of,
    layout_of,
    open_file,
    read_header,
)
from jaxmoe.formats import FORMATS, get_format
from jaxmoe.quantization import QuantizedTensor

PARTS = ("data", "scale", "global_scale")


def _flatten(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Stored arrays by name, and the format of each quantised tensor by name."""
    arrays: dict[str, Any] = {}
    formats = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            formats[name] = tensor.format.name
            data = tensor.packed() if tensor.format.is_fp4 else tensor.data
            parts = (data, tensor.scale, tensor.global_scale)
            new = {f"{name}.{p}": a for p, a in zip(PARTS, parts, strict=True) if a is not None}
        else:
            new = {name: tensor}
        if clash := arrays.keys() & new.keys():
            raise ValueError(f"two tensors would be stored as {min(clash)!r}; rename one of them")
        arrays.update(new)
    for name, array in arrays.items():
        if np.dtype(array.dtype) not in DTYPE_NAMES:
            raise ValueError(
                f"tensors[{name!r}] has dtype {array.dtype}, which safetensors cannot hold; use "
                f"one of {', '.join(str(dtype) for dtype in DTYPE_NAMES)}, or a QuantizedTensor"
            )
    return arrays, formats


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
    checksum = 0
    stored = {n: (DTYPE_NAMES[np.dtype(a.dtype)], tuple(a.shape)) for n, a in arrays.items()}
    order = list(layout_of(stored, {})[0].entries)
    for name in order:
        checksum = zlib.crc32(bytes_of(arrays[name]), checksum)
    own = {"quantized": json.dumps(formats, sort_keys=True), "crc32": f"{checksum:08x}"}
    if taken := own.keys() & (metadata or {}).keys():
        raise ValueError(f"metadata must not use the key {min(taken)!r}, which jaxmoe writes")
    _, beginning = layout_of(stored, {**(metadata or {}), **own})
    with atomic_write(path) as file:
        file.write(beginning)
        for name in order:
            file.write(bytes_of(arrays[name]))


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
    with open_file(path) as file:
        return dict(read_header(file, path).metadata)


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
    with open_file(path) as file:
        header = read_header(file, path)
        formats = quantized_formats(path, header)
        known = _logical_names(header.entries, formats)
        wanted = known if names is None else list(names)
        for name in wanted:
            if name not in known:
                raise CheckpointError(path, f"holds no tensor {name!r}, only {', '.join(known)}")
        if names is None and "crc32" in header.metadata:
            _verify(file, path, header)

        def read(name: str) -> jax.Array:
            entry = header.entries[name]
            file.seek(entry.offset)
            flat = np.frombuffer(file.read(entry.nbytes), DTYPES[entry.dtype])
            return jax.device_put(flat.reshape(entry.shape))  # compiles nothing

        return {
            name: _quantized(path, name, formats[name], header.entries, read)
            if name in formats
            else read(name)
            for name in wanted
        }


def quantized_formats(path: os.PathLike[str] | str, header: Header) -> dict[str, str]:
    """The format of each quantised tensor that a file of jaxmoe's layout declares, by name.

    Raises:
      CheckpointError: if the declaration makes no sense, or parts are missing.
    """
    try:
        formats = dict(json.loads(header.metadata.get("quantized", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(path, f"corrupt metadata 'quantized': {error}") from error
    for name, format in formats.items():
        if not isinstance(format, str) or format not in FORMATS:
            raise CheckpointError(
                path, f"tensor {name!r} has format {format!r}; known are {', '.join(FORMATS)}"
            )
        spec = get_format(format)
        present = (True, spec.scale is not None, spec.has_global_scale)
        for part, expected in zip(PARTS, present, strict=True):
            if (f"{name}.{part}" in header.entries) != expected:
                state = "lacks" if expected else "must not have"
                raise CheckpointError(path, f"{format} tensor {name!r} {state} {name}.{part}")
    return formats


def _logical_names(entries: Mapping[str, Entry], formats: Mapping[str, str]) -> list[str]:
    parts = {f"{name}.{part}" for name in formats for part in PARTS}
    return sorted([name for name in entries if name not in parts] + list(formats))


def _verify(file: BinaryIO, path: os.PathLike[str] | str, header: Header) -> None:
    file.seek(header.start)
    checksum, expected = 0, header.metadata["crc32"]
    while block := file.read(1 << 24):
        checksum = zlib.crc32(block, checksum)
    if f"{checksum:08x}" != expected:
        raise CheckpointError(
            path, f"corrupt safetensors file: its checksum is {checksum:08x}, not {expected}"
        )


def _quantized(
    path: os.PathLike[str] | str,
    name: str,
    format: str,
    entries: Mapping[str, Entry],
    read: Callable[[str], jax.Array],
) -> QuantizedTensor:
    parts = {part: read(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in entries}
    try:
        return QuantizedTensor.create(format, **parts, name=name)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
