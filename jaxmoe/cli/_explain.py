"""`jaxmoe explain` and `jaxmoe capabilities`: the capability table, asked for targets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from jaxmoe import kernels
from jaxmoe.benchmark.layers import get_layer
from jaxmoe.capability import (
    TABLE,
    Problem,
    Reason,
    Resolution,
    Row,
    Target,
    UnsupportedError,
    current_target,
    implementation_names,
    resolve,
)
from jaxmoe.capability.table import ACTIVATIONS, COMPUTE
from jaxmoe.cli._console import argument, merge, out, say, table

ALL_TARGETS = (
    *("sm_90", "sm_100", "sm_103", "sm_107", "sm_110", "sm_120", "sm_121", "sm_89"),
    *("cpu", "tpu"),
)
"""What `--target all` stands for."""

_FAR = (Reason.PLATFORM_UNSUPPORTED, Reason.SM_UNSUPPORTED, Reason.SM_UNKNOWN)


def find_target(name: str | None) -> Target:
    """The target of that name with what this installation has built; None is this machine."""
    info = kernels.installation()
    if name is None:
        return current_target(**info)
    with argument("--target"):
        return Target.from_name(name, **info)


def try_resolve(problem: Problem, target: Target, request: str | None = None) -> Resolution:
    """`resolve`, where a failure is a Resolution too (`selected` is None)."""
    try:
        return resolve(problem, target, request)
    except UnsupportedError as error:
        return error.resolution


def explain(
    *,
    targets: Sequence[str],
    layer: str,
    sizes: Mapping[str, int],
    problem: Mapping[str, Any],
    implementation: str | None,
    as_json: bool,
) -> None:
    """Prints the resolution of one problem for each target."""
    with argument("--layer"):
        spec = get_layer(layer)
    with argument("--activation"):
        if problem["activation"] not in ACTIVATIONS:
            raise ValueError(
                f"activation {problem['activation']!r} is unknown; the activations are "
                f"{', '.join(sorted(ACTIVATIONS))}"
            )
    with argument("--implementation"):
        if implementation is not None and implementation not in implementation_names():
            resolve(_any_problem(), Target("cpu"), implementation)  # raises, with the names
    names = ("hidden_size", "intermediate_size", "num_experts", "top_k")
    with argument("--compute or --declared"):
        asked = Problem(**problem, **{name: getattr(spec, name) for name in names} | dict(sizes))
    wanted = [t for name in targets for t in (ALL_TARGETS if name == "all" else (name,))]
    found = [find_target(name) for name in wanted] or [find_target(None)]
    resolutions = [
        kernels.with_tactic(try_resolve(asked, target, implementation)) for target in found
    ]
    if as_json:
        print(json.dumps([r.to_dict() for r in resolutions], indent=2))
        return
    console = out()
    say(console, str(asked), "bold")
    for resolution in resolutions:
        console.print()
        _print(console, resolution)
    if len(resolutions) > 1:
        console.print()
        console.print(_summary(resolutions))


def _any_problem() -> Problem:
    return Problem(
        weight_format="nvfp4", hidden_size=64, intermediate_size=64, num_experts=2, top_k=1
    )


def _print(console: Console, r: Resolution) -> None:
    selected = "nothing"
    if r.selected is not None:
        how = (
            "AUTO" if r.selected_by == "auto" else f"--implementation {', '.join(r.request or ())}"
        )
        selected = f"{r.selected} as {r.compute}, by {how} (evidence: {r.evidence})"
    say(console, f"{r.target}: {selected}", "bold green" if r.selected else "bold red")
    if r.input_scales:
        say(console, f"static input scales: {r.input_scales}")
    if r.tactic_by:
        say(console, f"tactic {r.tactic or 'default'}: {r.tactic_by}")
    if r.degraded_from:
        say(console, f"the checkpoint declares {r.degraded_from}; {r.compute} is more accurate")
    if r.alternatives:
        say(console, f"also able: {', '.join(r.alternatives)}")
    if r.hint:
        say(console, f"way out: {r.hint}")
    if r.rejected:
        rejected = table("rejected", "reason", "why")
        for row in merge(r.rejected):
            rejected.add_row(*row)
        console.print(rejected)


def _summary(resolutions: Sequence[Resolution]) -> Any:
    summary = table("target", "selected", "compute", "why no native variant", title="Summary")
    for r in resolutions:
        summary.add_row(str(r.target), r.selected or "nothing", r.compute or "", _why_not_native(r))
    return summary


def _why_not_native(r: Resolution) -> str:
    """The reasons of the kernels made for this SM or platform; where there are none, why."""
    native = {
        row.variant
        for row in TABLE
        if row.platform is not None and row.never is None and not row.only_by_name
    }
    if r.selected in native:
        return ""
    rejected = [rejection for rejection in r.rejected if rejection.variant in native]
    near = [rejection for rejection in rejected if rejection.reason not in _FAR]
    if not near:
        return "".join(f"{reason.name}: {detail}" for _, reason, detail in rejected[:1])
    reasons: dict[str, list[str]] = {}
    for variant, reason, _ in near:
        reasons.setdefault(reason.name, []).append(variant)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def capabilities(*, target: str | None, as_json: bool) -> None:
    """Prints all variants with their status on a target, and what is selected there."""
    machine = find_target(target)
    variants = [_status(row, machine) for row in TABLE]
    selected = [
        _choice(weight_format, compute, machine)
        for weight_format, computes in COMPUTE.items()
        for compute in ("auto", *computes)
    ]
    if as_json:
        print(json.dumps({"target": str(machine), "variants": variants, "selected": selected}))
        return
    console = out()
    say(console, str(machine), "bold")
    listing = table("variant", "arithmetic", "activations", "evidence", "status", "why")
    for v in variants:
        style = {"able": "green", "never": "dim"}.get(v["status"], "")
        arithmetic = "\n".join(f"{f} {', '.join(c)}" for f, c in v["arithmetic"].items())
        listing.add_row(
            v["variant"],
            arithmetic,
            "\n".join(v["activation_dtypes"]),
            v["evidence"],
            v["reason"] or v["status"],
            v["detail"],
            style=style,
        )
    console.print(listing)
    choices = table("weights", "compute", "selected", "runs as", "otherwise", title="Selected")
    for c in selected:
        choices.add_row(
            c["format"], c["compute"], c["selected"] or "nothing", c["runs_as"] or "", c["hint"]
        )
    console.print(choices)


def _status(row: Row, target: Target) -> dict[str, Any]:
    """One variant, asked for a problem that its own row allows."""
    weight_format, compute = sorted(row.arithmetic)[0]
    problem = dataclasses.replace(
        _any_problem(),
        op=sorted(row.ops, reverse=True)[0],
        weight_format=weight_format,
        compute=compute,
        activation_dtype=sorted(row.activation_dtypes)[0],
        hidden_size=row.alignment[0] * row.alignment[1],
        intermediate_size=row.alignment[0] * row.alignment[1],
    )
    resolution = try_resolve(problem, target, row.variant)
    rejection = next((r for r in resolution.rejected if r.variant == row.variant), None)
    unable = "unable" if row.never is None else "never"
    return {
        "variant": row.variant,
        "provider": row.provider,
        "family": row.family,
        "platform": row.platform,
        "sms": sorted(row.sms) if row.sms else None,
        "arithmetic": {f: list(row.computes(f)) for f in COMPUTE if row.computes(f)},
        "activation_dtypes": sorted(row.activation_dtypes),
        "layout": row.layout,
        "evidence": row.evidence,
        "status": "able" if rejection is None else unable,
        "reason": None if rejection is None else rejection.reason.name,
        "detail": "" if rejection is None else rejection.detail,
    }


def _choice(weight_format: str, compute: str, target: Target) -> dict[str, Any]:
    problem = dataclasses.replace(_any_problem(), weight_format=weight_format, compute=compute)
    resolution = try_resolve(problem, target)
    return {
        "format": weight_format,
        "compute": compute,
        "selected": resolution.selected,
        "runs_as": resolution.compute,
        "hint": resolution.hint,
    }
