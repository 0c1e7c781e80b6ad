"""Makes triton's interpreter fast enough for a test suite."""

from __future__ import annotations


def patch_language_once() -> None:
    """Device functions stop redoing what the interpreter has done for the kernel around them.

    Triton 3.6 replaces every builtin of its language, by way of inspect, each time that a kernel
    calls a jitted function, tl.sum included: 40 % of a test's time. The kernel's own launch has
    replaced them by then, so a device function needs it once for the module that it lies in.
    """
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
