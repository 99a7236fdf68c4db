"""SIGTERM and Ctrl-C: a run stops where nothing is lost.

While nothing of a run changes (its data is read, its weights are evaluated), the signal ends it at once, by an
exception. Within a meta-step it is only noted, and `check`, at the next step's top, raises. A second signal ends the
process on the spot.

Several processes (`distributed`) must stop at the same step, so from the first step to the last only `check` raises, in
all of them; a second signal means nothing there, because launchers pass on to the processes what these got already.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import torch

import device as devices


class Interrupted(BaseException):
    """SIGTERM or SIGINT came. Like KeyboardInterrupt no Exception, so that no handler of errors swallows it."""

    def __init__(self, number: int):
        self.status = 128 + number  # as a shell reports it


class Signals:
    """While it is entered, SIGTERM and SIGINT are handled as the module says; Interrupted leaves it as SystemExit."""

    def __init__(self):
        self.came = 0  # number of the signal
        self.at_once = False  # until all handlers are in place, and again once the work is done

    def __enter__(self) -> "Signals":
        self.before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self.before:
            signal.signal(number, self._take)
        if self.came:  # between the two handlers
            self._restore()
            sys.exit(128 + self.came)
        self.at_once = True
        return self

    def __exit__(self, _, error: BaseException | None, *__) -> None:
        self.at_once = False
        self._restore()
        if isinstance(error, Interrupted):
            sys.exit(error.status)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _) -> None:
        if self.came and devices.size() == 1:
            os._exit(128 + number)
        self.came = number
        if self.at_once:
            raise Interrupted(number)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within it, signals wait for `check`."""
        self.at_once = False
        try:
            yield
        finally:
            self.at_once = True

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Within it, signals raise at once again, but not where several processes have to agree."""
        self.at_once = devices.size() == 1
        try:
            yield
        finally:
            self.at_once = False

    def check(self, device: torch.device) -> None:
        """Raise what came; of several processes all or none, so all of them have to call it.

        Raises:
            Interrupted: a signal came, here or in another process.
        """
        came = int(devices.largest(torch.tensor(self.came, device=device))) if devices.size() > 1 else self.came
        if came:
            raise Interrupted(came)
