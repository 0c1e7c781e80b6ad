"""Compiles the Triton kernels for GPUs that are not there and reports what ptxas says of each.

Run as `python -m tests.tiue_kernels.triton.compile_kernels 90 norm [words of a case's name]`, in a
process without TRITON_INTERPRET: one JSON object a kernel.
"""

from __future__ import annotations

import importlib
import json
import sys

from tiue_kernels.triton.compilation import compiled, ptxas_logs


def main(capability: int, table: str, *words: str) -> None:
    module = importlib.import_module(f"tests.tiue_kernels.triton.compile_cases_{table}")
    for name, case in module.compilations().items():
        if all(word in name for word in words):
            kernel = f"{case.kernel.__module__.rpartition('.')[2]}.{case.kernel.__name__}"
            floats = [key for key, value in case.constants.items() if isinstance(value, float)]
            with ptxas_logs():
                figures = compiled(case, capability)
            print(json.dumps({"case": name, "kernel": kernel, "floats": floats, **figures}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
