"""Launchers of attention and upsampling, reference and Triton, against the float64 naive form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tests.tiue_kernels.fences import fenced
from tiue_kernels.ops import upsample_conv2d
from tiue_kernels.reference import cross_timestep_attention as reference
from tiue_kernels.triton import cross_timestep_attention as kernels

HEADS, SCALE = 2, 0.2
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """K timesteps of B rows of queries over B (or, `own`, K*B) rows of keys."""

    timesteps: int
    rows: int
    tokens: int
    keys: int
    head_dim: int = 40
    own: bool = False
    masked: bool = False
    sliced: bool = False


REPEATED = "2x2-repeated-keys"  # the reference repeats the keys here, which is nothing to a kernel
CASES = {
    "1x1-one-key": Case(1, 1, 5, 1),
    "1x1-one-key-masked": Case(1, 1, 5, 1, masked=True),
    "1x2-head-64": Case(1, 2, 9, 77, 64),
    "4x1-masked": Case(4, 1, 5, 77, masked=True),
    "2x3-head-16": Case(2, 3, 7, 20, 16),
    REPEATED: Case(2, 2, 256, 5, 8, masked=True),
    "2x1-head-80": Case(2, 1, 20, 77, 80),
    "1x1-head-160": Case(1, 1, 17, 33, 160),
    "own-rows-sliced": Case(2, 1, 9, 9, own=True, sliced=True),
    "many-keys-masked": Case(2, 1, 6, 150, masked=True),  # whole first blocks of keys masked
    "many-queries": Case(4, 1, 40, 8, 8, sliced=True),  # several blocks, over timesteps' borders
}
# What a form rounds is a term of a sum, and the sum may cancel: the floor is relative to the sum
# of the terms' sizes. float64 is summed in another order.
FLOORS = {
    torch.float64: 2**-49,
    torch.float32: 2**-23,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def noise(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """(query, key, value[, bias]) and the gradient of the output."""
    channels = HEADS * case.head_dim
    rows = case.timesteps * case.rows
    key_rows = rows if case.own else case.rows
    query, grad = (noise(rows, case.tokens, channels, seed=i).to(dtype) for i in (0, 1))
    key, value = (noise(key_rows, case.keys, channels, seed=i).to(dtype) for i in (2, 3))
    if case.sliced:  # as of one projection to queries and keys, and a gradient without dense rows
        query = torch.cat([query, torch.full_like(query, math.nan)], 2)[..., :channels]
        value = torch.cat([torch.full_like(value, math.nan), value], 1)[:, case.keys :]
        grad = grad.mT.contiguous().mT
    tensors = (query, key, value)
    if case.masked:
        bias = noise(key_rows, 1, case.keys, seed=4).to(dtype)
        bias[0, 0, : case.keys // 2 + case.keys // 4] = -math.inf
        tensors = (*tensors, bias)
    return tensors, grad


def split(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.repeat(rows // len(x), 1, 1).unflatten(2, (HEADS, -1)).transpose(1, 2)


def naive(tensors: Tensors, grad: torch.Tensor) -> Tensors:
    """Output and gradients of torch's attention over repeated keys."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    rows = len(leaves[0])
    query, key, value = (split(x, rows) for x in leaves[:3])
    bias = leaves[3].repeat(rows // len(leaves[3]), 1, 1)[:, None] if len(leaves) == 4 else None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=SCALE)
    out = out.transpose(1, 2).flatten(2)
    return (out, *torch.autograd.grad(out, leaves, grad))


def sizes(tensors: Tensors, grad: torch.Tensor) -> list[float]:
    """The largest sums of absolute terms behind the output and each gradient."""
    rows = len(grad)
    query, key, value, grad = (split(x, rows) for x in (*tensors[:3], grad))
    scores = query @ key.mT * SCALE
    if len(tensors) == 4:
        scores = scores + tensors[3].repeat(rows // len(tensors[3]), 1, 1)[:, None]
    p = scores.softmax(-1)
    grad_p = grad @ value.mT
    grad_scores = p * (grad_p.abs() + (p * grad_p).sum(-1, keepdim=True).abs())

    def summed(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, len(tensors[1]))).sum(0)

    terms = (
        p @ value.abs(),
        grad_scores @ key.abs() * SCALE,
        summed(grad_scores.mT @ query.abs()) * SCALE,
        summed(p.mT @ grad.abs()),
        summed(grad_scores).sum((1, 2)),
    )
    return [term.max().item() for term in terms]


def run(
    module, tensors: Tensors, grad: torch.Tensor, needs_bias_grad: bool = True
) -> tuple[Tensors, torch.Tensor]:
    """Output and gradients, and the logsumexp."""
    query, key, value, bias = (*tensors, None)[:4]
    out, logsumexp = module.cross_timestep_attention_fwd(query, key, value, HEADS, SCALE, bias)
    *grads, grad_bias = module.cross_timestep_attention_bwd(
        grad, query, key, value, HEADS, SCALE, bias, out, logsumexp, needs_bias_grad
    )
    if bias is None or not needs_bias_grad:
        assert grad_bias.shape == (0,)
        return (out, *grads), logsumexp
    return (out, *grads, grad_bias), logsumexp


def check(module, case: Case, dtype: torch.dtype) -> None:
    tensors, grad = inputs(case, dtype)
    results, logsumexp = run(module, fenced(tensors), *fenced([grad]))
    exact = tuple(x.double() for x in tensors)
    expected = naive(exact, grad.double())
    by_torch = naive(tensors, grad)
    errors = {}
    terms = sizes(exact, grad.double())
    for index, (value, answer, rounded) in enumerate(zip(results, expected, by_torch, strict=True)):
        source = (tensors[0], *tensors)[index]
        assert (value.shape, value.dtype) == (source.shape, source.dtype)
        error = (value.double() - answer).abs().max().item()
        allowed = 2 * (rounded.double() - answer).abs().max().item() + FLOORS[dtype] * terms[index]
        if not error <= allowed:
            errors[("out", "query", "key", "value", "bias")[index]] = (error, allowed)
    assert not errors
    rows = len(grad)
    scores = split(exact[0], rows) @ split(exact[1], rows).mT * SCALE
    if case.masked:
        scores = scores + exact[3].repeat(rows // len(exact[3]), 1, 1)[:, None]
    assert logsumexp.dtype == torch.promote_types(dtype, torch.float32)
    bound = max(1e-5, FLOORS[dtype])  # torch's CPU kernel rounds p of half types before it sums
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES.values()], ids=("f64", *DTYPES))
@pytest.mark.parametrize("name", CASES)
def test_reference(name: str, dtype: torch.dtype) -> None:
    check(reference, CASES[name], dtype)


