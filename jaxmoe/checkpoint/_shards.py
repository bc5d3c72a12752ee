"""The safetensors files of a folder as one set of tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxmoe.checkpoint._safetensors import (
    DTYPES,
    CheckpointError,
    Header,
    open_file,
    read_header,
)

INDEX = ".safetensors.index.json"
SUFFIX = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OF = re.compile(r"^(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors$")


class Shard:
    """One open file: its tensors are mapped, or read into memory."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO = open_file(path)
        try:
            self.header: Header = read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise
        self._map: np.memmap | None = None

    def map(self, name: str) -> np.ndarray:
        """A read-only view of the file, in the tensor's dtype and shape."""
        entry = self.header.entries[name]
        if entry.nbytes == 0:
            return np.empty(entry.shape, DTYPES[entry.dtype])
        if self._map is None:
            self._map = np.memmap(self._file, np.uint8, "r")
        view = np.asarray(self._map)[entry.offset : entry.offset + entry.nbytes]
        return view.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The tensor in memory of its own, or what it holds at one index of its first axis."""
        entry = self.header.entries[name]
        shape, offset, nbytes = entry.shape, entry.offset, entry.nbytes
        if index is not None:
            nbytes //= shape[0]
            shape, offset = shape[1:], offset + index * nbytes
        buffer = np.empty(nbytes, np.uint8)
        done = 0
        while done < nbytes:
            size = os.preadv(self._file.fileno(), [buffer[done:].data], offset + done)
            if size == 0:
                raise CheckpointError(self.path, f"became shorter while {name!r} was read")
            done += size
        return buffer.view(DTYPES[entry.dtype]).reshape(shape)

    def close(self) -> None:
        """Closes the file; views that were handed out stay valid."""
        self._file.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: if it cannot be read, or is no object.
    """
    with open_file(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not JSON: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"must hold a JSON object, got {type(value).__name__}")
    return value


def open_shards(folder: Path) -> tuple[list[Shard], dict[str, Shard]]:
    """Opens the safetensors files of a folder; returns them, and the file of each tensor.

    With an index, the files are those that it names, and what they hold must be what it says.
    Without, all safetensors files of the folder are taken.

    Raises:
      CheckpointError: if files or tensors are missing, or a tensor is there twice.
    """
    index, mapping = _read_index(folder)
    files = sorted(set(mapping.values())) if index else _list(folder)
    shards: list[Shard] = []
    found: dict[str, Shard] = {}
    try:
        for file in files:
            if index and not (folder / file).is_file():
                missing = min(name for name, shard in mapping.items() if shard == file)
                raise CheckpointError(
                    folder / file, f"is missing, though {index} says that it holds {missing!r}"
                )
            shards.append(Shard(folder / file))
            for name in shards[-1].header.entries:
                if name in found:
                    raise CheckpointError(
                        folder / file, f"tensor {name!r} is in {found[name].path.name} too"
                    )
                found[name] = shards[-1]
        if index:
            _check_index(folder / index, mapping, found)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return shards, found


def _read_index(folder: Path) -> tuple[str, dict[str, str]]:
    """The index's file name and its map from tensor to file; "" if there is none."""
    names = sorted(path.name for path in folder.glob(f"*{INDEX}"))
    if not names:
        return "", {}
    name = f"model{INDEX}" if f"model{INDEX}" in names else names[0]
    if name != f"model{INDEX}" and len(names) > 1:
        raise CheckpointError(folder, f"holds several indices: {', '.join(names)}; keep one")
    mapping = read_json(folder / name).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(folder / name, "has no weight_map from tensors to files")
    for tensor, file in mapping.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(SUFFIX):
            raise CheckpointError(
                folder / name,
                f"must name a safetensors file of this folder for {tensor!r}, got {file!r}",
            )
    return name, mapping


def _check_index(path: Path, mapping: Mapping[str, str], found: Mapping[str, Shard]) -> None:
    for name, file in mapping.items():
        if name not in found:
            raise CheckpointError(path, f"says that {name!r} is in {file}, which lacks it")
        if found[name].path.name != file:
            raise CheckpointError(
                path, f"says that {name!r} is in {file}, but it is in {found[name].path.name}"
            )
    if extra := found.keys() - mapping.keys():
        name = min(extra)
        raise CheckpointError(path, f"lacks {name!r}, which {found[name].path.name} holds")


def _list(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    if f"model{SUFFIX}" in names:
        return [f"model{SUFFIX}"]
    if not names:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
        raise CheckpointError(
            folder,
            f"holds no safetensors file, only pickled weights ({pickled[0]}), which can run code "
            "when they are opened; convert them to safetensors"
            if pickled
            else "holds no safetensors file",
        )
    present = set(names)
    for name in names:
        if match := _OF.match(name):
            count, width = int(match["count"]), len(match["number"])
            for number in range(1, min(count, 10**5) + 1):
                other = f"{match['stem']}-{number:0{width}d}-of-{match['count']}{SUFFIX}"
                if other not in present:
                    raise CheckpointError(folder / other, f"is missing, though {name} is there")
    return names
