"""A choice with everything that led to it: printed, as JSON, or raised."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmoe.capability.problem import Problem
from jaxmoe.capability.table import Reason
from jaxmoe.capability.targets import Target


class Rejection(NamedTuple):
    """A variant that was not taken, why, and the sentence that says what would have done."""

    variant: str
    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolution:
    """The choice of a variant with everything that led to it. `print` it, or take `to_json()`.

    Args:
      problem: what was asked.
      target: for which machine.
      request: the names asked for, or None for AUTO.
      selected: the variant, or None in the `resolution` of an `UnsupportedError`.
      layout: the layout of prepared weights that the variant reads.
      compute: the arithmetic that will run.
      degraded_from: the declared arithmetic where `compute` is another (always a more accurate
        one), else None.
      selected_by: `auto`, `request` or `failed`.
      input_scales: what the variant does with the weights' static input scales; "" without them.
      evidence: how the variant's numbers were checked, with the record.
      alternatives: variants that could run it too, best first.
      rejected: every other variant considered, with its reason.
      hint: after a failure, what would run.
      tactic: the variant's tactic for `problem.tokens`; "" where its library chooses, or nothing is
        known of it.
      tactic_by: where the tactic comes from; "" where the variant has none, or `problem.tokens` is
        None.
    """

    problem: Problem
    target: Target
    request: tuple[str, ...] | None
    selected: str | None
    layout: str | None
    compute: str | None
    degraded_from: str | None
    selected_by: str
    evidence: str = ""
    input_scales: str = ""
    alternatives: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    hint: str = ""
    tactic: str = ""
    tactic_by: str = ""

    @property
    def variant(self) -> str:
        """`selected`, for a reader that needs one.

        Raises:
          UnsupportedError: nothing is selected.
        """
        if self.selected is None:
            raise UnsupportedError(self)
        return self.selected

    def __str__(self) -> str:
        asked = "AUTO" if self.request is None else f"implementation {', '.join(self.request)}"
        lines = [("problem", str(self.problem)), ("target", str(self.target)), ("asked", asked)]
        if self.selected is None:
            lines.append(("selected", "none"))
        else:
            lines.append(
                (
                    "selected",
                    f"{self.selected} ({self.compute}, layout {self.layout}, "
                    f"evidence: {self.evidence})",
                )
            )
        if self.input_scales:
            lines.append(("scales", f"static input scales: {self.input_scales}"))
        if self.tactic_by:
            lines.append(("tactic", f"{self.tactic or 'default'}: {self.tactic_by}"))
        if self.degraded_from:
            lines.append(
                (
                    "degraded",
                    f"from {self.degraded_from}, which the checkpoint declares, to {self.compute} "
                    "(more accurate)",
                )
            )
        if self.alternatives:
            lines.append(("also able", ", ".join(self.alternatives)))
        if self.hint:
            lines.append(("way out", self.hint))
        text = [f"{head:<10}{body}" for head, body in lines]
        if self.rejected:
            text += ["rejected", *_rejection_table(self.rejected)]
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers; `from_dict` is the inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["problem"] = dataclasses.asdict(self.problem)
        fields["target"] = {
            **dataclasses.asdict(self.target),
            "features": sorted(self.target.features),
            "built": sorted(self.target.built),
            "disqualified": dict(self.target.disqualified),
        }
        fields["request"] = None if self.request is None else list(self.request)
        fields["alternatives"] = list(self.alternatives)
        fields["rejected"] = [
            {"variant": r.variant, "reason": r.reason.name, "detail": r.detail}
            for r in self.rejected
        ]
        return fields

    def to_json(self, **kwargs: Any) -> str:
        """JSON of `to_dict()`; keyword arguments go to `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Resolution:
        """The resolution that `to_dict` described."""
        request = fields["request"]
        return cls(
            **{
                **fields,
                "problem": Problem(**fields["problem"]),
                "target": Target(**fields["target"]),
                "request": None if request is None else tuple(request),
                "alternatives": tuple(fields["alternatives"]),
                "rejected": tuple(
                    Rejection(r["variant"], Reason[r["reason"]], r["detail"])
                    for r in fields["rejected"]
                ),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Resolution:
        """The resolution that `to_json` described."""
        return cls.from_dict(json.loads(text))


class UnsupportedError(NotImplementedError):
    """No variant that was asked for can run the problem; `resolution` holds every reason."""

    def __init__(self, resolution: Resolution) -> None:
        super().__init__(resolution)
        self.resolution = resolution

    def __str__(self) -> str:
        r = self.resolution
        asked = "none" if r.request is None else f"none of implementation={list(r.request)}"
        reasons = [f"  {v}: {reason.name}: {detail}" for v, reason, detail in r.rejected]
        message = f"{asked} can run this problem on {r.target}: {r.problem}"
        return "\n".join([message, *reasons, *([f"  way out: {r.hint}"] if r.hint else [])])


def _rejection_table(rejected: Sequence[Rejection], width: int = 100) -> list[str]:
    """Lines of an aligned table; neighbours with the same reason and sentence share a row."""
    merged: list[tuple[list[str], Reason, str]] = []
    for variant, reason, detail in rejected:
        if merged and merged[-1][1:] == (reason, detail):
            merged[-1][0].append(variant)
        else:
            merged.append(([variant], reason, detail))
    first = max(len(v) for v, _, _ in rejected) + 3
    second = max(len(r.name) for _, r, _ in rejected) + 2
    lines = []
    for variants, reason, detail in merged:
        sentence = textwrap.wrap(detail, max(40, width - first - second - 2))
        for i in range(max(len(variants), len(sentence))):
            variant = variants[i] if i < len(variants) else ""
            name = reason.name if i == 0 else ""
            text = sentence[i] if i < len(sentence) else ""
            lines.append(f"  {variant:<{first}}{name:<{second}}{text}".rstrip())
    return lines
