"""`jaxmoe eval`: how well a model predicts text."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn

import jaxmoe
from jaxmoe.cli import _model
from jaxmoe.cli._console import (
    FailureError,
    argument,
    decode,
    err,
    need,
    out,
    progress_bar,
    say,
    table,
)

_MEASURES = ("perplexity", "nats_per_token", "bits_per_token", "nats_per_byte", "bits_per_byte")


def evaluate(
    *,
    words: list[str],
    weight_format: str | None,
    context: int | None,
    stride: int | None,
    batch: int,
    implementation: str | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Prints the measures of each text, and of all together."""
    models = need("jaxmoe.models", "cli")
    folder, names = _model.split_folder(words, folder)
    _model.check_implementation(implementation)
    documents = _read(names)
    console = err()
    with jaxmoe.override(implementation=implementation):
        with console.status("reading the model"):
            loaded = _model.load(folder, weight_format)
        start = time.perf_counter()
        with (
            progress_bar(MofNCompleteColumn()) as bar,
            argument("TEXT, --context, --stride or --batch"),
        ):
            task = bar.add_task("windows", total=None)
            score = models.evaluate(
                loaded.model,
                list(documents.values()),
                text=loaded.text,
                context=context,
                stride=stride,
                batch=batch,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        seconds = time.perf_counter() - start
    if as_json:
        print(json.dumps(_report(loaded, list(documents), score, seconds), indent=2))
        return
    _print(list(documents), score)
    say(
        console,
        f"{score.tokens:,} tokens in {seconds:.1f} s with compilation; read in "
        f"{loaded.seconds:.1f} s",
    )
    for line in _model.kernels(loaded.resolutions):
        say(console, line)


def _read(names: list[str]) -> dict[str, bytes]:
    """The texts by name; none may be empty, so that each has its measures."""
    with argument("TEXT"):
        if not names:
            raise ValueError("at least one file must be named, or - for standard input")
        if len(set(names)) < len(names):
            raise ValueError(f"each file must be named once, got {' '.join(names)}")
        documents = {}
        for name in names:
            if Path(name).is_dir():
                raise ValueError(f"{name} is a folder, and none of a model; name text files")
            data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
            decode(name, data)
            documents[name] = data
    return documents


def _measures(score: Any) -> dict[str, Any]:
    if not score.tokens:
        raise FailureError("a text is too short: its only token has none before it")
    sizes = {"tokens": score.tokens, "bytes": score.bytes, "nats": score.nats}
    return sizes | {name: getattr(score, name) for name in _MEASURES}


def _report(loaded: _model.Loaded, names: list[str], score: Any, seconds: float) -> dict[str, Any]:
    return {
        "model": str(loaded.folder),
        **_measures(score),
        "documents": [
            {"name": name, **_measures(one)}
            for name, one in zip(names, score.documents, strict=True)
        ],
        "seconds": seconds,
        "kernels": [
            {
                "layer": layer,
                "variant": resolution.selected,
                "compute": resolution.compute,
                "degraded_from": resolution.degraded_from,
                "input_scales": resolution.input_scales,
            }
            for layer, resolution in loaded.resolutions.items()
        ],
    }


def _print(names: list[str], score: Any) -> None:
    titles = ("text", "tokens", "bytes", *(name.replace("_per_", "/") for name in _MEASURES))
    listing = table(*titles, right=titles[1:])
    rows = list(zip(names, score.documents, strict=True))
    for name, one in rows + ([("all", score)] if len(rows) > 1 else []):
        measures = _measures(one)
        listing.add_row(
            name,
            f"{one.tokens:,}",
            f"{one.bytes:,}",
            *(f"{measures[name]:.4f}" for name in _MEASURES),
        )
    out().print(listing)
