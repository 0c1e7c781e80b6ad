"""The student against the published implementation's own numbers."""

import pytest
import torch

from tests.golden import CASES, load_golden, requires_golden
from tests.tolerances import GOLDEN_GRADIENT_RELATIVE, GOLDEN_RELATIVE, relative_error
from tiue_kernels import functional

pytestmark = requires_golden


@pytest.mark.parametrize("dtype", GOLDEN_RELATIVE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_one_pass_equals_the_published_one(name: str, dtype: torch.dtype) -> None:
    case = load_golden(name, dtype)
    noise_pred = case.unet.predict_noise(case.latents, case.schedule.timesteps, case.prompt_embeds)
    results = {
        "noise_pred": noise_pred.flatten(0, 1),
        "pred_original": case.schedule.combine(case.latents, noise_pred),
        "pred_original_serial": case.unet.one_pass(case.latents, case.schedule, case.prompt_embeds),
        "kl_loss": 0.1 * functional.noise_kl(noise_pred).sum()[None],
    }
    assert torch.equal(case.schedule.timesteps, case.expected["timesteps"])
    errors = {key: relative_error(value, case.expected[key]) for key, value in results.items()}
    assert all(error <= GOLDEN_RELATIVE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", GOLDEN_RELATIVE, ids=str)
def test_every_gradient_equals_the_published_one(dtype: torch.dtype) -> None:
    case = load_golden("sd1-like", dtype)
    noise_pred = case.unet.predict_noise(case.latents, case.schedule.timesteps, case.prompt_embeds)
    combined = case.schedule.combine(case.latents, noise_pred)
    loss = (combined * case.expected["grad_pred_original"].to(dtype)).sum()
    (loss + 0.1 * functional.noise_kl(noise_pred).sum()).backward()

    parameters = dict(case.unet.named_parameters())
    expected = {
        key.removeprefix("grad."): value
        for key, value in case.expected.items()
        if key.startswith("grad.")
    }
    assert parameters.keys() == expected.keys()
    errors = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        errors[name] = relative_error(parameter.grad, expected[name])
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GOLDEN_GRADIENT_RELATIVE, (worst, errors[worst])


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_timesteps_equals_the_loop(name: str) -> None:
    case = load_golden(name, torch.float64)
    features = case.unet.encode(case.latents, case.schedule.encoder_timestep, case.prompt_embeds)
    batched = case.unet.decode(features, case.schedule.timesteps)
    looped = torch.cat([case.unet.decode(features, [t]) for t in case.schedule.timesteps])
    assert relative_error(batched, looped) <= GOLDEN_RELATIVE[torch.float64]
