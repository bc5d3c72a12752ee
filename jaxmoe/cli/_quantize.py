"""`jaxmoe quantize`: one matrix in memory at a time, and a result that is whole or absent."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import DownloadColumn

import jaxmoe
from jaxmoe.checkpoint import CheckpointError, Folder, open_folder
from jaxmoe.checkpoint._experts import FUSED_ORDER
from jaxmoe.checkpoint._layouts import Layout, get_layout, modelopt_file
from jaxmoe.checkpoint._safetensors import Entry, Header, layout_of, open_file, read_header
from jaxmoe.checkpoint._shards import INDEX, read_json
from jaxmoe.checkpoint._storage import BLOCK_FP8, FLOATS
from jaxmoe.cli import _calibrate
from jaxmoe.cli import _quantize_write as write
from jaxmoe.cli._console import FailureError, argument, err, progress_bar, say
from jaxmoe.cli._quantize_write import Job, Plan
from jaxmoe.formats import get_format

INCLUDE = (
    r"(^|\.)(experts?|mlp|moe|ffn)\.(\d+\.)?"
    r"((gate_up|up|down)(_proj)?|gate_proj|w[123])(\.weight)?$"
)
"""Matrices of experts and MLPs. A lone `gate` is left out: most models call their router that."""


def quantize(
    *,
    src: Path,
    dst: Path,
    weight_format: str,
    include: str | None,
    method: str,
    force: bool,
    layout_name: str = "jaxmoe",
    input_scales: Path | None = None,
    calibrate: Path | None = None,
    calibration_tokens: int = 0,
) -> None:
    """Quantises a file, or the safetensors files of a folder; the rest of a folder is copied."""
    with argument("--include"):
        try:
            pattern = re.compile(INCLUDE if include is None else include)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
    with argument("--layout"):
        layout = get_layout(layout_name, get_format(weight_format))
        if layout.describe is not None and not src.is_dir():
            raise ValueError(f"layout {layout_name} is for folders with a config.json")
    with argument("--input-scales" if calibrate is None else "--calibrate"):
        if (input_scales or calibrate) and layout.storage.input_scale is None:
            raise ValueError(f"{layout_name} {weight_format} stores no activation scales")
        if input_scales and calibrate:
            raise ValueError("cannot go together with --input-scales; give one of them")
    text = None if calibrate is None else _calibrate.read_text(calibrate)
    _check_destination(src, dst, force)
    if layout.describe is None:
        _run(_own_job(src, layout, pattern, method), pattern, dst)
        return
    with open_folder(src) as folder:
        job = _job(folder, layout, pattern, method, None)
        _check_chosen(job, pattern)
        note = _calibrate.note_beside(dst)
        scales: Mapping[str, float] | None = None
        if input_scales is not None:
            scales = _read_scales(input_scales)
        elif text is not None:
            modules = [layout.module(name) for plan in job.plans for name in plan.chosen]
            scales = _calibrate.input_scales(folder, modules, text, calibration_tokens, note)
        if scales is not None:
            job = _job(folder, layout, pattern, method, scales)
        _run(job, pattern, dst)
        if text is not None:
            note.unlink()


def _run(job: Job, pattern: re.Pattern[str], dst: Path) -> None:
    """Does what was planned, and says what was done."""
    src = job.src
    _check_chosen(job, pattern)
    console = err()
    with progress_bar(DownloadColumn()) as bar:
        task = bar.add_task("quantising", total=sum(plan.nbytes for plan in job.plans))

        def advance(size: int) -> None:
            bar.advance(task, size)

        if src.is_dir():
            resumed = write.write_folder(job, dst, advance)
        else:
            write.write_file(job, job.plans[0], dst, advance)
            resumed = 0
    _report(console, dst, job, resumed)


def _check_chosen(job: Job, pattern: re.Pattern[str]) -> None:
    """Fails unless there is something to quantise."""
    if not any(plan.chosen for plan in job.plans):
        names = [name for plan in job.plans for name in plan.source.entries]
        raise FailureError(
            f"{job.src}: none of {len(names)} tensors is a {_ranks(job.layout)} float tensor whose "
            f"name matches {pattern.pattern!r}; pass --include REGEX"
            + (f" (the first names are {', '.join(names[:3])})" if names else "")
        )


def _ranks(layout: Layout) -> str:
    return " or ".join(f"{rank}-D" for rank in layout.rank)


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


def _own_job(src: Path, layout: Layout, pattern: re.Pattern[str], method: str) -> Job:
    """jaxmoe's own layout: every safetensors file for itself, whatever folder it is in."""
    files = sorted(src.rglob("*.safetensors")) if src.is_dir() else [src]
    plans = [_plan(path, layout, pattern) for path in files]
    config = src / "config.json"
    model_type = read_json(config).get("model_type") if config.exists() else None
    if FUSED_ORDER.get(str(model_type), (False, False))[0]:
        for plan in plans:
            if name := next((n for n in plan.chosen if len(plan.source.entries[n].shape) == 3), ""):
                raise CheckpointError(
                    plan.path,
                    f"tensor {name!r} of a {model_type} model is stored transposed, so that its "
                    "last axis is not the contracted one; leave it out with --include"
                    + (", or pass --layout gpt-oss" if model_type == "gpt_oss" else ""),
                )
    texts = {}
    if src.is_dir():
        texts = {path: _own_index(path, plans, layout) for path in src.rglob(f"*{INDEX}")}
    return Job(src, layout, method, tuple(plans), texts)


