"""Write scikit-learn's handwritten digits as an image folder: FOLDER/train/3/0017.png and so on.

The division into train and val is that of `train.py --dataset digits`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

try:
    from tnt_kernels.cli.arguments import positive
    from tnt_programs import datasets
    from tnt_programs.arguments import Parser
except ImportError as error:
    sys.exit(f"digits.py: {error} (in a checkout, pip install '.[programs]' brings what is needed)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="digits.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=positive, help="images of a class in each part (default: all)")
    chosen = parser.parse_args(argv)
    try:
        write(chosen.folder, chosen.per_class)
    except (OSError, ImportError) as error:
        print(f"digits.py: {error}", file=sys.stderr)
        return 2
    return 0


def write(folder: Path, per_class: int | None = None) -> None:
    """Write both parts below `folder`, at most `per_class` images of a class in each."""
    found = datasets.digits()
    for part, digits in (("train", found.train), ("val", found.val)):
        written: Counter[str] = Counter()
        for index, (image, target) in enumerate(zip(digits.images, digits.targets, strict=True)):
            name = found.classes[target]
            if per_class is not None and written[name] == per_class:
                continue
            written[name] += 1
            path = folder / part / name / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


if __name__ == "__main__":
    sys.exit(main())
