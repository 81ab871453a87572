"""Arguments of the programs: types that say what is needed, and a parser that says so in one line."""

from __future__ import annotations

import argparse
import ast
import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; --help has the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def number(
    low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> Callable[[str], float]:
    """Type of an option: a number in [low, high], and above `above`."""
    needed = f"a number in [{low:g}, {high:g}]" if high < math.inf else f"a number of at least {low:g}"
    if above > -math.inf:
        needed = f"a number above {above:g}"

    def parse_number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value > above and math.isfinite(value)):
            raise ArgumentTypeError(f"{needed} is needed, got {text!r}")
        return value

    return parse_number


def whole(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isascii() or not text.isdigit():
        raise ArgumentTypeError(f"a whole number of at least 0 is needed, got {text!r}")
    return int(text)


def assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value a Python literal or else text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ArgumentTypeError(f"NAME=VALUE is needed, such as depth=4; got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


class Assignments(argparse.Action):
    """The option's `assignment`s as a dict."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, dict(values))


def augmentation(text: str) -> str | None:
    """A policy of timm's, or None for "none"."""
    if text == "none":
        return None
    if not text.startswith(("rand", "augmix", "original", "v0", "3a")):
        raise ArgumentTypeError(
            f"a policy of timm's is needed, such as rand-m9-mstd0.5-inc1, augmix-m3 or original, got {text!r}"
        )
    return text
