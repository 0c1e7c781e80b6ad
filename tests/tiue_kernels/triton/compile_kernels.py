"""Compiles the Triton kernels for GPUs that are not there and reports what ptxas says of each.

Run as `python -m tests.tiue_kernels.triton.compile_kernels 90 norm [words of a case's name]`, in a
process without TRITON_INTERPRET: one JSON object a kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type


class Compilation(NamedTuple):
    """One kernel as a launch would compile it.

    Attributes:
        kernel: what is compiled.
        signature: argument to type, "constexpr" for constants.
        constants: values of those.
        aligned: arguments that are multiples of 16; pointers are without being named.
        num_warps: warps a program.
        num_stages: loads in flight of a pipelined loop.
    """

    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 3


def launches_of(call: Callable[[], object]) -> list[Compilation]:
    """What the launchers that a call runs would compile; they are given meta tensors."""
    launches: list[Compilation] = []

    def note(kernel, *args, grid=None, warmup=False, num_warps=4, num_stages=3, **options):
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        signature, constants, aligned = {}, {}, []
        for parameter in kernel.params:
            name, value = parameter.name, values[parameter.name]
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if parameter.is_constexpr or value is None or (is_integer and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            if is_integer and value % 16 == 0:
                aligned.append(name)
        launches.append(
            Compilation(kernel, signature, constants, tuple(aligned), num_warps, num_stages)
        )

    with mock.patch.object(JITFunction, "run", note):
        call()
    return launches


def compiled(case: Compilation, capability: int) -> dict[str, int]:
    """Registers a thread, bytes of spills and stack, from ptxas's log; bytes of shared memory."""
    names = list(case.signature)
    aligned = [n for n, kind in case.signature.items() if kind[0] == "*" or n in case.aligned]
    source = ASTSource(
        case.kernel,
        case.signature,
        case.constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )

    def figure(pattern: str) -> int:
        found = re.findall(pattern, log.getvalue())
        if not found:  # every log has each of them; none is no zero
            raise RuntimeError(f"ptxas does not say {pattern!r}:\n{log.getvalue()}")
        return max(map(int, found))

    return {
        "registers": figure(r"Used (\d+) registers"),
        "spills": figure(r"(\d+) bytes spill stores"),
        "stack": figure(r"(\d+) bytes stack frame"),
        "shared": kernel.metadata.shared,
    }


def main(capability: int, table: str, *words: str) -> None:
    triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    triton.knobs.nvidia.dump_ptxas_log = True
    module = importlib.import_module(f"tests.tiue_kernels.triton.compile_cases_{table}")
    for name, case in module.compilations().items():
        if all(word in name for word in words):
            kernel = f"{case.kernel.__module__.rpartition('.')[2]}.{case.kernel.__name__}"
            floats = [key for key, value in case.constants.items() if isinstance(value, float)]
            figures = compiled(case, capability)
            print(json.dumps({"case": name, "kernel": kernel, "floats": floats, **figures}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
