"""A run that fails says why in one line: a full disk, no memory, numbers that are not finite. It can be resumed."""

import contextlib
import errno
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from data_files import log_rows, read_json
from test_resume import TINY, refused, resume, same, small, train, whole  # noqa: F401

import checkpoint
import training
from tasks import Sampler, Tasks

# ---- no space, no right, no memory


@contextlib.contextmanager
def limit(kind: str, bound: int):
    """A soft limit of this process."""
    resource = pytest.importorskip("resource")
    kind = getattr(resource, f"RLIMIT_{kind}")
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, whole):
    size = (whole / "checkpoint.pt").stat().st_size
    run = train(tmp_path / "run", "--epoch", "2")
    good = (run / "checkpoint.pt").read_bytes()
    with limit("FSIZE", size - 1000):
        assert "checkpoint.pt: File too large; free space or fix" in refused("--resume", str(run), "--epoch", "8")
    assert (run / "checkpoint.pt").read_bytes() == good
    assert not list(run.glob("*.tmp"))
    resume(run)
    same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("call, name", [(0, "checkpoint.pt"), (1, "args.json"), (2, "log.jsonl"), (4, "best.pt")])
def test_a_disk_that_is_full_only_when_it_is_flushed(call, name, tmp_path, monkeypatch, whole):
    """As over a network and with quotas: fsync fails once."""
    calls, original, run = iter(range(1000)), os.fsync, tmp_path / "run"

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = refused(*TINY, "--out", str(run))
    assert said.startswith(f"can't write {run / name}: {os.strerror(errno.EDQUOT)}; free space or fix")
    assert not list(run.glob("*.tmp"))
    if call > 1:
        resume(run)
        same(run, whole)


@pytest.mark.parametrize("out", ["file/run", "file", "x" * 300])
def test_folders_that_can_be_none(out, tmp_path):
    (tmp_path / "file").write_text("here")
    assert "name another" in refused(*TINY, "--out", str(tmp_path / out))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc has the process's size on Linux alone")
@pytest.mark.parametrize("large, flags", [
    pytest.param("--task_num 50 --n_way 3 --k_spt 2 --update_step 50",
                 "lower --task_chunk (now not given), or lower --task_num (now 50)", marks=pytest.mark.slow),
    ("--task_num 3000 --learner classifier", "lower --task_num (now 3000)")])
def test_out_of_memory_names_the_flags(large, flags, tmp_path):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with limit("AS", used + 2**28):
        said = refused(*TINY, *large.split(), "--out", str(tmp_path / "big"))
    assert said == f"out of memory; {flags}, or take another --device than cpu"


def test_out_of_memory_on_a_gpu_names_its_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(training.devices, "select_device", Mock(side_effect=MemoryError()))
    for flags, words in ([], "give --no-cuda_graph (a graph"), (["--no-cuda_graph"], "lower --task_ch"):
        assert refused(*TINY, "--device", "cuda", *flags, "--out", str(tmp_path / "run")).startswith(
            f"out of memory; {words}")


# ---- numbers


def break_tasks(monkeypatch, step: int, task: int) -> None:
    """One pixel of one task isn't a number; its loss isn't, then."""
    calls, original = iter(range(1000)), Sampler.gather

    def broken(sampler, *args, **options) -> Tasks:
        tasks = original(sampler, *args, **options)
        if sampler.turns > 1 and not options and next(calls) == step:
            tasks.x_qry[task, 0] = float("nan")
        return tasks

    monkeypatch.setattr(Sampler, "gather", broken)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    run = tmp_path / "new"
    with monkeypatch.context() as patch:
        break_tasks(patch, 4, 1)  # it measures, so that its row would be logged
        said = refused(*TINY, "--out", str(run))
    assert said.startswith("step 4: a loss, the gradient or the update is not finite. Lower")
    for flag in ("--update_lr (0.4)", "--meta_lr (0.001)", "--skip_nonfinite", f"_args {run} "):
        assert flag in said
    assert "--clip" not in said  # what isn't finite stays so
    assert max(row["step"] for row in log_rows(run)) == 3  # nothing of the step that failed
    assert checkpoint.read(run / "checkpoint.pt", "")["step"] == 4


@pytest.mark.slow
def test_skipping_continues_and_counts(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    break_tasks(monkeypatch, 5, 1)
    train(run, "--skip_nonfinite")
    assert "for 8 meta-steps, 1 without an update (not finite)" in capsys.readouterr().out
    assert read_json(run)["skipped_updates"] == 1
    saved = checkpoint.read(run / "checkpoint.pt", "")
    assert (saved["step"], saved["updates"]) == (8, 7)


def test_a_learning_rate_that_is_too_high(tmp_path):
    said = refused(*TINY, "--update_lr", "1e38", "--out", str(tmp_path / "run"))
    assert said.startswith("step 0: ") and "is not finite" in said and "--update_lr (1e+38)" in said
    assert said in refused("--resume", str(tmp_path / "run"))  # again and again
