"""Launchers of the norm and pointwise operators, reference and Triton, against the float64 form.

Every run poisons and fences new memory: an element that a kernel leaves unwritten stays NaN and
fails, a store outside of its tensor breaks the fence.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest
import torch

from testing.tolerances import ROUNDING_FLOORS
from tests.tiue_kernels.fences import fenced
from tests.tiue_kernels.triton.norm_cases import CASES, Case, Tensors, noise

# Dtype of the maps, dtype of the parameters, layout: each of them once a case, not their product,
# which takes minutes in the interpreter.
FORMS = {
    "f32": (torch.float32, torch.float32, "contiguous"),
    "f32-nhwc": (torch.float32, torch.float32, "channels_last"),
    "f16-masters-nhwc": (torch.float16, torch.float32, "channels_last"),
    "bf16-sliced": (torch.bfloat16, torch.bfloat16, "sliced"),
}
# Norms in the interpreter: two forms where a tile holds a group, the other two where it does not.
WHOLE_FORMS = ("f32", "f16-masters-nhwc")


@pytest.fixture
def backend(request, monkeypatch) -> str:
    if request.param == "reference":
        return "reference"
    group_norm = pytest.importorskip("tiue_kernels.triton.group_norm")
    if request.param == "triton-split":  # several tiles a group even for these small maps
        monkeypatch.setattr(group_norm, "WHOLE_TILE", 0)
        monkeypatch.setattr(group_norm, "SPLIT_TILE", 64)
    return "triton"


def module_of(backend: str, case: Case) -> ModuleType:
    return importlib.import_module(f"tiue_kernels.{backend}.{case.operator}")


def runs() -> list[tuple[str, str, str]]:
    """(case, form, backend) of the criterion; tiles that split a group only where there are any."""
    chosen = []
    for name, case in CASES.items():
        for form in FORMS:
            if "nhwc" in form and case.maps[0].ndim != 4:
                continue
            chosen.append((name, form, "reference"))
            if "norm" not in case.operator or not case.maps[0].numel() or form in WHOLE_FORMS:
                chosen.append((name, form, "triton"))
            else:
                chosen.append((name, form, "triton-split"))
    return chosen


def inputs_of(case: Case, form: str) -> tuple[Tensors, Tensors]:
    """Tensors of a call and the gradients at its outputs."""
    tensors = cast(case, *FORMS[form])
    with torch.no_grad():
        outs = case.textbook(*(t.double() for t in tensors))
    dtype = torch.float32 if case.operator == "noise_kl" else FORMS[form][0]
    return tensors, tuple(noise(*o.shape, seed=9).to(dtype) for o in outs)


def cast(case: Case, dtype: torch.dtype, parameters: torch.dtype, layout: str) -> Tensors:
    """The tensors of a case, rounded to the dtypes of the call."""
    maps = [t.to(dtype) for t in case.maps]
    if layout == "channels_last":
        maps = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in maps]
    elif layout == "sliced":
        maps = [sliced(t) for t in maps]
    return (*maps, *(t.to(parameters) for t in case.parameters))


def sliced(x: torch.Tensor) -> torch.Tensor:
    """x as every second element of the last axis of a larger tensor."""
    wide = torch.full((*x.shape, 2), math.nan, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


@torch.no_grad()
def run(
    module: ModuleType, case: Case, tensors: Tensors, grads: Tensors
) -> dict[str, torch.Tensor]:
    outs, backward = case.launch(module, *tensors)
    results = {f"output {i}": out for i, out in enumerate(outs)}
    for i, (tensor, grad) in enumerate(zip(tensors, backward(*grads), strict=True)):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)
        results[f"gradient {i}"] = grad
    return results


def textbook(case: Case, tensors: Tensors, grads: Tensors) -> Tensors:
    """Outputs and gradients by autograd over the naive form, in the dtypes of the tensors."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    outs = case.textbook(*inputs)
    grads = [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
    return (*outs, *torch.autograd.grad(outs, inputs, grads, allow_unused=True))


@pytest.mark.parametrize(("name", "form", "backend"), runs(), indirect=["backend"])
def test_error_is_at_most_twice_that_of_torch(name, form, backend, fences):
    case = CASES[name]
    tensors, grads = inputs_of(case, form)
    results = run(module_of(backend, case), case, fenced(tensors), fenced(grads))
    rounded = textbook(case, tensors, grads)
    expected = textbook(case, [t.double() for t in tensors], [g.double() for g in grads])
    errors = {}
    for (key, value), naive, reference in zip(results.items(), rounded, expected, strict=True):
        if reference is None or not reference.numel():
            assert value.shape == (naive.shape if naive is not None else value.shape)
            continue
        assert value.shape == reference.shape, key
        floor = ROUNDING_FLOORS[value.dtype] + 2**-24 * case.mean
        floor *= max(1.0, reference.abs().max().item())
        error = (value.double() - reference).abs().max().item()
        allowed = 2 * (naive.double() - reference).abs().max().item() + floor
        errors[key] = (error, allowed)
    assert {key: pair for key, pair in errors.items() if not pair[0] <= pair[1]} == {}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "triton-split") for name in ("skip-straddling", "add", "sum")),
        *(
            (name, "triton")
            for name in (
                "skip-straddling",
                "add",
                "sum",
                "combine",
                "kl",
                "modulated",
                "joined",
                "long-skip",
                "geglu",
            )
        ),
    ],
    indirect=["backend"],
)
def test_the_same_input_gives_the_same_bits(name, backend):
    case = CASES[name]
    tensors, grads = inputs_of(case, "f32")
    first, second = (run(module_of(backend, case), case, tensors, grads) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("held", [1, 2])
@pytest.mark.parametrize("size", [1, 8, 15, 32, 64, 96, 128])
def test_tiles_cover_every_shape_and_fit_the_registers(size, held, channels_last):
    group_norm = pytest.importorskip("tiue_kernels.triton.group_norm")
    for channels, groups in [(320, 32), (960, 32), (2560, 32), (320, 1), (5, 5), (2560, 1)]:
        tiles = group_norm.plan(4, groups, channels // groups, size**2, channels_last, held)
        assert tiles.groups * channels // groups <= tiles.block_c
        assert (tiles.splits - 1) * tiles.block_p < size**2 <= tiles.splits * tiles.block_p
        elements = tiles.block_c * tiles.block_p / (32 * tiles.num_warps)
        assert elements <= 32 // held or tiles.block_p == 1, (channels, groups, tiles)
        if tiles.splits > 1 and channels // groups <= 80:  # 64 bytes of a half type in one piece
            run = tiles.groups * channels // groups if channels_last else tiles.block_p
            assert run >= min(30, channels)


def test_plans_are_kept_by_what_they_depend_on(monkeypatch):
    group_norm = importlib.import_module("tiue_kernels.triton.group_norm")
    sizes = (2, 4, 8, 64, False)
    assert group_norm.plan(*sizes).whole
    monkeypatch.setattr(group_norm, "WHOLE_TILE", 0)
    monkeypatch.setattr(group_norm, "SPLIT_TILE", 64)
    assert group_norm.plan(*sizes).splits > 1


def test_a_plane_beyond_int32_reaches_the_kernels_whole(monkeypatch):
    """A product of two int32 in a kernel would wrap; a number that the launcher gives is int64."""
    from triton.runtime.jit import KernelInterface

    from tiue_kernels.triton import adaptive_layer_norm

    launches = []
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda kernel, _: lambda *args, **__: launches.append(args)
    )
    x = torch.empty(512, 4096, 1152, dtype=torch.float16, device="meta")
    scale = torch.empty(1024, 1152, dtype=torch.float16, device="meta")
    assert x.numel() > 2**31
    out, stats = adaptive_layer_norm.adaptive_layer_norm_fwd(x, scale, scale, 1e-6)
    adaptive_layer_norm.adaptive_layer_norm_bwd(out, x, scale, scale, stats)
    for args in launches[:2]:  # the last walks no plane
        assert x.numel() in [arg for arg in args if isinstance(arg, int)]
