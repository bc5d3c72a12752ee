"""Input scales for `jaxmoe quantize --calibrate`: found once, and kept until the folder is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from rich.progress import MofNCompleteColumn

import jaxmoe
from jaxmoe.checkpoint import Folder, atomic_write
from jaxmoe.checkpoint._shards import read_json
from jaxmoe.cli._console import FailureError, argument, decode, need, progress_bar

LARGEST = 448 * 6
"""e4m3's largest times e2m1's: an NVFP4 input scale is the amax over this, as in ModelOpt."""


def read_text(path: Path) -> str:
    """The text to calibrate on."""
    with argument("--calibrate"):
        return decode(path, path.read_bytes())


def note_beside(dst: Path) -> Path:
    """Where the result is kept until DST is complete."""
    return dst.parent / f".{dst.name}.calibration.json"


def input_scales(
    folder: Folder, modules: Collection[str], text: str, max_tokens: int, note: Path
) -> dict[str, float]:
    """The scale of each module's input, from the note if it is of the same job."""
    models = need("jaxmoe.models", "cli")
    if unknown := sorted(set(modules) - models.calibrated_modules(folder.path)):
        raise FailureError(
            f"{len(unknown)} of {len(modules)} modules are no matrices of experts or MLPs, whose "
            f"inputs alone are calibrated (the first is {unknown[0]!r}); leave them out with "
            "--include, or give --input-scales"
        )
    identity = _identity(folder, text, max_tokens)
    known: Any = read_json(note) if note.exists() else {}
    if known.get("identity") != identity:
        known = {"identity": identity, "amax": _run(models, folder, text, max_tokens)}
        with atomic_write(note) as file:
            file.write(json.dumps(known).encode())
    return {module: known["amax"][module] / LARGEST for module in modules}


def _run(models: Any, folder: Folder, text: str, max_tokens: int) -> dict[str, float]:
    try:
        tokenizer = models.Tokenizer(folder.path)
    except ModuleNotFoundError as error:
        raise FailureError(str(error)) from error
    with progress_bar(MofNCompleteColumn()) as bar, argument("--calibrate"):
        task = bar.add_task("calibrating layers", total=None)
        return models.input_amax(
            folder.path,
            [text],
            tokenizer,
            max_tokens=max_tokens,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _identity(folder: Folder, text: str, max_tokens: int) -> str:
    """A string that differs for calibrations with different results."""
    facts = [jaxmoe.__version__, jax.default_backend(), str(max_tokens), text]
    for path in sorted(path for path in folder.path.iterdir() if path.is_file()):
        stat = path.stat()
        facts.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
