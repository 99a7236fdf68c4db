"""Fixtures of several test files; and runs within the tests' process are spared the drawing of a figure."""

import pytest
from data_files import photos, small_omniglot  # noqa: F401

import record


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Runs draw none: a second each. What imports `draw_figure` by its name has it still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "draw_figure", lambda out: None)
        yield
