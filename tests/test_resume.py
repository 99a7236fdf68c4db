"""A run can be stopped at any moment and continues as if nothing had happened; what prevents it is one line."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill
import pytest
import torch

import checkpoint
import meta
import miniimagenet_train
import omniglot_train
import record
import synthetic
import training
from files import UserError, atomic, locked
from interrupt import Interrupted, Signals
from meta import Meta
from tasks import Sampler, Tasks

HERE = Path(__file__).parent
TINY = ("--synthetic --device cpu --task_num 2 --n_way 2 --k_qry 2 --update_step 1 --update_step_test 1 --epoch 8 "
        "--eval_every 3 --eval_tasks 6 --test_tasks 6 --nc_every 2 --save_every 2").split()
ONE_LINE = 1500  # characters at most


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def make_small(monkeypatch) -> None:
    """Few characters, drawn in no time; an evaluation still takes three batches."""
    monkeypatch.setattr(training, "DRAWN", 4)
    monkeypatch.setattr(synthetic, "CHARACTER_SPLITS", {"train": (0, 4), "val": (4, 3), "test": (7, 3)})
    monkeypatch.setattr(synthetic, "CHARACTER_IMAGES", 4)


def train(out: Path, *flags: str) -> Path:
    omniglot_train.main([*TINY, "--out", str(out), *flags])
    return out


def refused(*arguments: str, program=omniglot_train) -> str:
    with pytest.raises(UserError) as error:
        program.main(list(arguments))
    assert "\n" not in str(error.value) and len(str(error.value)) < ONE_LINE
    return str(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return stop_at(patch, tmp_path_factory.mktemp("stopped") / "run", "forward", 5)


@pytest.fixture
def stopped(tmp_path, stopped_once) -> Path:
    """The same, stopped at the top of step 5; its last regular checkpoint was of step 4. A copy for each test."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def stop_at(monkeypatch, out: Path, method: str, call: int, number: int = signal.SIGTERM,
            flags: list[str] = TINY) -> Path:
    """Train, or go on, with a signal in the given call of one of Meta's methods."""
    calls, original = iter(range(1, 1000)), getattr(Meta, method)

    def signalled(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Meta, method, signalled)
        omniglot_train.main([*flags, *(["--out", str(out)] if "--resume" not in flags else [])])
    assert ended.value.code == 128 + number
    return out


def same(one: Path, two: Path) -> None:
    assert not kill.differences(kill.state(one), kill.state(two))


# ---- stopped and resumed


@pytest.mark.slow
def test_thirty_kills_lose_nothing():
    """A few runs of `python tests/kill.py`."""
    done = subprocess.run([sys.executable, HERE / "kill.py", "--kills", "30"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 30, done.stdout


@pytest.mark.slow
def test_sigterm_ends_a_real_process_and_it_is_resumed(tmp_path):
    kill.make_photographs(tmp_path / "photographs")
    flags = [*kill.FLAGS, "--root", str(tmp_path / "photographs"), "--save_every", "500", "--eval_every", "1000"]
    run = tmp_path / "run"
    program = [sys.executable, HERE.parent / "miniimagenet_train.py"]
    process = subprocess.Popen([*program, *flags, "--epoch", "100000", "--out", run], stdout=subprocess.PIPE, text=True)
    try:
        while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_bytes().count(b"\n") < 9:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
    finally:
        process.kill()
    assert process.returncode == 143
    assert f"go on with: python miniimagenet_train.py --resume {run}" in said.splitlines()[-1]
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert step > 2
    settings = json.loads((run / "args.json").read_text())
    settings["settings"]["epoch"] = 2 * (step + 2)  # an end in sight; --epoch may only grow
    (run / "args.json").write_text(json.dumps(settings))
    miniimagenet_train.main(["--resume", str(run)])
    miniimagenet_train.main([*flags, "--epoch", str(2 * (step + 2)), "--out", str(tmp_path / "whole")])
    same(run, tmp_path / "whole")


@pytest.mark.parametrize("method, call, step", [
    ("forward", 4, 4),  # within a step: at the next one's top
    ("finetune", 5, 3),  # in a validation: as at that step's top
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("forward", 1, 1), ("forward", 8, 8), ("finetune", 1, 0), ("finetune", 12, 8),
        ("finetune", 13, 8), ("finetune", 15, 8)]),  # in the test: the last checkpoint is there already
])
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_anywhere_and_resumed(method, call, step, number, whole, tmp_path, monkeypatch, capsys):
    run = stop_at(monkeypatch, tmp_path / "run", method, call, number)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == step
    said = f"stopped at step {step}; go on with: python omniglot_train.py --resume {run}\n"
    assert capsys.readouterr().out.endswith(said)
    assert not (run / "result.json").exists()
    omniglot_train.main(["--resume", str(run)])
    same(run, whole)


