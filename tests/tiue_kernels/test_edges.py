"""Values at the edge: what every backend answers where a formula divides zero by zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tiue_kernels import functional, use_backend
from tiue_kernels.reference import cross_timestep_attention as reference
from tiue_kernels.reference.noise_kl import LEAST_VARIANCE
from tiue_kernels.triton import noise_kl as kernels

HEADS = 2


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def masked_attention(run, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients; of two rows of keys the first is masked whole, its values infinite."""
    query, key, value = noise(4, 5, 32), noise(2, keys, 32), noise(2, keys, 32, seed=1)
    bias = noise(2, 1, keys, seed=2)
    bias[0] = -torch.inf
    bias[1, 0, keys // 2 :] = -torch.inf
    leaves = [x.to(dtype).requires_grad_() for x in (query, key, value, bias)]
    out = run(*leaves)
    return [out, *torch.autograd.grad(out, leaves, noise(*out.shape, seed=3).to(dtype))]


def by_torch(query, key, value, bias) -> torch.Tensor:
    def heads(x):
        return x.repeat(len(query) // len(x), 1, 1).unflatten(2, (HEADS, -1)).transpose(1, 2)

    mask = bias.repeat(2, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(heads(query), heads(key), heads(value), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def check_masked(run, keys: int, dtype: torch.dtype) -> None:
    want = masked_attention(by_torch, keys, torch.float64)
    assert not want[0][::2].any()
    names = ("out", "grad_query", "grad_key", "grad_value", "grad_bias")
    got = masked_attention(run, keys, dtype)
    for name, value, answer in zip(names, got, want, strict=True):
        masked = value[::2] if name in ("out", "grad_query") else value[0]
        assert not masked.any(), name  # NaN is true
        bound = {torch.float32: 1e-5, torch.float16: 2e-2}[dtype] * answer.abs().max().item()
        torch.testing.assert_close(value.double(), answer, rtol=0, atol=bound, msg=name)


def ours(query, key, value, bias) -> torch.Tensor:
    return functional.cross_timestep_attention(query, key, value, HEADS, attention_bias=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("keys", [7, 150])  # one block, and several that are masked whole
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_a_query_whose_keys_are_all_masked_gives_0(backend, keys, dtype, request, fences):
    if backend == "cuda":
        request.getfixturevalue("host_library")
    with use_backend(backend):
        check_masked(ours, keys, dtype)


def test_the_explicit_form_gives_0_too(monkeypatch) -> None:
    monkeypatch.setattr(reference, "_cpu_forward", lambda *args, attn_mask, scale: (
        reference._explicit_fwd(*args, scale, attn_mask)
    ))  # fmt: skip
    check_masked(ours, 7, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_constant_map_has_a_finite_loss_and_finite_gradients(backend, value) -> None:
    maps = torch.full((2, 4, 8, 8), value)
    maps[1] += noise(4, 8, 8)
    maps.requires_grad_()
    with use_backend(backend):
        kl = functional.noise_kl(maps)
        (grad,) = torch.autograd.grad(kl.sum(), maps)
    floor = torch.tensor(LEAST_VARIANCE, dtype=torch.float64)
    want = 0.5 * (value**2 - 1 - floor.log())
    torch.testing.assert_close(kl[0].double(), want, rtol=1e-5, atol=0)
    # The mean still pulls to 0, alike at every value: mean / n.
    torch.testing.assert_close(grad[0], torch.full((4, 8, 8), value / 256), rtol=1e-5, atol=1e-8)
    assert grad.isfinite().all()
    assert kl[1] < 6


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_gradient_at_the_floor_is_the_derivative(backend) -> None:
    for deviation in (0.5e-6, 2e-6):
        maps = (deviation * noise(1, 4, 8, 8)).double().requires_grad_()
        variance, mean = torch.var_mean(maps, (1, 2, 3))
        want = 0.5 * (mean**2 + variance - 1 - variance.clamp_min(LEAST_VARIANCE).log())
        (slope,) = torch.autograd.grad(want.sum(), maps)
        single = maps.detach().float().requires_grad_()
        with use_backend(backend):
            kl = functional.noise_kl(single)
            (grad,) = torch.autograd.grad(kl.sum(), single)
        torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=1e-12)


def test_the_norm_of_a_constant_map_far_from_zero_gives_its_bias() -> None:
    """A mean of 252 times 1000.1 that rounding moves by 1e-4 would be 0.02 in the output."""
    maps, bias = torch.full((1, 4, 7, 9), 1000.1), noise(4)
    with use_backend("triton"):
        out = functional.broadcast_add_group_norm_silu(
            maps, torch.zeros_like(maps), torch.zeros(1, 4), 1, torch.ones(4), bias
        )
    want = F.silu(bias)[:, None, None].expand(4, 7, 9)
    torch.testing.assert_close(out[0], want, rtol=0, atol=1e-5)


def test_a_constant_map_far_from_zero_has_no_variance() -> None:
    """A sum of 252 times 1000.1 rounds, and a mean that is off by 1e-4 is a variance of 1e-8."""
    value = torch.tensor(1000.1)
    _, (mean, variance) = kernels.noise_kl_fwd(value.expand(1, 4, 7, 9))
    assert (mean.item(), variance.item()) == (value.item(), 0.0)
