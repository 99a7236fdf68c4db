"""Trains the study's runs: skips finished ones, resumes stopped ones.

    python -m study.variants                     first: makes the data sets of section 5 from the two that you have
    python -m study.run --jobs 2                 all of them into runs/study, two at a time
    python -m study.run omniglot-5w1s --seeds 1  one setting, one seed
    python -m study.run --collect                copy finished runs to res/

The data are in omniglot/ and miniimagenet/, which may be links. After --collect, `python -m study.controls res/RUN`
measures a run's controls, `python plot_nc.py` redraws the figures and `python -m study.tables` rewrites the tables.
"""

import argparse
import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import files
from files import Parser, UserError, atomic, reading
from study.design import SETTINGS
from study.logs import HOME

RESULTS = ("result.json", "timing.json")  # a finished run has both
RUNS = Path("runs/study")  # the folder of the runs' folders
POLL_SECONDS = 1.0


class Job(NamedTuple):
    """One training run: its folder, and the command that starts or resumes it."""

    folder: Path
    script: str
    flags: list[str]

    @property
    def finished(self) -> bool:
        return all((self.folder / name).exists() for name in RESULTS)

    def command(self) -> list[str]:
        if (self.folder / "args.json").exists():
            return [self.script, "--resume", str(self.folder)]
        return [self.script, *self.flags, "--out", str(self.folder)]


def jobs_of(names: Sequence[str], seeds: Sequence[int] | None) -> list[Job]:
    """The first seed of every setting, then the second: an interrupted study has some runs of each.

    Raises:
        UserError: a name is not a setting of the study.
    """
    for name in names:
        if name not in SETTINGS:
            raise UserError(f"no setting {name!r} in the study; there are: {', '.join(SETTINGS)}")
    runs = [(seed, SETTINGS[name]) for name in dict.fromkeys(names or SETTINGS)
            for seed in dict.fromkeys(seeds or range(1, SETTINGS[name].seeds + 1))]
    return [Job(RUNS / f"{setting.name}-seed{seed}", setting.script, shlex.split(f"{setting.flags} --seed {seed}"))
            for seed, setting in sorted(runs, key=lambda run: run[0])]


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Run the unfinished jobs, `at_once` at a time; their output goes to FOLDER.txt.

    Each has OMP_NUM_THREADS threads, or one. If this process is stopped, it stops them, and each leaves a checkpoint.

    Raises:
        UserError: a run failed; the others were run nevertheless.
    """
    waiting = [job for job in jobs if not job.finished]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished", flush=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    running: dict[subprocess.Popen, Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                script, *flags = job.command()
                print(f"python {shlex.join([script, *flags])}", flush=True)
                with open(f"{job.folder}.txt", "ab") as output:
                    process = subprocess.Popen([sys.executable, HOME / script, *flags], stdin=subprocess.DEVNULL,
                                               stdout=output, stderr=output, env={"OMP_NUM_THREADS": "1"} | os.environ,
                                               start_new_session=True)  # Ctrl-C reaches this process alone
                running[process] = job
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                print(f"{job.folder.name}: {'finished' if job.finished else 'failed'}", flush=True)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if failed := [job for job in jobs if not job.finished]:
        raise UserError(f"failed: {', '.join(job.folder.name for job in failed)}; {failed[0].folder}.txt says why")


def contents(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """What the files of these names hold, without those that are absent."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def collect(jobs: Sequence[Job], results: Path) -> None:
    """Copy the log (compressed), settings, results, tested and last weights of finished runs to `results`/NAME-seedS.

    The same run gives the same bytes: the compressed log has no time stamp, args.json no --out.
    """
    for job in jobs:
        if not job.finished:
            print(f"{job.folder.name}: not finished, left out")
            continue
        with reading(job.folder, "let it train again", "is damaged"):
            arguments = json.loads((job.folder / "args.json").read_bytes())
            arguments["settings"]["out"] = None
            log = (job.folder / "log.jsonl").read_bytes()
        weights = contents(job.folder, ["last.pt", f"{arguments['settings'].get('test_weights', 'best')}.pt"])
        copies = contents(job.folder, RESULTS) | weights | {
            "log.jsonl.gz": gzip.compress(log, mtime=0), "args.json": (json.dumps(arguments, indent=1) + "\n").encode()}
        folder = results / job.folder.name
        controls = folder / "controls.json"
        if controls.exists() and contents(folder, weights) != weights:
            controls.unlink()
            print(f"{controls} is of other weights and removed; measure again: python -m study.controls {folder}")
        for name, content in copies.items():
            with atomic(folder / name) as file:
                file.write(content)
        print(f"{job.folder.name}: {sum(map(len, copies.values())) / 1000:,.0f} kB")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m study.run", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SETTING", help="settings in study/design.py; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the study's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--collect", action="store_true", help="copy finished runs to res/, run nothing")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UserError("--jobs must be at least 1")
    jobs = jobs_of(options.names, options.seeds)
    if options.collect:
        collect(jobs, HOME / "res")
    else:
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # Windows has no SIGHUP
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the runs are stopped too
        run_all(jobs, options.jobs)


if __name__ == "__main__":
    files.run(main)