def _plan(path: Path, layout: Layout, pattern: re.Pattern[str]) -> Plan:
    with open_file(path) as file:
        source = read_header(file, path)
    chosen = _chosen(path, source, layout, pattern, path)
    targets: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in source.entries.items():
        new = {name: (entry.dtype, entry.shape)}
        if name in chosen:
            new = layout.parts(name, entry.shape)
        if clash := targets.keys() & new.keys():
            raise CheckpointError(path, f"two tensors would be stored as {min(clash)!r}")
        targets.update(new)
    formats = json.loads(source.metadata.get("quantized", "{}"))
    formats |= dict.fromkeys(chosen, layout.format.name)
    own = {"quantized": json.dumps(formats, sort_keys=True), "crc32": write.NO_CHECKSUM}
    header, beginning = layout_of(targets, {**source.metadata, **own})
    return Plan(path, source, chosen, header, beginning)


def _chosen(
    path: Path, source: Header, layout: Layout, pattern: re.Pattern[str], where: Path
) -> frozenset[str]:
    chosen = []
    for name, entry in source.entries.items():
        if entry.dtype not in FLOATS or not pattern.search(name) or 0 in entry.shape:
            continue
        if len(entry.shape) not in layout.rank or not name.endswith(layout.ending):
            if layout.describe is not None and len(entry.shape) in (2, 3):
                raise CheckpointError(
                    where,
                    f"tensor {name!r} = {entry} cannot be stored in layout {layout.name}, which is "
                    f"for {_ranks(layout)} tensors called *{layout.ending}; leave it out with "
                    "--include, or choose another layout",
                )
            continue
        k = entry.shape[-1] if layout.name != "gpt-oss" else entry.shape[-2]
        size = layout.format.block_size
        assert size is not None
        if k % size:
            axis = "last axis" if layout.name != "gpt-oss" else "second axis"
            raise CheckpointError(
                path,
                f"tensor {name!r} of shape {list(entry.shape)} cannot be {layout.format}: its "
                f"{axis} must be a multiple of {size}; leave it out with --include",
            )
        chosen.append(name)
    return frozenset(chosen)


def _job(
    folder: Folder,
    layout: Layout,
    pattern: re.Pattern[str],
    method: str,
    scales: Mapping[str, float] | None,
) -> Job:
    """A layout of another tool: a whole folder with its configuration."""
    if folder.scheme is not None and folder.scheme.storages != (BLOCK_FP8,):
        raise FailureError(f"{folder.path} is quantised already: {folder.scheme}")
    if layout.name == "gpt-oss" and folder.config.get("model_type") != "gpt_oss":
        raise FailureError(
            f"{folder.path}: layout gpt-oss is for models of type gpt_oss, whose experts are fused "
            f"and interleaved, got {folder.config.get('model_type')!r}; choose compressed-tensors"
        )
    plans = []
    written: dict[str, str] = {}
    input_scales: dict[str, float] = {}
    for path in folder.files:
        source, fp8 = _without_fp8(folder, folder.header(path))
        chosen = _chosen(path, source, layout, pattern, path)
        targets: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, entry in source.entries.items():
            if name not in chosen:
                targets[name] = (entry.dtype, entry.shape)
                continue
            shape = entry.shape if layout.name != "gpt-oss" else _transposed(entry.shape)
            targets |= layout.parts(name, shape)
            if scales is not None:
                module = layout.module(name)
                input_scales[module] = _scale_of(module, scales)
                shape = (1,) if layout.storage.inverse else ()
                targets[f"{module}{layout.storage.input_scale}"] = ("F32", shape)
        for name in targets:
            if name in written:
                raise CheckpointError(path, f"two tensors would be stored as {name!r}")
            written[name] = path.name
        metadata = {"format": "pt", **source.metadata, "crc32": write.NO_CHECKSUM}
        header, beginning = layout_of(targets, metadata)
        plans.append(Plan(path, source, chosen, header, beginning, fp8))
    texts = _texts(folder, layout, plans, written, scales)
    return Job(folder.path, layout, method, tuple(plans), texts, input_scales, folder)


