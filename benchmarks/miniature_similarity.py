"""How much the teacher's features change along its sampling: encoder against decoder.

The observation that the method rests on (Li et al., 2024, "Faster Diffusion", arXiv 2312.09608,
section 3.2; arXiv 2505.21960, section 3): from one timestep to another the encoder's features
change little and the decoder's much.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tiue.embedded.config import GUIDANCE_SCALE, TEACHER_STEPS
from tiue.evaluate.prompts import draw_prompts
from tiue.openmoji import load_openmoji, load_openmoji_teacher

PROMPTS = 64


class Recorder:
    """Keeps every block's output at every call of a UNet, of the half with the prompt.

    Args:
        unet: Whose blocks to listen to.
    """

    def __init__(self, unet: Any) -> None:
        self.encoder: list[list[Tensor]] = []
        self.decoder: list[list[Tensor]] = []
        self.timesteps: list[int] = []
        unet.register_forward_pre_hook(self._begin)
        for block in unet.down_blocks:
            block.register_forward_hook(lambda _m, _i, out: self._keep(self.encoder, out[0]))
        unet.mid_block.register_forward_hook(lambda _m, _i, out: self._keep(self.encoder, out))
        for block in unet.up_blocks:
            block.register_forward_hook(lambda _m, _i, out: self._keep(self.decoder, out))

    def _begin(self, _unet: Any, args: tuple[Any, ...]) -> None:
        self.timesteps.append(int(args[1]))
        self.encoder.append([])
        self.decoder.append([])

    def _keep(self, part: list[list[Tensor]], out: Tensor) -> None:
        # Guidance runs both halves as one batch, the prompt's second.
        part[-1].append(out.chunk(2)[1].flatten(1).clone())


def cosines(features: list[list[Tensor]]) -> list[list[float]]:
    """Mean cosine of features at every two timesteps.

    Args:
        features: Of every timestep, every block's output [B, D].

    Returns:
        [T, T], averaged over blocks and pictures.
    """
    matrices = []
    for block in zip(*features, strict=True):
        unit = torch.nn.functional.normalize(torch.stack(block), dim=-1)  # [T, B, D]
        matrices.append(torch.einsum("sbd,tbd->st", unit, unit) / unit.shape[1])
    return [[round(value, 5) for value in row] for row in torch.stack(matrices).mean(0).tolist()]


def changes(features: list[list[Tensor]]) -> list[float]:
    """Relative change from each timestep to the next: |f' - f|^2 / |f|^2, mean over blocks."""
    means = []
    for before, after in itertools.pairwise(features):
        ratios = [
            ((b - a).square().sum() / a.square().sum()).item()
            for a, b in zip(before, after, strict=True)
        ]
        means.append(round(sum(ratios) / len(ratios), 6))
    return means


@torch.no_grad()
def predictions() -> dict[str, Any]:
    """The shipped student's K = 4 predictions: how alike they are, and what each weighs."""
    from tiue import OnePassSchedule

    pipe = load_openmoji()
    schedule = OnePassSchedule.from_scheduler(pipe.scheduler, 4)
    prompts = _prompts()
    text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(prompts), 16, 8, 8, generator=generator)
    predicted = pipe.unet.predict_noise(noise, schedule.timesteps, text)
    return {
        "timesteps": schedule.timesteps.tolist(),
        "latent_coefficient": schedule.latent_coefficient.item()
        if isinstance(schedule.latent_coefficient, Tensor)
        else schedule.latent_coefficient,
        "noise_coefficients": schedule.noise_coefficients.tolist(),
        "cosines": cosines([[row.flatten(1)] for row in predicted]),
    }


def _prompts() -> list[str]:
    from benchmarks.miniature import WORK
    from tiue.evaluate.openmoji_preset import reference_pictures

    pictures = reference_pictures(WORK / "openmoji-pictures.safetensors")
    return draw_prompts(pictures.prompts, PROMPTS, 0)


def measure() -> dict[str, Any]:
    """Sample 64 prompts by the teacher and compare its features along the way.

    Returns:
        Timesteps, cosines [T, T] and changes [T - 1] of encoder and decoder, and the student's
        predictions.
    """
    pipe = load_openmoji_teacher()
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe.unet)
    prompts = _prompts()
    pipe(
        prompts,
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="latent",
    )
    return {
        "format": 1,
        "figures": {},
        "prompts": len(prompts),
        "steps": TEACHER_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "timesteps": recorder.timesteps,
        "encoder": {"cosines": cosines(recorder.encoder), "changes": changes(recorder.encoder)},
        "decoder": {"cosines": cosines(recorder.decoder), "changes": changes(recorder.decoder)},
        "student": predictions(),
    }
