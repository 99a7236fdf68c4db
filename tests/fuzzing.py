"""What the fuzz test feeds inputs with: seeds, damage, and the judgement of how a program took an input.

An input is good or bad, and both are fine: the program must end by itself, in success or in one line and exit status
2, and write nothing outside the folders that it was given. `attempt` asserts that.
"""

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import files

SEED = int(os.environ.get("FUZZ_SEED", "222"))
INPUTS = int(os.environ.get("FUZZ_INPUTS", "2400"))  # of all kinds together
ONLY = os.environ.get("FUZZ_ONLY")  # one input again: KIND:NUMBER
SECONDS = 30.0  # that one input may take; most take a hundredth of one
MEMORY = 2 * 2**30  # bytes that one input may take, beside what the process has already
NOTES = ("decoding ", "downloading ", "the cache ", "note: ", "waiting for ")  # lines that may stand before the refusal



class Input(NamedTuple):
    """One input, written to disk."""

    recipe: str  # what is wrong with it, for a reader
    call: Callable[[], object]  # feeds it to a program
    named: tuple[Path, ...]  # folders and files that the program was told to work in: it writes nothing elsewhere
    results: tuple[Path, ...]  # of these, where something new may lie afterwards
    arguments: tuple[str, ...] = ()  # of the command line, to run it as a process


class Hang(BaseException):
    """An input took too long. No Exception, least of all an OSError as TimeoutError is one: programs handle those."""


def random_of(kind: str, number: int) -> random.Random:
    """The generator of one input: it depends on nothing that ran before."""
    return random.Random(f"{SEED} {kind} {number}")


# ---- judging


def attempt(given: Input, around: Path) -> str:
    """Feed an input: "accepted" or "refused".

    Args:
        given: the input.
        around: the folder that holds everything of this input; what lies in it outside `given.results` stays as it is.
    Raises:
        AssertionError: a traceback, another status, more than one line, a hang, or a file where none belongs.
    """
    before = snapshot(around, given.results)
    # As strict as a terminal's: stdout refuses what UTF-8 can't hold, stderr spells it out.
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), Writes() as writes, time_limit():
            files.run(given.call)
    except SystemExit as stopped:
        status = stopped.code
    except BaseException as error:
        raise AssertionError("".join(traceback.format_exception(error, limit=None if ONLY else -1))) from error
    err.flush()
    judge(status, err.buffer.getvalue().decode(), given)
    assert snapshot(around, given.results) == before, "what lay there changed, or something was left"
    outside = {str(path) for path in writes.paths if not any(path.is_relative_to(name) for name in given.named)}
    assert not outside, f"written outside the named folders: {outside}"
    return "refused" if status else "accepted"


def judge(status: int | None, said: str, given: Input) -> None:
    """Assert that a program's status and its stderr are those of a success or of a refusal."""
    assert "Traceback" not in said, said
    assert status in (0, 2), f"status {status}: {said}"
    if status == 2:
        *notes, line = said.removesuffix("\n").split("\n")
        assert line.startswith("error: ") and all(note.startswith(NOTES) for note in notes), said
        assert line.isprintable(), line
        assert len("error: a line") < len(line) <= files.LONGEST + len("error:  ... "), line


def snapshot(folder: Path, but: tuple[Path, ...] = ()) -> dict[str, tuple]:
    """Every path below `folder`, without what lies at or below `but`: type, size and time of change."""
    found = {}
    for path in folder.rglob("*"):
        if not any(path.is_relative_to(name) for name in but):
            status = path.lstat()
            folder_time = 0 if path.is_dir() else status.st_mtime_ns  # a folder's changes with what `but` names
            found[str(path)] = status.st_mode, 0 if path.is_dir() else status.st_size, folder_time
    return found


class Writes:
    """The paths that Python code opens for writing, makes, renames or removes while this is entered, on all the disk.

    Python's audit hooks can't be taken away again: there is one, which looks at nothing outside the block.
    """

    _current: "Writes | None" = None
    _hooked = False
    CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2,
               "os.truncate": 1, "os.chmod": 1}  # event: how many of its arguments are paths

    def __enter__(self) -> "Writes":
        self.paths: list[Path] = []
        if not Writes._hooked:
            sys.addaudithook(Writes._look)
            Writes._hooked = True
        Writes._current = self
        return self

    def __exit__(self, *_) -> None:
        Writes._current = None

    @staticmethod
    def _look(event: str, arguments: tuple) -> None:
        writes = Writes._current
        if writes is None:
            return
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            paths = arguments[:1]
        else:
            paths = arguments[:Writes.CHANGES.get(event, 0)]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path) != os.devnull:
                writes.paths.append(Path(os.path.abspath(os.fsdecode(path))))


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise in the main thread when the block takes longer, and again each second: it may wait for threads to end."""

    def stop(*_) -> None:
        raise Hang(f"a hang: more than {SECONDS:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(more: int = MEMORY) -> Iterator[None]:
    """So that a bomb ends in a MemoryError and not in the machine's: address space beside what is in use (Linux)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---- damage


