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

from benchmarks.miniature import drawing
from benchmarks.miniature.rows import PROTOCOL, ROWS, SEEDS
from benchmarks.miniature.training import is_trained, student_folder
from tiue import OnePassSchedule
from tiue.embedded.config import GUIDANCE_SCALE, TEACHER_STEPS
from tiue.evaluate.scenes_preset import draw_requests
from tiue.scenes import load_scenes, load_scenes_teacher

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


def student_predictions(prompts: list[str]) -> dict[str, Any] | None:
    """How alike the predictions of the K = 4 student are; None where it has not been distilled."""
    row, seed = ROWS["k4"], SEEDS[0]
    if not is_trained(row, seed):
        return None
    pipe = load_scenes(student=student_folder(row, seed))
    schedule = OnePassSchedule.from_scheduler(pipe.scheduler, 4)
    begun = drawing.begin(pipe, prompts, list(range(len(prompts))))
    predicted = drawing.predictions(pipe, begun, schedule)
    return {
        "timesteps": schedule.timesteps.tolist(),
        "noise_coefficients": schedule.noise_coefficients.tolist(),
        "cosines": cosines([[own.flatten(1)] for own in predicted]),
    }


def measure() -> dict[str, Any]:
    """Sample 64 of the protocol's prompts by the teacher and compare its features along the way.

    Returns:
        Timesteps, cosines [T, T] and changes [T - 1] of encoder and decoder, and the K = 4
        student's predictions where there is one.
    """
    pipe = load_scenes_teacher()
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe.unet)
    prompts = list(map(str, draw_requests(PROMPTS, PROTOCOL.prompt_seed)))
    pipe(
        prompts,
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="latent",
    )
    return {
        "prompts": len(prompts),
        "steps": TEACHER_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "timesteps": recorder.timesteps,
        "encoder": {"cosines": cosines(recorder.encoder), "changes": changes(recorder.encoder)},
        "decoder": {"cosines": cosines(recorder.decoder), "changes": changes(recorder.decoder)},
        "student": student_predictions(prompts),
    }
