"""`jaxmoe generate`: text to stdout, speed and kernel to stderr."""

from __future__ import annotations

import codecs
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jaxmoe
from jaxmoe.capability import TABLE, Resolution, implementation_names
from jaxmoe.cli._console import FailureError, argument, err, need, say

PROMPT = 'def read_lines(path):\n    """'
STRIDE = 8  # tokens per device call


@dataclasses.dataclass
class Clock:
    """When the parts of a text arrived."""

    start: float = 0.0
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def watch(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Yields `parts` and notes when each arrives."""
        self.start = time.perf_counter()
        for part in parts:
            self.arrivals.append((time.perf_counter(), len(part)))
            yield part

    def rates(self, prompt_tokens: int) -> tuple[float | None, float | None]:
        """Tokens per second of prefill and of decode; None where too few parts arrived.

        The first part arrives after the prompt was read and as many tokens were drawn as in
        every other part; the time of one such draw is taken off.
        """
        if len(self.arrivals) < 2:
            return None, None
        draws = len(self.arrivals) - 1
        seconds = self.arrivals[-1][0] - self.arrivals[0][0]
        drawn = sum(size for _, size in self.arrivals[1:])
        prefill = self.arrivals[0][0] - self.start - seconds / draws
        return (prompt_tokens / prefill if prefill > 0 else None), drawn / seconds


def generate(
    *,
    prompt: str | None,
    weight_format: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    implementation: str | None,
    folder: Path | None,
) -> None:
    """Writes prompt and continuation as they come."""
    models = need("jaxmoe.models", "cli")
    prompt = PROMPT if prompt is None else prompt
    with argument("--temperature or --top-p"):
        sampling = models.Sampling(temperature=temperature, top_p=top_p)
    with argument("--implementation"):
        if implementation is not None and implementation not in implementation_names():
            raise ValueError(
                f"{implementation!r} is unknown; the names are {', '.join(implementation_names())}"
            )
    folder = models.bundled() if folder is None else folder
    if not folder.is_dir():
        raise FailureError(f"{folder}: there is no model; pass --model FOLDER")
    console = err()
    with jaxmoe.override(implementation=implementation):
        with console.status(f"reading {folder.name} in {weight_format}"):
            model = models.load(folder, weight_format)
            resolution = _first_layer(model).explain(model.dtype)
            if resolution.layout != "canonical":
                model = need("jaxmoe.nn", "cli").prepare(model, resolution.selected)
        options = {"sampling": sampling, "seed": seed, "stride": STRIDE}
        with argument("PROMPT or --max-new-tokens"):
            parts = models.generate(model, prompt, max_new_tokens=max_new_tokens, **options)
        with console.status("compiling"):
            start = time.perf_counter()
            for _ in models.generate(model, prompt, max_new_tokens=1, **options):
                pass
            compiled = time.perf_counter() - start
        clock = Clock()
        _write(prompt, clock.watch(parts))
    _report(console, resolution, clock, len(prompt.encode()) or 1, compiled)


def _first_layer(model: Any) -> Any:
    """A MoE layer of the model; all of them have one shape, and so one kernel."""
    from flax import nnx

    from jaxmoe.nn import MoE

    return next(node for _, node in nnx.iter_graph(model) if isinstance(node, MoE))


def _write(prompt: str, parts: Iterable[bytes]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for part in parts:
        sys.stdout.write(decoder.decode(part))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()


def _report(
    console: Any, resolution: Resolution, clock: Clock, prompt_tokens: int, compiled: float
) -> None:
    prefill, decode = clock.rates(prompt_tokens)
    new = sum(size for _, size in clock.arrivals)
    console.print()
    speed = [
        f"{name} {rate:,.0f} tokens/s"
        for name, rate in ((f"prefill ({prompt_tokens} tokens)", prefill), ("decode", decode))
        if rate is not None
    ] or ["the text is too short to tell the speed"]
    say(console, f"{', '.join(speed)}; {new} new tokens; compiled in {compiled:.1f} s", "bold")
    say(console, why(resolution))


def why(resolution: Resolution) -> str:
    """What ran, who chose it, and what would have been preferred but could not run."""
    place = {row.variant: i for i, row in enumerate(TABLE)}
    platforms = {row.variant: row.platform for row in TABLE}
    selected = str(resolution.selected)
    by = "the best that can run here" if resolution.selected_by == "auto" else "as requested"
    better = [
        f"  not {r.variant}: {r.detail}"
        for r in resolution.rejected
        if place[r.variant] < place[selected] and platforms[r.variant] == resolution.target.platform
    ]
    return "\n".join([f"kernel: {selected} ({resolution.compute}), {by}", *better])
