"""Kills a training process at many moments, resumes it each time, and compares its end with an undisturbed run's.

    python tests/kill.py --kills 1000 --seed 7

The run is `miniimagenet_train.py` on a few small photographs made here: a second or two. SIGKILL ends it; another
process continues with --resume, often with an empty cache folder, until the run is complete; then another run begins.
Every second process kills itself at one of its calls that change a file, the others are killed after a random time.

Each process is forked from this one, which has imported torch already. None draws its figure: matplotlib calls write
more often than a process lives here, so that no run would ever end.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # Adam would import it in every fork, for a second

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_files import write_classes

import files
import miniimagenet_train
import record

FLAGS = ("--device cpu --n_way 2 --k_spt 1 --k_qry 2 --imgsz 48 --task_num 2 --update_step 1 --update_step_test 1 "
         "--epoch 30 --eval_every 5 --eval_tasks 2 --test_tasks 12 --nc_every 1 --save_every 1").split()
CHANGES = {"open", "write", "fsync", "replace", "unlink", "truncate", "mkdir", "close"}  # Python's own functions


def start(arguments: list[str], said: Path, change: int | None = None) -> int:
    """Fork a process that runs miniimagenet_train.py and kills itself at its `change`-th change of a file; its id."""
    if child := os.fork():
        return child

    def count(_, event: str, function) -> None:
        nonlocal change
        if event in ("c_call", "c_return") and function.__name__ in CHANGES:  # before it, and after it
            change -= 1
            if change < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        sys.stdout = sys.stderr = said.open("a", buffering=1)
        if change is not None:
            sys.setprofile(count)
        files.run(lambda: miniimagenet_train.main(arguments))
        status = 0
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.setprofile(None)
        os._exit(status)


def state(run: Path) -> dict:
    """All that two runs of one seed share: log, result, weights, Adam, generators. Minutes may differ."""
    shared = {name: (run / name).read_bytes() for name in ("log.jsonl", "result.json")}
    shared |= torch.load(run / "checkpoint.pt", weights_only=True) | {"minutes": None}
    return shared | {"best.pt": torch.load(run / "best.pt", weights_only=True),
                     "files": sorted(path.name for path in run.iterdir())}


def differences(one, two, where: str = "") -> list[str]:
    """Where two states differ, even by a single bit."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [line for key in one for line in differences(one[key], two[key], f"{where}/{key}")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [where]
    return [] if type(one) is type(two) and one == two else [where]


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    """Kill runs in `folder` at least `kills` times; an AssertionError if one's end isn't the undisturbed run's."""
    for first, split in enumerate(("train", "val", "test")):
        write_classes(folder / "photographs" / split, 4, first, name=split, size=320)
    chance, said, begun = random.Random(seed), folder / "said", time.perf_counter()

    def flags(cache: str) -> list[str]:
        return ["--root", str(folder / "photographs"), "--cache", str(folder / cache)]

    def killed(child: int) -> bool:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"status {status}: {said.read_text()[-2000:]}"
        return status != 0

    assert not killed(start([*FLAGS, *flags("cache"), "--out", str(folder / "undisturbed")], said))
    whole, undisturbed = time.perf_counter() - begun, state(folder / "undisturbed")
    count = runs = 0
    while count < kills:
        runs += 1
        run, cache = folder / f"run{runs}", f"cache{runs}"
        while not (run / "result.json").exists():
            if chance.random() < 0.3:
                shutil.rmtree(folder / cache, ignore_errors=True)
            begins = [*FLAGS, "--out", str(run)] if not (run / "args.json").exists() else ["--resume", str(run)]
            change = chance.randrange(150) if chance.random() < 0.5 else None
            child = start(begins + flags(cache), said, change)
            if change is None:
                time.sleep(chance.uniform(0, whole / 3))
                os.kill(child, signal.SIGKILL)  # ended already, it takes no notice
            count += killed(child)
        assert not killed(start(["--resume", str(run), *flags(cache)], said))  # the kill may have left half a file
        assert not differences(state(run), undisturbed), f"run {runs} differs in {differences(state(run), undisturbed)}"
        shutil.rmtree(run)
        print(f"{count} kills, {runs} runs finished as the undisturbed one did")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    record.draw_figure = lambda out: None
    torch.set_num_threads(1)  # before any is started: a fork has none of them
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), args.kills, args.seed)


if __name__ == "__main__":
    main()
