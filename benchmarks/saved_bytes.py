"""Counts the bytes that a student keeps for its backward pass: `python -m benchmarks.saved_bytes`.

The decoder alone, and a whole step of the student: encoder, decoder, combination and losses.

Fake tensors carry shapes and no data, so the count needs neither the memory nor the time of a
training step, and is the same on every machine.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.forms.models import stable_diffusion_scheduler
from testing import published_form
from testing.configs import CONFIGS, NUM_TOKENS
from tiue import OnePassSchedule, TiUEUNet
from tiue.distill import losses

FORMS = ("published", "tiue")
TIMESTEPS = [751, 501, 251, 1]


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Adds up distinct storages that autograd saves inside the context, parameters left out.

    Args:
        module: whose parameters are not counted.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._kept: dict[int, torch.UntypedStorage] = {}
        parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                self._kept[storage._cdata] = storage  # held, so that no address is used twice
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(storage.nbytes() for storage in self._kept.values())


def _case(
    form: str, model: str, latent_size: int, batch: int, options: dict[str, bool]
) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The UNet of a form, latents, timesteps and prompt embeddings; without data in a fake mode."""
    cls = TiUEUNet if form == "tiue" else UNet2DConditionModel
    unet = cls(**CONFIGS[model]).train()
    for name, value in options.items():
        setattr(unet, name, value)
    latents = torch.empty(batch, 4, latent_size, latent_size)
    prompt_embeds = torch.empty(batch, NUM_TOKENS, unet.config.cross_attention_dim)
    return unet, latents, torch.tensor(TIMESTEPS), prompt_embeds


def decoder_bytes(
    form: str, model: str = "sd15", latent_size: int = 64, batch: int = 1, **options: bool
) -> int:
    """Counts what the decoder of one form keeps for K = 4 timesteps in float32.

    Args:
        form: "published" or "tiue".
        model: a key of `benchmarks.forms.models.CONFIGS`.
        latent_size: height and width of the latents.
        batch: B.
        **options: attributes set on the student, e.g. `recompute_feed_forward=True`.

    Returns:
        Bytes.
    """
    with FakeTensorMode():
        unet, latents, timesteps, prompt_embeds = _case(form, model, latent_size, batch, options)
        with torch.no_grad():
            hidden, skips = published_form.encode(unet, latents, timesteps[0], prompt_embeds)
            features = unet.encode(latents, timesteps[0], prompt_embeds) if form == "tiue" else None
        saved = SavedBytes(unet)
        with saved:
            if features is None:
                rows = [rows.requires_grad_() for rows in (hidden, *skips)]
                published_form.decode(unet, rows[0], rows[1:], timesteps, prompt_embeds)
            else:
                features = replace(
                    features,
                    hidden=features.hidden.requires_grad_(),
                    skips=tuple(skip.requires_grad_() for skip in features.skips),
                )
                unet.decode(features, timesteps)
    return saved.total


def step_bytes(
    form: str, model: str = "sd15", latent_size: int = 64, batch: int = 1, **options: bool
) -> int:
    """Counts what a step of the student keeps: encoder, K = 4 decoder rows, combination, losses.

    Args:
        form: "published" or "tiue".
        model: a key of `benchmarks.forms.models.CONFIGS`.
        latent_size: height and width of the latents.
        batch: B.
        **options: attributes set on the student, e.g. `recompute_feed_forward=True`.

    Returns:
        Bytes.
    """
    scheduler = stable_diffusion_scheduler()
    schedule = OnePassSchedule.from_scheduler(scheduler, len(TIMESTEPS))
    scheduler.set_timesteps(len(TIMESTEPS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, latents, timesteps, prompt_embeds = _case(form, model, latent_size, batch, options)
        saved = SavedBytes(unet)
        with saved:
            if form == "tiue":
                noise_pred = unet.predict_noise(latents, timesteps, prompt_embeds)
                images, kl = schedule.combine(latents, noise_pred), losses.kl_loss(noise_pred)
            else:
                noise_pred = published_form.predict_noise(unet, latents, timesteps, prompt_embeds)
                images = latents * schedule.latent_coefficient
                for coefficient, rows in zip(
                    schedule.noise_coefficients.tolist(), noise_pred, strict=True
                ):
                    images = images + coefficient * rows
                kl = 0.1 * published_form.noise_kl(noise_pred).sum()
            losses.vsd_loss(images, torch.empty_like(latents)) + kl
    return saved.total


def main() -> None:
    """Prints the bytes of both forms and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--latents", type=int, default=64, help="Height and width.")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    case = (arguments.model, arguments.latents, arguments.batch)
    for part, count in (("decoder", decoder_bytes), ("student's step", step_bytes)):
        published = count("published", *case)
        print(f"{part}, published form: {published / 2**20:.0f} MiB")
        for label, options in (
            ("tiue", {}),
            ("tiue, feed-forward computed again", {"recompute_feed_forward": True}),
        ):
            own = count("tiue", *case, **options)
            print(f"{part}, {label}: {own / 2**20:.0f} MiB, {own / published:.2f} x")


if __name__ == "__main__":
    main()
