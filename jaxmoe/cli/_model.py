"""What commands that run a model share: the model of a folder, its text, and its kernels."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.capability import TABLE, Resolution, implementation_names
from jaxmoe.cli._console import FailureError, argument, need


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run.

    Args:
      folder: that it was read from.
      model: with its experts in the layout of the kernel that runs them.
      text: makes tokens of text for it.
      chat: whether it answers messages.
      resolutions: what runs the experts of each layer that has some.
      seconds: that reading took.
    """

    folder: Path
    model: Any
    text: Any
    chat: bool
    resolutions: dict[int, Resolution]
    seconds: float


def split_folder(words: list[str], folder: Path | None) -> tuple[Path | None, list[str]]:
    """A first word that is a model's folder, unless --model names one, and the other words."""
    if words and folder is None and (Path(words[0]) / "config.json").is_file():
        return Path(words[0]), words[1:]
    return folder, words


def check_implementation(name: str | None) -> None:
    """Refuses a name that the capability table does not have, as a bad argument."""
    with argument("--implementation"):
        if name is not None and name not in implementation_names():
            raise ValueError(
                f"{name!r} is unknown; the names are {', '.join(implementation_names())}"
            )


def load(folder: Path | None, weight_format: str | None) -> Loaded:
    """Reads the model of a folder, by default the bundled one.

    The bundled one's experts, and those of others that `models.save` wrote, are read in
    `weight_format` (default: nvfp4); a Hugging Face folder's are quantised to it if they are plain.
    """
    models = need("jaxmoe.models", "cli")
    folder = models.bundled() if folder is None else folder
    if not folder.is_dir():
        raise FailureError(f"{folder}: there is no model; pass --model FOLDER")
    start = time.perf_counter()
    chat = False
    if models.is_own(folder):
        model, text = models.load(folder, weight_format or "nvfp4"), models.ByteText()
        resolutions = _resolutions(model)
        model = need("jaxmoe.nn", "cli").prepare(model)
    else:
        try:
            text = models.Tokenizer(folder)
        except ModuleNotFoundError as error:
            raise FailureError(str(error)) from error
        chat = text.has_chat_template
        model = models.load_pretrained(folder, weight_format=weight_format)
        resolutions = _resolutions(model)
    return Loaded(folder, model, text, chat, resolutions, time.perf_counter() - start)


def _resolutions(model: Any) -> dict[int, Resolution]:
    known: dict[tuple[int, int], Resolution] = {}
    found = {}
    for index in range(len(model.layers)):
        stack, block, _ = model.layers.place(index)
        moe = model.layers.stacks[stack].blocks[block].moe
        if moe is not None:
            if (stack, block) not in known:
                known[stack, block] = moe.explain(model.dtype)
            found[index] = known[stack, block]
    return found


def kernels(resolutions: dict[int, Resolution]) -> list[str]:
    """One paragraph for each kernel that runs, and the layers that it runs."""
    layers: dict[str, list[int]] = {}
    for index, resolution in resolutions.items():
        layers.setdefault(why(resolution), []).append(index)
    return [f"layers {_ranges(indices)}: {text}" for text, indices in layers.items()]


def _ranges(indices: list[int]) -> str:
    """Sorted numbers, runs as first-last."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def why(resolution: Resolution) -> str:
    """What ran, who chose it, and what would have been preferred but could not run."""
    place = {row.variant: i for i, row in enumerate(TABLE)}
    platforms = {row.variant: row.platform for row in TABLE}
    selected = str(resolution.selected)
    by = "the best that can run here" if resolution.selected_by == "auto" else "as requested"
    lines = [f"kernel: {selected} ({resolution.compute}), {by}"]
    if resolution.degraded_from:
        lines.append(
            f"  the checkpoint declares {resolution.degraded_from}; {resolution.compute} is more "
            "accurate"
        )
    if resolution.input_scales:
        lines.append(f"  static input scales: {resolution.input_scales}")
    lines += [
        f"  not {r.variant}: {r.detail}"
        for r in resolution.rejected
        if place[r.variant] < place[selected] and platforms[r.variant] == resolution.target.platform
    ]
    return "\n".join(lines)
