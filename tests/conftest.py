"""What every test module shares."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import pytest

# LLVM optimises XLA's programs little in these modules, where it would take longer than all else;
# XLA's own passes are the same. The other modules compile as users do, those among them that want
# XLA's numbers bit by bit. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 all of them do.
COMPILED_QUICKLY = {"test_families", "test_models", "test_ops_gradients", "test_ops_transforms"}
VARIABLE = "JAX_DISABLE_MOST_OPTIMIZATIONS"
GIVEN = os.environ.get(VARIABLE)


@pytest.fixture(autouse=True, scope="module")
def executables(request: pytest.FixtureRequest) -> Iterator[None]:
    """How programs are compiled, in processes that a test starts, too; and forgets them in the end.

    Thousands of them would fill the memory of a long run.
    """
    with pytest.MonkeyPatch.context() as patch:
        if GIVEN is None:
            quickly = request.module.__name__ in COMPILED_QUICKLY
            patch.setenv(VARIABLE, str(int(quickly)))
            jax.config.update(VARIABLE.lower(), quickly)
        yield
    jax.clear_caches()


@pytest.fixture
def script(monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of benchmarks/ as it imports its neighbours when it is run."""
    scripts = str(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.syspath_prepend(scripts)
    yield importlib.import_module
    for name in [n for n, m in sys.modules.items() if scripts in str(m.__dict__.get("__file__"))]:
        del sys.modules[name]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line; returns exit code, stdout and stderr."""
    from jaxmoe.cli import main

    monkeypatch.setenv("COLUMNS", "200")

    def call(*args):
        capsys.readouterr()
        try:
            main([str(a) for a in args])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        else:
            code = 0
        text = capsys.readouterr()
        assert "Traceback" not in text.out + text.err
        return code, text.out, text.err

    return call
