"""Winograd convolutions of the CPU library: right, bounded in memory, never of a stale weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tolerances import WINOGRAD_RELATIVE
from tiue_kernels import convolution, winograd
from tiue_kernels.winograd import POINTS, WeightCache

pytestmark = pytest.mark.usefixtures("with_cpu_library")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def cache(monkeypatch) -> Iterator[WeightCache]:
    fresh = WeightCache(2**30)
    monkeypatch.setattr(winograd, "cache", fresh)
    return fresh


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, start: int) -> None:
    part = weight[:, start : start + x.shape[1]]
    reference = F.conv2d(
        x.double(), part.double(), None if bias is None else bias.double(), padding=1
    )
    with torch.no_grad():
        out = winograd.conv2d(x, weight, bias, 1, start)
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


def test_what_it_does_not_serve_is_left_to_torch(cache: WeightCache) -> None:
    x, weight, bias = noise(2, 64, 32, 32), noise(64, 64, 3, 3), noise(64)
    with torch.no_grad():
        assert winograd.conv2d(x, weight, bias, 1) is not None
        assert winograd.conv2d(x, weight, bias, 0) is None
        assert winograd.conv2d(x, noise(64, 64, 1, 1), bias, 0) is None
        assert winograd.conv2d(x.double(), weight.double(), bias.double(), 1) is None
        assert winograd.conv2d(x.to(memory_format=torch.channels_last), weight, bias, 1) is None
        assert winograd.conv2d(x[:, :32], weight[:, :32], bias, 1) is None
        assert winograd.conv2d(x[:0], weight, bias, 1) is None
        assert winograd.conv2d(x[:1, :, :4, :4].contiguous(), weight, bias, 1) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert winograd.conv2d(x, weight, bias, 1) is None
    assert winograd.conv2d(x, weight, bias, 1) is None  # training


def test_convolutions_of_the_package_take_it(cache: WeightCache) -> None:
    x, weight, bias = noise(2, 64, 32, 32), noise(64, 80, 3, 3), noise(64)
    with torch.no_grad():
        out = convolution.conv2d(x, weight, bias, 1, start=16)
        assert torch.equal(out, winograd.conv2d(x, weight, bias, 1, 16))


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


def test_weights_out_of_use_make_room(cache: WeightCache, monkeypatch) -> None:
    monkeypatch.setattr(WeightCache, "STALE_AFTER", 10)
    cache.limit = POINTS * 64 * 64 * 4
    old, new = noise(64, 64, 3, 3), noise(64, 64, 3, 3, seed=1)
    assert cache.get(old, 0, 64) is not None
    answers = [cache.get(new, 0, 64) is not None for _ in range(12)]
    assert answers == [False] * 9 + [True] * 3
    assert cache.get(old, 0, 64) is None


def test_the_variable_sets_the_bound(monkeypatch) -> None:
    monkeypatch.setenv(winograd.VARIABLE, "0.5")
    assert winograd._default_limit() == 2**19
    monkeypatch.setenv(winograd.VARIABLE, "much")
    with pytest.raises(ValueError, match="TIUE_WINOGRAD_MIB is a number of MiB, got 'much'"):
        winograd._default_limit()
