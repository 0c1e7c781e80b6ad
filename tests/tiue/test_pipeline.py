"""What a call of the pipeline computes, against the same thing done by hand."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.tiue.tiny import (
    TEXT_DIM,
    tiny_autoencoder_tiny,
    tiny_pipeline,
    tiny_scheduler,
    tiny_unet,
)
from tests.tiue.unets import make_unet
from tiue import OnePassSchedule, TiUEPipeline
from tiue.errors import CheckpointError, NonFiniteError

PROMPTS = ["red apple", "rocket"]


def make(seed: int = 0, **components) -> TiUEPipeline:
    pipe = TiUEPipeline.from_pipe(tiny_pipeline(seed, **components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> TiUEPipeline:
    return make()


def noise(batch: int, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def embed(pipe, prompts, **kwargs) -> torch.Tensor:
    return pipe.encode_prompt(prompts, torch.device("cpu"), 1, False, **kwargs)[0]


def latents_of(pipe, *args, **kwargs) -> torch.Tensor:
    return pipe(*args, output_type="latent", **kwargs).images


@torch.no_grad()
def step_by_step(pipe, latents, text, steps=4, negative=None, guidance=1.0, **conditioning):
    """K calls of the scheduler over `predict_noise`, guidance at every step, as diffusers loops."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    model_input = scheduler.scale_model_input(latents, scheduler.timesteps[0])

    def predict(embeds):
        return pipe.unet.predict_noise(model_input, scheduler.timesteps, embeds, **conditioning)

    noise_pred = predict(text)
    if negative is not None:
        uncond = predict(negative)
        noise_pred = uncond + guidance * (noise_pred - uncond)
    for k, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(noise_pred[k], timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (DDIMScheduler, {}),
        (DDIMScheduler, {"prediction_type": "v_prediction"}),
        (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    ],
    ids=["ddim", "ddim-v", "euler", "dpm++"],
)
def test_equals_k_scheduler_steps(cls, settings, steps):
    pipe = make(scheduler=tiny_scheduler(cls, **settings))
    got = latents_of(pipe, PROMPTS, num_decoder_steps=steps, latents=noise(2))
    want = step_by_step(pipe, noise(2), embed(pipe, PROMPTS), steps)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_four_steps_are_the_default(pipe):
    assert torch.equal(
        latents_of(pipe, PROMPTS, latents=noise(2)),
        latents_of(pipe, PROMPTS, latents=noise(2), num_decoder_steps=4),
    )