@pytest.mark.parametrize("name", CASES)
def test_explicit_form_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices without a kernel of torch's take, in chunks of queries."""
    monkeypatch.setattr(reference, "MOST_SCORES", 500)
    monkeypatch.setattr(reference, "_cpu_forward", lambda *args, attn_mask, scale: (
        reference._explicit_fwd(*args, scale, attn_mask)
    ))  # fmt: skip
    monkeypatch.setattr(reference, "_cpu_backward", lambda *args, attn_mask, scale: (
        reference._explicit_bwd(*args[:6], scale, attn_mask)[:3]
    ))  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        check(reference, CASES[name], dtype)


@pytest.mark.usefixtures("fences")
@pytest.mark.parametrize("name", [name for name in CASES if name != REPEATED])
def test_triton(name: str) -> None:
    check(kernels, CASES[name], torch.float32)


# The rounding of p and of the score gradients; the indexing is that of float32.
HALF_CASES = ("4x1-masked", "2x1-head-80", "many-keys-masked")


@pytest.mark.usefixtures("fences")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("name", HALF_CASES)
def test_triton_half(name: str, dtype: torch.dtype) -> None:
    check(kernels, CASES[name], dtype)


@pytest.mark.parametrize("runs", [1, 3])
def test_runs_of_queries_add_up(runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernels, "query_runs", lambda programs, blocks, wanted: (runs, -(-blocks // runs))
    )
    check(kernels, CASES["many-queries"], torch.float32)


def test_no_run_of_queries_is_empty() -> None:
    for programs in (1, 16, 200, 5000):
        for blocks in (1, 2, 7, 64, 1000):
            for wanted in (80, 528):
                runs, size = kernels.query_runs(programs, blocks, wanted)
                assert runs * size >= blocks > (runs - 1) * size
                assert runs == 1 or programs * (runs - 1) < wanted


def test_blocks_hold_a_head() -> None:
    for head_dim in range(8, 257, 8):
        block, tail = kernels.split_head(head_dim)
        assert head_dim <= block + tail <= max(16, 2 * head_dim)
        assert tail == 0 or block < head_dim
    assert [kernels.split_head(d) for d in (40, 64, 80, 160)] == [
        (32, 16), (64, 0), (64, 16), (128, 32)
    ]  # fmt: skip


def test_triton_gives_the_same_bits_twice() -> None:
    tensors, grad = inputs(CASES["many-queries"], torch.float16)
    first, second = (run(kernels, tensors, grad) for _ in range(2))
    for a, b in zip((*first[0], first[1]), (*second[0], second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("module", [reference, kernels], ids=["reference", "triton"])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_batch(module, masked: bool) -> None:
    tensors, grad = inputs(Case(3, 0, 5, 7), torch.float32)
    tensors = (*tensors, torch.zeros(0, 1, 7)) if masked else tensors
    results, logsumexp = run(module, tensors, grad)
    assert [x.shape for x in results] == [x.shape for x in (tensors[0], *tensors)]
    assert logsumexp.shape == (0, HEADS, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("module", [reference, kernels], ids=["reference", "triton"])
def test_the_gradient_of_a_mask_may_be_left_out(module, dtype: torch.dtype) -> None:
    for name in ("4x1-masked", "many-keys-masked"):
        tensors, grad = inputs(CASES[name], dtype)
        (*whole, _), _ = run(module, tensors, grad)
        parts, _ = run(module, tensors, grad, needs_bias_grad=False)
        for x, y in zip(parts, whole, strict=True):  # the reference takes another form
            bound = FLOORS[dtype] * 8 * y.abs().max().item()
            torch.testing.assert_close(x, y, rtol=0, atol=0 if module is kernels else bound)


UPSAMPLED = {  # rows, channels, height, width: few pixels are doubled, many take the phases
    "one-pixel": (2, 5, 1, 1),
    "few": (3, 5, 3, 2),
    "phases": (6, 5, 9, 11),
    "phases-square": (1, 7, 16, 16),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES.values()], ids=("f64", *DTYPES))
@pytest.mark.parametrize("name", UPSAMPLED)
def test_upsample_conv2d(name: str, dtype: torch.dtype, layout: str) -> None:
    rows, channels, height, width = UPSAMPLED[name]
    x = noise(rows, channels, height, width, seed=0).to(dtype)
    weight, bias = noise(6, channels, 3, 3, seed=1).to(dtype), noise(6, seed=2).to(dtype)
    grad = noise(rows, 6, 2 * height, 2 * width, seed=3).to(dtype)
    if layout == "channels_last":
        x, grad, weight = (t.to(memory_format=torch.channels_last) for t in (x, grad, weight))
    elif layout == "sliced":
        x = torch.cat([x, x], 1)[:, :channels]
        grad = torch.cat([grad, grad], 3)[..., : 2 * width]

    def naive(x, weight, bias, grad) -> Tensors:
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        doubled = F.interpolate(leaves[0], scale_factor=2.0, mode="nearest")
        out = F.conv2d(doubled, *leaves[1:], padding=1)
        return (out, *torch.autograd.grad(out, leaves, grad))

    results = (
        upsample_conv2d.forward(x, weight, bias),
        *upsample_conv2d.backward(grad, x, weight, [True, True, True]),
    )
    expected = naive(*(t.double() for t in (x, weight, bias, grad)))
    terms = naive(*(t.double().abs() for t in (x, weight, bias, grad)))
    errors = {}
    by_torch = naive(x, weight, bias, grad)
    for index, (value, answer, rounded) in enumerate(zip(results, expected, by_torch, strict=True)):
        assert (value.shape, value.dtype) == (answer.shape, dtype)
        error = (value.double() - answer).abs().max().item()
        floor = FLOORS[dtype] * terms[index].max().item()
        allowed = 2 * (rounded.double() - answer).abs().max().item() + floor
        if not error <= allowed:
            errors[("out", "x", "weight", "bias")[index]] = (error, allowed)
    assert not errors
    channels_last = layout == "channels_last" and height * width > 1
    for value in results[:2]:
        assert value.is_contiguous() is not channels_last
        assert value.is_contiguous(memory_format=torch.channels_last) or not channels_last


@pytest.mark.parametrize("size", [3, 16])
def test_upsample_conv2d_computes_what_is_wanted(size: int) -> None:
    x, weight = noise(2, 4, size, size, seed=0), noise(5, 4, 3, 3, seed=1)
    grad = noise(2, 5, 2 * size, 2 * size, seed=2)
    whole = upsample_conv2d.backward(grad, x, weight, [True, True, True])
    for index in range(3):
        mask = [i == index for i in range(3)]
        parts = upsample_conv2d.backward(grad, x, weight, mask)
        assert [part.shape == (0,) for part in parts] == [not wanted for wanted in mask]
        assert torch.equal(parts[index], whole[index])


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False]], ids=str)
def test_upsample_conv2d_of_an_empty_batch(mask: list[bool]) -> None:
    x, weight = torch.empty(0, 4, 3, 3), torch.randn(5, 4, 3, 3)
    out = upsample_conv2d.forward(x, weight, torch.randn(5))
    assert out.shape == (0, 5, 6, 6)
    grads = upsample_conv2d.backward(out, x, weight, mask)
    for grad, tensor, wanted in zip(grads, (x, weight, torch.empty(5)), mask, strict=True):
        assert grad.shape == (tensor.shape if wanted else (0,))
        assert not grad.any()
