"""`jaxmoe inspect`: what a checkpoint folder holds, from its headers, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from jaxmoe.checkpoint import CheckpointError, Folder, open_folder
from jaxmoe.checkpoint._layouts import SHARED
from jaxmoe.checkpoint._storage import Storage
from jaxmoe.cli._console import out, say, table
from jaxmoe.quantization import QuantizedTensor


@dataclasses.dataclass
class Row:
    """Tensors whose names differ in numbers alone, and which are alike."""

    name: str
    format: str
    shape: tuple[int, ...]
    count: int = 0
    nbytes: int = 0


def inspect(*, folder: Path, deep: bool, as_json: bool) -> None:
    """Prints the report; exits with 1 if something is wrong."""
    with open_folder(folder) as opened:
        report = examine(opened, deep)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    if report["problems"]:
        raise typer.Exit(1)


def examine(folder: Folder, deep: bool = False) -> dict[str, Any]:
    """Everything that is printed."""
    rows: dict[tuple[str, str, tuple[int, ...]], Row] = {}
    problems: list[str] = []
    scales: dict[str, float] = {}
    for weight in _weights(folder):
        key = (re.sub(r"\d+", "*", weight.name), weight.format, weight.shape)
        row = rows.setdefault(key, Row(*key))
        row.count += 1
        row.nbytes += weight.nbytes
        try:
            weight.check(folder, deep, scales)
        except CheckpointError as error:
            problems.append(str(error))
    scheme = folder.scheme
    return {
        "folder": str(folder.path),
        "model_type": folder.config.get("model_type"),
        "scheme": None if scheme is None else str(scheme),
        "compute": None if scheme is None else scheme.compute,
        "exclude": [] if scheme is None else list(scheme.exclude),
        "files": len(folder.files),
        "tensors": len(folder.names),
        "nbytes": sum(folder.entry(name).nbytes for name in folder.names),
        "weights": [dataclasses.asdict(row) for row in rows.values()],
        "notes": _notes(scales),
        "problems": problems,
    }


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A plain tensor, or a quantised weight with all its parts."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    storage: Storage | None
    ending: str = ""

    def check(self, folder: Folder, deep: bool, scales: dict[str, float]) -> None:
        """Raises a CheckpointError if the weight cannot be read; notes its global scale."""
        module = self.name.removesuffix(self.ending)
        if self.storage is None and not self.ending:
            return
        folder.storage(module, self.ending)
        if not deep or self.storage is None:
            return
        weight = folder.matrix(module, ending=self.ending)
        if self.storage.input_scale is not None:
            folder.input_scale(module)
        if isinstance(weight, QuantizedTensor) and weight.global_scale is not None:
            scales.update({module: float(weight.global_scale)} if weight.ndim == 2 else {})


def _weights(folder: Folder) -> Iterator[_Weight]:
    """All tensors, those that belong to one weight as one."""
    storages = folder.scheme.storages if folder.scheme else ()
    parts: set[str] = set()
    found = []
    for name in folder.names:
        for storage in storages:
            module = name.removesuffix(storage.data)
            scale = module + storage.scale
            if module == name or scale not in folder or name in parts:
                continue
            if folder.entry(name).dtype != storage.data_dtype:
                continue
            if folder.entry(scale).dtype not in storage.scale_dtypes:
                continue
            endings = (storage.data, storage.scale, storage.global_scale, storage.input_scale)
            own = [module + e for e in endings if e is not None and module + e in folder]
            parts.update(own)
            found.append((module, storage, own))
    for module, storage, own in found:
        ending = ".weight" if storage.data.startswith(".weight") else ""
        shape = folder.entry(own[0]).shape
        if storage.data == "_blocks":
            shape = (*shape[:-2], shape[-2] * shape[-1])
        if storage.format is not None:
            shape = (*shape[:-1], 2 * shape[-1])
        size = sum(folder.entry(name).nbytes for name in own)
        yield _Weight(module + ending, storage.name, shape, size, storage, ending)
    for name in folder.names:
        if name not in parts:
            entry = folder.entry(name)
            # A module's matrix must be readable as one; any other tensor is what it is.
            ending = ".weight" if name.endswith(".weight") and len(entry.shape) == 2 else ""
            yield _Weight(name, entry.dtype, entry.shape, entry.nbytes, None, ending)


def _notes(scales: dict[str, float]) -> list[str]:
    """Weights that kernels read as one, but whose global scales differ."""
    differ = []
    for module, scale in scales.items():
        head, dot, last = module.rpartition(".")
        for group in SHARED:
            if last == group[0]:
                others = [f"{head}{dot}{name}" for name in group[1:]]
                differ += [module for other in others if scales.get(other, scale) != scale]
    if not differ:
        return []
    return [
        f"{len(differ)} modules (first {min(differ)}) have another global scale than a matrix that "
        "kernels read together with them; where gate and up differ, one is requantised when loaded"
    ]


def _print(report: dict[str, Any]) -> None:
    console = out()
    say(
        console,
        f"{report['folder']}: {report['model_type'] or 'no model_type'}, "
        f"{report['scheme'] or 'not quantised'}"
        + (f", made for {report['compute']}" if report["compute"] else "")
        + f"; {report['tensors']} tensors in {report['files']} files, "
        f"{report['nbytes'] / 1e6:,.1f} MB",
        "bold",
    )
    if report["exclude"]:
        say(console, f"not quantised by its configuration: {', '.join(report['exclude'])}")
    rows = table("weight", "format", "shape", "count", "MB", right=("count", "MB"))
    for row in report["weights"]:
        shape = " × ".join(map(str, row["shape"])) or "scalar"
        size = f"{row['nbytes'] / 1e6:,.2f}"
        rows.add_row(row["name"], row["format"], shape, str(row["count"]), size)
    console.print(rows)
    for note in report["notes"]:
        say(console, f"note: {note}")
    for problem in report["problems"]:
        say(console, f"problem: {problem}", "red")
    say(console, f"{len(report['problems'])} problems." if report["problems"] else "No problems.")
