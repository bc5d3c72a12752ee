"""The one reader of the table: which variant runs a problem on a target, and why no other does.

Pure: nothing here asks a device, the environment, an importer or a clock, so the answer for a
machine that is elsewhere is the answer that the machine itself would give.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from jaxmoe.capability.problem import Problem
from jaxmoe.capability.requirements import has_compute, reject
from jaxmoe.capability.resolution import Rejection, Resolution, UnsupportedError
from jaxmoe.capability.table import TABLE, Row
from jaxmoe.capability.targets import Target

Request = str | Sequence[str] | None


def resolve(
    problem: Problem,
    target: Target,
    request: Request = None,
    *,
    table: Sequence[Row] = TABLE,
) -> Resolution:
    """Chooses the kernel variant for `problem` on `target`.

    >>> from jaxmoe.capability import Problem, Target, resolve
    >>> problem = Problem(weight_format="nvfp4", hidden_size=2048, intermediate_size=768,
    ...                   num_experts=128, top_k=8)
    >>> resolve(problem, Target.from_name("sm_120")).selected
    'xla'

    Among the variants that can run the problem, the order of `request` counts first, then how
    near the arithmetic is to the declared one, then the order of the table.

    Args:
      problem: what to compute.
      target: where.
      request: None for AUTO; the name of a variant (`sm120_w4a4`), a provider (`cpu`, `cutlass`)
        or a family (`sm120`), strictly; or a sequence of names of which the first that can run
        the problem is taken.
      table: the rows to choose from.

    Raises:
      ValueError: `request` names nothing in the table.
      UnsupportedError: no variant asked for can run the problem; it carries every reason. AUTO
        raises it only for arithmetic that was asked for explicitly and is not there.
    """
    names = requested_names(request, table)
    able, rejected = _weigh(problem, target, names, table)
    common: dict[str, Any] = {
        "problem": problem,
        "target": target,
        "request": names,
        "alternatives": tuple(row.variant for row, _ in able[1:]),
        "rejected": tuple(rejected),
    }
    if not able:
        failure = Resolution(
            selected=None,
            layout=None,
            compute=None,
            degraded_from=None,
            selected_by="failed",
            hint=_hint(problem, target, names, table),
            **common,
        )
        raise UnsupportedError(failure)
    row, compute = able[0]
    degraded = problem.compute == "auto" and compute != problem.declared
    return Resolution(
        selected=row.variant,
        layout=row.layout,
        compute=compute,
        degraded_from=problem.declared if degraded else None,
        selected_by="auto" if names is None else "request",
        evidence=f"{row.evidence} ({row.record})" if row.record else row.evidence,
        input_scales=_input_scales(row, problem, compute),
        **common,
    )


def _input_scales(row: Row, problem: Problem, compute: str) -> str:
    """What becomes of the weights' static input scales; "" where there are none."""
    if not problem.input_scales:
        return ""
    if row.input_scales:
        return f"{row.variant} quantises activations by them"
    if compute == "w4a16":
        return f"ignored: {row.variant} reads activations as they are"
    return f"ignored: {row.variant} finds the scales of activations itself"


def explain(problem: Problem, target: Target, request: Request = None) -> str:
    """The text of `resolve`, also where it fails: what is selected, and why nothing else is.

    >>> problem = Problem(weight_format="nvfp4", compute="w4a4", hidden_size=64,
    ...                   intermediate_size=64, num_experts=4, top_k=2)
    >>> "W4A4 does not exist on SM 90" in explain(problem, Target.from_name("H100"))
    True
    """
    try:
        return str(resolve(problem, target, request))
    except UnsupportedError as error:
        return str(error.resolution)


def implementation_names(table: Sequence[Row] = TABLE) -> tuple[str, ...]:
    """Every name that `implementation` accepts: variants first, then providers and families."""
    return tuple(
        dict.fromkeys([row.variant for row in table] + [name for r in table for name in r.names])
    )


def requested_names(request: Request, table: Sequence[Row]) -> tuple[str, ...] | None:
    """The request as a tuple of names that exist, or None for AUTO."""
    if request is None:
        return None
    names = (request,) if isinstance(request, str) else tuple(request)
    known = implementation_names(table)
    if not names:
        raise ValueError(
            "implementation must name at least one variant; got an empty sequence: pass None to "
            f"choose automatically, or names of {', '.join(known)}"
        )
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"implementation {name!r} is unknown; the names are {', '.join(known)}"
                + (f". Did you mean {close[0]!r}?" if close else "")
            )
    return tuple(dict.fromkeys(names))


def _weigh(
    problem: Problem, target: Target, names: tuple[str, ...] | None, table: Sequence[Row]
) -> tuple[list[tuple[Row, str]], list[Rejection]]:
    """The rows asked for: those able, best first, with the arithmetic of each; and the others."""
    able: list[tuple[int, int, int, Row]] = []  # rank in the request, in the chain, in the table
    rejected: list[tuple[int, int, Rejection]] = []
    for place, row in enumerate(table):
        ranks = [0] if names is None else [i for i, n in enumerate(names) if n in row.names]
        if not ranks:
            continue
        rejection = reject(row, problem, target, table, by_auto=names is None)
        if rejection is not None:
            rejected.append((ranks[0], place, Rejection(row.variant, *rejection)))
            continue
        step = next(i for i, c in enumerate(problem.chain) if has_compute(row, problem, c))
        able.append((ranks[0], step, place, row))
    able.sort(key=lambda item: item[:3])
    rejected.sort(key=lambda item: item[:2])
    return [(row, problem.chain[step]) for _, step, _, row in able], [r for *_, r in rejected]


def _hint(
    problem: Problem, target: Target, names: tuple[str, ...] | None, table: Sequence[Row]
) -> str:
    """What would run: by another variant as asked, else with other arithmetic, else with both."""
    relaxed = dataclasses.replace(problem, compute="auto")
    for attempt, request, change in (
        (problem, None, "implementation=None"),
        (relaxed, names, "compute='auto'"),
        (relaxed, None, "implementation=None and compute='auto'"),
    ):
        able, _ = _weigh(attempt, target, request, table)
        if able:
            row, compute = able[0]
            return f"with {change}, {row.variant} runs it as {compute}"
    return "no variant of this table can"
