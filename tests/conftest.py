"""Fixtures of several test files; all tests compute with one thread, and runs in their process draw no figure."""

import os

import pytest
import torch
from data_files import largest, photos, small_omniglot  # noqa: F401

# Small tests gain nothing from threads, and take ten times as long with them where other programs use a core.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Runs draw none: a second each. What imports `draw_figure` by its name has it still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("record.draw_figure", lambda out: None)
        yield
