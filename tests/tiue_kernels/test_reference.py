"""`use_backend("reference")` gives torch's own results, to the bit."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.tiue.unets import make_conditioning, make_inputs, make_unet
from tests.tiue_kernels.calls import CALLS
from tiue import TiUEUNet
from tiue_kernels import functional, use_backend
from tiue_kernels.nn import fuse

pytestmark = pytest.mark.usefixtures("with_cpu_library")

# Sums over timesteps, and over a skip's channels apart, have another order than the textbook's; the
# KL term has a least variance.
SUMS = {
    *("timestep_sum_group_norm_silu", "one_pass_combine", "noise_kl"),
    "shared_skip_layer_norm_linear",
}


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CALLS.keys() - SUMS))
def test_of_every_operator(name: str) -> None:
    call = CALLS[name]
    tensors = [tensor.float() for tensor in call.tensors.values()]
    with use_backend("reference"):
        results = call.run(*tensors)
    for found, wanted in zip(results, call.textbook(*tensors), strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_of_convolutions_that_another_backend_would_do_otherwise() -> None:
    x, weight = torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3)
    wanted = torch.nn.functional.conv2d(x, weight, padding=1)
    assert not torch.equal(functional.conv2d(x, weight, padding=1), wanted)  # Winograd's
    with use_backend("reference"):
        assert torch.equal(functional.conv2d(x, weight, padding=1), wanted)
        own, shared = functional.split_conv2d(x[:, :40], x[:, 40:], weight, padding=1)
        assert torch.equal(own + shared, wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_of_a_whole_unet(name: str) -> None:
    """Diffusers' own layers against the operators, in the fused form and in the one pass."""
    unet = make_unet(name).float()
    inputs = {key: value.float() for key, value in make_inputs().items()}
    conditioning = torch.utils._pytree.tree_map(
        lambda t: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
        make_conditioning(name),
    )
    call = (inputs["latents"], 751, inputs["prompt_embeds"])
    wanted = unet(*call, **conditioning).sample
    student = TiUEUNet.from_unet(unet)
    with use_backend("reference"):
        found = student.predict_noise(call[0], [751], call[2], **conditioning)[0]
        fuse(unet)
        assert type(unet) is UNet2DConditionModel
        assert torch.equal(unet(*call, **conditioning).sample, wanted)
    assert torch.equal(found, wanted)


def test_gradients_of_the_sum_are_those_of_the_split_form() -> None:
    """The reference gives the whole convolution in the rows, and splits its gradients."""
    call = CALLS["shared_skip_group_norm_silu_conv2d"]  # which adds the two

    def gradients() -> tuple[torch.Tensor, ...]:
        inputs = [tensor.clone().requires_grad_() for tensor in call.tensors.values()]
        (out,) = call.run(*inputs)
        return torch.autograd.grad(out.square().sum(), inputs)

    with use_backend("reference"):
        found = gradients()
    for own, wanted in zip(found, gradients(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-10)
