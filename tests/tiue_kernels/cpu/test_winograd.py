"""Winograd convolutions of the CPU library: right, in bounded memory, of the weight as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from testing.tolerances import WINOGRAD_RELATIVE
from tiue_kernels import functional, use_backend
from tiue_kernels.cpu import conv2d, winograd

pytestmark = pytest.mark.usefixtures("with_cpu_library")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


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
def test_equals_the_convolution(rows: int, size: tuple[int, int]) -> None:
    check(noise(rows, 64, *size), noise(96, 64, 3, 3), noise(96), 0)


@pytest.mark.parametrize("start", [0, 5, 32])
def test_a_part_of_a_weight(start: int) -> None:
    check(noise(2, 65, 32, 31), noise(70, 97, 3, 3), None, start)


# Whole steps of 160 channels, and a rest; fewer outputs than a task has, and a rest of them.
@pytest.mark.parametrize("channels", [160, 161, 320, 350])
@pytest.mark.parametrize("outputs", [64, 65, 71, 96])
def test_channels_of_several_steps(channels: int, outputs: int) -> None:
    check(noise(1, channels, 13, 17), noise(outputs, channels, 3, 3), noise(outputs), 0)


@pytest.mark.parametrize("size", [(33, 31), (6, 9), (64, 64)])
def test_maps_in_several_parts(size: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(winograd, "MOST_BYTES", 2**16)  # a strip or two at a time
    check(noise(3, 70, *size), noise(90, 70, 3, 3), noise(90), 0)


def test_no_transformed_map_and_no_transformed_weight_exists() -> None:
    x, weight = noise(1, 64, 512, 512), noise(64, 64, 3, 3)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.untyped_storage().nbytes())
            return out

    with torch.no_grad(), Sizes():
        out = winograd.conv2d(x, weight, None, [1, 1])
    assert out is not None
    assert sorted(set(sizes))[-1] == out.nbytes
    assert sum(sizes) >= 2.25 * x.nbytes  # all the parts of the map together
    assert sorted(set(sizes))[-2] <= max(winograd.MOST_BYTES, weight.nbytes)


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
    monkeypatch.setattr(winograd, "BACKWARD_BYTES", 2**16)  # 32 channels, one row at a time
    check_gradients(noise(3, 70, 33, 31), noise(90, 70, 3, 3), 0, [True, True, True])


@pytest.mark.parametrize("start", [0, 5, 32])
@pytest.mark.parametrize("wanted", range(3))
def test_gradients_of_a_part_of_a_weight(start: int, wanted: int) -> None:
    output_mask = [wanted == 0, wanted == 1, wanted == 2]
    check_gradients(noise(2, 65, 32, 31), noise(70, 97, 3, 3), start, output_mask)


def test_what_it_does_not_serve_is_left_to_torch() -> None:
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


def test_autocast_and_autograd_settle_what_it_is_given() -> None:
    x, weight, bias = noise(2, 64, 32, 32), noise(64, 64, 3, 3).requires_grad_(), noise(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.conv2d(x, weight, bias, 1).dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(functional.conv2d(x, weight, bias, 1).sum(), weight)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).sum(), weight)
    assert (grad - expected).abs().max() <= WINOGRAD_RELATIVE * expected.std()


def test_convolutions_of_the_package_take_it() -> None:
    x, weight, bias = noise(2, 64, 32, 32), noise(64, 80, 3, 3), noise(64)
    with torch.no_grad():
        _, out = functional.split_conv2d(noise(2, 16, 32, 32), x, weight, bias, 1)
        assert torch.equal(out, winograd.conv2d(x, weight, bias, [1, 1], 16))


def _norm(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(channels), torch.zeros(channels)


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
