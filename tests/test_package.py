"""What `import jaxmoe` may cost and touch, and what the package says of itself."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jaxmoe

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=True
    )


def test_import_starts_no_backend_and_loads_neither_flax_nor_the_native_library():
    code = """
import sys, jaxmoe, jax
from jax._src import xla_bridge
assert not xla_bridge._backends, "import jaxmoe started a backend"
print(sorted(m for m in sys.modules if m.split(".")[0] in ("flax", "typer", "rich", "safetensors")
             or m.startswith("jaxmoe._") and getattr(sys.modules[m], "registrations", None)))
"""
    assert run(code).stdout.strip() == "[]"


def test_import_loads_nothing_that_jax_has_not_loaded():
    # What keeps the import under 50 ms; a test of the time itself would depend on who else runs.
    code = """
import sys, jax
before = set(sys.modules)
import jaxmoe
print(sorted(m for m in set(sys.modules) - before if m.split(".")[0] != "jaxmoe"))
"""
    assert run(code).stdout.strip() == "[]"


def test_all_lists_what_is_there():
    assert [name for name in jaxmoe.__all__ if not hasattr(jaxmoe, name)] == []
    assert sorted(jaxmoe.__all__) == sorted(set(jaxmoe.__all__))


def test_version_is_the_distributions():
    assert jaxmoe.__version__ == metadata.version("jaxmoe")
    if PYPROJECT.exists():
        assert tomllib.loads(PYPROJECT.read_text())["project"]["version"] == jaxmoe.__version__


def test_core_depends_on_jax_and_numpy_alone():
    requirements = [r for r in metadata.requires("jaxmoe") or [] if "extra ==" not in r]
    assert {re.split(r"[<>=!~ ;\[]", r)[0] for r in requirements} == {"jax", "numpy"}


def test_typed():
    assert (Path(jaxmoe.__file__).parent / "py.typed").exists()
