"""Ctrl-C and SIGTERM as a request that the training loop looks at between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Inside the `with`, SIGINT and SIGTERM set `asked`; a second Ctrl-C raises KeyboardInterrupt.

    With several processes it does not: torchrun passes on a Ctrl-C that its processes have had already.
    """

    def __init__(self, *, second_raises: bool = True) -> None:
        self.asked = False
        self._second_raises = second_raises
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and self._second_raises and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def leave_to_parent() -> None:
    """In a process that loads data: a Ctrl-C reaches it too, and its parent is the one to act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
