"""csrc/shared_skip_group_norm_silu, every kernel executed on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from testing.criterion import check, noise, plain_norm
from tests.tiue_kernels.fences import fenced

pytestmark = pytest.mark.usefixtures("host_library")
kernels = torch.ops.tiue_cuda
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Case:
    timesteps: int
    batch: int
    hidden: int
    skip: int
    groups: int
    height: int = 4
    width: int = 4


CASES = {
    "1x1": Case(1, 1, 20, 12, 4),
    "1x2": Case(1, 2, 20, 12, 4),
    "4x1": Case(4, 1, 20, 12, 4),
    "2x3": Case(2, 3, 20, 12, 4),
    "4x2": Case(4, 2, 20, 12, 4),
    "3x0": Case(3, 0, 20, 12, 4),
    "odd_channels_and_pixels": Case(3, 2, 9, 7, 4, 3, 5),
    "one_pixel": Case(3, 2, 9, 7, 4, 1, 1),
    "one_pixel_wide": Case(2, 1, 40, 24, 4, 1, 1),
    "one_group": Case(2, 2, 5, 6, 1),
    "groups_of_one": Case(2, 2, 16, 8, 24),
    "border_between_groups": Case(2, 2, 24, 8, 4),
    "border_in_the_last_group": Case(2, 2, 27, 5, 4),
    "no_skip": Case(2, 2, 32, 0, 4),
    "vectors_of_four": Case(2, 2, 20, 12, 8),  # 20 channels are no multiple of 8
    "vectors_of_eight": Case(2, 1, 72, 24, 4, 8, 8),
    "many_chunks": Case(2, 1, 40, 24, 2, 24, 26),
}


def make(case: Case, dtype: torch.dtype, memory_format) -> tuple[torch.Tensor, ...]:
    rows, size = case.timesteps * case.batch, (case.height, case.width)
    # Means far from zero and from one another: a one-pass variance would cancel.
    hidden = noise(rows, case.hidden, *size, dtype=torch.float64) + 3
    skip = 2 * noise(case.batch, case.skip, *size, dtype=torch.float64, seed=1) - 1
    channels = case.hidden + case.skip
    return (
        hidden.to(dtype).contiguous(memory_format=memory_format),
        skip.to(dtype).contiguous(memory_format=memory_format),
        noise(channels, dtype=dtype, seed=2),
        noise(channels, dtype=dtype, seed=3),
    )


def run_kernels(tensors, groups: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Outputs and gradients, and the gradients of the outputs that were handed in."""
    hidden, skip, weight, bias = tensors
    *outputs, hidden_stats, skip_stats = kernels.shared_skip_group_norm_silu_fwd(
        hidden, skip, groups, weight, bias, 1e-5
    )
    grads = tuple(noise(*o.shape, dtype=o.dtype, seed=4) for o in outputs)
    gradients = kernels.shared_skip_group_norm_silu_bwd(
        *grads, hidden, skip, groups, weight, bias, hidden_stats, skip_stats
    )
    return (*outputs, *gradients), grads


NAMES = (
    *("hidden_out", "skip_out", "grad_hidden", "grad_skip", "grad_weight", "grad_bias"),
)  # fmt: skip


def check_case(tensors, groups: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    results, grads = run_kernels(fenced(tensors), groups)
    check(NAMES, results, lambda *t: plain_norm(*t, groups), tensors, grads, dtype)
    return results


@pytest.mark.parametrize("shared_bytes", [None, "0"], ids=["resident", "two_pass"])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_norm(case, dtype, memory_format, shared_bytes, fences, monkeypatch) -> None:
    if shared_bytes is not None:  # nothing fits: statistics first, then a second read
        monkeypatch.setenv("TIUE_HOST_SHARED_BYTES", shared_bytes)
    results = check_case(make(case, dtype, memory_format), case.groups, dtype)
    for map_ in results[:4]:
        assert not map_.numel() or map_.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_another_dtype(weight_dtype: torch.dtype, fences) -> None:
    hidden, skip, weight, bias = make(CASES["2x3"], torch.bfloat16, torch.channels_last)
    tensors = (hidden, skip, weight.to(weight_dtype), bias.to(weight_dtype))
    check_case(tensors, 4, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_slices_and_mixed_formats(dtype: torch.dtype, fences) -> None:
    hidden, skip, weight, bias = make(Case(2, 2, 24, 12, 4, 5, 8), dtype, torch.channels_last)
    check_case((hidden[:, 3:23], skip.contiguous(), weight[2:34], bias[1:33]), 4, dtype)
    wide = noise(2 * 2 * 20 * 16 + 1, dtype=dtype)[1:].view(4, 20, 4, 4)  # off 16 bytes
    check_case((wide, skip[..., :4, :4], weight[:32], bias[:32]), 4, dtype)


def test_a_group_too_wide_for_channels_last(fences) -> None:
    tensors = make(Case(1, 1, 514, 513, 1, 1, 2), torch.float32, torch.channels_last)
    results = check_case(tensors, 1, torch.float32)
    assert results[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shared_bytes", [None, "0"], ids=["resident", "two_pass"])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_same_bits_in_any_order(memory_format, shared_bytes, fences, monkeypatch):
    """Lanes, warps and blocks shuffled: races are errors, and nothing else may differ either."""
    if shared_bytes is not None:
        monkeypatch.setenv("TIUE_HOST_SHARED_BYTES", shared_bytes)
    tensors = make(CASES["many_chunks"], torch.bfloat16, memory_format)
    first, _ = run_kernels(tensors, 2)
    for seed in "12":
        monkeypatch.setenv("TIUE_HOST_SEED", seed)
        second, _ = run_kernels(tensors, 2)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_statistics() -> None:
    hidden, skip, weight, bias = make(CASES["2x3"], torch.float16, torch.contiguous_format)
    *_, hidden_stats, skip_stats = kernels.shared_skip_group_norm_silu_fwd(
        hidden, skip, 4, weight, bias, 0
    )
    joined = torch.cat([hidden, skip.repeat(2, 1, 1, 1)], 1).double().view(6, 4, -1)
    variance, mean = torch.var_mean(joined, -1, correction=0)
    expected = torch.stack([mean, variance.rsqrt()])
    assert hidden_stats.dtype == skip_stats.dtype == torch.float32
    torch.testing.assert_close(hidden_stats.double(), expected[:, :, :3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(skip_stats.double(), expected[:, :3, 3:], rtol=1e-5, atol=1e-6)


def test_float64_is_refused() -> None:
    hidden, skip, weight, bias = make(CASES["1x1"], torch.float64, torch.contiguous_format)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        kernels.shared_skip_group_norm_silu_fwd(hidden, skip, 4, weight, bias, 1e-5)
