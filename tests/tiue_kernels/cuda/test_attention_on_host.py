"""csrc/cross_timestep_attention, every kernel executed on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from testing.criterion import check, noise, plain_attention
from tests.tiue_kernels.fences import fenced
from tiue_kernels import dispatch

pytestmark = pytest.mark.usefixtures("host_library")
kernels = torch.ops.tiue_cuda
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    timesteps: int
    batch: int
    queries: int
    keys: int
    heads: int = 1
    head_dim: int = 40
    own_keys: bool = False  # K*B rows of keys
    bias: bool = False


CASES = {
    "1x1": Case(1, 1, 5, 7),
    "1x2": Case(1, 2, 5, 7, heads=2),
    "4x1": Case(4, 1, 5, 7, heads=2),
    "2x3": Case(2, 3, 5, 7, bias=True),
    "4x2": Case(4, 2, 21, 7, heads=2),
    "3x0": Case(3, 0, 5, 7),
    "one_query": Case(2, 1, 1, 9),
    "text": Case(3, 1, 23, 77, bias=True),
    "several_tiles_a_block": Case(4, 1, 130, 7, heads=4, head_dim=8),
    "queries_split": Case(4, 1, 150, 7, head_dim=8, bias=True),
    "self_attention": Case(2, 1, 90, 90, own_keys=True),
    "self_attention_masked": Case(1, 2, 70, 170, own_keys=True, bias=True),
    "head_of_8": Case(2, 1, 20, 30, head_dim=8),
    "head_of_56": Case(2, 1, 20, 30, heads=2, head_dim=56),
    "head_of_64": Case(2, 1, 20, 100, head_dim=64, bias=True),
    "head_of_80": Case(2, 1, 20, 100, head_dim=80),
    "head_of_160": Case(2, 1, 20, 60, head_dim=160, bias=True),
    "head_of_200": Case(2, 1, 17, 50, head_dim=200),
    "head_of_256": Case(1, 1, 20, 40, head_dim=256, bias=True),
}


def make(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    rows = case.timesteps * case.batch
    key_rows = rows if case.own_keys else case.batch
    channels = case.heads * case.head_dim
    tensors = [
        noise(rows, case.queries, channels, dtype=dtype),
        noise(key_rows, case.keys, channels, dtype=dtype, seed=1),
        noise(key_rows, case.keys, channels, dtype=dtype, seed=2),
    ]
    if case.bias:
        bias = noise(key_rows, 1, case.keys, dtype=dtype, seed=3)
        # Masked keys; in the first row more than a tile of them before the first one that counts.
        bias[:, :, 1:-1:3] = -torch.inf
        bias[:1, :, : case.keys * 2 // 3] = -torch.inf
        tensors.append(bias)
    return tuple(tensors)


def scale_of(query: torch.Tensor, heads: int) -> float:
    return (query.shape[2] // heads) ** -0.5


def run_kernels(tensors, heads: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    query, key, value, bias = tensors if len(tensors) == 4 else (*tensors, None)
    scale = scale_of(query, heads)
    out, logsumexp = kernels.cross_timestep_attention_fwd(query, key, value, heads, scale, bias)
    grad = noise(*out.shape, dtype=out.dtype, seed=4)
    gradients = kernels.cross_timestep_attention_bwd(
        grad, query, key, value, heads, scale, bias, out, logsumexp, True
    )
    if bias is None:
        assert gradients[3].shape == (0,)
        gradients = gradients[:3]
    return (out, *gradients), (grad,)


def check_case(tensors, heads: int, dtype: torch.dtype) -> None:
    results, grads = run_kernels(fenced(tensors), heads)

    def plain(query, key, value, bias=None):
        return plain_attention(query, key, value, bias, heads, scale_of(query, heads))

    names = ("out", "grad_query", "grad_key", "grad_value", "grad_attention_bias")
    check(names[: len(results)], results, plain, tensors, grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(case: Case, dtype: torch.dtype, fences) -> None:
    check_case(make(case, dtype), case.heads, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_slices(dtype: torch.dtype, fences) -> None:
    joined = noise(4, 21, 3 * 80, dtype=dtype)
    check_case(tuple(joined.chunk(3, dim=2)), 2, dtype)  # read in place
    odd = noise(4, 21, 3 * 80 + 1, dtype=dtype)[:, :, 1:]  # rows off 16 bytes
    check_case(tuple(odd.chunk(3, dim=2)), 2, dtype)
    check_case(tuple(part[::2, 3:] for part in joined.chunk(3, dim=2)), 2, dtype)


@pytest.mark.parametrize("name", ["queries_split", "self_attention_masked"])
def test_the_gradient_of_a_mask_may_be_left_out(name: str, fences) -> None:
    query, key, value, bias = make(CASES[name], torch.float16)
    out, logsumexp = kernels.cross_timestep_attention_fwd(query, key, value, 1, 0.3, bias)
    grad = noise(*out.shape, dtype=out.dtype, seed=4)
    operands = (grad, query, key, value, 1, 0.3, bias, out, logsumexp)
    *whole, _ = kernels.cross_timestep_attention_bwd(*operands, True)
    *parts, none = kernels.cross_timestep_attention_bwd(*operands, False)
    assert none.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_key(dtype: torch.dtype, fences) -> None:
    """Its probability is 1: the output is the value, and no gradient reaches the scores."""
    query, key, value, bias = make(Case(2, 1, 3, 1, bias=True), dtype)
    bias[:] = 2.0
    (out, grad_query, grad_key, grad_value, grad_bias), (grad,) = run_kernels(
        (query, key, value, bias), 1
    )
    assert torch.equal(out, value.expand_as(out.view(1, 6, 40)).view_as(out))
    total = grad.double().sum((0, 1))
    torch.testing.assert_close(grad_value[0, 0].double(), total, rtol=2**-8, atol=2**-8)
    # grad_out . value minus itself, summed in two orders.
    cancelled = 2.0**-20 * (grad.double().abs() * value.double().abs()).sum(-1).max().item()
    for zero in (grad_query, grad_key, grad_bias):
        assert zero.abs().max().item() <= 6 * cancelled * max(1.0, key.abs().max().item())


def test_logsumexp() -> None:
    case = CASES["text"]
    query, key, value, bias = make(case, torch.float32)
    _, logsumexp = kernels.cross_timestep_attention_fwd(query, key, value, 1, 0.3, bias)
    scores = torch.einsum("rnc,rmc->rnm", query.double(), key.double().repeat(3, 1, 1)) * 0.3
    expected = (scores + bias.double()).logsumexp(-1)[:, None]
    torch.testing.assert_close(logsumexp.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["self_attention_masked", "queries_split", "head_of_160"])
def test_same_bits_in_any_order(name: str, fences, monkeypatch) -> None:
    """Lanes, warps and blocks shuffled: races are errors, and nothing else may differ either."""
    tensors = make(CASES[name], torch.float16)
    first, _ = run_kernels(tensors, CASES[name].heads)
    for seed in "12":
        monkeypatch.setenv("TIUE_HOST_SEED", seed)
        second, _ = run_kernels(tensors, CASES[name].heads)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 160, 168, 256])
def test_the_table_refuses_what_99_kib_of_shared_memory_do_not_hold(
    head_dim: int, dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setenv("TIUE_HOST_SHARED_BYTES", str(99 * 1024))
    limit = dispatch.TABLE["cross_timestep_attention"]["cuda"].limit
    for keys in (77, 160):
        query, key, value = make(Case(2, 1, 3, keys, head_dim=head_dim), dtype)
        forward = (query, key, value, 1, 1.0, None)
        call = {"query": query, "num_heads": 1}
        assert limit("fwd", call, (8, 6)) is None
        out, logsumexp = kernels.cross_timestep_attention_fwd(*forward)
        backward = (out, *forward, out, logsumexp, False)
        if limit("bwd", call, (8, 6)) is None:
            kernels.cross_timestep_attention_bwd(*backward)
        else:
            with pytest.raises(RuntimeError, match="needs more shared memory"):
                kernels.cross_timestep_attention_bwd(*backward)


@pytest.mark.parametrize("head_dim", [12, 264])
def test_head_sizes_that_do_not_fit_are_refused(head_dim: int) -> None:
    tensors = make(Case(1, 1, 2, 2, head_dim=head_dim), torch.float32)
    with pytest.raises(RuntimeError, match="no multiple of 8 up to 256"):
        kernels.cross_timestep_attention_fwd(*tensors, 1, 1.0, None)
