"""Makes Triton's interpreter twice as fast, by two things that it does over and over:

at each call of a device function it looks through the language's modules for what it has patched already, and it checks every
sum and product of integers for overflow, which a GPU does not.
"""

import dataclasses
import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _names(module) -> list[str]:
    return [name for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]


def _patch_builtin(module, builder, scope) -> None:
    """A module's built-ins are patched all together, and restored all together."""
    for name in _names(module):
        member = getattr(module, name)
        if not tl.core.is_builtin(member):
            return
        interpreter._patch_attr(module, name, member, builder, scope)


def apply() -> None:
    """Patch the interpreter of this process."""
    interpreter._patch_builtin = _patch_builtin
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
