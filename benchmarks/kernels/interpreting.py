"""Triton's interpreter, with two things mended that version 3.9 lacks. Import it before anything is launched."""

from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter


def mend() -> None:
    """Multiply bfloat16 as numbers, and patch the language once a launch."""
    _multiply_bfloat16()
    _remember_patches()


def _multiply_bfloat16() -> None:
    """The interpreter multiplies the bits that it stores bfloat16 in."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(self: Any, x: Any) -> Any:
        return self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return multiply(self, widened(self, a), widened(self, b), *args)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _remember_patches() -> None:
    """It patches the language anew for every call of a device function, which takes most of its time."""
    patched = set()
    launched = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launched(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch, call
