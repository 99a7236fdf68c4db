"""Lets the tests import the modules from wherever pytest is started, and spares their runs the drawing."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "tests")]
pytest_plugins = ["data_files"]  # its fixtures


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Runs within the tests' process draw none: a second each. What imports `draw_figure` by its name has it still."""
    import record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "draw_figure", lambda out: None)
        yield
