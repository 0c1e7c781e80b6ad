"""The one pass as a block of diffusers' modular pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam

from tiue.schedule import OnePassSchedule
from tiue.unet import TiUEUNet


class OnePassStep(ModularPipelineBlocks):
    """Noise to latents in one pass; takes the place of a denoising loop.

    Components: `unet`, a `TiUEUNet`, and `scheduler`, any that `OnePassSchedule` takes. Inputs:
    `latents` [B, C, h, w], noise of deviation 1; `prompt_embeds` [B, L, D]; `num_decoder_steps`, K;
    `added_cond_kwargs`, of an SDXL. Output: `latents`.
    """

    model_name = "tiue"

    @property
    def description(self) -> str:
        """What diffusers shows of the block."""
        return "The encoder once, the decoder for K timesteps in one batch (arXiv 2505.21960)"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """What the block is made of."""
        return [
            ComponentSpec("unet", TiUEUNet),
            ComponentSpec("scheduler"),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        """What it reads of the state."""
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("prompt_embeds", required=True, type_hint=torch.Tensor),
            InputParam("num_decoder_steps", default=4, type_hint=int),
            InputParam("added_cond_kwargs", type_hint=dict),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What it leaves there."""
        return [OutputParam("latents", type_hint=torch.Tensor)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Run the pass."""
        block = self.get_block_state(state)
        schedule = OnePassSchedule.from_scheduler(components.scheduler, block.num_decoder_steps)
        extra = block.added_cond_kwargs
        arguments = {} if extra is None else {"added_cond_kwargs": extra}
        noise = block.latents * schedule.init_noise_sigma
        unet: Any = components.unet
        block.latents = unet.one_pass(noise, schedule, block.prompt_embeds, **arguments)
        self.set_block_state(state, block)
        return components, state
