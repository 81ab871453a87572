"""Files that survive a full disk or a kill, and what a checkpoint holds."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from tnt_programs.processes import Processes

FORMAT = "tnt_kernels train.py 1"


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file so that under its name there is always a whole one: the one before, or the new one.

    It is written under another name in the same folder, brought to the disk, then renamed.

    Raises:
        OSError: it could not be written; the file before is as it was.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, Exception) and isinstance(cause, OSError):  # torch.save hides the cause
            raise OSError(cause.errno, f"{path} could not be written: {cause.strerror or cause}") from error
        raise


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    # The rename is on the disk when the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint. Raises OSError with one line that says why; the one before is as it was."""
    write(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def read(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What a checkpoint of train.py holds, or None for a file of another kind.

    Raises:
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # what a damaged file raises depends on where it is damaged
            return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def random_states(processes: Processes) -> list[dict[str, Any]]:
    """The state of every random number generator of every process, by rank."""
    name, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if processes.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(processes.device)
    return processes.gather(states)


def restore_random_states(states: Sequence[dict[str, Any]], processes: Processes) -> bool:
    """Put this process's generators where they were; False where another number of processes wrote them."""
    if len(states) != processes.world:
        return False
    state = states[processes.rank]
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and processes.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], processes.device)
    return True
