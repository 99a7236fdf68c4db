"""Kills a training process at random moments, resumes it each time, and compares its end with an undisturbed run's.

    python tests/kill.py                               # 30 kills, as in the tests
    python tests/kill.py --kills 1000 --seed 7         # as many as wanted
    python tests/kill.py --seconds 600                 # for so long, at least --kills of them

The run is `miniimagenet_train.py` on a few small photographs made here: a process builds their cache, trains, saves,
measures, validates and tests in a second or two. SIGKILL ends it after a random time; another goes on with --resume,
often with an empty cache folder so that a cache is built again, until the run is complete; then another run begins.
Half of the kills wait on for the next change of a file, for that is where harm could be done.
At the end of each run its log, result, weights, Adam and best weights must be those of the run that nobody disturbed.

Each process is forked from this one, which has imported torch already, so a start costs nothing. Just before the
SIGKILL, SIGUSR1 makes the process dump its stack (faulthandler, no Python code): so it is known where the kill fell.
"""

import argparse
import contextlib
import faulthandler
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import files  # noqa: E402
import miniimagenet_train  # noqa: E402

FLAGS = ("--device cpu --n_way 2 --k_spt 1 --k_qry 2 --imgsz 48 --task_num 2 --update_step 1 --update_step_test 1 "
         "--epoch 30 --eval_every 5 --eval_tasks 2 --test_tasks 12 --nc_every 1 --save_every 1").split()
PLACES = {  # where a kill fell: the innermost of these functions on the stack
    "images.decode_all": "building a cache",
    "images._write_cache": "building a cache",
    "images._read_cache": "reading a cache",
    "record.write_args": "writing args.json",
    "checkpoint.load": "loading a checkpoint",
    "checkpoint.restore": "loading a checkpoint",
    "training.save": "saving a checkpoint",
    "record.add": "writing a log line",
    "record.metrics": "writing a log line",
    "training.validate": "evaluation",
    "training._test": "evaluation",
    "training.test": "writing the result",
    "meta.forward": "a meta-step",
    "training.train": "between steps",
    "training.__init__": "reading the data",
    "miniimagenet.sizes": "reading the data",
}
ALL_OF = {"building a cache", "saving a checkpoint", "writing a log line", "evaluation", "a meta-step"}  # must be hit


def make_photographs(root: Path) -> None:
    """3 splits of 4 classes of 6 noise images, in the miniImageNet layout."""
    generator = numpy.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for split in ("train", "val", "test"):
        rows = [f"{split}{label}-{number}.png,{split}{label}" for label in range(4) for number in range(6)]
        (root / f"{split}.csv").write_text("filename,label\n" + "".join(f"{row}\n" for row in rows))
        for row in rows:
            pixels = generator.integers(0, 256, (320, 320, 3), numpy.uint8)
            Image.fromarray(pixels).save(root / "images" / row.split(",")[0], compress_level=1)


def start(arguments: list[str], said: Path, stack: Path) -> int:
    """Fork a process that runs miniimagenet_train.py; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        dump = open(f"{stack}.new", "wb")
        faulthandler.register(signal.SIGUSR1, dump, all_threads=False)
        os.rename(f"{stack}.new", stack)
        files.run(lambda: miniimagenet_train.main(arguments))
        status = 0
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def until_a_file_changes(*folders: Path) -> None:
    """Return as soon as a file grew, came or went, or after a tenth of a second."""
    def sizes() -> list[tuple[str, int]]:
        with contextlib.suppress(FileNotFoundError):  # it went just now
            return [(entry.path, entry.stat().st_size) for folder in folders for entry in os.scandir(folder)]

    before, deadline = sizes(), time.perf_counter() + 0.1
    while sizes() == before and time.perf_counter() < deadline:
        pass


def kill(child: int, stack: Path) -> str:
    """Kill the process, and say where it was."""
    deadline = time.perf_counter() + 0.2
    dumped = ""
    if stack.exists():  # the process takes SIGUSR1 from there on
        os.kill(child, signal.SIGUSR1)
        while time.perf_counter() < deadline and not dumped.endswith(" in <module>\n"):
            dumped = stack.read_text()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for file, function in re.findall(r'File ".*?(\w+)\.py", line \d+ in (\S+)', dumped):  # the innermost first
        if f"{file}.{function}" in PLACES:
            return PLACES[f"{file}.{function}"]
    return "starting or ending"


def state(run: Path) -> dict:
    """Everything that must be the same, whatever happened on the way; the time alone may differ."""
    found = torch.load(run / "checkpoint.pt", weights_only=True)
    found.pop("minutes")
    found["best.pt"] = torch.load(run / "best.pt", weights_only=True)
    for name in ("log.jsonl", "result.json"):
        found[name] = (run / name).read_bytes()
    found["files"] = sorted(path.name for path in run.iterdir())
    return found


def differences(one, two, where: str = "") -> list[str]:
    """Where two states differ, by a single bit even."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [line for key in one for line in differences(one[key], two[key], f"{where}/{key}")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [where]
    return [] if type(one) is type(two) and one == two else [where]


def kill_and_resume(folder: Path, kills: int, seconds: float, seed: int, report=print) -> Counter:
    """Kill runs in `folder` at least `kills` times, for at least `seconds`, and in every place of ALL_OF.

    Returns:
        How many kills fell in which place.
    Raises:
        AssertionError: a run didn't go on, or its end isn't the undisturbed run's, or a place is never hit.
    """
    chance = random.Random(seed)
    make_photographs(folder / "photographs")
    said, stack = folder / "said", folder / "stack"
    begun = time.perf_counter()

    def flags(cache: str) -> list[str]:
        return ["--root", str(folder / "photographs"), "--cache", str(folder / cache)]

    def succeeded(status: int) -> None:
        assert status == 0, f"status {os.waitstatus_to_exitcode(status)}: {said.read_text()[-2000:]}"

    def ended(child: int) -> None:
        succeeded(os.waitpid(child, 0)[1])

    ended(start([*FLAGS, *flags("cache"), "--out", str(folder / "undisturbed")], said, stack))
    whole = time.perf_counter() - begun
    undisturbed = state(folder / "undisturbed")
    places, runs = Counter(), 0
    while places.total() < kills or time.perf_counter() < begun + seconds or not ALL_OF <= places.keys():
        assert places.total() < kills + 200, f"no kill fell in {ALL_OF - places.keys()}"
        runs += 1
        run, cache = folder / f"run{runs}", f"cache{runs}"
        while not (run / "result.json").exists():
            if chance.random() < 0.3:
                shutil.rmtree(folder / cache, ignore_errors=True)
            goes_on = (run / "args.json").exists()
            stack.unlink(missing_ok=True)
            child = start((["--resume", str(run)] if goes_on else [*FLAGS, "--out", str(run)]) + flags(cache), said, stack)
            time.sleep(chance.uniform(0, whole / 3))
            if chance.random() < 0.5:
                until_a_file_changes(run, folder / cache)
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                places[kill(child, stack)] += 1
            else:
                succeeded(status)
        ended(start(["--resume", str(run), *flags(cache)], said, stack))  # the kill may have left a lock or half a file
        assert not differences(state(run), undisturbed), f"run {runs} differs in {differences(state(run), undisturbed)}"
        shutil.rmtree(run)
        report(f"{places.total()} kills, {runs} runs finished as the undisturbed one did")
    for phase, count in places.most_common():
        report(f"{count:6} in {phase}")
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)  # before any is started: a fork has none of them
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), args.kills, args.seconds, args.seed)


if __name__ == "__main__":
    main()
