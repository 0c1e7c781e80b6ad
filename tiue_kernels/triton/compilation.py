"""What the launchers would compile, compiled for a GPU that need not be there.

For use in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
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

    def note(
        kernel: Any,
        *args: Any,
        grid: Any = None,
        warmup: bool = False,
        num_warps: int = 4,
        num_stages: int = 3,
        **options: Any,
    ) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        signature: dict[str, str] = {}
        constants: dict[str, object] = {}
        aligned = []
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


def target_of(name: int | str) -> GPUTarget:
    """A compute capability, as in 90, or an AMD architecture, as in gfx942."""
    if str(name).startswith("gfx"):
        return GPUTarget("hip", name, 64 if str(name).startswith("gfx9") else 32)
    return GPUTarget("cuda", int(name), 32)


def compiled(case: Compilation, target: int | str) -> dict[str, int]:
    """Registers a thread, bytes of spills and stack, as the assembler says; of shared memory.

    Use inside `ptxas_logs`.

    Args:
        case: what to compile.
        target: for `target_of`.

    Raises:
        RuntimeError: the assembler left no log.
    """
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
            target=target_of(target),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )

    is_amd = target_of(target).backend == "hip"
    said = kernel.asm["amdgcn"] if is_amd else log.getvalue()

    def figure(pattern: str) -> int:
        found = re.findall(pattern, said)
        if not found:  # every log has each of them; none is no zero
            raise RuntimeError(f"the assembler does not say {pattern!r}:\n{said}")
        return max(map(int, found))

    if is_amd:
        return {
            "registers": figure(r"\.vgpr_count:\s+(\d+)"),
            "spills": 4 * figure(r"\.vgpr_spill_count:\s+(\d+)"),
            "stack": figure(r"\.private_segment_fixed_size:\s+(\d+)"),
            "shared": kernel.metadata.shared,
        }
    return {
        "registers": figure(r"Used (\d+) registers"),
        "spills": figure(r"(\d+) bytes spill stores"),
        "stack": figure(r"(\d+) bytes stack frame"),
        "shared": kernel.metadata.shared,
    }


@contextlib.contextmanager
def ptxas_logs() -> Iterator[None]:
    """Inside, everything is compiled anew, with a log: what is cached has none."""
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield
