"""`python -m tnt_kernels`: info, verify, bench, demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tnt_kernels._version import __version__
from tnt_kernels.cli import bench, demo, info, verify

COMMANDS = {"info": info, "verify": verify, "bench": bench, "demo": demo}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m tnt_kernels", description="Fast kernels for TNT.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="{info,verify,bench,demo}")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    top = parser()
    arguments = top.parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"{top.prog} {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
