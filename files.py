"""Files written whole or not at all, locks, and errors that the user can fix.

Every program here ends in one of two ways: it did its work, or it prints one
line that says what is wrong and what to do, with exit status 2 (`run`).
"""

import argparse
import contextlib
import io
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from tqdm import tqdm

LONGEST = 2000  # characters of a message, whatever a file or an argument holds


class UserError(Exception):
    """An error that the user can fix; its text is one line: what is wrong, where, what to do."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are a UserError, one line, without the usage text."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument.endswith("=--"):  # argparse would make an empty list of it
                self.error(f"argument {argument[:-3]}: '--' is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help says what there is")


@contextlib.contextmanager
def atomic(path: Path, mode: str = "wb", remedy: str = "free some space or name another folder") -> Iterator:
    """Open a temporary file in the folder of `path`; on success flush it to disk and rename it to `path`.

    A reader never sees a half-written `path`, and a failure leaves neither a
    half-written file nor the temporary one behind. A killed process leaves
    `.<name>.????????.tmp`, which `remove_stale` finds.

    Raises:
        UserError: the folder can't be written or the disk is full; the line ends in `remedy`.
    """
    path = _without_nul(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}; {remedy}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # renamed already, or the disk takes no change any more
                os.unlink(temporary)


@contextlib.contextmanager
def reading(path: Path | str, remedy: str, wrong: str = "can't be read", passed: tuple = ()) -> Iterator[None]:
    """What goes wrong in the block becomes a UserError of one line: `path`, what is wrong with it, `remedy`.

    Libraries that parse a damaged file raise nearly anything, so all errors are taken but UserErrors, memory that
    runs out and those `passed`.
    """
    try:
        yield
    except (UserError, MemoryError, *passed):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"can't read {path}: {error.strerror}; {remedy}") from error
        raise UserError(f"{path} {wrong} ({str(error) or type(error).__name__}); {remedy}") from error


def contents(path: Path, remedy: str) -> bytes:
    """What the file `path` holds.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is a folder, a pipe (which would be waited on for ever) or a device, or can't be read; the line
            ends in `remedy`.
    """
    path = _without_nul(path)
    with reading(path, remedy, passed=(FileNotFoundError,)):
        if stat.S_ISREG(os.stat(path).st_mode):
            return path.read_bytes()
    raise UserError(f"{path} is not a file; {remedy}")


def listed(faults: Sequence[str], what: str, remedy: str) -> None:
    """Refuse all `faults` in one line: the first ten and how many more there are. Nothing if there are none.

    Raises:
        UserError: `what`, the faults, `remedy`.
    """
    if faults:
        more = f"; and {len(faults) - 10:,} more" if len(faults) > 10 else ""
        raise UserError(f"{what}: {'; '.join(faults[:10])}{more}; {remedy}")


def short(text: str) -> str:
    """`text` as a message quotes it."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def progress(items: Iterable, what: str, total: int, unit: str) -> Iterator:
    """`items`, with a bar on a terminal, else with a line every ten seconds; under two seconds without."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, delay=2, unit=f" {unit}")
        return
    next_line = time.monotonic() + 2
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() > next_line:
            next_line = time.monotonic() + 10
            print(f"{what}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)


def _without_nul(path: Path) -> Path:
    """Python raises a ValueError, not an OSError, for the one character that no path can hold."""
    if "\0" in str(path):
        raise UserError(f"{path} holds a NUL character, which no file's name can; name another")
    return Path(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_stale(folder: Path, pattern: str) -> None:
    """Delete what killed `atomic` writes of files named like `pattern` left in `folder`.

    Call it only while holding the lock that their writers hold, or a running one loses its file.
    """
    for leftover in Path(folder).glob(f".{pattern}.????????.tmp"):
        _remove(leftover)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, remedy: str = "name another folder") -> Iterator[bool]:
    """Hold the lock file `path`; the system releases it however the process ends.

    Yields True, or False where the system or file system has no locks. With
    `wait` a second process waits for the first, and says so in one line.

    Raises:
        UserError: the folder can't be written, or with `wait=False` another process holds the lock.
    """
    path = _without_nul(path)
    try:
        descriptor, held = _take_lock(path, wait)
    except OSError as error:
        raise UserError(f"can't write in {path.parent}: {error.strerror or error}; {remedy}") from error
    try:
        yield held
    finally:
        if _posix_locks():  # removed while it is held: `_take_lock` sees that and opens a new one
            _remove(path)
            os.close(descriptor)
        else:  # Windows removes no file that a process has open, be it this one or the next holder
            os.close(descriptor)
            _remove(path)


def _take_lock(path: Path, wait: bool) -> tuple[int, bool]:
    """The open lock file, and whether this process holds it."""
    waiting = False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)  # a link leads outside
        try:
            held = _lock(descriptor)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            if not wait:
                raise UserError(f"{path.parent} is in use by another process; name another folder") from None
            if not waiting:
                print(f"waiting for another process that works in {path.parent}", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(0.05)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, held
        os.close(descriptor)  # the holder before has removed it meanwhile


def _lock(descriptor: int) -> bool:
    """Take the lock; False where there are none.

    Raises:
        BlockingIOError, PermissionError: another process holds it.
    """
    try:
        if posix := _posix_locks():
            posix.flock(descriptor, posix.LOCK_EX | posix.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        raise
    except (OSError, ImportError):  # some network file systems have none
        return False
    return True


def _posix_locks() -> ModuleType | None:
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def one_line(text: str) -> str:
    """`text` with line ends and control characters spelled out: file names may hold any."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2, Ctrl-C status 130.

    A character that a stream's encoding lacks is printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        line = one_line(str(error))
        if len(line) > LONGEST:
            line = f"{line[:LONGEST // 2]} ... {line[-LONGEST // 2:]}"
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports it
