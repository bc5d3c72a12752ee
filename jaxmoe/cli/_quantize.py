"""`jaxmoe quantize`: one matrix in memory at a time, and a result that is whole or absent."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

import jaxmoe
from jaxmoe.checkpoint import _DTYPES as DTYPES
from jaxmoe.checkpoint import _NAMES as NAMES
from jaxmoe.checkpoint import CheckpointError, atomic_write
from jaxmoe.checkpoint import _open as open_checkpoint
from jaxmoe.checkpoint import _read_header as read_header
from jaxmoe.cli._console import FailureError, argument, err, say
from jaxmoe.formats import Format, get_format

INCLUDE = (
    r"(^|\.)(experts?|mlp|moe|ffn)\.(\d+\.)?"
    r"((gate_up|up|down)(_proj)?|gate_proj|w[123])(\.weight)?$"
)
"""Matrices of experts and MLPs. A lone `gate` is left out: most models call their router that."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = ".safetensors.index.json"
_ALIGNMENT = 8  # bytes of the widest dtype
_COPY = 1 << 24  # bytes at a time
_NO_CHECKSUM = "0" * 8

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of one file: which tensors are quantised, and the header of the result."""

    path: Path
    sources: tuple[Source, ...]
    chosen: frozenset[str]
    metadata: Mapping[str, str]
    spec: Format

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(source.nbytes for source in self.sources)


def quantize(
    *, src: Path, dst: Path, weight_format: str, include: str | None, method: str, force: bool
) -> None:
    """Quantises a file, or the safetensors files of a folder; the rest of a folder is copied."""
    with argument("--include"):
        try:
            pattern = re.compile(INCLUDE if include is None else include)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
    _check_destination(src, dst, force)
    files = sorted(src.rglob("*.safetensors")) if src.is_dir() else [src]
    plans = [_plan(path, pattern, get_format(weight_format)) for path in files]
    if not any(plan.chosen for plan in plans):
        names = [source.name for plan in plans for source in plan.sources]
        raise FailureError(
            f"{src}: none of {len(names)} tensors is a 2-D or 3-D float tensor whose name matches "
            f"{pattern.pattern!r}; pass --include REGEX"
            + (f" (the first names are {', '.join(names[:3])})" if names else "")
        )
    console = err()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    silent = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as progress:
        task = progress.add_task("quantising", total=sum(plan.nbytes for plan in plans))

        def advance(size: int) -> None:
            progress.advance(task, size)

        if src.is_dir():
            _write_folder(src, dst, plans, method, advance)
        else:
            _write(plans[0], dst, method, advance)
    _report(console, dst, plans)


def _check_destination(src: Path, dst: Path, force: bool) -> None:
    """Refuses, as bad arguments, what would destroy something."""
    with argument("DST"):
        here, there = src.resolve(), dst.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise ValueError(f"{dst} and SRC must not contain each other")
        if not dst.parent.is_dir():
            raise ValueError(f"the folder {dst.parent} does not exist")
        if not dst.exists():
            return
        if dst.is_dir() != src.is_dir():
            kind = "folder" if src.is_dir() else "file"
            raise ValueError(f"{dst} must be a {kind}, like SRC")
        if not force:
            raise ValueError(f"{dst} exists; pass --force to replace it")
        if dst.is_dir() and any(dst.iterdir()) and not any(dst.rglob("*.safetensors")):
            raise ValueError(f"{dst} holds no safetensors file, so --force does not replace it")


# --- the plan: from headers alone, so that what cannot work fails before anything is written ----


def _plan(path: Path, pattern: re.Pattern[str], spec: Format) -> Plan:
    with open_checkpoint(path) as file:
        header, base = read_header(file, path)
    metadata = dict(header.pop("__metadata__", {}))
    sources = tuple(
        Source(name, entry["dtype"], tuple(entry["shape"]), base + first, last - first)
        for name, entry in header.items()
        for first, last in [entry["data_offsets"]]
    )
    chosen = [s for s in sources if _wanted(s, pattern)]
    for source in chosen:
        assert spec.block_size is not None
        if source.shape[-1] % spec.block_size:
            raise CheckpointError(
                path,
                f"tensor {source.name!r} of shape {list(source.shape)} cannot be {spec.name}: its "
                f"last axis must be a multiple of {spec.block_size}; leave it out with --include",
            )
    return Plan(path, sources, frozenset(s.name for s in chosen), metadata, spec)


def _wanted(source: Source, pattern: re.Pattern[str]) -> bool:
    return (
        source.dtype in _FLOATS
        and len(source.shape) in (2, 3)
        and math.prod(source.shape) > 0
        and pattern.search(source.name) is not None
    )


def _parts(source: Source, spec: Format) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors that a quantised one is stored as."""
    *rows, k = source.shape
    assert spec.block_size is not None
    assert spec.scale is not None
    parts = {
        f"{source.name}.data": ("U8", (*rows, k // 2)),
        f"{source.name}.scale": (NAMES[spec.scale], (*rows, k // spec.block_size)),
    }
    if spec.has_global_scale:
        parts[f"{source.name}.global_scale"] = ("F32", tuple(rows[:-1]))
    return parts


def _header(plan: Plan) -> tuple[dict[str, Any], bytes]:
    """The header of the result, and its bytes with a checksum to be filled in."""
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for source in plan.sources:
        if source.name in plan.chosen:
            new = _parts(source, plan.spec)
        else:
            new = {source.name: (source.dtype, source.shape)}
        if clash := entries.keys() & new.keys():
            raise CheckpointError(plan.path, f"two tensors would be stored as {min(clash)!r}")
        entries.update(new)
    formats = json.loads(plan.metadata.get("quantized", "{}"))
    formats |= dict.fromkeys(plan.chosen, plan.spec.name)
    own = {"quantized": json.dumps(formats, sort_keys=True), "crc32": _NO_CHECKSUM}
    header: dict[str, Any] = {"__metadata__": {**plan.metadata, **own}}
    end = 0
    # Wide types first keeps every tensor aligned to its own type.
    for name, (dtype, shape) in sorted(entries.items(), key=lambda e: (-_itemsize(e[1][0]), e[0])):
        start, end = end, end + math.prod(shape) * _itemsize(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return header, text + b" " * (-len(text) % _ALIGNMENT)


def _itemsize(dtype: str) -> int:
    return np.dtype(DTYPES[dtype]).itemsize


# --- writing ------------------------------------------------------------------------------------


def _write(plan: Plan, dst: Path, method: str, advance: Advance) -> None:
    header, text = _header(plan)
    base = 8 + len(text)
    with open_checkpoint(plan.path) as file, atomic_write(dst) as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)

        def place(name: str, done: int, values: np.ndarray) -> int:
            """Writes part of a tensor, `done` bytes into it; returns how far it then is."""
            out.seek(base + header[name]["data_offsets"][0] + done)
            out.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            return done + values.nbytes

        for source in plan.sources:
            done = 0
            if source.name not in plan.chosen:
                for block in _blocks(file, source):
                    done = place(source.name, done, block)
                    advance(block.nbytes)
                continue
            done_of = dict.fromkeys(_parts(source, plan.spec), 0)
            for matrix, size in _matrices(file, source):
                leaves = _quantize_matrix(matrix, plan.spec, method)
                for name, values in zip(done_of, leaves, strict=True):
                    done_of[name] = place(name, done_of[name], values)
                advance(size)
        out.flush()
        _fill_in_checksum(out, text)


def _blocks(file: BinaryIO, source: Source) -> Iterator[np.ndarray]:
    for start in range(0, source.nbytes, _COPY):
        file.seek(source.offset + start)
        yield np.frombuffer(file.read(min(_COPY, source.nbytes - start)), np.uint8)


def _matrices(file: BinaryIO, source: Source) -> Iterator[tuple[np.ndarray, int]]:
    """Each matrix [N, K] in f32, with the bytes that it took in the file."""
    *leading, n, k = source.shape
    size = n * k * _itemsize(source.dtype)
    for index in range(math.prod(leading)):
        file.seek(source.offset + index * size)
        values = np.frombuffer(file.read(size), np.dtype(DTYPES[source.dtype])).reshape(n, k)
        matrix = values.astype(np.float32)
        if not np.isfinite(matrix).all():
            where = f"[{index}]" if leading else ""
            raise CheckpointError(
                file.name, f"tensor {source.name!r}{where} has values that are not finite"
            )
        yield matrix, size


@functools.partial(jax.jit, static_argnums=(1, 2))
def _jitted(matrix: jax.Array, format_name: str, method: Any) -> Any:
    return jaxmoe.quantize(matrix, format_name, method=method, nonfinite="saturate")


def _quantize_matrix(matrix: np.ndarray, spec: Format, method: str) -> list[np.ndarray]:
    q = _jitted(matrix, spec.name, method)
    leaves = [q.packed(), q.scale, *([q.global_scale] if spec.has_global_scale else [])]
    return [np.asarray(leaf) for leaf in leaves]


def _fill_in_checksum(out: BinaryIO, text: bytes) -> None:
    """Puts the checksum of the tensors' bytes over its placeholder."""
    start, checksum = 8 + len(text), 0
    while block := os.pread(out.fileno(), _COPY, start):  # mkstemp opens for reading too
        checksum = zlib.crc32(block, checksum)
        start += len(block)
    marker = f'"crc32": "{_NO_CHECKSUM}"'.encode()
    out.seek(8 + text.index(marker) + len(marker) - len(_NO_CHECKSUM) - 1)
    out.write(f"{checksum:08x}".encode())


def _write_folder(
    src: Path, dst: Path, plans: Sequence[Plan], method: str, advance: Advance
) -> None:
    """Fills a folder beside DST, then gives it DST's name."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", suffix=".tmp", dir=dst.parent))
    try:
        for plan in plans:
            target = temporary / plan.path.relative_to(src)
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(plan, target, method, advance)
        for path in sorted(src.rglob("*")):
            target = temporary / path.relative_to(src)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif path.name.endswith(_INDEX):
                target.write_text(_index(path, plans), encoding="utf-8")
            elif path.suffix != ".safetensors":
                shutil.copy2(path, target)
        temporary.chmod(src.stat().st_mode)
        _take_name(temporary, dst)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _take_name(temporary: Path, dst: Path) -> None:
    """Renames; a folder that had the name is put aside first, and deleted at the end."""
    if not dst.exists():
        os.replace(temporary, dst)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", suffix=".old", dir=dst.parent))
    os.replace(dst, aside / dst.name)
    try:
        os.replace(temporary, dst)
    except BaseException:
        os.replace(aside / dst.name, dst)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _index(path: Path, plans: Sequence[Plan]) -> str:
    """A Hugging Face shard index with the names and the size of the quantised tensors."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        old: Mapping[str, str] = index["weight_map"]
        new = {}
        for name, shard in old.items():
            plan = next((p for p in plans if p.path == path.parent / shard), None)
            source = next((s for s in plan.sources if s.name == name), None) if plan else None
            quantised = plan is not None and source is not None and name in plan.chosen
            names = _parts(source, plan.spec) if quantised else (name,)  # type: ignore[arg-type, union-attr]
            new.update(dict.fromkeys(names, shard))
        index["weight_map"] = new
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] = sum(_written_bytes(p) for p in plans)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            path, f"not an index of shards: {type(error).__name__}: {error}"
        ) from error
    return json.dumps(index, indent=2) + "\n"


def _written_bytes(plan: Plan) -> int:
    header, _ = _header(plan)
    return max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)


def _report(console: Any, dst: Path, plans: Sequence[Plan]) -> None:
    before = sum(plan.nbytes for plan in plans)
    after = sum(_written_bytes(plan) for plan in plans)
    chosen = sum(len(plan.chosen) for plan in plans)
    kept = sum(len(plan.sources) for plan in plans) - chosen
    say(
        console,
        f"{dst}: {chosen} tensors in {plans[0].spec.name}, {kept} copied; "
        f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB",
        "bold",
    )
