"""Writing what `jaxmoe quantize` has planned: each file is checked, and the folder comes last."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

import jaxmoe
from jaxmoe.checkpoint import CheckpointError, Folder, atomic_write, open_folder
from jaxmoe.checkpoint._layouts import Layout
from jaxmoe.checkpoint._safetensors import DTYPES, Header, bytes_of, open_file, read_header
from jaxmoe.checkpoint._storage import BLOCK_FP8
from jaxmoe.formats import BFLOAT16

NO_CHECKSUM = "0" * 8

_COPY = 1 << 24  # bytes at a time
_JOB = "job.json"
_CONFIG = "config.json"

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of one file: which tensors are quantised, and the header of the result.

    In `source`, weights in block-scaled FP8 (`fp8`) count as BF16, and their scales are left out.
    """

    path: Path
    source: Header
    chosen: frozenset[str]
    target: Header
    beginning: bytes
    fp8: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(entry.nbytes for entry in self.source.entries.values())

    @property
    def written(self) -> int:
        """Bytes of the tensors of the result."""
        return sum(entry.nbytes for entry in self.target.entries.values())


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is to be done.

    Args:
      src: the file or folder to read.
      layout: of the result.
      method: how block scales are chosen.
      plans: one for each safetensors file.
      texts: by path in `src`, what other files of the result hold instead of a copy.
      input_scales: the activations' scales by module.
      folder: `src`, open, for weights that must be dequantised.
      amax: the largest magnitudes that were found, by tensor.
    """

    src: Path
    layout: Layout
    method: str
    plans: tuple[Plan, ...]
    texts: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    input_scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    folder: Folder | None = None
    amax: dict[str, np.float32] = dataclasses.field(default_factory=dict)

    @property
    def left_out(self) -> list[str]:
        """Safetensors files of the folder that are not part of it."""
        if not self.src.is_dir():
            return []
        known = {plan.path for plan in self.plans}
        return sorted(str(p.relative_to(self.src)) for p in _weights(self.src) if p not in known)

    def identity(self) -> str:
        """A string that differs for jobs with different results."""
        digest = hashlib.sha256()
        facts = [jaxmoe.__version__, str(self.src.resolve()), self.layout.name, self.method]
        facts += [f"{path} {text}" for path, text in sorted(self.texts.items())]
        facts += [f"{module} {scale}" for module, scale in sorted(self.input_scales.items())]
        for plan in self.plans:
            stat = plan.path.stat()
            facts.append(f"{plan.path} {stat.st_size} {stat.st_mtime_ns}")
            digest.update(plan.beginning)
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()


def _weights(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.safetensors") if path.is_file())


# --- one file -----------------------------------------------------------------------------------


def write_file(job: Job, plan: Plan, dst: Path, advance: Advance) -> None:
    """Writes one file, and compares what is on disk with what was to be there."""
    with open_file(plan.path) as file, atomic_write(dst) as out:
        out.write(plan.beginning)
        checksums = dict.fromkeys(plan.target.entries, 0)
        done = dict.fromkeys(plan.target.entries, 0)

        def place(name: str, values: Any) -> None:
            """Writes the next part of a tensor."""
            data = bytes_of(values)
            out.seek(plan.target.entries[name].offset + done[name])
            out.write(data)
            done[name] += len(data)
            checksums[name] = zlib.crc32(data, checksums[name])

        for name, entry in plan.source.entries.items():
            if name not in plan.chosen:
                for block in _blocks(job, plan, file, name):
                    place(name, block)
                    advance(block.nbytes)
                continue
            global_scale = _shared_scale(job, name)
            parts = job.layout.parts(name, entry.shape)
            for matrix, size in _matrices(job, plan, file, name):
                leaves = _quantize_matrix(matrix, job.layout.format.name, job.method, global_scale)
                if job.layout.storage.inverse and len(leaves) == 3:
                    leaves[2] = np.float32(1) / leaves[2]
                for part, values in zip(parts, leaves, strict=True):
                    place(part, values)
                advance(size)
            module = job.layout.module(name)
            if module in job.input_scales:
                scale = np.float32(job.input_scales[module])
                if job.layout.storage.inverse:
                    scale = np.float32(1) / scale
                place(f"{module}{job.layout.storage.input_scale}", scale)
        out.flush()
        _check_written(out, dst, plan, checksums)


def _blocks(job: Job, plan: Plan, file: BinaryIO, name: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor that is copied."""
    entry = plan.source.entries[name]
    if name in plan.fp8:
        yield np.frombuffer(bytes_of(_dequantized(job, name, BFLOAT16)), np.uint8)
        return
    for start in range(0, entry.nbytes, _COPY):
        file.seek(entry.offset + start)
        yield np.frombuffer(file.read(min(_COPY, entry.nbytes - start)), np.uint8)


def _dequantized(job: Job, name: str, dtype: Any) -> np.ndarray:
    assert job.folder is not None
    weight = job.folder.matrix(name.removesuffix(BLOCK_FP8.data), dtype=dtype)
    assert isinstance(weight, np.ndarray)
    return weight


