"""How far a benchmark is."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """What a caller may want to show; this one shows nothing."""

    def start(self, text: str, steps: int) -> None: ...
    def step(self, text: str) -> None: ...
    def finish(self) -> None: ...


class Bar(Progress):
    """A tqdm bar on standard error; one line per stage where tqdm is missing or the stream is no terminal."""

    def __init__(self) -> None:
        self._tqdm: Any = None
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._tqdm = tqdm

    def start(self, text: str, steps: int) -> None:
        if self._tqdm is None:
            print(f"{text} ...", file=sys.stderr, flush=True)
        else:
            self._bar = self._tqdm(total=steps, desc=text, leave=False, dynamic_ncols=True, file=sys.stderr)

    def step(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
