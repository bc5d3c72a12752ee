"""The command `jaxmoe`. Each command's code is imported when the command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, 1 after a failure, 2 for bad arguments.

    >>> main(["--version"])                                                    # doctest: +SKIP
    jaxmoe 0.1.0

    Args:
      args: the arguments; those of the process by default.
    """
    try:
        from jaxmoe.cli._app import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"jaxmoe: the command line needs the package {package}: pip install 'jaxmoe[cli]'")
    run(args)
