"""A run: epoch after epoch, what is saved and said of each, and how it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnt_programs import checkpoints, options
from tnt_programs.network import Network
from tnt_programs.run_folder import LAST, RunFolder
from tnt_programs.trainer import Interrupted, NonFiniteLoss, Trainer

# Exit codes of train.py.
DONE, UNSAVED, BAD_INPUT, NOT_FINITE, INTERRUPTED = 0, 1, 2, 3, 130


class Run:
    """Args:
    trainer: what trains.
    network: what its model is called and made of.
    stored: the options, kept in the checkpoints.
    folder: where checkpoints and figures go.
    history: figures of the epochs before, of a run that goes on.
    """

    def __init__(
        self,
        trainer: Trainer,
        network: Network,
        stored: Mapping[str, Any],
        folder: RunFolder,
        history: list[dict[str, Any]],
    ) -> None:
        self.trainer, self.network, self.stored = trainer, network, dict(stored)
        self.folder, self.history = folder, history
        self.first = trainer.processes.first

    @property
    def best(self) -> dict[str, Any]:
        """The figures of the best epoch."""
        return max(self.history, key=lambda row: (row["top1"], -row["val_loss"]))

    def fit(self) -> int:
        """Train to the last epoch, saving after each; the exit code.

        Raises:
            NonFiniteLoss: nothing was saved since; the message says what there is.
        """
        while self.trainer.position.epoch < self.trainer.epochs:
            try:
                row = self.trainer.epoch()
            except Interrupted:
                return self._stop()
            except NonFiniteLoss as error:
                there = self.folder.last.exists()
                kept = f"the last good checkpoint is {self.folder.last}" if there else "nothing was saved yet"
                raise NonFiniteLoss(f"{error}; {kept}") from error
            self.history.append(row)
            is_best = self.best is row
            self._save(best=is_best)
            if self.first:
                self.folder.report(self.history, self.network.name)
                print(_line(row, self.trainer.epochs) + ("  best" if is_best else ""), flush=True)
        if self.first:
            best = self.best
            print(f"\nbest     top-1 {best['top1']:.2f} % in epoch {best['epoch']}: {self.folder.best}")
            print(f"figures  {self.folder.figures}\ncurves   {self.folder.curves}")
        return UNSAVED if self.folder.failed else DONE

    def _stop(self) -> int:
        self._save(best=False)
        if self.first and LAST not in self.folder.failed:
            position, world = self.trainer.position, self.trainer.processes.world
            print(
                f"\nstopped in epoch {position.epoch + 1} after {position.step} of {self.trainer.steps} "
                f"steps; to go on: {options.resume_command(self.folder.last, world)}"
            )
        return INTERRUPTED

    def _save(self, *, best: bool) -> None:
        content = {
            **self.trainer.state(),
            "rng": checkpoints.random_states(self.trainer.processes),
            "network": self.network.content(),
            "args": self.stored,
            "history": self.history,
        }
        if self.first:
            self.folder.save(content, best=best)
            if self.stored["log_steps"]:
                self.folder.log_steps(self.trainer.step_rows)
        self.trainer.step_rows.clear()


def _line(row: Mapping[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.2e}  train loss {row['train_loss']:.4f}  "
        f"val loss {row['val_loss']:.4f}  top-1 {row['top1']:.2f} %  "
        f"{row['train_images_per_s']:.0f} images/s  {row['seconds']:.1f} s"
    )
