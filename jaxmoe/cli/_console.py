"""Where output goes: results to stdout, everything about them to stderr."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from jaxmoe.capability import Rejection

_WIDTH = 120  # of tables that no terminal shows


class FailureError(Exception):
    """An expected failure: one line for the user, exit code 1."""


def _console(file: TextIO) -> Console:
    known = file.isatty() or "COLUMNS" in os.environ
    return Console(file=file, width=None if known else _WIDTH, highlight=False)


def out() -> Console:
    """Console for results."""
    return _console(sys.stdout)


def err() -> Console:
    """Console for progress, explanations and errors."""
    return _console(sys.stderr)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a line as it is: no markup, no wrapping, no loss at the margin."""
    console.print(Text(text, style), soft_wrap=True)


def table(*columns: str, title: str = "", right: Sequence[str] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    made = Table(title=title or None, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def progress_bar(done: ProgressColumn) -> Progress:
    """A bar on a terminal, nothing elsewhere; `done` is the column that counts."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = err()
    what = TextColumn("{task.description}")
    columns = (what, BarColumn(), done, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def decode(name: str | Path, data: bytes) -> str:
    """The text of a file.

    Raises:
      ValueError: it is empty, or not UTF-8.
    """
    if not data:
        raise ValueError(f"{name} is empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error


def merge(rejected: Sequence[Rejection]) -> list[tuple[str, str, str]]:
    """Variants, reason and sentence of each rejection; equal ones share a row."""
    merged: dict[tuple[str, str], list[str]] = {}
    for variant, reason, detail in rejected:
        merged.setdefault((reason.name, detail), []).append(variant)
    return [("\n".join(names), reason, detail) for (reason, detail), names in merged.items()]


@contextlib.contextmanager
def argument(name: str) -> Iterator[None]:
    """Turns a ValueError into the complaint about one argument, with exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=name) from error


def need(module: str, extra: str) -> ModuleType:
    """Imports a part of jaxmoe that depends on an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("jaxmoe"):
            raise
        raise FailureError(
            f"this command needs the package {error.name}: pip install 'jaxmoe[{extra}]'"
        ) from error
