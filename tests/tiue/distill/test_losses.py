from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiue.distill import losses

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_vsd_loss_hands_its_gradient_over_exactly(generator):
    latents = 1e3 * torch.randn(2, 4, 8, 8, generator=generator)
    gradient = torch.randn(2, 4, 8, 8, generator=generator)
    latents.requires_grad_()
    losses.vsd_loss(latents, gradient).backward()
    assert torch.equal(latents.grad, gradient / latents.numel())


def test_vsd_loss_is_half_the_mean_square_to_its_target(generator):
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    gradient = torch.randn(2, 4, 8, 8, generator=generator)
    target = latents - gradient
    expected = 0.5 * (latents - target).square().mean()
    torch.testing.assert_close(losses.vsd_loss(latents, gradient), expected)


def test_vsd_loss_shows_latents_that_are_not_finite():
    latents = torch.full((1, 4, 2, 2), torch.inf)
    assert not losses.vsd_loss(latents, torch.ones_like(latents)).isfinite()


def test_vsd_gradient_weighs_by_the_noise_variance(generator):
    frozen, lora = torch.randn(2, 2, 4, 8, 8, generator=generator, requires_grad=True)
    sigma = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1)
    gradient = losses.vsd_gradient(frozen, lora, sigma)
    assert not gradient.requires_grad
    for row, variance in enumerate((0.01, 0.81)):
        torch.testing.assert_close(gradient[row], variance * (frozen - lora)[row].detach())
    uniform = losses.vsd_gradient(frozen, lora, sigma, "uniform")
    torch.testing.assert_close(uniform, (frozen - lora).detach())


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases lie beside a full checkout only")
@pytest.mark.parametrize("case", ["sd1-like", "sd2-like"])
def test_kl_loss_equals_the_published_one(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    steps = len(expected["timesteps"])
    noise_pred = expected["noise_pred"].unflatten(0, (steps, -1))
    loss = losses.kl_loss(noise_pred)
    torch.testing.assert_close(loss.view(1), expected["kl_loss"], rtol=1e-10, atol=0)


def test_kl_loss_mean_does_not_grow_with_the_batch(generator):
    noise_pred = torch.randn(4, 1, 4, 8, 8, generator=generator)
    doubled = noise_pred.repeat(1, 2, 1, 1, 1)
    mean, doubled_mean = (losses.kl_loss(x, reduction="mean") for x in (noise_pred, doubled))
    torch.testing.assert_close(doubled_mean, mean)
    torch.testing.assert_close(losses.kl_loss(doubled), 8 * mean)


def test_lora_loss_weighs_every_row_by_its_signal():
    noise = torch.zeros(2, 1, 2, 2)
    noise_pred = torch.stack([torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 3.0)])
    alpha = torch.tensor([0.5, 0.1]).view(2, 1, 1, 1)
    loss = losses.lora_loss(noise_pred, noise, alpha)
    torch.testing.assert_close(loss, torch.tensor((0.5 * 4 + 0.1 * 9) / 2))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_equal_their_equations_in_float64(generator, reduction):
    x, g, noise_pred, noise = torch.randn(4, 3, 4, 8, 8, generator=generator)
    maps = torch.randn(2, 3, 4, 8, 8, generator=generator)
    alpha, sigma = torch.rand(2, 3, 1, 1, 1, generator=generator)
    wide = [tensor.double() for tensor in (x, g, noise_pred, noise, maps, alpha, sigma)]
    x64, g64, noise_pred64, noise64, maps64, alpha64, sigma64 = wide

    target = x64 - g64
    vsd = sum((0.5 * (a - b) ** 2) for a, b in zip(x64.flatten(), target.flatten(), strict=True))
    assert losses.vsd_loss(x, g).item() == pytest.approx(vsd.item() / x.numel(), rel=1e-6)

    weighted = losses.vsd_gradient(noise_pred, noise, sigma)
    torch.testing.assert_close(weighted.double(), sigma64**2 * (noise_pred64 - noise64))

    kl = []
    for value in maps64.flatten(0, 1):
        mean = value.sum() / value.numel()
        variance = ((value - mean) ** 2).sum() / (value.numel() - 1)
        kl.append(0.5 * (mean**2 + variance - 1 - variance.log()))
    expected = 0.1 * (sum(kl) if reduction == "sum" else sum(kl) / 6)
    assert losses.kl_loss(maps, 0.1, reduction).item() == pytest.approx(expected.item(), rel=1e-5)

    rows = [(p - n).square().mean() for p, n in zip(noise_pred64, noise64, strict=True)]
    expected = sum(a.squeeze() * row for a, row in zip(alpha64, rows, strict=True)) / 3
    assert losses.lora_loss(noise_pred, noise, alpha).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("target", [0.35, 0.9])
def test_clip_loss_equals_its_equation_in_float64(generator, target):
    images, texts = torch.randn(2, 3, 16, generator=generator)
    images = texts + 0.9 * images  # a mean cosine between the two targets
    cosines = [
        (i @ t / (i.norm() * t.norm())).item()
        for i, t in zip(images.double(), texts.double(), strict=True)
    ]
    mean = sum(cosines) / 3
    assert 0.4 < mean < 0.85
    images.requires_grad_()
    loss = losses.clip_loss(images, texts, target)
    assert loss.item() == pytest.approx(max(0.0, target - mean), rel=1e-5)
    loss.backward()
    assert (images.grad.abs().max() > 0) == (target > mean)
