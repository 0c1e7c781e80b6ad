"""What a picture of each row of the miniature costs: multiply-adds of the UNet, and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmarks.machine import describe
from benchmarks.multiply_adds import Counter
from tiue import OnePassSchedule, TiUEUNet
from tiue.embedded.config import LATENT_CHANNELS, LATENT_SIZE
from tiue.errors import CheckpointError
from tiue.openmoji import WEIGHTS
from tiue.openmoji.config import MAX_PROMPT_TOKENS

if TYPE_CHECKING:
    from benchmarks.miniature import Row

ROUNDS = 7


def _unet() -> UNet2DConditionModel:
    config = UNet2DConditionModel.load_config(WEIGHTS / "teacher", subfolder="unet")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).eval()


@torch.no_grad()
def multiply_adds(steps: int | None, num_decoder_steps: int | None) -> int:
    """Multiply-adds of the UNet for one picture.

    Args:
        steps: Of the loop, each of which runs the UNet twice: with the prompt and without.
        num_decoder_steps: K of the one pass, which needs no guidance.

    Returns:
        The number; text encoder and autoencoder, alike for all, are left out.
    """
    unet = _unet()
    latents = torch.empty(1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, device="meta")
    text = torch.empty(1, MAX_PROMPT_TOKENS, unet.config.cross_attention_dim, device="meta")
    with Counter() as counter:
        if steps is not None:
            unet(latents, torch.zeros(1, device="meta"), text)
        else:
            scheduler = DDIMScheduler.from_pretrained(WEIGHTS / "student", subfolder="scheduler")
            schedule = OnePassSchedule.from_scheduler(scheduler, num_decoder_steps or 1)
            student = TiUEUNet.from_unet(unet)
            features = student.encode(latents, schedule.timesteps[0].to("meta"), text)
            student.decode_combined(features, latents, schedule)
    return counter.count.total * (2 * steps if steps is not None else 1)


def measure(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Count every row, and time those whose weights are there, in turn.

    Args:
        rows: Of the miniature.

    Returns:
        By row: multiply-adds, and the median of the CPU seconds of one picture on one thread, text
        encoder and autoencoder included; and the machine.
    """
    from benchmarks.miniature import load_row

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    ready = {}
    for name, row in rows.items():
        if name == "autoencoder":
            continue
        found[name] = {"multiply_adds": multiply_adds(row.steps, row.num_decoder_steps)}
        # Students of one K run the same arithmetic: the shipped one stands for them.
        if row.training is None:
            try:
                ready[name] = load_row(row)
            except CheckpointError:
                continue
    for model in ready.values():
        model.draw(["red apple"], [0])
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, model in ready.items():
            # Of this process alone: other work on the machine slows the clock, not this.
            started = time.process_time()
            model.draw(["red apple"], [0])
            times[name].append(time.process_time() - started)
    for name, values in times.items():
        found[name] |= {"seconds": statistics.median(values), "rounds": len(values)}
    return {"format": 1, "figures": {}, "rows": found, "machine": describe(torch.device("cpu"))}
