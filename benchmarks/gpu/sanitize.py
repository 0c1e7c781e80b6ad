"""Calls every kernel once, forward and backward, on small shapes: what compute-sanitizer watches.

`compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize`
"""

from __future__ import annotations

import argparse
import sys

import torch

from testing.operators import OPERATORS, kernel_backends
from testing.problem import Draw, default_device
from testing.shapes import decoder
from tiue_kernels import BackendError, use_backend

FORMS = ((torch.bfloat16, "nhwc"), (torch.float32, "nchw"))
CPU = torch.device("cpu")


def calls(operator: str, device: torch.device) -> int:
    """Call one operator on each of its backends.

    Args:
        operator: A key of `testing.operators.OPERATORS`.
        device: Where the kernels run. The numbers are drawn on the CPU, and torch's own kernels
            kept few: every one of them is watched as well.

    Returns:
        How many calls were made; one that a backend refuses is said and not counted.
    """
    made = 0
    key = OPERATORS[operator].key
    shapes = {name: sizes for name, sizes in decoder("tiny", 64).items() if key(sizes) is not None}
    for backend in kernel_backends(operator):
        for dtype, layout in FORMS:
            for name, sizes in list(shapes.items())[:2]:
                problem = OPERATORS[operator].build(sizes, Draw(CPU, dtype, layout, 2, 1))
                inputs = [x.to(device).requires_grad_() for x in problem.tensors.values()]
                label = f"{operator} {backend} {dtype} {layout} {name}"
                try:
                    with use_backend(backend):
                        outputs = problem.run(*inputs)
                        torch.autograd.grad(outputs, inputs, outputs)
                except BackendError as error:
                    print(f"{label}: {error}", file=sys.stderr)
                    continue
                print(label, flush=True)
                made += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Call the kernels.

    Args:
        arguments: Of the command line; by default this process's.

    Returns:
        The exit status: 1 when no kernel could be called.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kernels = [name for name in OPERATORS if kernel_backends(name)]
    parser.add_argument("--operators", nargs="+", choices=kernels, default=kernels)
    operators = parser.parse_args(arguments).operators
    made = sum(calls(operator, default_device()) for operator in operators)
    print(f"{made} calls, forward and backward")
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