def damage_file(rng: random.Random, path: Path) -> str:
    """Damage a file in its place; what was done."""
    data, recipe = damaged(rng, path.read_bytes())
    path.write_bytes(data)
    return recipe


def damaged(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """`data` as a bad disk, a broken transfer or a hostile hand leaves it, and what was done."""
    if not data:
        return b"\0", "one NUL byte"
    kind = rng.choice(["cut", "bits", "bits", "bytes", "removed", "repeated", "inserted", "number", "zeroed", "empty"])
    place = rng.randrange(len(data))
    end = min(len(data), place + rng.choice([1, 4, 16, 100, 1000]))
    if kind == "cut":
        return data[:place], f"cut to {place} of {len(data)} bytes"
    if kind == "bits":
        places = sorted(rng.randrange(8 * len(data)) for _ in range(rng.choice([1, 1, 2, 8, 50])))
        new = bytearray(data)
        for bit in places:
            new[bit // 8] ^= 1 << bit % 8
        return bytes(new), f"bits {places} flipped"
    if kind == "bytes":
        return data[:place] + rng.randbytes(end - place) + data[end:], f"bytes {place} to {end} replaced"
    if kind == "removed":
        return data[:place] + data[end:], f"bytes {place} to {end} removed"
    if kind == "repeated":
        return data[:end] + data[place:], f"bytes {place} to {end} repeated"
    if kind == "inserted":
        return data[:place] + rng.randbytes(end - place) + data[place:], f"{end - place} bytes inserted at {place}"
    if kind == "number":
        number = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        return data[:place] + number + data[place + 4:], f"{number.hex()} at {place}"
    if kind == "zeroed":
        return data[:place] + bytes(end - place) + data[end:], f"bytes {place} to {end} zeroed"
    return b"", "empty"


TOKENS = [  # of JSON, and of what Python's json takes for JSON
    "null", "true", "false", "-1", "0", "1", "2", "0.5", "1e308", "1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000,
    "1e-320", '""', '" "', '"x"', '"\\ud800"', '"\\u0000"', '"a\\nb"', '"\\u001b[31m"', '"$\\\\frac{$"', '"$x^$"',
    '"../x"',
    '"/dev/null"', '"\u4e2d\u6587 \U0001f600"', json.dumps("x" * 100_000), "[]", "{}", "[1]", '[["a"]]', '{"a": 1}',
    "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[null]", '["\\ud800"]', "[1e999, NaN]",
]


def part_of(rng: random.Random, value: dict | list) -> tuple[dict | list, str | int, str]:
    """A random part of nested dictionaries and lists: what holds it, its key there, and the way to it."""
    path, parent = [], value
    while True:
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        path.append(str(key))
        if not (isinstance(parent[key], (dict, list)) and parent[key]) or rng.random() < 0.2:
            return parent, key, ".".join(path)
        parent = parent[key]


def mutated_json(rng: random.Random, value: dict) -> tuple[str, str]:
    """The JSON of `value` with one part of it replaced, removed, renamed or given twice, and what was done."""
    mark = "\0"  # stands where a token goes that no value has
    everything = {"": json.loads(json.dumps(value))}
    parent, key, path = part_of(rng, everything)
    kind = rng.choice(["removed", "renamed", "twice", "replaced", "replaced", "replaced", "replaced"])
    if parent is everything or kind == "replaced":
        token = rng.choice(TOKENS)
        parent[key] = mark
        return json.dumps(everything[""]).replace(json.dumps(mark), token), f"{path} is {token[:40]}"
    if kind == "twice" and isinstance(parent, list):
        parent.append(parent[key])
    elif kind == "renamed" and isinstance(parent, dict):
        parent[key + rng.choice([" ", "s", "\u200b"])] = parent.pop(key)
    else:
        del parent[key]
        kind = "removed"
    return json.dumps(everything[""]), f"{path} {kind}"