def _matrices(job: Job, plan: Plan, file: BinaryIO, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Each matrix [N, K] in f32, with the bytes that it counts for."""
    entry = plan.source.entries[name]
    if name in plan.fp8:
        yield _dequantized(job, name, np.float32), entry.nbytes
        return
    transposed = job.layout.name == "gpt-oss"
    *leading, n, k = entry.shape
    size = n * k * DTYPES[entry.dtype].itemsize
    for index in range(math.prod(leading)):
        file.seek(entry.offset + index * size)
        values = np.frombuffer(file.read(size), DTYPES[entry.dtype]).reshape(n, k)
        matrix = values.astype(np.float32)
        if not np.isfinite(matrix).all():
            where = f"[{index}]" if leading else ""
            raise CheckpointError(
                file.name, f"tensor {name!r}{where} has values that are not finite"
            )
        yield (np.ascontiguousarray(matrix.T) if transposed else matrix), size


@functools.partial(jax.jit, static_argnums=(1, 2))
def _jitted(matrix: jax.Array, format_name: str, method: Any, global_scale: Any) -> Any:
    return jaxmoe.quantize(
        matrix, format_name, method=method, nonfinite="saturate", global_scale=global_scale
    )


def _quantize_matrix(
    matrix: np.ndarray, format_name: str, method: str, global_scale: np.float32 | None
) -> list[Any]:
    q = _jitted(matrix, format_name, method, global_scale)
    leaves = [q.packed(), q.scale, q.global_scale]
    return [np.asarray(leaf) for leaf in leaves if leaf is not None]


def _shared_scale(job: Job, name: str) -> np.float32 | None:
    """The global scale that a tensor shares with its siblings; None where each has its own."""
    if not job.layout.shared or not job.layout.format.has_global_scale:
        return None
    homes = {n: p for p in job.plans for n in job.layout.siblings(name) if n in p.chosen}
    amax = max(_amax(job, plan, n) for n, plan in homes.items())
    scale = max(np.float32(float(amax) / (448 * 6)), np.float32(2.0**-112))
    while job.layout.storage.inverse and (again := _through_reciprocal(scale)) != scale:
        scale = again  # what a reader of the reciprocal will find
    return scale


def _through_reciprocal(scale: np.float32) -> np.float32:
    return np.float32(np.float32(1) / (np.float32(1) / scale))


def _amax(job: Job, plan: Plan, name: str) -> np.float32:
    if name not in job.amax:
        with open_file(plan.path) as file:
            matrices = _matrices(job, plan, file, name)
            job.amax[name] = max(np.abs(matrix).max() for matrix, _ in matrices)
    return job.amax[name]


def _check_written(out: BinaryIO, dst: Path, plan: Plan, checksums: Mapping[str, int]) -> None:
    """Reads everything again, and puts the checksum of all tensors over its placeholder."""
    whole = 0
    for name, entry in plan.target.entries.items():  # in the order of the file
        found = 0
        for start in range(0, entry.nbytes, _COPY):
            size = min(_COPY, entry.nbytes - start)
            block = os.pread(out.fileno(), size, entry.offset + start)  # opened for reading too
            found, whole = zlib.crc32(block, found), zlib.crc32(block, whole)
        if found != checksums[name]:
            raise CheckpointError(dst, f"tensor {name!r} is not on disk as it was written")
    marker = f'"crc32": "{NO_CHECKSUM}"'.encode()
    out.seek(plan.beginning.index(marker) + len(marker) - len(NO_CHECKSUM) - 1)
    out.write(f"{whole:08x}".encode())


# --- a folder -----------------------------------------------------------------------------------


def write_folder(job: Job, dst: Path, advance: Advance) -> int:
    """Fills a hidden folder beside DST, then gives it DST's name.

    What an interrupted run of the same job has finished is kept; config.json comes last.

    Returns:
      How many files were there from before.
    """
    temporary = dst.parent / f".{dst.name}.partial"
    _begin(temporary, job.identity())
    resumed = 0
    try:
        for plan in job.plans:
            target = temporary / plan.path.relative_to(job.src)
            if _is_finished(target, plan):
                resumed += 1
                advance(plan.nbytes)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(job, plan, target, advance)
        _copy_rest(job, temporary)
        if job.layout.describe is not None:
            _check_folder(job, temporary)
    except CheckpointError:  # it would fail again
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    (temporary / _JOB).unlink()
    temporary.chmod(job.src.stat().st_mode)
    _take_name(temporary, dst)
    return resumed


def _begin(temporary: Path, identity: str) -> None:
    """Makes the folder, unless one of the same job is there."""
    note = temporary / _JOB
    same = False
    with contextlib.suppress(OSError, ValueError):
        same = json.loads(note.read_text()) == identity
    if not same:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        note.write_text(json.dumps(identity))
    for path in temporary.rglob(".*.tmp"):
        path.unlink()


def _is_finished(path: Path, plan: Plan) -> bool:
    """A file takes its name when it is complete and was checked; its header must be the plan's."""
    if not path.exists():
        return False
    with open_file(path) as file:
        return read_header(file, path).entries == plan.target.entries


def _copy_rest(job: Job, temporary: Path) -> None:
    """Everything but weights; config.json at the end, since a folder without it is none."""
    paths = {path for path in job.src.rglob("*") if path.suffix != ".safetensors"} | set(job.texts)
    for path in sorted(paths, key=lambda path: (path.name == _CONFIG, path)):
        target = temporary / path.relative_to(job.src)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path in job.texts:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as file:
                file.write(job.texts[path].encode())
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def _check_folder(job: Job, temporary: Path) -> None:
    """Opens the result as a reader would: every weight is declared, and its parts are there."""
    with open_folder(temporary) as folder:
        for plan in job.plans:
            for name in plan.chosen:
                storage = folder.storage(job.layout.module(name), job.layout.ending)
                if storage is not job.layout.storage:
                    raise CheckpointError(temporary, f"{name!r} does not read as {job.layout.name}")


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
