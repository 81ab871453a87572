"""The folder of a run: checkpoints, figures, curves."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tnt_programs import checkpoints, history
from tnt_programs.history import Row

LAST, BEST = "last.pt", "best.pt"


class RunFolder:
    """Writes what a run leaves behind. A file that cannot be written is reported, and the one before stays.

    Attributes:
        failed: names of the files whose last version could not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed: set[str] = set()

    @property
    def last(self) -> Path:
        return self.path / LAST

    @property
    def best(self) -> Path:
        return self.path / BEST

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def figures(self) -> Path:
        return self.path / "history.csv"

    @property
    def steps(self) -> Path:
        return self.path / "steps.csv"

    @property
    def damaged(self) -> Path:
        return self.path / "damaged.csv"

    def check_free(self) -> None:
        """Raise ValueError where the folder holds a run."""
        if self.last.exists():
            raise ValueError(
                f"--output {self.path} holds a run: --resume goes on with it, --overwrite starts again"
            )

    def begin(self) -> None:
        """Make the folder for a new run, without what another left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (self.last, self.best, self.figures, self.curves, self.steps, self.damaged):
            file.unlink(missing_ok=True)

    def go_on(self, steps: int) -> None:
        """Take up a run after its first `steps` steps: what was logged of later ones will come again."""
        self.path.mkdir(parents=True, exist_ok=True)
        rows = [row for row in history.read_csv(self.steps) if int(row["step"]) <= steps]
        if rows:
            history.write_csv(self.steps, rows, history.STEP_COLUMNS)

    def save(self, content: dict[str, Any], *, best: bool) -> None:
        """Write last.pt, and best.pt if this is the best so far."""
        self._attempt(self.last, lambda: checkpoints.save(self.last, content))
        if best:
            self._attempt(self.best, lambda: checkpoints.save(self.best, content))

    def report(self, rows: Sequence[Row], title: str) -> None:
        """Write every epoch's figures, and the curves."""
        self._attempt(self.figures, lambda: history.write_csv(self.figures, rows, history.COLUMNS))
        self._attempt(self.curves, lambda: history.plot_curves(self.curves, rows, title))

    def write_damaged(self, damaged: Sequence[tuple[str, str]]) -> None:
        """Write which images were left out, and why."""
        rows = [{"file": path, "reason": why} for path, why in damaged]
        self._attempt(self.damaged, lambda: history.write_csv(self.damaged, rows, ("file", "reason")))

    def log_steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to steps.csv."""
        self._attempt(self.steps, lambda: self._append(rows))

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        new = not self.steps.exists()
        with open(self.steps, "a", newline="") as file:
            writer = csv.DictWriter(file, history.STEP_COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def _attempt(self, file: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            kept = "; the one before is intact" if file.exists() else ""
            print(f"train.py: {error.strerror or error}{kept}", file=sys.stderr)
            self.failed.add(file.name)
        else:
            self.failed.discard(file.name)
