"""`jaxmoe generate`: text to stdout, speed and kernel to stderr."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jaxmoe
from jaxmoe.cli import _model
from jaxmoe.cli._console import argument, err, need, say

PROMPT = 'def read_lines(path):\n    """'
QUESTION = "What is a mixture of experts?"
STRIDE = 8  # tokens per device call


@dataclasses.dataclass
class Clock:
    """When the parts of a text arrived."""

    start: float = 0.0
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def watch(self, parts: Iterable[list[list[int]]]) -> Iterator[list[list[int]]]:
        """Yields `parts` and notes when each arrives, and how many tokens it holds."""
        self.start = time.perf_counter()
        for part in parts:
            self.arrivals.append((time.perf_counter(), sum(map(len, part))))
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
    words: list[str],
    weight_format: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    batch: int,
    raw: bool,
    implementation: str | None,
    folder: Path | None,
) -> None:
    """Writes prompt and continuation, or the answer to a question, as it comes."""
    models = need("jaxmoe.models", "cli")
    folder, prompt = _folder_and_prompt(words, folder)
    with argument("--temperature, --top-k or --top-p"):
        sampling = models.Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _model.check_implementation(implementation)
    console = err()
    with jaxmoe.override(implementation=implementation):
        with console.status("reading the model"):
            loaded = _model.load(folder, weight_format)
        model, text, chat = loaded.model, loaded.text, loaded.chat and not raw
        if prompt is None:
            prompt = QUESTION if chat else PROMPT
        with argument("PROMPT"):
            tokens = (
                text.encode_chat([{"role": "user", "content": prompt}])
                if chat
                else text.encode(prompt)
            )

        def parts() -> Iterator[list[list[int]]]:
            return models.generate_tokens(
                model,
                [tokens] * batch,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                stop=text.stop,
                stride=STRIDE,
            )

        with argument("PROMPT or --max-new-tokens"):
            warm = parts()
        with console.status("compiling"):
            start = time.perf_counter()
            next(warm, None)
            del warm  # and its cache
            compiled = time.perf_counter() - start
        clock = Clock()
        _write("" if chat else prompt, clock.watch(parts()), models.TextStream(text))
    _report(console, clock, batch * len(tokens), loaded.seconds, compiled)
    for line in _model.kernels(loaded.resolutions):
        say(console, line)


def _folder_and_prompt(words: list[str], folder: Path | None) -> tuple[Path | None, str | None]:
    """The folder of a model and a prompt, as far as they are given."""
    folder, words = _model.split_folder(words, folder)
    if len(words) > 1:
        with argument("PROMPT"):
            raise ValueError(
                f"must be one argument, got {len(words)}; put the prompt in quotes, and in front "
                "of it at most the folder of a model"
            )
    return folder, words[0] if words else None


def _write(prompt: str, parts: Iterable[list[list[int]]], stream: Any) -> None:
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for part in parts:
        sys.stdout.write(stream.push(part[0]))
        sys.stdout.flush()
    sys.stdout.write(stream.end() + "\n")
    sys.stdout.flush()


def _report(console: Any, clock: Clock, prompt_tokens: int, read: float, compiled: float) -> None:
    prefill, decode = clock.rates(prompt_tokens)
    new = sum(size for _, size in clock.arrivals)
    console.print()
    speed = [
        f"{name} {rate:,.0f} tokens/s"
        for name, rate in ((f"prefill ({prompt_tokens} tokens)", prefill), ("decode", decode))
        if rate is not None
    ] or ["the text is too short to tell the speed"]
    say(
        console,
        f"{', '.join(speed)}; {new} new tokens; read in {read:.1f} s, compiled in {compiled:.1f} s",
        "bold",
    )
