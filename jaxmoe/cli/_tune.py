"""`jaxmoe tune`: measures tactics and records the winners."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from jaxmoe import benchmark
from jaxmoe.benchmark import Layer
from jaxmoe.capability import implementation_names
from jaxmoe.cli._bench import check_arithmetic, parse_tokens
from jaxmoe.cli._console import FailureError, argument, err, out, say, table
from jaxmoe.tuning import Tuned, TuningError, cache_path, tables, tune

_GIB = 2**30


def tune_layers(
    *,
    layers: Sequence[str],
    tokens: str,
    formats: Sequence[str],
    dtype: str,
    compute: str,
    implementation: str | None,
    seconds: float,
    memory: float,
    path: Path | None,
) -> None:
    """Tunes each layer and format, prints a table for each, and adds the winners to `path`."""
    names = [n for name in layers for n in (benchmark.LAYERS if name == "all" else (name,))]
    with argument("--layer"):
        specs = [benchmark.get_layer(name) for name in names]
    with argument("--tokens"):
        counts = parse_tokens(tokens)
    with argument("--implementation"):
        if implementation is not None and implementation not in implementation_names():
            raise ValueError(
                f"{implementation!r} is unknown; the names are {', '.join(implementation_names())}"
            )
    check_arithmetic(formats, compute)
    target = cache_path() if path is None else path
    with argument("--json" if path is not None else tables.CACHE_VARIABLE):
        tables.read(target)
    status, results = err(), out()
    for layer in specs:
        for weight_format in formats:
            what = f"{layer.name} in {weight_format}"
            with status.status(f"{what}: making weights") as line:

                def report(found: Tuned, what: str = what) -> None:
                    line.update(f"{what}: T = {found.key.tokens} done")

                try:
                    found = tune(
                        layer,
                        weight_format,
                        counts,
                        dtype=dtype,
                        compute=compute,
                        implementation=implementation,
                        path=target,
                        budget=seconds,
                        memory_limit=int(memory * _GIB),
                        report=report,
                    )
                except benchmark.MemoryLimitError as error:
                    raise FailureError(f"{error} (--memory)") from error
                except TuningError as error:
                    raise FailureError(str(error)) from error
            results.print(results_table(layer, weight_format, dtype, found))
            for reason in refused_lines(found):
                say(results, reason, "dim")
    say(results, f"recorded in {target}")


def results_table(layer: Layer, weight_format: str, dtype: str, results: Sequence[Tuned]) -> Table:
    """The winners, beside what the library would have chosen and all other tactics."""
    numbers = ("T", "µs", "library's own choice, µs", "saved")
    made = table(
        "T", "tactic", *numbers[1:], "all tactics, µs",
        title=f"{layer.name} (H={layer.hidden_size} I={layer.intermediate_size} "
        f"E={layer.num_experts} k={layer.top_k}), {weight_format}, {dtype} activations",
        right=numbers,
    )  # fmt: skip
    for r in results:
        best, own = r.seconds[r.tactic], r.seconds[""]
        made.add_row(
            str(r.key.tokens),
            r.tactic or "library's own",
            f"{best * 1e6:,.1f}",
            f"{own * 1e6:,.1f}",
            f"{1 - best / own:.1%}" if r.tactic else "",
            ", ".join(f"{name} {t * 1e6:,.1f}" for name, t in r.seconds.items() if name),
        )
    return made


def refused_lines(results: Sequence[Tuned]) -> list[str]:
    """A sentence for each tactic that was left out, with the T it concerns."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for r in results:
        for name, reason in r.refused.items():
            reasons.setdefault((name, reason), []).append(r.key.tokens)
    return [
        f"{name} left out at T = {', '.join(map(str, tokens))}: {reason}"
        for (name, reason), tokens in reasons.items()
    ]
