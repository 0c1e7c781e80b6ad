"""The forms of a transformer's pass: one pass, repeated, and plain sampling; from one student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.forms import repeated_transformers
from benchmarks.forms.models import transformer_scheduler
from tiue import OnePassSchedule
from tiue.dit.student import OnePassTransformer

FORMS = {
    "repeated": "the shared blocks once, everything repeated K times, the other blocks whole",
    "tiue": "this package's one pass",
    "full-steps": "plain sampling, the whole transformer K times, one after the other",
    "one-step": "the whole transformer once",
}


def schedules(name: str, num_decoder_steps: int) -> tuple[OnePassSchedule, OnePassSchedule]:
    """The schedules of K steps and of one.

    Args:
        name: A key of `testing.configs.TRANSFORMERS`.
        num_decoder_steps: K.
    """
    scheduler = transformer_scheduler(name)
    first, second = (
        OnePassSchedule.from_scheduler(scheduler, steps) for steps in (num_decoder_steps, 1)
    )
    return first, second


def passes(
    student: OnePassTransformer,
    name: str,
    inputs: dict[str, Any],
    both: tuple[OnePassSchedule, OnePassSchedule],
) -> dict[str, Callable[[], torch.Tensor]]:
    """Every form, from noise and text to denoised latents.

    Args:
        student: Whose weights all have.
        name: The key of `testing.configs.TRANSFORMERS` that it was built of.
        inputs: Of `benchmarks.forms.models.transformer_inputs`.
        both: Of `schedules`.

    Returns:
        Calls by form, without gradients.
    """
    given = dict(inputs)
    latents, text = given.pop("latents"), given.pop("prompt_embeds")
    schedule, single = (own.on(latents.device) for own in both)

    def repeated() -> torch.Tensor:
        features = student.encode(latents, schedule.encoder_timestep, text, **given)
        noise = repeated_transformers.decode(student, features, schedule.timesteps)
        return schedule.combine(latents, noise[:, :, : latents.shape[1]])

    def whole(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        model: Any = student
        out = model(
            hidden_states=sample,
            timestep=timestep.to(sample.dtype).expand(len(sample)),
            encoder_hidden_states=text,
            return_dict=False,
            **given,
        )[0]
        return out[:, : sample.shape[1]]

    def full_steps() -> torch.Tensor:
        scheduler, sample = transformer_scheduler(name), latents
        scheduler.set_timesteps(schedule.num_decoder_steps, device=latents.device)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(whole(sample, timestep), timestep, sample).prev_sample
        return sample

    def one_step() -> torch.Tensor:
        return single.combine(latents, whole(latents, single.timesteps[0])[None])

    calls = {
        "repeated": repeated,
        "tiue": lambda: student.one_pass(schedule=schedule, **inputs),
        "full-steps": full_steps,
        "one-step": one_step,
    }
    return {form: torch.no_grad()(calls[form]) for form in FORMS}
