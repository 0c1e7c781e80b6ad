"""ComfyUI nodes: a pipeline, and its one pass. Needs `pip install tiue` where ComfyUI runs."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io

from tiue.devices import Dtype, find_device, find_dtype
from tiue.errors import InputError
from tiue.generate.loading import load
from tiue.generate.request import LoRA, Request

Pipeline = io.Custom("TIUE_PIPELINE")


class TiUELoad(io.ComfyNode):
    """A pipeline of one pass, with its LoRAs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return io.Schema(
            node_id="TiUELoad",
            display_name="TiUE: load",
            category="TiUE",
            description="A Stable Diffusion 1.x, 2.x or XL student: a folder, a Hugging Face id or"
            " one .safetensors file; openmoji is the small model in the package.",
            inputs=[
                io.String.Input("model", default="openmoji"),
                io.String.Input(
                    "loras", default="", multiline=True, tooltip="FILE or FILE:WEIGHT, one a line."
                ),
                io.String.Input("vae", default="", tooltip="tiny, a folder or a Hugging Face id."),
                io.Combo.Input("dtype", options=[kind.value for kind in Dtype], default="auto"),
            ],
            outputs=[Pipeline.Output(display_name="pipeline")],
        )

    @classmethod
    def execute(cls, model: str, loras: str, vae: str, dtype: str) -> io.NodeOutput:
        """Load."""
        lines = [line.strip() for line in loras.splitlines() if line.strip()]
        request = Request(
            model=model.strip() or None,
            loras=[LoRA.parse(line) for line in lines],
            vae=vae.strip() or None,
        )
        request.check()
        device = find_device("auto")
        pipe = load(request, find_dtype(Dtype(dtype), device)).to(device)
        pipe.set_progress_bar_config(disable=True)
        return io.NodeOutput(pipe)


class TiUEOnePass(io.ComfyNode):
    """Pictures of a prompt, or of a conditioning, in one pass."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What ComfyUI shows."""
        return io.Schema(
            node_id="TiUEOnePass",
            display_name="TiUE: one pass",
            category="TiUE",
            inputs=[
                Pipeline.Input("pipeline"),
                io.String.Input("prompt", default="red apple", multiline=True),
                io.String.Input("negative_prompt", default="", multiline=True),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Int.Input("num_decoder_steps", default=4, min=1, max=64, tooltip="K."),
                io.Float.Input("guidance_scale", default=1.0, min=0.0, max=30.0, step=0.1),
                io.Int.Input("width", default=0, min=0, max=16384, tooltip="0: the model's own."),
                io.Int.Input("height", default=0, min=0, max=16384, tooltip="0: the model's own."),
                io.Int.Input("batch_size", default=1, min=1, max=64),
                io.Conditioning.Input("positive", optional=True, tooltip="Instead of the prompt."),
                io.Conditioning.Input("negative", optional=True, tooltip="With positive."),
                io.Latent.Input(
                    "latents", optional=True, tooltip="Noise to begin with; empty, their size."
                ),
            ],
            outputs=[io.Image.Output(), io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls,
        pipeline: Any,
        prompt: str,
        negative_prompt: str,
        seed: int,
        num_decoder_steps: int,
        guidance_scale: float,
        width: int,
        height: int,
        batch_size: int,
        positive: Any = None,
        negative: Any = None,
        latents: Any = None,
    ) -> io.NodeOutput:
        """Draw: IMAGE [B, H, W, 3] from 0 to 1, LATENT as ComfyUI keeps it (not scaled)."""
        given = None if latents is None else latents["samples"]
        if given is not None:
            factor = pipeline.vae_scale_factor
            batch_size = given.shape[0]
            height, width = (side * factor for side in given.shape[2:])
        arguments: dict[str, Any] = {
            "num_decoder_steps": num_decoder_steps,
            "guidance_scale": guidance_scale,
            "height": height or None,
            "width": width or None,
            "generator": [torch.Generator().manual_seed(seed + i) for i in range(batch_size)],
            "output_type": "latent",
        }
        if given is not None and given.any():
            arguments["latents"] = given
        if positive is not None:
            arguments["prompt_embeds"] = _embeds(positive, batch_size, pipeline)
            if negative is not None:
                arguments["negative_prompt_embeds"] = _embeds(negative, batch_size, pipeline)
            elif guidance_scale > 1:
                raise InputError("guidance with a conditioning needs a negative one too")
        else:
            arguments["prompt"] = [prompt] * batch_size
            if guidance_scale > 1:
                arguments["negative_prompt"] = [negative_prompt] * batch_size
        drawn = pipeline(**arguments).images
        vae = pipeline.vae
        if getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16:
            vae.to(torch.float32)  # SDXL's own overflows in float16
        scaled = drawn.to(vae.dtype) / vae.config.scaling_factor
        scaled = scaled + (getattr(vae.config, "shift_factor", None) or 0.0)
        with torch.no_grad():
            decoded = vae.decode(scaled).sample
        pictures = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu()
        return io.NodeOutput(pictures, {"samples": scaled.float().cpu()})


def _embeds(conditioning: Any, rows: int, pipe: Any) -> torch.Tensor:
    """ComfyUI's conditioning as embeddings [rows, L, D] of this pipeline."""
    embeds: torch.Tensor = conditioning[0][0]
    width = pipe.unet.config.cross_attention_dim
    if embeds.shape[-1] != width:
        raise InputError(
            f"this conditioning is of width {embeds.shape[-1]}, and the UNet reads {width}: take"
            " the text encoder that belongs to the model"
        )
    return embeds.expand(rows, -1, -1).to(pipe.unet.device, pipe.unet.dtype)


class TiUEExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes."""
        return [TiUELoad, TiUEOnePass]


async def comfy_entrypoint() -> TiUEExtension:
    """Where ComfyUI begins."""
    return TiUEExtension()
