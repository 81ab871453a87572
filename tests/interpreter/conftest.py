"""Tests of the Triton kernels in Triton's interpreter: launchers are called on CPU tensors, in float32.

A process of their own: triton.jit looks at TRITON_INTERPRET when a kernel is defined, Triton's own included.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 pytest tests/interpreter")

import triton.language
from triton.runtime.interpreter import InterpretedFunction

if not isinstance(triton.language.sum, InterpretedFunction):
    raise pytest.UsageError("triton was imported before TRITON_INTERPRET=1 was set")
