"""Files written whole or not at all, locks, and errors that the user can fix.

A program that can't do its work prints one line, what is wrong and what to do, and ends with exit status 2 (`run`).
Programs import this module first: it does the same where Python is too old, and must therefore parse on Python 3.7.
"""

import argparse
import contextlib
import io
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

if sys.version_info < (3, 10):  # noqa: UP036
    sys.stderr.write(f"error: this is Python {sys.version_info[0]}.{sys.version_info[1]}, and 3.10 or later is needed; "
                     "install that\n")
    sys.exit(2)

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, where, what to do."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are a UserError of one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def run(main: Callable[[], None]) -> None:
    """Call `main`. A UserError becomes one line on stderr and exit status 2, Ctrl-C becomes status 130.

    A character that is missing in a stream's encoding is printed as "?".
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None: closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells report Ctrl-C
    except BrokenPipeError:  # a pipe's reader, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush would fail
        sys.exit(141)


def one_line(text: str) -> str:
    """`text` with line ends and control characters, which file names may hold, as escape sequences."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def short(text: str) -> str:
    """`text` as a message quotes it."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def quoted(path: Path | str) -> str:
    """`path` as a shell takes it: for the commands in messages."""
    if os.name == "nt":
        return f'"{path}"' if " " in str(path) else str(path)
    return shlex.quote(str(path))


def home_path(path: str | os.PathLike) -> Path:
    """A path, in which ~ is the home folder, as in a shell."""
    return Path(os.path.expanduser(path))


def same_place(one: str | Path | None, other: str | Path | None) -> bool:
    """Whether two paths lead to one place, however they are spelled; None is no path."""
    return one == other or None not in (one, other) and os.path.realpath(one) == os.path.realpath(other)


def program(name: str) -> str:
    """The command that starts a script of this project: by the script's name in its folder, by its path elsewhere."""
    path = Path(__file__).with_name(f"{name}.py")
    return f"python {quoted(path.name if same_place(Path.cwd(), path.parent) else path)}"


def listed(faults: Sequence[str], what: str, remedy: str) -> None:
    """Raise a UserError if there are any `faults`: `what`, the first ten and the number of others, `remedy`."""
    if faults:
        more = f"; and {len(faults) - 10:,} more" if len(faults) > 10 else ""
        raise UserError(f"{what}: {'; '.join(faults[:10])}{more}; {remedy}")


@contextlib.contextmanager
def reading(path: Path | str, remedy: str = "", wrong: str = "can't be read") -> Iterator[None]:
    """Turn an error in the block into a UserError of one line: `path`, what is wrong with it, `remedy`.

    Libraries raise nearly anything on a damaged file. So this takes every error but UserError and MemoryError.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = re.sub(r":\n\s*", ": ", str(error)).partition("\n")[0] or type(error).__name__
        line = f"{path} {wrong} ({reason})"
        if isinstance(error, OSError) and error.strerror:
            line = f"can't read {path}: {error.strerror}"
        raise UserError(f"{line}; {remedy}" if remedy else line) from error


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn an OSError in the block, such as a full disk, into a UserError of one line that ends in `remedy`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}; {remedy}") from error


@contextlib.contextmanager
def atomic(path: Path, mode: str = "wb", remedy: str = "free some space or name another folder") -> Iterator:
    """Open a temporary file in the folder of `path`; on success flush it to disk and rename it to `path`.

    A reader never sees a half-written `path`. An error leaves no file behind; a killed process leaves
    `.<name>.????????.tmp`, which `remove_stale` deletes.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with writing(path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is gone already, or the disk has become read-only
            temporary.unlink()


def remove_stale(folder: Path, pattern: str, age: float = 0) -> None:
    """Delete the temporary files in `folder` of killed `atomic` writes to names that match `pattern`.

    It would delete a running writer's file too: hold the writers' lock, or give an age in seconds that none reaches.
    """
    for leftover in Path(folder).glob(f".{pattern}.????????.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime >= age:
                leftover.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, or raise a UserError if another process holds it or the folder can't be written.

    It is released however the process ends. Some network file systems have no locks; nothing is held there.
    """
    with writing(path, "fix the permissions there or name another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{path.parent} is in use by another process; wait until it ends, or name another "
                            "folder") from None
        except (OSError, ImportError):
            pass  # no locks here
        yield


class _Lines(tqdm):
    """A progress bar for a log file: a new line per update. tqdm itself would write one endless line."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if pos == 0:  # by `close`, which adds the line end
            self.fp.write(f"{self}")
        elif self.n < self.total:  # `close` writes the last one
            self.fp.write(f"{self}\n")


def progress(items: Iterable | None, what: str, total: int, unit: str, delay: float = 2, **options) -> tqdm:
    """`items` with a bar on a terminal, else a line every ten seconds; nothing in the first `delay` seconds."""
    options |= {"total": total, "delay": delay, "miniters": 1}
    if sys.stderr.isatty():
        return tqdm(items, what, unit=f" {unit}", dynamic_ncols=True, **options)
    text = f"{what and f'{what}: '}{{n_fmt}}/{{total_fmt}} {unit}{{postfix}}, {{remaining}} left"
    return _Lines(items, mininterval=10, bar_format=text, **options)