def test_guidance_equals_guiding_every_step(pipe):
    got = latents_of(
        pipe, PROMPTS, latents=noise(2), guidance_scale=7.5, negative_prompt=["blue", "slow"]
    )
    negative = embed(pipe, ["blue", "slow"])
    want = step_by_step(pipe, noise(2), embed(pipe, PROMPTS), negative=negative, guidance=7.5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    unguided = latents_of(pipe, PROMPTS, latents=noise(2))
    assert not torch.allclose(got, unguided, atol=1e-2)


def test_negative_prompts(pipe):
    def guided(**kwargs):
        return latents_of(pipe, PROMPTS, latents=noise(2), guidance_scale=3.0, **kwargs)

    for_all = guided(negative_prompt="blue")
    assert torch.equal(for_all, guided(negative_prompt=["blue", "blue"]))
    embeds = embed(pipe, ["blue", "blue"])
    torch.testing.assert_close(for_all, guided(negative_prompt_embeds=embeds))
    assert torch.equal(guided(), guided(negative_prompt=""))
    assert not torch.allclose(for_all, guided(), atol=1e-4)


def test_a_batch_equals_single_calls(pipe):
    batch = latents_of(pipe, PROMPTS, generator=generators(3, 4))
    for row, prompt, seed in zip(batch, PROMPTS, (3, 4), strict=True):
        single = latents_of(pipe, prompt, generator=generators(seed)[0])[0]
        torch.testing.assert_close(row, single, rtol=1e-5, atol=1e-5)


def test_images_per_prompt_equal_repeated_prompts(pipe):
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    got = latents_of(
        pipe,
        PROMPTS,
        num_images_per_prompt=3,
        latents=noise(6),
        guidance_scale=2.0,
        negative_prompt=["a", "b"],
    )
    want = latents_of(
        pipe, repeated, latents=noise(6), guidance_scale=2.0, negative_prompt=["a"] * 3 + ["b"] * 3
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_prompt_embeds_stand_for_the_prompt(pipe):
    by_text = latents_of(pipe, PROMPTS, latents=noise(2))
    by_embeds = latents_of(pipe, prompt_embeds=embed(pipe, PROMPTS), latents=noise(2))
    assert torch.equal(by_text, by_embeds)


def test_without_a_text_encoder_embeds_are_enough(pipe):
    bare = TiUEPipeline.from_pipe(pipe, text_encoder=None, tokenizer=None)
    bare.set_progress_bar_config(disable=True)
    embeds = embed(pipe, PROMPTS)
    assert torch.equal(
        latents_of(bare, prompt_embeds=embeds, latents=noise(2)),
        latents_of(pipe, prompt_embeds=embeds, latents=noise(2)),
    )


def test_clip_skip_takes_an_earlier_layer(pipe):
    got = latents_of(pipe, PROMPTS, latents=noise(2), clip_skip=1)
    embeds = embed(pipe, PROMPTS, clip_skip=1)
    assert torch.equal(got, latents_of(pipe, prompt_embeds=embeds, latents=noise(2)))
    assert not torch.equal(got, latents_of(pipe, PROMPTS, latents=noise(2)))


def test_a_generator_gives_the_noise(pipe):
    drawn = torch.randn(2, 4, 8, 8, generator=generators(5)[0])
    assert torch.equal(
        latents_of(pipe, PROMPTS, generator=generators(5)[0]),
        latents_of(pipe, PROMPTS, latents=drawn),
    )


@pytest.mark.parametrize("vae", [None, tiny_autoencoder_tiny()], ids=["kl", "tiny"])
def test_output_types_are_the_same_picture(vae):
    pipe = make(**({} if vae is None else {"vae": vae}))
    call = {"prompt": PROMPTS, "latents": noise(2)}
    latents = latents_of(pipe, **call)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    want = (decoded / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pipe(**call, output_type="pt").images, want)
    as_numpy = pipe(**call, output_type="np").images
    np.testing.assert_array_equal(as_numpy, want.permute(0, 2, 3, 1).numpy())
    images, nsfw = pipe(**call, return_dict=False)
    assert nsfw is None
    assert [image.size for image in images] == [(32, 32)] * 2
    np.testing.assert_array_equal(np.asarray(images[0]), (as_numpy[0] * 255).round())


@pytest.mark.parametrize(("height", "width"), [(16, 64), (36, 20), (4, 12)])
def test_any_size_that_the_vae_divides(pipe, height, width):
    image = pipe("red apple", height=height, width=width, generator=generators(0)[0]).images[0]
    assert image.size == (width, height)
    latents = noise(1, height // 4, width // 4)
    got = latents_of(pipe, "red apple", latents=latents)
    want = step_by_step(pipe, latents, embed(pipe, ["red apple"]))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_skip_below_leaves_out_light_timesteps(pipe):
    schedule = OnePassSchedule.from_scheduler(pipe.scheduler, 4)
    text = embed(pipe, PROMPTS)
    with torch.no_grad():
        noise_pred = pipe.unet.predict_noise(noise(2), schedule.timesteps, text)
    noise_pred[3] = 0  # t = 1, |E| = 0.0121
    got = latents_of(pipe, PROMPTS, latents=noise(2), skip_below=0.05)
    torch.testing.assert_close(got, schedule.combine(noise(2), noise_pred), rtol=1e-5, atol=2e-5)
    exact = latents_of(pipe, PROMPTS, latents=noise(2))
    assert torch.equal(latents_of(pipe, PROMPTS, latents=noise(2), skip_below=0.0), exact)
    assert not torch.equal(got, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float32(pipe, dtype):
    half = TiUEPipeline.from_pipe(copy.deepcopy(pipe), torch_dtype=dtype)
    call = {"prompt": PROMPTS, "latents": noise(2), "output_type": "np"}
    want, got = pipe(**call).images, half(**call).images
    assert np.abs(want - got).mean() < {torch.float16: 0.002, torch.bfloat16: 0.02}[dtype]
    assert latents_of(half, PROMPTS).dtype == dtype


def test_the_vae_may_stay_in_float32(pipe):
    half = TiUEPipeline.from_pipe(copy.deepcopy(pipe), torch_dtype=torch.bfloat16)
    half.vae.to(torch.float32)
    assert half(PROMPTS, output_type="pt").images.dtype == torch.float32


def test_a_lora_takes_part_at_its_scale():
    pipe = make()
    plain = latents_of(pipe, PROMPTS, latents=noise(2))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    def scaled(scale):
        kwargs = {"cross_attention_kwargs": {"scale": scale}}
        return latents_of(pipe, PROMPTS, latents=noise(2), **kwargs)

    torch.testing.assert_close(scaled(0.0), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled(1.0), latents_of(pipe, PROMPTS, latents=noise(2)))
    assert not torch.allclose(scaled(0.5), plain, atol=1e-3)
    assert not torch.allclose(scaled(0.5), scaled(1.0), atol=1e-3)


def test_a_lora_of_other_sizes_is_refused_and_leaves_nothing(tmp_path):
    pipe = make()
    plain = latents_of(pipe, PROMPTS, latents=noise(2))
    wider = tuple(2 * width for width in pipe.unet.config.block_out_channels)
    other = make_unet("sd1", block_out_channels=wider)
    other.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(other)
    )
    with pytest.raises(CheckpointError, match=r"other sizes .*size mismatch .*to_q"):
        pipe.load_lora_weights(tmp_path)
    assert torch.equal(latents_of(pipe, PROMPTS, latents=noise(2)), plain)


@pytest.mark.parametrize("loaded", [False, True], ids=["alone", "beside_another"])
def test_a_lora_whose_text_encoder_part_does_not_fit_leaves_nothing(tmp_path, loaded):
    pipe, other = make(), tiny_pipeline()
    if loaded:
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    plain = latents_of(pipe, PROMPTS, latents=noise(2))
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    other.text_encoder.add_adapter(
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    wide = {
        key: torch.cat([weight, weight], dim=-1 if "lora_A" in key else 0)
        for key, weight in get_peft_model_state_dict(other.text_encoder).items()
    }
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(other.unet),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(wide),
    )
    before = pipe.get_list_adapters()
    with pytest.raises(CheckpointError, match=r"other sizes .*text encoder"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == before
    assert torch.equal(latents_of(pipe, PROMPTS, latents=noise(2)), plain)


def ip_adapter_weights(unet) -> dict:
    """A state dict as `load_ip_adapter` reads it, four tokens of an image embedding of width 8."""
    generator = torch.Generator().manual_seed(2)

    def weights(*shape):
        return torch.randn(*shape, generator=generator) / 4

    layers = {}
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(names):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * number + 1}.{part}.weight"] = weights(width, TEXT_DIM)
    projection = {
        "proj.weight": weights(4 * TEXT_DIM, 8),
        "proj.bias": weights(4 * TEXT_DIM),
        "norm.weight": torch.ones(TEXT_DIM),
        "norm.bias": torch.zeros(TEXT_DIM),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def test_an_ip_adapter_takes_part_at_its_scale():
    pipe = make()
    plain = latents_of(pipe, PROMPTS, latents=noise(2), guidance_scale=2.0)
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    image = torch.randn(1, 1, 8, generator=generators(6)[0])
    guided = torch.cat([torch.zeros_like(image), image])

    def call(scale, embeds, guidance_scale):
        pipe.set_ip_adapter_scale(scale)
        return latents_of(
            pipe,
            PROMPTS,
            latents=noise(2),
            guidance_scale=guidance_scale,
            ip_adapter_image_embeds=[embeds],
        )

    torch.testing.assert_close(call(0.0, guided, 2.0), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(call(1.0, guided, 2.0), plain, atol=1e-3)
    want = step_by_step(
        pipe,
        noise(2),
        embed(pipe, PROMPTS),
        added_cond_kwargs={"image_embeds": [image.expand(2, -1, -1)]},
    )
    torch.testing.assert_close(call(1.0, image, 1.0), want, rtol=1e-4, atol=1e-4)


def test_a_unet_that_takes_guidance_as_an_input():
    torch.manual_seed(0)
    pipe = make(unet=tiny_unet(time_cond_proj_dim=16))
    embedding = pipe.get_guidance_scale_embedding(torch.tensor([3.0, 3.0]), embedding_dim=16)
    got = latents_of(pipe, PROMPTS, latents=noise(2), guidance_scale=4.0)
    want = step_by_step(pipe, noise(2), embed(pipe, PROMPTS), timestep_cond=embedding)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_timings_are_summed_inside_the_block_only(pipe):
    with pipe.record_timings() as timings:
        pipe("red apple")
        once = dict(timings)
        pipe("red apple")
    assert list(timings) == ["text encoder", "encoder", "decoder", "VAE"]
    assert all(timings[stage] > seconds > 0 for stage, seconds in once.items())
    twice = dict(timings)
    pipe("red apple")
    assert timings == twice


def test_progress_counts_the_stages(pipe, capsys):
    shown = TiUEPipeline.from_pipe(pipe)
    shown("red apple")
    assert "4/4" in capsys.readouterr().err
    latents_of(shown, "red apple")
    assert "3/3" in capsys.readouterr().err


def test_changing_the_scheduler_changes_the_schedule(pipe):
    changed = TiUEPipeline.from_pipe(pipe)
    before = latents_of(changed, PROMPTS, latents=noise(2))
    changed.scheduler = tiny_scheduler(timestep_spacing="trailing")
    got = latents_of(changed, PROMPTS, latents=noise(2))
    want = step_by_step(changed, noise(2), embed(changed, PROMPTS))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(got, before, atol=1e-3)


def test_a_long_prompt_is_cut_with_a_warning(pipe, caplog):
    diffusers_logging.enable_propagation()
    try:
        got = latents_of(pipe, "a " * 14 + "b c d", latents=noise(1))
    finally:
        diffusers_logging.disable_propagation()
    assert "truncated" in caplog.text
    assert torch.equal(got, latents_of(pipe, "a " * 14, latents=noise(1)))


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_nan_in_a_picture_is_an_error(output_type):
    pipe = make()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"pipe\.vae\.to\(torch\.float32\)"):
        pipe("red apple", output_type=output_type)