def _without_fp8(folder: Folder, source: Header) -> tuple[Header, frozenset[str]]:
    """A file as if its block-scaled FP8 weights were BF16; their names."""
    entries, fp8 = {}, set()
    for name, entry in source.entries.items():
        if folder.scheme is not None:
            if _is_fp8(folder, name, BLOCK_FP8.scale):
                continue
            if _is_fp8(folder, name, BLOCK_FP8.data):
                fp8.add(name)
                entry = Entry("BF16", entry.shape, entry.offset, 2 * entry.nbytes)
        entries[name] = entry
    return Header(entries, source.metadata, source.start), frozenset(fp8)


def _is_fp8(folder: Folder, name: str, ending: str) -> bool:
    """Whether a tensor is that part of a block-scaled FP8 weight."""
    module = name.removesuffix(ending)
    return module != name and folder.storage(module) is BLOCK_FP8


def _transposed(shape: Sequence[int]) -> tuple[int, ...]:
    *leading, k, n = shape
    return (*leading, n, k)


def _texts(
    folder: Folder,
    layout: Layout,
    plans: Sequence[Plan],
    written: Mapping[str, str],
    scales: Mapping[str, float] | None,
) -> dict[Path, str]:
    """The files that say what the weights are."""
    assert layout.describe is not None
    quantised = sorted(layout.module(name) for plan in plans for name in plan.chosen)
    done = {name for plan in plans for name in plan.chosen}
    plain = [
        name.removesuffix(".weight")
        for name in folder.names
        if name not in done and name.endswith(".weight") and len(folder.entry(name).shape) == 2
    ]
    described = layout.describe(quantised, plain, scales is not None)
    texts = {folder.path / "config.json": {**folder.config, "quantization_config": described}}
    if layout.name == "modelopt":
        producer = {"name": "jaxmoe", "version": jaxmoe.__version__}
        texts[folder.path / "hf_quant_config.json"] = modelopt_file(described, producer)
    if len(plans) > 1 or any(folder.path.glob(f"*{INDEX}")):
        total = sum(plan.written for plan in plans)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(written.items()))}
        texts[folder.path / f"model{INDEX}"] = index
    return {path: json.dumps(value, indent=2) + "\n" for path, value in texts.items()}


def _read_scales(path: Path) -> dict[str, float]:
    values = read_json(path)
    for name, value in values.items():
        if type(value) not in (int, float) or not (0 < value < math.inf):
            raise CheckpointError(
                path, f"{name!r} must be finite and > 0 (amax of the input / 2688), got {value!r}"
            )
    return values


def _scale_of(module: str, scales: Mapping[str, float]) -> float:
    if module in scales:
        return scales[module]
    found = next((v for k, v in scales.items() if fnmatch.fnmatchcase(module, k)), None)
    if found is None:
        raise FailureError(f"--input-scales has none for {module!r}; add it, or a pattern with *")
    return found


def _own_index(path: Path, plans: Iterable[Plan], layout: Layout) -> str:
    """A Hugging Face shard index with the names and the size of the quantised tensors."""
    plans = list(plans)
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        old: Mapping[str, str] = index["weight_map"]
        new = {}
        for name, shard in old.items():
            plan = next((p for p in plans if p.path == path.parent / shard), None)
            if plan is not None and name in plan.chosen:
                names: Iterable[str] = layout.parts(name, plan.source.entries[name].shape)
            else:
                names = (name,)
            new.update(dict.fromkeys(names, shard))
        index["weight_map"] = new
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] = sum(plan.written for plan in plans)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            path, f"not an index of shards: {type(error).__name__}: {error}"
        ) from error
    return json.dumps(index, indent=2) + "\n"


def _report(console: Any, dst: Path, job: Job, resumed: int) -> None:
    before = sum(plan.nbytes for plan in job.plans)
    after = sum(plan.written for plan in job.plans)
    chosen = sum(len(plan.chosen) for plan in job.plans)
    kept = sum(len(plan.source.entries) for plan in job.plans) - chosen
    say(
        console,
        f"{dst}: {chosen} tensors in {job.layout.format.name}, {kept} copied; "
        f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB"
        + (f"; {resumed} of {len(job.plans)} files were there from before" if resumed else ""),
        "bold",
    )
    if job.left_out:
        say(console, f"left out, since no index names them: {', '.join(job.left_out)}")
    if job.layout.storage.input_scale is not None and not job.input_scales:
        say(
            console,
            "The activations have no scales, so that the weights alone are declared as FP4; give "
            "--calibrate TEXT or --input-scales for FP4 activations.",
        )
