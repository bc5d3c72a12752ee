"""What every test module shares."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_executables() -> Iterator[None]:
    """Thousands of compiled programs would otherwise fill the memory of a long run."""
    yield
    jax.clear_caches()