def test_a_signal_while_data_is_read_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "load_characters", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "runs/run")
    assert ended.value.code == 143 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_ends_on_the_spot():
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), Signals() as signals, signals.noted():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_a_signal_while_the_handlers_are_set_or_taken_away(monkeypatch):
    """The process ends with the signal's status, or with its work done; the handlers are what they were."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for call, sent, status in ((1, signal.SIGTERM, 143), (2, signal.SIGTERM, 143), (3, signal.SIGINT, None)):
        calls, original = iter(range(1, 10)), signal.signal

        def signalled(number, handler):  # two handlers are set, then taken away, SIGTERM's first
            result = original(number, handler)
            if next(calls) == call:
                os.kill(os.getpid(), sent)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", signalled)
            ended = None
            try:
                with Signals():
                    pass
            except SystemExit as error:
                ended = error.code
        assert ended == status and [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with pytest.raises(SystemExit) as ended, Signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert ended.value.code == 130


def test_a_noted_signal_waits_for_the_check():
    with Signals() as signals:
        with signals.noted():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted) as interrupted:
                signals.check(torch.device("cpu"))
    assert interrupted.value.status == 130


@pytest.mark.parametrize("left", [["args.json"], ["args.json", "log.jsonl"]])
def test_killed_before_its_first_checkpoint_it_begins(left, whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".checkpoint.pt.abcd1234.tmp").write_bytes(b"half")
    for name in left:
        shutil.copy(whole / name, run)
    if "log.jsonl" in left:
        (run / "log.jsonl").write_bytes(b'{"kind": "run", "st')
    omniglot_train.main(["--resume", str(run)])
    same(run, whole)


def test_a_half_written_line_is_cut_off(stopped, whole):
    with (stopped / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 5, "lo')
    omniglot_train.main(["--resume", str(stopped)])
    same(stopped, whole)


@pytest.mark.slow
def test_a_longer_run_is_the_longer_run(whole, tmp_path, monkeypatch, capsys):
    run = train(tmp_path / "run", "--epoch", "4")
    short = (run / "result.json").read_bytes()
    omniglot_train.main(["--resume", str(run)])
    assert f"{run} is complete" in capsys.readouterr().out
    assert (run / "result.json").read_bytes() == short
    stop_at(monkeypatch, run, "forward", 2, flags=["--resume", str(run), "--epoch", "8"])
    assert not (run / "result.json").exists()
    omniglot_train.main(["--resume", str(run)])
    same(run, whole)
    one, two = (json.loads((folder / "args.json").read_text()) for folder in (run, whole))
    assert one["meta_steps"] == 8 and one["settings"] == two["settings"] | {"out": str(run)}
    assert "--epoch 4: the run has 8; that may only grow" in refused("--resume", str(run), "--epoch", "4")


def test_minutes_add_up(stopped):
    found = torch.load(stopped / "checkpoint.pt", weights_only=True)
    checkpoint.write(stopped / "checkpoint.pt", found | {"minutes": 60.0})
    omniglot_train.main(["--resume", str(stopped)])
    assert json.loads((stopped / "timing.json").read_text())["training_minutes"] >= 60


# ---- the settings of a run again


@pytest.mark.parametrize("flags", [["--update_lr", "0.3"], ["--n_way", "3"], ["--seed", "1"], ["--precision", "tf32"],
                                   ["--clip", "1"], ["--eval_every", "4"], ["--nc_every_late", "5"],
                                   ["--no-synthetic"], ["--out", "elsewhere"], ["--deterministic"]])
def test_resuming_refuses_what_changes_the_experiment(flags, stopped):
    before = (stopped / "log.jsonl").read_bytes()
    said = refused("--resume", str(stopped), *flags)
    assert said.startswith(f"{flags[0].replace('no-', '')} can't be set with --resume")
    assert (stopped / "log.jsonl").read_bytes() == before


def test_resuming_takes_the_runs_own_flags_and_where_it_happens(stopped, whole, tmp_path):
    omniglot_train.main(["--resume", str(stopped), *TINY, "--save_every", "3", "--cuda_graph", "--root", "x",
                         "--cache", str(tmp_path / "cache")])
    same(stopped, whole)


@pytest.mark.slow
def test_from_args_repeats_a_run(whole, tmp_path):
    def repeat(run: Path, out: str, *flags: str) -> dict:
        omniglot_train.main(["--from_args", str(run / "args.json"), "--out", str(tmp_path / out), *flags])
        return json.loads((tmp_path / out / "args.json").read_text())["settings"]

    repeat(whole, "run")
    same(tmp_path / "run", whole)
    settings = repeat(whole, "other", "--epoch", "2", "--first_order")
    assert settings["first_order"] and settings["epoch"] == 2 and settings["n_way"] == 2
    assert not repeat(tmp_path / "other", "back", "--no-first_order")["first_order"]


def rewrite(run: Path, **settings) -> str:
    """Change settings in args.json; None takes one away."""
    recorded = json.loads((run / "args.json").read_text())
    recorded["settings"] = {name: value for name, value in (recorded["settings"] | settings).items() if value != "away"}
    (run / "args.json").write_text(json.dumps(recorded))
    return str(run / "args.json")


@pytest.mark.slow
def test_a_file_of_an_older_version(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    path = rewrite(run, clip="away", skip_nonfinite="away", save_every="away", deterministic="away", test=None)
    assert "not of this script and version (clip, deterministic" in refused("--resume", str(run), "--epoch", "9")
    omniglot_train.main(["--test", str(run)])
    omniglot_train.main(["--from_args", path, "--out", str(tmp_path / "new")])
    assert (tmp_path / "new/log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


@pytest.mark.parametrize("settings, line", [
    ({"colour": 1}, "not of this script and version (colour)"),
    ({"script": "miniimagenet_train"}, "not of this script and version (script miniimagenet_train)"),
    ({"net": "resnet"}, "argument --net: invalid choice"), ({"epoch": "ten"}, "argument --epoch: invalid int value"),
    ({"epoch": None}, "argument --epoch: invalid int value"), ({"seed": [1]}, "argument --seed: invalid int value"),
    ({"synthetic": "yes"}, "ignored explicit argument"), ({"out": "a\0b"}, ""),
])
@pytest.mark.parametrize("mode", ["resume", "test", "from_args"])
def test_a_file_that_is_wrong(mode, settings, line, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    path = rewrite(run, **settings)
    if line:
        assert line in refused(f"--{mode}", path if mode == "from_args" else str(run))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"settings": 5}', b"\xff", b"[" * 100_000])
def test_a_file_that_is_none(content, tmp_path):
    (tmp_path / "args.json").write_bytes(content)
    assert "args.json is not what a run writes" in refused("--from_args", str(tmp_path / "args.json"))


def test_modes_exclude_each_other(whole):
    assert refused("--test", str(whole), "--resume", str(whole)) == "--resume and --test exclude each other; give one"


# ---- a checkpoint that is wrong


def test_every_damage_to_a_checkpoint_is_refused(stopped):
    """Cut anywhere, one byte changed anywhere: never a run that goes on from something else."""
    path, log = stopped / "checkpoint.pt", (stopped / "log.jsonl").read_bytes()
    good = path.read_bytes()
    for length in [0, 1, 100, len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:length])
        assert ("checkpoint.pt is cut, damaged or no file of this program; put it back, or start again: python "
                f"omniglot_train.py --from_args {stopped / 'args.json'}") in refused("--resume", str(stopped))
    accepted = 0
    for place in range(7, len(good), len(good) // 60):
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1:])
        try:
            found = checkpoint.load(path, torch.device("cpu"), "")
        except UserError:
            continue
        accepted += 1  # padding, or a byte that zip holds twice
        path.write_bytes(good)
        assert not kill.differences(found, checkpoint.load(path, torch.device("cpu"), ""))
    assert accepted < 20
    assert (stopped / "log.jsonl").read_bytes() == log


def test_a_checkpoint_is_read_for_any_name_of_the_processor(stopped):
    for name in ("cpu", "cpu:0"):
        assert checkpoint.load(stopped / "checkpoint.pt", torch.device(name), "")["step"] == 5


class Code:
    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


def other_weights(found: dict) -> dict:
    return found | {"weights": {name: weight[:1] for name, weight in found["weights"].items()}}


def other_adam(found: dict) -> dict:
    state = {i: values | {"exp_avg": torch.zeros(3)} for i, values in found["adam"]["state"].items()}
    return found | {"adam": found["adam"] | {"state": state}}


@pytest.mark.parametrize("change, line", [
    (lambda found: {"weights": found["weights"], "step": 3, "val_accuracy": 0.5}, "is no checkpoint (updates, adam,"),
    (lambda found: [found], "is cut, damaged or no file of this program"),
    (lambda found: found | {"best": Code()}, "is cut, damaged or no file of this program"),
    (lambda found: found | {"step": -1}, "is no checkpoint (its counts are impossible)"),
    (lambda found: found | {"of": found["of"] | {"update_lr": 0.1}}, "is of a run with update_lr 0.1, and here it is"),
    (lambda found: found | {"of": found["of"] | {"device": "cuda"}}, "is of a run with device cuda, and here it is"),
    (other_weights, "doesn't fit this run"), (other_adam, "doesn't fit this run"),
    (lambda found: found | {"tasks": torch.zeros(3)}, "doesn't fit this run"),
    (lambda found: found | {"generator": torch.zeros(3, dtype=torch.uint8)}, "doesn't fit this run"),
    (lambda found: found | {"log_bytes": 10**9}, "log.jsonl is cut"),
])
def test_a_foreign_checkpoint_is_refused(change, line, stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, best = stopped / "checkpoint.pt", (stopped / "best.pt").read_bytes()
    torch.save(change(torch.load(path, weights_only=True)), path)
    assert line in refused("--resume", str(stopped))
    assert not (tmp_path / "made by a checkpoint").exists()
    assert (stopped / "best.pt").read_bytes() == best or "log.jsonl" in line


def test_a_run_without_its_checkpoint_or_log_is_refused(stopped):
    log = (stopped / "log.jsonl").read_bytes()
    (stopped / "log.jsonl").unlink()
    assert "log.jsonl is missing" in refused("--resume", str(stopped))
    (stopped / "log.jsonl").write_bytes(log[:-1])
    assert f"log.jsonl is cut: {len(log) - 1:,} of the {len(log):,} bytes" in refused("--resume", str(stopped))
    (stopped / "log.jsonl").write_bytes(log)
    (stopped / "checkpoint.pt").unlink()
    assert "checkpoint.pt is missing; put it back, or start again" in refused("--resume", str(stopped))
    assert (stopped / "log.jsonl").read_bytes() == log


def test_a_link_in_the_place_of_the_log_leads_nowhere(stopped, tmp_path):
    (tmp_path / "precious").write_bytes((stopped / "log.jsonl").read_bytes() + b"more")
    (stopped / "log.jsonl").unlink()
    (stopped / "log.jsonl").symlink_to(tmp_path / "precious")
    assert "log.jsonl is not a file of its own" in refused("--resume", str(stopped))
    assert (tmp_path / "precious").read_bytes().endswith(b"more")


# ---- two at once


def test_a_folder_in_use_is_refused(stopped, whole, tmp_path):
    new = tmp_path / "new"
    for run, flags in ((new, [*TINY, "--out", str(new)]), (stopped, ["--resume", str(stopped)])):
        with locked(run / ".run.lock"):
            assert refused(*flags) == f"{run} is in use by another process; name another folder"
    omniglot_train.main(["--resume", str(stopped)])
    same(stopped, whole)


def test_a_run_that_began_and_ended_just_now_is_not_overwritten(whole, tmp_path, monkeypatch):
    """After the folder was looked at and before it was locked."""
    run, opened = tmp_path / "run", os.open

    def late(path, *args, **kwargs):
        if str(path).endswith(".run.lock"):
            shutil.copytree(whole, run, dirs_exist_ok=True)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", late)
    assert f"--out {run}: there is a run already" in refused(*TINY, "--out", str(run))
    same(run, whole)


def test_a_test_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / ".test-4tasks-1qry-1steps.json.abcd1234.tmp").write_text("half")
    with locked(tmp_path / ".test.lock"), pytest.raises(KeyboardInterrupt):  # it waits for a test that is writing
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            record.write_test(tmp_path / "test-6tasks.json", {})
    assert len(list(tmp_path.iterdir())) == 1
    record.write_test(tmp_path / "test-6tasks.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["test-6tasks.json"]


def test_a_real_run_holds_its_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Meta, "forward", lambda *_, **__: refused("--resume", str(tmp_path / "run")) and sys.exit(7))
        with pytest.raises(SystemExit) as ended:
            train(tmp_path / "run")
    assert ended.value.code == 7
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["args.json", "best.pt", "checkpoint.pt", "log.jsonl"]


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
    run = tmp_path / "run"
    size = (whole / "checkpoint.pt").stat().st_size
    train(run, "--epoch", "2")
    good = (run / "checkpoint.pt").read_bytes()
    with limit("FSIZE", size - 1000):
        assert "checkpoint.pt: File too large; free some space" in refused("--resume", str(run), "--epoch", "8")
    assert (run / "checkpoint.pt").read_bytes() == good
    assert not list(run.glob(".*"))
    omniglot_train.main(["--resume", str(run)])
    same(run, whole)


def test_a_log_on_a_full_disk(tmp_path):
    path = tmp_path / "log.jsonl"
    with record.Log(path) as log:
        log.add("run", 0, data="whole")
        size = log.sync()
        with limit("FSIZE", size + 10), pytest.raises(UserError, match="log.jsonl: File too large; free some"):
            log.add("train", 0, loss=1.0)
    assert path.stat().st_size == size + 10  # half a line
    with record.Log(path, keep=size) as log:
        log.add("train", 0, loss=1.0)
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["run", "train"]


@pytest.mark.slow
def test_a_disk_that_is_full_only_when_it_is_flushed(tmp_path, monkeypatch, whole):
    """As over a network and with quotas: the first fsync is of args.json, the second of the log."""
    for call, name in ((1, "args.json"), (2, "log.jsonl"), (3, "checkpoint.pt"), (4, "best.pt")):
        calls, original = iter(range(1, 1000)), os.fsync

        def full(descriptor: int) -> None:
            if next(calls) == call:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            original(descriptor)

        run = tmp_path / str(call)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            said = refused(*TINY, "--out", str(run))
        assert said.startswith(f"can't write {run / name}: {os.strerror(errno.EDQUOT)}; free some space")
        assert not run.exists() or not list(run.glob(".*"))
        if call > 1:
            omniglot_train.main(["--resume", str(run)])
            same(run, whole)


def test_a_disk_that_is_read_only(tmp_path, monkeypatch):
    opened = os.open

    def refusing(path, *args, **options):
        if str(path).endswith(".lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", refusing)
    assert "Read-only file system; give rights there" in refused(*TINY, "--out", str(tmp_path / "run"))


@pytest.mark.parametrize("out", ["file/run", "file", "a\0b", "x" * 300])
def test_folders_that_can_be_none(out, tmp_path):
    (tmp_path / "file").write_text("here")
    said = refused(*TINY, "--out", str(tmp_path / out))
    assert "name another" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_path_holds_nul(tmp_path):
    for manager in (atomic, locked):
        with pytest.raises(UserError, match="NUL"), manager(Path(f"{tmp_path}/a\0b")):
            pass


def test_out_of_memory_names_the_flag(stopped, tmp_path):
    good = (stopped / "checkpoint.pt").read_bytes()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with limit("AS", used + 2**28):
        large = ["--task_num", "50", "--n_way", "3", "--k_spt", "2", "--update_step", "50"]
        said = refused(*TINY, *large, "--out", str(tmp_path / "big"))
    assert said == ("out of memory; lower --task_chunk (now as fits the device) to hold fewer tasks at once, "
                    "or take another --device than cpu")
    assert (stopped / "checkpoint.pt").read_bytes() == good


# ---- numbers


def break_tasks(monkeypatch, step: int, task: int) -> None:
    """One pixel of one task isn't a number; its loss isn't, then."""
    calls, original = iter(range(1000)), Sampler.gather

    def broken(sampler, *args, **options) -> Tasks:
        tasks = original(sampler, *args, **options)
        if sampler.turns > 1 and not options and drawn.setdefault(tasks.x_qry.sum().item(), next(calls)) == step:
            tasks.x_qry[task, 0] = float("nan")
        return tasks

    drawn = {}  # tasks drawn again are the same ones
    monkeypatch.setattr(Sampler, "gather", broken)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_tasks(patch, 5, 1)
        said = refused(*TINY, "--out", str(run))
    assert said.startswith(f"step 5: the loss of task 1 is not finite; its weights and tasks are in {run}/nonfinite.pt")
    for flag in ("--update_lr (0.4)", "--meta_lr (0.001)", "--clip", "--skip_nonfinite", f"_args {run}/args.json"):
        assert flag in said
    found = torch.load(run / "nonfinite.pt", weights_only=True)
    assert found["step"] == 5 and found["losses"].isfinite().tolist() == [True, False]
    assert found["tasks"]["x_qry"].isnan().any()
    stopped = stop_at(monkeypatch, tmp_path / "stopped", "forward", 5)
    reached = torch.load(stopped / "checkpoint.pt", weights_only=True)
    for part in ("weights", "adam"):
        assert not kill.differences(found[part], reached[part])
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 4  # nothing of the step that failed


@pytest.mark.slow
def test_skipping_goes_on_and_counts(tmp_path, monkeypatch, whole):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_tasks(patch, 5, 1)
        train(run, "--skip_nonfinite")
    assert json.loads((run / "result.json").read_text())["skipped_updates"] == 1
    found = torch.load(run / "checkpoint.pt", weights_only=True)
    assert (found["step"], found["updates"]) == (8, 7)
    train(tmp_path / "none", "--skip_nonfinite")
    assert json.loads((tmp_path / "none/result.json").read_text())["skipped_updates"] == 0


def test_a_learning_rate_that_is_too_high(tmp_path):
    said = refused(*TINY, "--update_lr", "1e38", "--out", str(tmp_path / "run"))
    assert said.startswith("step 0: ") and "is not finite" in said and "--update_lr (1e+38)" in said
    assert said in refused("--resume", str(tmp_path / "run"))  # again and again


@pytest.mark.slow
def test_clip_reaches_the_gradient(tmp_path, whole):
    train(tmp_path / "run", "--clip", "1e-4")
    train(tmp_path / "wide", "--clip", "1e4")
    one, two, none = (kill.state(run)["weights"] for run in (tmp_path / "run", tmp_path / "wide", whole))
    assert not kill.differences(two, none) and kill.differences(one, none)


# ---- reproducible


def test_measurements_get_rarer(tmp_path, monkeypatch):
    monkeypatch.setattr(meta, "LATE", 4)
    train(tmp_path / "run", "--nc_every", "1", "--nc_every_late", "3")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("classes") == "train"] == [0, 1, 2, 3, 6]


@pytest.mark.slow
def test_deterministic_is_asked_of_torch_and_changes_nothing_on_a_cpu(tmp_path, whole):
    train(tmp_path / "run", "--deterministic")
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    one, two = kill.state(tmp_path / "run"), kill.state(whole)
    one.pop("of"), two.pop("of")
    assert not kill.differences(one, two)
    train(tmp_path / "other", "--epoch", "1")
    assert not torch.are_deterministic_algorithms_enabled()
