import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled(few_optimizations):
    """All tests of training make tiny runs."""
