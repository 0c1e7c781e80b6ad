"""Every kind of pipeline in one pass against the same pipeline driven by the published form."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, MultiControlNetModel, T2IAdapter
from peft import LoraConfig

import tiue
from testing import published_form
from testing.tolerances import PIPELINE_RELATIVE, relative_error
from tests.tiue.published import PublishedUNet, published
from tests.tiue.test_pipeline import ip_adapter_weights
from tests.tiue.tiny import (
    tiny_pipeline,
    tiny_scheduler,
    tiny_unet,
    tiny_xl_parts,
    tiny_xl_unet,
)

STEPS = 3
PROMPTS = ["red apple", "rocket"]
# 9 x 5 latents: the UNet halves them to 5 x 3, and the way up does not double.
HEIGHT, WIDTH = 36, 20
SIZE = {"height": HEIGHT, "width": WIDTH}

Made = tuple[Any, dict[str, Any]]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> torch.Tensor:
    return noise(2, 3, *size, seed=seed).sigmoid()


def mask() -> torch.Tensor:
    pixels = torch.arange(HEIGHT * WIDTH).view(1, 1, HEIGHT, WIDTH)
    return (pixels % 7 < 4).float().repeat(2, 1, 1, 1)


def wake(module: torch.nn.Module) -> Any:
    """Give weights to what starts from zero, so that it takes part."""
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def sd(name: str, **components: Any) -> Any:
    """A Stable Diffusion pipeline of a class, of tiny parts."""
    cls = getattr(diffusers, f"StableDiffusion{name}Pipeline")
    parts = tiny_pipeline().components | components | {"requires_safety_checker": False}
    return cls(**{k: v for k, v in parts.items() if k in inspect.signature(cls).parameters})


def xl(name: str, **extra: Any) -> Any:
    cls = getattr(diffusers, f"StableDiffusionXL{name}Pipeline")
    return cls(**tiny_xl_parts() | extra)


def controlnet(unet: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return wake(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 16)))


def adapter(kind: str, channels: list[int], factor: int) -> Any:
    torch.manual_seed(0)
    return T2IAdapter(3, channels, 1, downscale_factor=factor, adapter_type=kind).eval()


def two_controlnets() -> Made:
    unet = tiny_unet()
    nets = MultiControlNetModel([controlnet(unet, 0), controlnet(unet, 1)])
    pipe = sd("ControlNet", unet=unet, controlnet=nets)
    scale = {"controlnet_conditioning_scale": [0.7, 0.4]}
    return pipe, {"image": [pictures(0), pictures(1)], **scale}


def with_controlnet(name: str = "ControlNet", **arguments: Any) -> Made:
    unet = tiny_unet()
    call = {"image": pictures(), **arguments}
    return sd(name, unet=unet, controlnet=controlnet(unet)), call


def loras() -> Made:
    pipe = sd("")
    torch.manual_seed(3)
    for name, targets in (("one", ["to_q", "to_v", "conv1"]), ("two", ["to_k", "ff.net.2"])):
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        pipe.unet.add_adapter(config, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.7, 0.4])
    return pipe, SIZE | {"cross_attention_kwargs": {"scale": 0.5}}


def ip_adapter() -> Made:
    pipe = sd("")
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    pipe.set_ip_adapter_scale(0.7)
    return pipe, SIZE | {"ip_adapter_image_embeds": [noise(2, 1, 8)]}


def gligen() -> Made:
    pipe = sd("GLIGEN", unet=wake(tiny_unet(attention_type="gated")))
    boxes = {"gligen_phrases": ["a", "b"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7], [0.4, 0.1, 1, 1]]}
    return pipe, SIZE | boxes | {"gligen_scheduled_sampling_beta": 1.0}


def pag(layers: list[str]) -> Made:
    return sd("PAG", pag_applied_layers=layers), SIZE | {"pag_scale": 2.0}


def inpaint(channels: int, **arguments: Any) -> Made:
    pipe = sd("Inpaint", unet=tiny_unet(in_channels=channels))
    return pipe, SIZE | {"image": pictures(), "mask_image": mask()} | arguments


# What draws, and the arguments of its call beside prompt, guidance and noise.
CASES: dict[str, Callable[[], Made]] = {
    "text_to_image": lambda: (sd(""), SIZE),
    "text_to_image_euler": lambda: (
        sd("", scheduler=tiny_scheduler(EulerDiscreteScheduler)),
        SIZE,
    ),
    "image_to_image": lambda: (sd("Img2Img"), {"image": pictures(), "strength": 0.6}),
    "image_to_image_euler": lambda: (
        sd("Img2Img", scheduler=tiny_scheduler(EulerDiscreteScheduler)),
        {"image": pictures(), "strength": 0.3},
    ),
    "inpaint": lambda: inpaint(4),
    "inpaint_strength": lambda: inpaint(4, strength=0.6),
    "inpaint_9_channels": lambda: inpaint(9),
    "inpaint_9_channels_strength": lambda: inpaint(9, strength=0.6),
    "instruct_pix2pix": lambda: (
        sd("InstructPix2Pix", unet=tiny_unet(in_channels=8)),
        {"image": pictures(), "image_guidance_scale": 1.5},
    ),
    "controlnet": with_controlnet,
    "controlnet_guess_mode": lambda: with_controlnet(guess_mode=True),
    "two_controlnets": two_controlnets,
    "controlnet_image_to_image": lambda: with_controlnet(
        "ControlNetImg2Img", control_image=pictures(1), strength=0.6
    ),
    "t2i_adapter_full": lambda: (
        sd("Adapter", adapter=adapter("full_adapter", [16, 32], 4)),
        {"image": pictures()},
    ),
    "t2i_adapter_light": lambda: (
        sd("Adapter", adapter=adapter("light_adapter", [16, 32], 4)),
        {"image": pictures(), "adapter_conditioning_scale": 0.6},
    ),
    "ip_adapter": ip_adapter,
    "loras": loras,
    "gligen": gligen,
    "pag_mid": lambda: pag(["mid"]),
    "pag_up": lambda: pag(["up"]),
    "xl": lambda: (xl(""), SIZE),
    "xl_image_to_image": lambda: (xl("Img2Img"), {"image": pictures(), "strength": 0.6}),
    "xl_inpaint": lambda: (
        xl("Inpaint"),
        SIZE | {"image": pictures(), "mask_image": mask(), "strength": 0.6},
    ),
    "xl_controlnet": lambda: (
        xl("ControlNet", controlnet=controlnet(tiny_xl_unet())),
        {"image": pictures()},
    ),
    # SDXL's adapter halves the map once more before its first feature: 10 x 6 latents, 5 x 3.
    "xl_t2i_adapter": lambda: (
        xl("Adapter", adapter=adapter("full_adapter_xl", [16, 32, 32, 32], 8)),
        {"image": pictures(size=(40, 24))},
    ),
}
# Euler steps in float32 whatever it is given.
FLOAT32 = {name for name in CASES if "euler" in name}


@functools.cache
def case(name: str) -> Made:
    torch.manual_seed(0)
    pipe, arguments = CASES[name]()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=torch.float32 if name in FLOAT32 else torch.float64)
    return pipe, arguments


def latents_of(pipe: Any, arguments: dict[str, Any], guidance: float, **own: Any) -> torch.Tensor:
    arguments = arguments | own
    if guidance <= 1 and "ip_adapter_image_embeds" not in arguments:
        arguments = {k: v for k, v in arguments.items() if k != "negative_prompt"}
    if guidance > 1 and "ip_adapter_image_embeds" in arguments:
        (image,) = arguments["ip_adapter_image_embeds"]
        arguments["ip_adapter_image_embeds"] = [torch.cat([torch.zeros_like(image), image])]
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(
        prompt=PROMPTS, guidance_scale=guidance, generator=generator, output_type="latent",
        **arguments,
    ).images  # fmt: skip


def begun_at(scheduler: Any, strength: float) -> Any:
    """A scheduler that knows the lowest noise levels alone, made anew."""
    kept = round(scheduler.config.num_train_timesteps * strength)
    return type(scheduler).from_config(
        scheduler.config, trained_betas=scheduler.betas[:kept].numpy(), num_train_timesteps=kept
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_the_published_form_in_the_same_pipeline(name: str, guidance: float) -> None:
    pipe, arguments = case(name)
    negative = {"negative_prompt": ["blue", "slow"]} if guidance > 1 else {}
    scheduler = begun_at(pipe.scheduler, arguments.get("strength", 1.0))
    want = latents_of(
        published(pipe, STEPS, scheduler), arguments, guidance, num_inference_steps=1, **negative
    )
    calls = []
    drawn = tiue.one_pass(pipe, num_decoder_steps=STEPS)
    drawn.unet.register_forward_hook(lambda *_: calls.append(1))
    got = latents_of(drawn, arguments, guidance, **negative)
    assert got.shape == want.shape
    assert relative_error(got, want) <= PIPELINE_RELATIVE[got.dtype]
    assert calls == [1]
    if name not in FLOAT32:
        assert got.dtype == torch.float64


@torch.no_grad()
def test_the_published_form_is_the_benchmarks() -> None:
    unet = tiny_unet().double()
    timesteps = torch.tensor([751, 501, 251])
    latents, text = noise(2, 4, 9, 5).double(), noise(2, 16, 32).double()
    got = PublishedUNet.of(unet, timesteps)(latents, timesteps[0], text).sample
    want = published_form.predict_noise(unet, latents, timesteps, text)
    assert relative_error(torch.stack(got.chunk(3, dim=1)), want) <= 1e-12
