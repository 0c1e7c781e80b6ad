"""The golden cases: what the published implementation computes, in float64, from small UNets.

They lie in `shared/golden` beside the checkout.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from tiue import OnePassSchedule, TiUEUNet

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
CASES = ("sd1-like", "sd2-like")

requires_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="no ../shared/golden beside the checkout"
)


@dataclass
class GoldenCase:
    """One folder, loaded: the model, its schedule, and the expected tensors."""

    folder: Path
    unet: TiUEUNet
    schedule: OnePassSchedule
    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    expected: dict[str, torch.Tensor]


def load_golden(name: str, dtype: torch.dtype) -> GoldenCase:
    """Load a case with weights and inputs in one dtype."""
    folder = GOLDEN / name
    steps = json.loads((folder / "case.json").read_text())["decoder_steps"]
    expected = load_file(folder / "expected.safetensors")
    return GoldenCase(
        folder=folder,
        unet=TiUEUNet.from_pretrained(folder, dtype=dtype),
        schedule=OnePassSchedule.from_scheduler(DDIMScheduler.from_pretrained(folder), steps),
        latents=expected["latents"].to(dtype),
        prompt_embeds=expected["prompt_embeds"].to(dtype),
        expected=expected,
    )
