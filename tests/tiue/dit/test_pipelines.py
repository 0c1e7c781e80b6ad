"""diffusers' own pipelines of the three families draw in one pass, by the one line."""

import copy
import pickle

import diffusers
import pytest
import torch

import tiue
from tests.tiue.dit.models import build, conditions, repeated_form
from tiue.errors import ArchitectureError, InputError
from tiue.schedule import OnePassSchedule

DDIM = {"beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}


def vae(channels=4):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4,
        layers_per_block=1, shift_factor=0.0,
    ).eval()  # fmt: skip


def pipeline(family, **scheduler):
    """A pipeline without text encoders, and the arguments of a call of two prompts."""
    model = build(family, torch.float32)
    latents, text, given = conditions(family, dtype=torch.float32)
    negative = torch.zeros_like(text)
    call = {
        "prompt_embeds": text,
        "negative_prompt_embeds": negative,
        "latents": latents,
        "output_type": "latent",
    }
    if family == "pixart":
        pipe = diffusers.PixArtSigmaPipeline(
            None, None, vae(), model, diffusers.DDIMScheduler(**DDIM)
        )
        mask = given["encoder_attention_mask"]
        call |= {
            "prompt_attention_mask": mask,
            "negative_prompt": None,
            "negative_prompt_attention_mask": torch.ones_like(mask),
            "use_resolution_binning": False,
        }
    elif family == "hunyuan":
        pipe = diffusers.HunyuanDiTPipeline(
            vae(), None, None, model, diffusers.DDIMScheduler(**DDIM), None, None,
            requires_safety_checker=False,
        )  # fmt: skip
        call |= {
            "prompt_attention_mask": given["text_embedding_mask"],
            "negative_prompt_attention_mask": torch.ones(2, 5),
            "prompt_embeds_2": given["encoder_hidden_states_t5"],
            "negative_prompt_embeds_2": torch.zeros(2, 7, 16),
            "prompt_attention_mask_2": given["text_embedding_mask_t5"],
            "negative_prompt_attention_mask_2": torch.ones(2, 7),
            "use_resolution_binning": False,
        }
    else:
        pipe = diffusers.StableDiffusion3Pipeline(
            model, diffusers.FlowMatchEulerDiscreteScheduler(**scheduler), vae(),
            None, None, None, None, None, None,
        )  # fmt: skip
        pooled = given["pooled_projections"]
        call |= {
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
        }
    size = 8 * pipe.vae_scale_factor
    return pipe, {**call, "height": size, "width": size}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", ["pixart", "hunyuan", "sd3"])
def test_a_pipeline_draws_what_the_repeated_form_draws(family, guidance):
    pipe, call = pipeline(family)
    made = tiue.one_pass(pipe, num_decoder_steps=4)
    assert isinstance(made, type(pipe))
    calls = []
    # What the pipeline hands to its transformer, sizes and rotary tables of its own among it.
    made.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        got = made(**call, guidance_scale=guidance).images
    ((args, given),) = calls
    given = {k: v for k, v in given.items() if v is not None and k != "return_dict"}
    schedule, latents = given.pop("schedule"), call["latents"]
    hidden = args[0] if args else given.pop("hidden_states")
    assert hidden.shape[0] == (4 if guidance > 1 else 2)
    timestep, text = given.pop("timestep", None), given.pop("encoder_hidden_states")
    assert timestep is None or (timestep == schedule.encoder_timestep).all()
    with torch.no_grad():
        border, model = made.transformer.num_shared_blocks, pipe.transformer
        noise = repeated_form(model, border, hidden, schedule.timesteps, text, given)
        noise = torch.einsum("k,kbchw->bchw", schedule.noise_coefficients.float(), noise)
    if guidance > 1:
        negative, positive = noise.chunk(2)
        noise = negative + guidance * (positive - negative)
    expected = schedule.latent_coefficient * latents + noise
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_a_shift_by_the_pictures_size_is_taken():
    pipe, call = pipeline("sd3", use_dynamic_shifting=True)
    made = tiue.one_pass(pipe)
    with torch.no_grad():
        one, other = (made(**call, guidance_scale=1.0, mu=mu).images for mu in (0.5, 1.5))
        schedule = OnePassSchedule.from_scheduler(made.scheduler, 4, mu=0.5)
        latents, text, given = conditions("sd3", dtype=torch.float32)
        expected = made.transformer.one_pass(latents, schedule, text, **given)
    torch.testing.assert_close(one, expected)
    assert not torch.allclose(one, other)


def test_the_pipeline_handed_in_is_unchanged_and_what_is_saved_loads_in_diffusers(tmp_path):
    pipe, call = pipeline("pixart")
    before = dict(vars(pipe))
    made = tiue.one_pass(pipe)
    assert vars(pipe) == before
    made.transformer.num_shared_blocks = 3
    made.save_pretrained(tmp_path)
    plain = diffusers.PixArtSigmaPipeline.from_pretrained(tmp_path)
    assert type(plain.transformer) is diffusers.PixArtTransformer2DModel
    again = tiue.one_pass(plain)
    again.transformer.num_shared_blocks = 3
    with torch.no_grad():
        pictures = [p(**call, guidance_scale=1.0).images for p in (made, again)]
    torch.testing.assert_close(*pictures)


def test_steps_are_answered_and_other_families_named():
    pipe, call = pipeline("pixart")
    with pytest.raises(InputError, match="num_decoder_steps"):
        tiue.one_pass(pipe)(**call, num_inference_steps=20)
    pipe, _ = pipeline("pixart")
    pipe.transformer = torch.nn.Identity()
    with pytest.raises(ArchitectureError, match="HunyuanDiT2DModel, PixArtTransformer2DModel"):
        tiue.one_pass(pipe)


def test_copies_and_pickles_draw_the_same():
    pipe, call = pipeline("pixart")
    student = tiue.one_pass(pipe, num_decoder_steps=2)
    student.set_progress_bar_config(disable=True)
    expected = student(**call).images
    for other in (copy.copy(student), pickle.loads(pickle.dumps(student))):
        assert type(other) is type(student)
        assert torch.equal(other(**call).images, expected)
