"""`jaxmoe bench`: a table of implementations side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from jaxmoe import benchmark
from jaxmoe.benchmark import BASELINE, Layer, Measurement, Skipped
from jaxmoe.capability import Problem, implementation_names
from jaxmoe.cli._console import FailureError, argument, err, out, say, table

_GIB = 2**30


def bench(
    *,
    layers: Sequence[str],
    tokens: str,
    formats: Sequence[str],
    implementations: Sequence[str],
    dtype: str,
    compute: str,
    modes: Sequence[str] | None,
    seconds: float,
    memory: float | None,
    path: Path | None,
) -> None:
    """Measures and prints one table for each layer and format; adds rows to `path`."""
    with argument("--layer"):
        specs = [benchmark.get_layer(name) for name in layers]
    with argument("--tokens"):
        counts = parse_tokens(tokens)
    check_arithmetic(formats, compute)
    with argument("--implementation"):
        known = ("auto", BASELINE, *implementation_names())
        for name in implementations:
            if name not in known:
                raise ValueError(f"{name!r} is unknown; the names are {', '.join(known)}")
    with argument("--mode"):
        for name in modes or ():
            if name not in benchmark.MODES:
                raise ValueError(f"mode must be {' or '.join(benchmark.MODES)}, got {name!r}")
    if path is not None:
        with argument("--json"):
            benchmark.read_rows(path)
    status, results = err(), out()
    with status.status("measuring memory bandwidth and matrix products"):
        machine = benchmark.measure_machine()
    say(
        results,
        f"{machine.device}: reads {machine.bandwidth / 1e9:.1f} GB/s, multiplies "
        f"{machine.peak / 1e12:.3f} TFLOP/s"
        + (f", {machine.peak_fp8 / 1e12:.3f} in float8" if machine.peak_fp8 else ""),
        "bold",
    )
    on_cpu = machine.platform == "cpu"
    modes = modes or (("dispatch",) if on_cpu else benchmark.MODES)
    memory = memory or (6.0 if on_cpu else 40.0)
    for layer in specs:
        for weight_format in formats:
            done: list[Measurement | Skipped] = []
            with status.status(f"{layer.name} in {weight_format}") as line:
                try:
                    for result in benchmark.measure_layer(
                        layer,
                        weight_format,
                        counts,
                        machine=machine,
                        implementations=implementations,
                        dtype=dtype,
                        compute=compute,
                        modes=modes,
                        budget=seconds,
                        memory_limit=int(memory * _GIB),
                    ):
                        done.append(result)
                        line.update(f"{layer.name} in {weight_format}: T = {result.tokens}")
                except benchmark.MemoryLimitError as error:
                    raise FailureError(f"{error} (--memory)") from error
            results.print(results_table(layer, weight_format, dtype, done))
            for reason in skipped_lines(done):
                say(results, reason, "dim")
            if path is not None:
                measured = [r for r in done if isinstance(r, Measurement)]
                benchmark.append_rows(path, [benchmark.row(r, machine) for r in measured])


def check_arithmetic(formats: Sequence[str], compute: str) -> None:
    """Complains about a format that is not FP4, and about arithmetic that it does not have."""
    with argument("--format"):
        for name in formats:
            if name not in ("nvfp4", "mxfp4"):
                raise ValueError(f"format must be nvfp4 or mxfp4, got {name!r}")
    with argument("--compute"):
        for name in formats:
            Problem(
                weight_format=name,
                compute=compute,
                hidden_size=64,
                intermediate_size=64,
                num_experts=1,
                top_k=1,
            )


def parse_tokens(text: str) -> list[int]:
    """`"1,8,64"` -> `[1, 8, 64]`."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"tokens must be whole numbers of at least 1 with commas, got {text!r}")
    return counts


def results_table(
    layer: Layer, weight_format: str, dtype: str, results: Sequence[Measurement | Skipped]
) -> Table:
    """The measurements, with ratios to the floor and to the baseline of the same run."""
    numbers = ("T", "µs", "GB/s", "TFLOP/s", "× floor", "faster than ragged_dot", "error")
    made = table(
        "T", "implementation", "compute", "mode", *numbers[1:],
        title=f"{layer.name} (H={layer.hidden_size} I={layer.intermediate_size} "
        f"E={layer.num_experts} k={layer.top_k}), {weight_format}, {dtype} activations",
        right=numbers,
    )  # fmt: skip
    measured = [r for r in results if isinstance(r, Measurement)]
    baseline = {r.tokens: r.seconds for r in measured if r.implementation == BASELINE}
    last = None
    for r in measured:
        if last not in (None, r.tokens):
            made.add_section()
        last = r.tokens
        ratio = baseline.get(r.tokens)
        made.add_row(
            str(r.tokens),
            r.implementation,
            r.compute,
            r.mode,
            f"{r.seconds * 1e6:,.{1 if r.seconds < 1e-4 else 0}f}",
            f"{r.gbps:.3g}",
            f"{r.tflops:.3g}",
            f"{r.seconds / r.floor:.2f}",
            "" if ratio is None else f"{ratio / r.seconds:,.1f}×",
            f"{r.error:.1e}",
        )
    return made


def skipped_lines(results: Sequence[Measurement | Skipped]) -> list[str]:
    """A sentence for each implementation that was left out, with the T it concerns."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for r in results:
        if isinstance(r, Skipped):
            reasons.setdefault((r.implementation, r.reason), []).append(r.tokens)
    return [
        f"{name} not measured at T = {', '.join(map(str, tokens))}: {reason}"
        for (name, reason), tokens in reasons.items()
    ]
