"""Runs the study: every setting and seed that the README's figures and tables are made from.

    python study.py --jobs 2                  train all of them into runs/study, two at a time
    python study.py omniglot-5w1s --seeds 1   one setting, one seed
    python study.py --collect                 copy what the finished runs logged to res/

What is finished is skipped and what was stopped is resumed, so the same command goes on after an interruption. The
settings stand in runs.py; each is a command that can be run by hand (--dry_run shows them). After --collect,
`python plot_nc.py` and `python nc_statistics.py` remake the figures and the tables.
"""

import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Sequence

import files
import runs

HERE = Path(__file__).resolve().parent
RESULTS = ("result.json", "timing.json")  # what a finished run has
ROOTS = {"omniglot_train.py": "omniglot/", "miniimagenet_train.py": "miniimagenet/"}  # the scripts' defaults
POLL_SECONDS = 1.0


class Job(NamedTuple):
    """One training run: what it is called, its folder, and the command that makes it, or goes on with it."""

    name: str
    folder: Path
    script: str
    flags: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return all((self.folder / name).exists() for name in RESULTS)

    def command(self, root: str) -> list[str]:
        place = ["--root", root]
        if (self.folder / "args.json").exists():
            return [self.script, "--resume", str(self.folder), *place]
        return [self.script, *self.flags, "--out", str(self.folder), *place]


def jobs_of(names: Sequence[str], seeds: Sequence[int] | None, out_root: Path) -> list[Job]:
    """A seed of every setting first, then the next seed: an interrupted study has something of each.

    Raises:
        UserError: a name is not one of the study's.
    """
    known = {setting.name: setting for setting in runs.STUDY}
    for name in names:
        if name not in known:
            raise files.UserError(f"no setting {name!r} in the study; there are: {', '.join(known)}")
    chosen = [known[name] for name in names or known]
    asked = [(seed, setting) for setting in chosen for seed in seeds or setting.seeds]
    return [
        Job(f"{setting.name}-seed{seed}", out_root / f"{setting.name}-seed{seed}", setting.script,
            (*shlex.split(setting.flags), "--seed", str(seed)))
        for seed, setting in sorted(asked, key=lambda pair: pair[0])
    ]  # fmt: skip


def run_all(jobs: Sequence[Job], at_once: int, threads: int, roots: dict[str, str]) -> None:
    """Run the jobs that aren't finished, so many at once; their output goes to FOLDER.txt.

    Stopped itself, it stops them, and each leaves a checkpoint.

    Raises:
        UserError: a run failed; the others are run all the same.
    """
    waiting = [job for job in jobs if not job.finished]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running: dict[subprocess.Popen, Job] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[_start(job, roots[job.script], environment)] = job
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                print(f"{job.name}: {'finished' if job.finished else 'failed'}", flush=True)
                failed += [] if job.finished else [job]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if failed:
        raise files.UserError(f"failed: {', '.join(job.name for job in failed)}; {failed[0].folder}.txt says why")


def _start(job: Job, root: str, environment: dict[str, str]) -> subprocess.Popen:
    command = job.command(root)
    print(f"{job.name}: python {shlex.join(command)}", flush=True)
    log = job.folder.with_name(f"{job.name}.txt")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            return subprocess.Popen([sys.executable, HERE / command[0], *command[1:]], env=environment,
                                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)  # fmt: skip
    except OSError as error:
        raise files.UserError(f"can't write {log}: {error.strerror}; name another --out_root") from error


def collect(jobs: Sequence[Job], results: Path) -> None:
    """Copy the log (compressed), settings and results of every finished run to `results`/NAME-seedS.

    The same run gives the same bytes: the compressed log carries no time, args.json no folder of this machine.
    """
    for job in jobs:
        if not job.finished:
            print(f"{job.name}: not finished, left out")
            continue
        log = gzip.compress((job.folder / "log.jsonl").read_bytes(), mtime=0)
        arguments = json.loads((job.folder / "args.json").read_bytes())
        arguments["settings"] |= {"root": ROOTS[job.script], "cache": None, "out": None}
        copies = {"log.jsonl.gz": log, "args.json": (json.dumps(arguments, indent=1) + "\n").encode()}
        copies |= {name: (job.folder / name).read_bytes() for name in RESULTS}
        for name, content in copies.items():
            with files.atomic(results / job.name / name) as file:
                file.write(content)
        print(f"{job.name}: {sum(map(len, copies.values())) / 1000:,.0f} kB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, or collect what it left."""
    parser = files.Parser(description="Run the study's settings, skipping what is finished, resuming what was stopped.")
    parser.add_argument("names", nargs="*", metavar="SETTING", help=f"{', '.join(s.name for s in runs.STUDY)}; or all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the study's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of each run (default: 1)")
    parser.add_argument("--out_root", type=Path, default=Path("runs/study"), help="folder of the runs' folders")
    parser.add_argument("--omniglot", default=ROOTS["omniglot_train.py"], metavar="ROOT", help="folder of its data")
    parser.add_argument("--photographs", default=ROOTS["miniimagenet_train.py"], metavar="ROOT", help="the same")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of what isn't finished")
    parser.add_argument("--collect", action="store_true", help="copy what finished runs logged to res/, run nothing")
    options = parser.parse_args(arguments)
    for name in ("jobs", "threads"):
        if getattr(options, name) < 1:
            raise files.UserError(f"--{name} {getattr(options, name)}: must be at least 1")

    jobs = jobs_of(options.names, options.seeds, options.out_root)
    roots = {"omniglot_train.py": options.omniglot, "miniimagenet_train.py": options.photographs}
    if options.collect:
        return collect(jobs, HERE / "res")
    if options.dry_run:
        for job in jobs:
            if not job.finished:
                print(f"python {shlex.join(job.command(roots[job.script]))}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are stopped too
    run_all(jobs, options.jobs, options.threads, roots)


if __name__ == "__main__":
    files.run(main)
