"""The compiled library of the CPU path: schemas, loading, and why it is not there.

`libtiue_cpu.so` lies beside this file when the package was built with TIUE_CPU=1. Without it
everything works, in plain PyTorch.
"""

import functools
from pathlib import Path

import torch

from tiue_kernels import libraries

SCHEMAS = (
    "winograd_input(Tensor x, bool panels) -> Tensor",
    "winograd_product(Tensor weights, Tensor panels, int tiles) -> Tensor",
    "winograd_output(Tensor products, Tensor? bias, Tensor(a!) out, int first_row,"
    " int first_channel) -> ()",
    "winograd_output_backward(Tensor grad_out) -> Tensor",
    "winograd_input_backward(Tensor grads, Tensor(a!) grad_x, int first_row, int first_channel)"
    " -> ()",
    "winograd_weight_backward(Tensor grads, Tensor(a!) grad_weight, int first_output) -> ()",
    "winograd_weight(Tensor weight, int start, int first_output, Tensor(a!) out) -> ()",
    "winograd_fingerprint(Tensor weight, int start, int channels) -> int",
    "products_available() -> bool",
    "attention(Tensor query, Tensor key, Tensor value, int num_heads, float scale)"
    " -> (Tensor, Tensor)",
)
CURE = "TIUE_CPU=1 pip install --no-build-isolation . (needs g++)"

# A library must outlive its registrations.
_library = torch.library.Library("tiue_cpu", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)

_why_not: str | None = libraries.load(Path(__file__).parent / "libtiue_cpu.so", "CPU", CURE)


def loaded() -> bool:
    """Whether the compiled library is there."""
    return _why_not is None


def why_not() -> str | None:
    """Why the library is not loaded, with the cure; None when it is."""
    return _why_not


def has_products() -> bool:
    """Whether the library multiplies matrices here, and is faster at it than what torch calls."""
    return why_no_products() is None


def why_no_products() -> str | None:
    """Why it does not; None when it does."""
    return why_not() or _why_no_products()


@functools.cache
def _why_no_products() -> str | None:
    if torch.ops.tiue_cpu.products_available():
        return None
    return "its products are for CPUs with AVX2 and without AVX-512"
