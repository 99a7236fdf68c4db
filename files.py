"""Files written whole or not at all, and errors that are the user's to mend.

Every program here ends in one of two ways: it did its work, or it prints one
line that says what is wrong and what to do, with exit status 2 (`run`).
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Callable, Iterator


class UserError(Exception):
    """Something the user can mend; its text is one line: what is wrong, where, what to do."""


@contextlib.contextmanager
def atomic(path: Path, mode: str = "wb") -> Iterator:
    """Open a temporary file beside `path`; on success flush it to disk and rename it to `path`.

    A reader never sees a half-written `path`, and a failure leaves neither a
    half-written file nor the temporary one behind.

    Raises:
        UserError: the folder can't be written or the disk is full.
    """
    path = Path(path)
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
        raise UserError(f"can't write {path}: {error.strerror or error}; free some space or name another folder") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
