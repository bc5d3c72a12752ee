"""Timing several functions side by side, so that a busy moment hits all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

Call = Callable[[int], object]
"""Takes the number of the call (to rotate its inputs) and returns when its result is there."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each timed call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to report."""
        return statistics.median(self.seconds)


def interleave(counts: Sequence[int]) -> Iterator[int]:
    """Yields each index i `counts[i]` times, spread evenly over the whole.

    >>> list(interleave([4, 2]))
    [0, 0, 1, 0, 0, 1]
    """
    rounds = max(counts, default=0)
    for r in range(rounds):
        for i, count in enumerate(counts):
            if (r + 1) * count // rounds > r * count // rounds:
                yield i


def measure(
    calls: Sequence[Call], budget: float, *, at_least: int = 5, at_most: int = 100
) -> list[Timing]:
    """Times functions in turn.

    >>> measure([lambda number: None], budget=0.1, at_most=9)[0].median < 0.1
    True

    Each is called twice first: once to compile and to touch its memory, once to learn how long it
    takes and so how often it fits into its share of the time.

    Args:
      calls: the functions.
      budget: seconds to spend on each.
      at_least: fewest timed calls of a function that takes less than the budget. One that takes
        longer is timed twice, of which the first is the call that showed it.
      at_most: most timed calls of each.

    Returns:
      A `Timing` for each.
    """
    counts = []
    seconds_of: list[list[float]] = []
    for call in calls:
        call(0)
        seconds = _time(call, 1)
        slow = seconds > budget
        seconds_of.append([seconds] if slow else [])
        counts.append(1 if slow else int(min(max(budget / seconds, at_least), at_most)))
    for i in interleave(counts):
        seconds_of[i].append(_time(calls[i], 2 + len(seconds_of[i])))
    return [Timing(tuple(seconds)) for seconds in seconds_of]


def _time(call: Call, number: int) -> float:
    start = time.perf_counter()
    call(number)
    return time.perf_counter() - start
