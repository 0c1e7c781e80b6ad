"""The student against the published implementation's own numbers, on every backend."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from testing.tolerances import GOLDEN_GRADIENT_RELATIVE, GOLDEN_RELATIVE, relative_error
from tests.golden import CASES, GoldenCase, load_golden, requires_golden
from tiue_kernels import cuda, dispatch, functional, use_backend

pytestmark = requires_golden


def predict(case: GoldenCase) -> torch.Tensor:
    return case.unet.predict_noise(case.latents, case.schedule.timesteps, case.prompt_embeds)


@torch.no_grad()
def forward_errors(case: GoldenCase, noise_pred: torch.Tensor) -> dict[str, float]:
    """How far what the student computes lies from the published numbers, by name."""
    results = {
        "noise_pred": noise_pred.flatten(0, 1),
        "pred_original": case.schedule.combine(case.latents, noise_pred),
        "pred_original_serial": case.unet.one_pass(case.latents, case.schedule, case.prompt_embeds),
        "kl_loss": 0.1 * functional.noise_kl(noise_pred).sum()[None],
    }
    assert torch.equal(case.schedule.timesteps, case.expected["timesteps"])
    return {key: relative_error(value.cpu(), case.expected[key]) for key, value in results.items()}


def gradient_errors(case: GoldenCase, noise_pred: torch.Tensor) -> dict[str, float]:
    """The same of the gradient of every parameter."""
    combined = case.schedule.combine(case.latents, noise_pred)
    loss = (combined * case.expected["grad_pred_original"].to(combined)).sum()
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
        errors[name] = relative_error(parameter.grad.cpu(), expected[name])
    return errors


def assert_all_below(errors: dict[str, float], bound: float) -> None:
    assert {name: error for name, error in errors.items() if not error <= bound} == {}


@pytest.mark.parametrize("dtype", GOLDEN_RELATIVE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_one_pass_equals_the_published_one(name: str, dtype: torch.dtype) -> None:
    case = load_golden(name, dtype)
    assert_all_below(forward_errors(case, predict(case)), GOLDEN_RELATIVE[dtype])


@pytest.mark.parametrize("dtype", GOLDEN_RELATIVE, ids=str)
def test_every_gradient_equals_the_published_one(dtype: torch.dtype) -> None:
    case = load_golden("sd1-like", dtype)
    assert_all_below(gradient_errors(case, predict(case)), GOLDEN_GRADIENT_RELATIVE)


@pytest.fixture
def exact_products() -> Iterator[None]:
    """float32 products of a GPU without TF32, which keeps 11 of their 24 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def is_missing(capability: dispatch.Capability) -> bool:
    """Whether what the kernels need is not here: the CPU's attention wants AVX2 without AVX-512."""
    return capability.missing is not None and capability.missing() is not None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["triton", "cuda", "cpu"])
def test_kernels_give_the_published_numbers(
    backend: str, device: str, served: set[tuple[str, str]], exact_products, request
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "cpu":
        if device == "cuda":
            pytest.skip("its kernels are for tensors on a CPU")
        request.getfixturevalue("with_cpu_library")
    elif backend == "triton":
        pytest.importorskip("triton")
        if device == "cpu":
            if torch.cuda.is_available():
                pytest.skip("Triton compiles here, and interprets nothing")
            request.getfixturevalue("wide_tiles")
    elif device == "cpu":
        request.getfixturevalue("host_library")
    elif cuda.why_not():
        pytest.skip(cuda.why_not())
    case = load_golden("sd1-like", torch.float32)
    case = replace(
        case,
        unet=case.unet.to(device),
        latents=case.latents.to(device),
        prompt_embeds=case.prompt_embeds.to(device),
    )
    # Attention of 4 channels a head, and what a backend has no kernel of, are left to PyTorch.
    with use_backend(backend, "reference"):
        noise_pred = predict(case)
        assert_all_below(forward_errors(case, noise_pred), GOLDEN_RELATIVE[torch.float32])
        assert_all_below(gradient_errors(case, noise_pred), GOLDEN_GRADIENT_RELATIVE)
    implemented = {
        name
        for name, backends in dispatch.TABLE.items()
        if backend in backends and not is_missing(backends[backend])
    }
    of_transformers = {"adaptive_layer_norm", "gated_residual", "shared_skip_layer_norm_linear"}
    implemented -= of_transformers
    assert {name for name, where in served if where == backend} == implemented


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_timesteps_equals_the_loop(name: str) -> None:
    case = load_golden(name, torch.float64)
    features = case.unet.encode(case.latents, case.schedule.encoder_timestep, case.prompt_embeds)
    batched = case.unet.decode(features, case.schedule.timesteps)
    looped = torch.cat([case.unet.decode(features, [t]) for t in case.schedule.timesteps])
    assert relative_error(batched, looped) <= GOLDEN_RELATIVE[torch.float64]
