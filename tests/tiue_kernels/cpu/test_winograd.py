"""Winograd convolutions of the CPU library: right, bounded in memory, never of a stale weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from testing.tolerances import WINOGRAD_RELATIVE
from tiue_kernels import functional, use_backend
from tiue_kernels.cpu import conv2d, winograd, winograd_weights
from tiue_kernels.cpu.library import POINTS
from tiue_kernels.cpu.winograd_weights import WeightCache

pytestmark = pytest.mark.usefixtures("with_cpu_library")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def cache(monkeypatch) -> Iterator[WeightCache]:
    fresh = WeightCache(2**30)
    monkeypatch.setattr(winograd_weights, "cache", fresh)
    return fresh


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, start: int) -> None:
    part = weight[:, start : start + x.shape[1]]
    reference = F.conv2d(
        x.double(), part.double(), None if bias is None else bias.double(), padding=1
    )
    with torch.no_grad():
        out = winograd.conv2d(x, weight, bias, [1, 1], start)
    assert out is not None
    assert out.shape == reference.shape
    assert out.is_contiguous()
    error = (out.double() - reference).abs().max() / reference.std()
    assert error <= WINOGRAD_RELATIVE


# Sizes that tiles of 4 x 4 do not divide; one row, and more rows than run together.
@pytest.mark.parametrize("size", [(32, 32), (30, 33), (5, 70), (64, 1), (1, 129)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_equals_the_convolution(rows: int, size: tuple[int, int], cache: WeightCache) -> None:
    check(noise(rows, 64, *size), noise(96, 64, 3, 3), noise(96), 0)


@pytest.mark.parametrize("start", [0, 5, 32])
@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_part_of_a_weight(start: int, limit: int, cache: WeightCache) -> None:
    cache.limit = limit
    for _ in range(2):  # transformed, then out of the cache where there is one
        check(noise(2, 65, 32, 31), noise(70, 97, 3, 3), None, start)
    assert cache.bytes == (POINTS * 70 * 65 * 4 if limit else 0)


def check_gradients(
    x: torch.Tensor, weight: torch.Tensor, start: int, output_mask: list[bool]
) -> None:
    part = weight[:, start : start + x.shape[1]].double().requires_grad_()
    reference_x = x.double().requires_grad_()
    out = F.conv2d(reference_x, part, padding=1)
    grad_out = noise(*out.shape, seed=7)
    out.backward(grad_out.double())
    expected = (reference_x.grad, part.grad, grad_out.double().sum((0, 2, 3)))
    whole = torch.full_like(weight, 7.0)
    with torch.no_grad():
        assert winograd.serves_backward(x, weight, [1, 1])
        part = whole[:, start : start + x.shape[1]]
        actual = conv2d.conv2d_bwd(grad_out, x, weight, [1, 1], start, output_mask, part)
    for wanted, found, reference in zip(output_mask, actual, expected, strict=True):
        assert found.shape == (reference.shape if wanted else (0,))
        if wanted:
            error = (found.double() - reference).abs().max() / reference.std()
            assert error <= WINOGRAD_RELATIVE
    # Written where it was asked for, and nowhere else.
    untouched = torch.ones(weight.shape[1], dtype=torch.bool)
    if output_mask[1]:
        untouched[start : start + x.shape[1]] = False
        assert torch.equal(actual[1], whole[:, start : start + x.shape[1]])
    assert (whole[:, untouched] == 7).all()


@pytest.mark.parametrize("size", [(32, 32), (30, 33), (5, 130), (256, 1), (1, 257)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_gradients_equal_the_convolutions(rows: int, size: tuple[int, int]) -> None:
    check_gradients(noise(rows, 65, *size), noise(96, 65, 3, 3), 0, [True, True, True])


def test_gradients_of_channels_in_several_parts(monkeypatch) -> None:
    monkeypatch.setattr(winograd, "MOST_BYTES", 2**16)  # 32 channels and one row at a time
    check_gradients(noise(3, 70, 33, 31), noise(90, 70, 3, 3), 0, [True, True, True])


@pytest.mark.parametrize("start", [0, 5, 32])
@pytest.mark.parametrize("wanted", range(3))
def test_gradients_of_a_part_of_a_weight(start: int, wanted: int) -> None:
    output_mask = [wanted == 0, wanted == 1, wanted == 2]
    check_gradients(noise(2, 65, 32, 31), noise(70, 97, 3, 3), start, output_mask)


def test_what_it_does_not_serve_is_left_to_torch(cache: WeightCache) -> None:
    x, weight, bias = noise(2, 64, 32, 32), noise(64, 64, 3, 3), noise(64)
    with torch.no_grad():
        assert winograd.conv2d(x, weight, bias, [1, 1]) is not None
        assert winograd.conv2d(x, weight, bias, [0, 0]) is None
        assert winograd.conv2d(x, noise(64, 64, 1, 1), bias, [0, 0]) is None
        assert winograd.conv2d(x.double(), weight.double(), bias.double(), [1, 1]) is None
        assert (
            winograd.conv2d(x.to(memory_format=torch.channels_last), weight, bias, [1, 1]) is None
        )
        assert winograd.conv2d(x[:, :32], weight[:, :32], bias, [1, 1]) is None
        assert winograd.conv2d(x[:0], weight, bias, [1, 1]) is None
        assert winograd.conv2d(x[:1, :, :4, :4].contiguous(), weight, bias, [1, 1]) is None


def test_autocast_and_autograd_settle_what_it_is_given(cache: WeightCache) -> None:
    x, weight, bias = noise(2, 64, 32, 32), noise(64, 64, 3, 3).requires_grad_(), noise(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.conv2d(x, weight, bias, 1).dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(functional.conv2d(x, weight, bias, 1).sum(), weight)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).sum(), weight)
    assert (grad - expected).abs().max() <= WINOGRAD_RELATIVE * expected.std()


def test_convolutions_of_the_package_take_it(cache: WeightCache) -> None:
    x, weight, bias = noise(2, 64, 32, 32), noise(64, 80, 3, 3), noise(64)
    with torch.no_grad():
        _, out = functional.split_conv2d(noise(2, 16, 32, 32), x, weight, bias, 1)
        assert torch.equal(out, winograd.conv2d(x, weight, bias, [1, 1], 16))


def _adam(conv: nn.Conv2d) -> None:
    conv(noise(1, 64, 4, 4)).sum().backward()
    torch.optim.AdamW(conv.parameters(), lr=0.1).step()


def _state_dict(conv: nn.Conv2d) -> None:
    conv.load_state_dict({"weight": noise(64, 64, 3, 3, seed=3), "bias": noise(64)})


def _to(conv: nn.Conv2d) -> None:
    conv.to(torch.bfloat16).to(torch.float32)


def _one_element(conv: nn.Conv2d) -> None:
    conv.weight.data[3, 5, 1, 2] += 0.05


def _copy(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.copy_(noise(64, 64, 3, 3, seed=4))


def _new_parameter(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(noise(64, 64, 3, 3, seed=5))


def _numpy(conv: nn.Conv2d) -> None:
    conv.weight.detach().numpy()[...] *= 2  # torch's version counter does not see it


CHANGES: dict[str, Callable[[nn.Conv2d], None]] = {
    "optimiser_step": _adam,
    "load_state_dict": _state_dict,
    "to": _to,
    "data": _one_element,
    "copy_": _copy,
    "new_parameter": _new_parameter,
    "numpy": _numpy,
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_stale_weight_is_used(change: str, cache: WeightCache) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    x = noise(2, 64, 32, 32)
    check(x, conv.weight.detach(), conv.bias.detach(), 0)
    before = copy.deepcopy(conv)
    CHANGES[change](conv)
    assert not torch.equal(before.weight, conv.weight)
    check(x, conv.weight.detach(), conv.bias.detach(), 0)
    held = cache.bytes
    check(x, before.weight.detach(), before.bias.detach(), 0)  # unloading a LoRA: still held
    assert cache.bytes == held


def test_the_cache_keeps_its_bound(cache: WeightCache) -> None:
    weights = [noise(64, 64, 3, 3, seed=seed) for seed in range(4)]
    size = POINTS * 64 * 64 * 4
    cache.limit = 2 * size + 1
    for _ in range(3):
        held = [cache.get(weight, 0, 64) is not None for weight in weights]
        assert held == [True, True, False, False]  # a circle of four over two places
    assert cache.bytes == 2 * size
    cache.limit = size
    assert cache.bytes == size
    cache.limit = 0
    assert cache.get(weights[0], 0, 64) is None
    with pytest.raises(ValueError, match="number of bytes"):
        cache.limit = -1


def _norm(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(channels), torch.zeros(channels)


def test_a_weight_in_training_is_not_kept(cache: WeightCache) -> None:
    x, weight = noise(2, 64, 32, 32), noise(64, 64, 3, 3).requires_grad_()

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return functional.group_norm_silu_conv2d(hidden, 4, *_norm(64), weight, padding=1)

    with torch.no_grad():
        expected = run(x)  # a validation between two steps
    assert cache.bytes
    out = run(x.clone().requires_grad_())
    assert cache.bytes == 0
    assert torch.equal(out, expected)
    out.sum().backward()
    assert cache.bytes == 0
    weight.requires_grad_(False)  # as the teacher's, or beside an adapter
    run(x.clone().requires_grad_())
    assert cache.bytes


def test_a_training_step_equals_that_of_direct_convolutions() -> None:
    def gradients() -> list[torch.Tensor]:
        hidden, skip = noise(4, 64, 32, 32).requires_grad_(), noise(2, 64, 32, 32).requires_grad_()
        weight, upsampler = noise(96, 128, 3, 3) / 30, noise(64, 96, 3, 3) / 30
        weight.requires_grad_(), upsampler.requires_grad_()
        own, shared = functional.shared_skip_group_norm_silu_conv2d(
            hidden, skip, 8, *_norm(128), weight, padding=1
        )
        out = functional.upsample_conv2d(own + shared.repeat(2, 1, 1, 1), upsampler)
        out.square().mean().backward()
        return [tensor.grad for tensor in (hidden, skip, weight, upsampler)]

    actual = gradients()
    with use_backend(conv2d="reference"):
        direct = gradients()
    for found, expected in zip(actual, direct, strict=True):
        assert not torch.equal(found, expected)  # Winograd's sums are others
        assert (found - expected).abs().max() <= WINOGRAD_RELATIVE * expected.std()


def test_weights_out_of_use_make_room(cache: WeightCache, monkeypatch) -> None:
    monkeypatch.setattr(WeightCache, "STALE_AFTER", 10)
    cache.limit = POINTS * 64 * 64 * 4
    old, new = noise(64, 64, 3, 3), noise(64, 64, 3, 3, seed=1)
    assert cache.get(old, 0, 64) is not None
    answers = [cache.get(new, 0, 64) is not None for _ in range(12)]
    assert answers == [False] * 9 + [True] * 3
    assert cache.get(old, 0, 64) is None


def test_the_variable_sets_the_bound(monkeypatch) -> None:
    monkeypatch.setenv(winograd_weights.VARIABLE, "0.5")
    assert winograd_weights._default_limit() == 2**19
    monkeypatch.setenv(winograd_weights.VARIABLE, "much")
    with pytest.raises(ValueError, match="TIUE_WINOGRAD_MIB is a number of MiB, got 'much'"):
        winograd_weights._default_limit()
