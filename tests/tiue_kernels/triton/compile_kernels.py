"""Compiles the Triton kernels for GPUs that are not there and reports what ptxas says of each.

Run as `python -m tests.tiue_kernels.triton.compile_kernels 90 norm [words of a case's name]`, in a
process without TRITON_INTERPRET: one JSON object a kernel. A target is a compute capability or an
AMD architecture, as in `gfx942`; `each` in place of the words compiles each kernel once.
"""

from __future__ import annotations

import importlib
import json
import sys

from tiue_kernels.triton.compilation import compiled, ptxas_logs


def main(target: str, table: str, *words: str) -> None:
    module = importlib.import_module(f"tests.tiue_kernels.triton.compile_cases_{table}")
    done = set()
    for name, case in module.compilations().items():
        kernel = f"{case.kernel.__module__.rpartition('.')[2]}.{case.kernel.__name__}"
        chosen = kernel not in done if words == ("each",) else all(word in name for word in words)
        if chosen:
            done.add(kernel)
            floats = [key for key, value in case.constants.items() if isinstance(value, float)]
            with ptxas_logs():
                figures = compiled(case, target)
            print(json.dumps({"case": name, "kernel": kernel, "floats": floats, **figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
