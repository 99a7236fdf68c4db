"""Files written whole or not at all, locks, and errors that are the user's to mend.

Every program here ends in one of two ways: it did its work, or it prints one
line that says what is wrong and what to do, with exit status 2 (`run`).
"""

import argparse
import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Callable, Iterator, NoReturn, Sequence

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks; every file is still written whole, through `atomic`
    fcntl = None


LONGEST = 2000  # characters of a message, whatever a file or an argument holds


class UserError(Exception):
    """Something the user can mend; its text is one line: what is wrong, where, what to do."""


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
    """Open a temporary file beside `path`; on success flush it to disk and rename it to `path`.

    A reader never sees a half-written `path`, and a failure leaves neither a
    half-written file nor the temporary one behind. A process killed on the way
    leaves `.<name>.????????.tmp`, which `remove_stale` finds.

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
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def contents(path: Path, remedy: str) -> bytes:
    """What the file `path` holds.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is a folder, a pipe (which would be waited on for ever) or a device, or can't be read; the line
            ends in `remedy`.
    """
    path = _without_nul(path)
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; {remedy}") from error
    raise UserError(f"{path} is not a file; {remedy}")


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

    Call it only while holding the lock that their writers hold, or a living one loses its file.
    """
    for leftover in Path(folder).glob(f".{pattern}.????????.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, remedy: str = "name another folder") -> Iterator[bool]:
    """Hold the lock file `path`; the system lets go of it however the process ends.

    Yields True, or False where the system or file system has no locks. With
    `wait` a second process waits for the first, saying so in one line.

    Raises:
        UserError: the folder can't be written, or with `wait=False` another process holds the lock.
    """
    path = _without_nul(path)
    descriptor = None
    try:
        try:
            descriptor = _take_lock(path, wait)
        except OSError as error:
            raise UserError(f"can't write in {path.parent}: {error.strerror or error}; {remedy}") from error
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Unlinked while held: a process that waits on the unlinked file sees that and starts over.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _take_lock(path: Path, wait: bool) -> int | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        no_link = getattr(os, "O_NOFOLLOW", 0)  # it may lead outside
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | no_link, 0o666)
        try:
            try:
                if fcntl is None:
                    raise OSError("no locks on this system")
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise UserError(f"{path.parent} is in use by another process; name another folder")
                print(f"waiting for another process that works in {path.parent}", file=sys.stderr, flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:  # some network file systems have no locks
                path.unlink(missing_ok=True)
                os.close(descriptor)
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def one_line(text: str) -> str:
    """`text` with line ends and control characters spelled out: file names may hold any."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2, Ctrl-C status 130."""
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
