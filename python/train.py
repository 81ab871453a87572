"""Train or fine-tune a TNT, or a timm model to compare it with. `--help` lists the options."""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from tqdm import tqdm

    from tnt_programs import checkpoints, datasets, loaders, network, options, processes
    from tnt_programs.datasets import DamagedImage, ImageData
    from tnt_programs.interrupts import Interrupts
    from tnt_programs.network import Network
    from tnt_programs.processes import Processes
    from tnt_programs.run import BAD_INPUT, INTERRUPTED, NOT_FINITE, Run
    from tnt_programs.run_folder import LAST, RunFolder
    from tnt_programs.trainer import NonFiniteLoss, Trainer
except ImportError as error:
    sys.exit(f"train.py: {error} (in a checkout, pip install '.[programs]' brings what is needed)")


class BadInput(Exception):
    """Options, data or files that cannot be used."""


def main(argv: Sequence[str] | None = None) -> int:
    chosen, given = options.parse(argv)
    try:
        return _train(chosen, given)
    except BadInput as error:
        return _fail(error, BAD_INPUT)
    except DamagedImage as error:  # from a process that loads images it comes with a traceback in its message
        return _fail(str(error).strip().rpartition("DamagedImage: ")[2], BAD_INPUT)
    except NonFiniteLoss as error:
        return _fail(error, NOT_FINITE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    finally:
        processes.leave()


def _train(chosen: Namespace, given: Mapping[str, Any]) -> int:
    # Not in main: what uses the other processes must be gone when these part.
    run = set_up(chosen, given)
    with run.trainer.interrupts:
        code = run.fit()
    run.trainer.processes.wait()
    return code


def _fail(message: object, code: int) -> int:
    rank = processes.rank()
    print(f"train.py{f', process {rank}' if rank else ''}: {message}", file=sys.stderr)
    return code


def set_up(chosen: Namespace, given: Mapping[str, Any]) -> Run:
    """Everything up to the first step. Raises BadInput."""
    try:
        content = None
        if chosen.resume is not None:
            chosen, content = _resumed(chosen, given)
        options.check(chosen)
        folder = RunFolder(Path(chosen.output or _default_output(chosen)))
        if content is None and not chosen.overwrite:
            folder.check_free()
        if chosen.threads is not None:
            torch.set_num_threads(chosen.threads)
        together = processes.join(chosen.device)
        data = _data(chosen, together)

        _seed(chosen.seed)
        if content is None:
            model, described, origin = network.start(chosen, given, data.classes)
        else:
            described, origin = Network(**content["network"]), f"those of {chosen.resume}, to go on with"
            network.check_classes(f"--resume {chosen.resume}", described.classes, data.classes)
            model = described.build(reference=chosen.reference)
        data.train.transform = loaders.train_transform(chosen, described.preprocessing)
        data.val.transform = loaders.eval_transform(described.preprocessing)
        interrupts = Interrupts(second_raises=together.world == 1)
        trainer = Trainer(model, data, chosen, together, interrupts, content)

        stored = {name: value for name, value in vars(chosen).items() if name != "resume"}
        run = Run(trainer, described, stored, folder, content["history"] if content else [])
        if together.first:
            if content is None:
                folder.begin()
            else:
                folder.go_on(trainer.position.total)
            _introduce(run, data, origin)
        _seed(chosen.seed + together.rank)
        if content is not None:
            checkpoints.restore_random_states(content["rng"], together)
        return run
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(str(error)) from error


def _resumed(chosen: Namespace, given: Mapping[str, Any]) -> tuple[Namespace, dict[str, Any]]:
    path = Path(chosen.resume or Path(chosen.output or _default_output(chosen), LAST))
    if not path.is_file():
        raise ValueError(f"--resume: there is no {path}")
    content = checkpoints.read(path)
    if content is None:
        raise ValueError(f"--resume: {path} is no checkpoint of train.py, or damaged")
    values = options.resumed(content["args"], given)
    values["output"] = given.get("output", str(path.parent))
    return Namespace(**{**values, "resume": str(path)}), content


def _default_output(chosen: Namespace) -> Path:
    data = "digits" if chosen.dataset == "digits" else Path(chosen.data).resolve().name
    return Path("runs", f"{data}-{chosen.model.replace(':', '-').replace('/', '-')}")


def _data(chosen: Namespace, together: Processes) -> ImageData:
    if chosen.dataset == "digits":
        return datasets.digits()

    def find(paths: Sequence[str]) -> list[tuple[str, str]]:
        mine = paths[together.rank :: together.world]
        off = True if chosen.no_progress or not together.first else None
        with tqdm(total=len(mine), desc="reading images", disable=off, leave=False) as bar:
            found = datasets.damaged_images(mine, bar.update)
        return sorted(item for part in together.gather(found) for item in part)

    return datasets.image_folder(chosen.data, None if chosen.no_scan else find)


def _introduce(run: Run, data: ImageData, origin: str) -> None:
    trainer = run.trainer
    chosen, together = trainer.options, trainer.processes
    for path, why in data.damaged[:10]:
        print(f"left out  {path}: {why}", file=sys.stderr)
    if data.damaged:
        run.folder.write_damaged(data.damaged)
        print(
            f"{len(data.damaged)} unreadable images are left out; all: {run.folder.damaged}", file=sys.stderr
        )
    count = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    precision = "float32" if chosen.amp == "none" else f"{chosen.amp} autocast"
    threads = f", {torch.get_num_threads()} threads" if together.device.type == "cpu" else ""
    workers = f", {together.world} processes" if together.world > 1 else ""
    kind = type(trainer.model).__name__
    print(f"model    {run.network.name} ({kind}), {count / 1e6:.2f} M parameters to train")
    print(f"weights  {origin}")
    print(f"data     {len(data.train)} images, {len(data.val)} for validation, {len(data.classes)} classes")
    print(f"device   {together.device}{threads}{workers}, {precision}, batches of {chosen.batch_size}")
    print(f"output   {run.folder.path}\n", flush=True)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


if __name__ == "__main__":
    processes.end(main())
