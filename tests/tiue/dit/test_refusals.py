"""What the transformers' one pass does not take, and what each error says."""

import inspect
import json

import diffusers
import pytest
import torch

import tiue
from tests.tiue.dit.models import STUDENTS, build, conditions
from tests.tiue.dit.test_pipelines import pipeline, vae
from tiue.dit import student_of
from tiue.errors import ArchitectureError, InputError, SchedulerError
from tiue.schedule import OnePassSchedule

FAMILIES = "HunyuanDiT2DModel, PixArtTransformer2DModel, SD3Transformer2DModel"


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


@pytest.mark.parametrize("border", [0, 4, 99])
def test_a_border_outside_of_the_blocks(border, tmp_path):
    """Set later, asked for, or written into a folder by another hand."""
    student = STUDENTS["pixart"].from_transformer(build("pixart", torch.float32), 2)
    refused = pytest.raises(InputError, match="from 1 to 3 for the 4 blocks of this PixArt")
    with refused:
        student.num_shared_blocks = border
    assert student.num_shared_blocks == 2
    student.save_pretrained(tmp_path)
    with refused:
        STUDENTS["pixart"].from_pretrained(tmp_path, num_shared_blocks=border)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_shared_blocks": border}))
    with refused:
        STUDENTS["pixart"].from_pretrained(tmp_path)


def test_a_family_without_a_student(tmp_path):
    model = flux()
    with pytest.raises(ArchitectureError, match=f"FluxTransformer2DModel has no .*{FAMILIES}"):
        student_of(model)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, vae(), None, None, None, None, model)
    with pytest.raises(ArchitectureError, match=FAMILIES):
        tiue.one_pass(pipe)
    with pytest.raises(ArchitectureError, match="made of a SD3Transformer2DModel, not FluxTran"):
        STUDENTS["sd3"].from_transformer(model)


def test_controlnets_of_other_families_than_hunyuans():
    pipe, _ = pipeline("sd3")
    parts = {name: part for name, part in pipe.components.items() if "image" not in name}
    torch.manual_seed(0)
    net = diffusers.SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=24,
        pooled_projection_dim=12, pos_embed_max_size=12,
    )  # fmt: skip
    controlled = diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=net)
    with pytest.raises(ArchitectureError, match="takes no ControlNet; that of HunyuanDiT2DModel"):
        tiue.one_pass(controlled)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("pixart", "controlnet_block_samples"),
        ("sd3", "block_controlnet_hidden_states"),
        ("hunyuan", "joint_attention_kwargs"),
    ],
)
def test_conditions_that_a_family_does_not_know(family, name):
    student = STUDENTS[family].from_transformer(build(family, torch.float32))
    latents, text, given = conditions(family, dtype=torch.float32)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    schedule = OnePassSchedule.from_scheduler(scheduler, 2)
    given[name] = [torch.zeros(2, 16, 24)]
    message = f"one pass of a {STUDENTS[family].PARENT.__name__} has no {name}; it takes"
    with pytest.raises(InputError, match=message):
        student.predict_noise(latents, schedule.timesteps, text, **given)
    with pytest.raises(InputError, match=message):
        student.one_pass(latents, schedule, text, **given)
    with pytest.raises(InputError, match=message):
        student(latents, encoder_hidden_states=text, timestep=None, schedule=schedule, **given)


def test_more_of_a_controlnets_samples_than_there_are_skips():
    student = STUDENTS["hunyuan"].from_transformer(build("hunyuan", torch.float32))
    latents, text, given = conditions("hunyuan", dtype=torch.float32)
    samples = [torch.zeros(2, 16, 24)] * 3
    with pytest.raises(InputError, match="1 of the ControlNet's samples meet no skip"):
        student.predict_noise(latents, [500.0], text, **given, controlnet_block_samples=samples)


@pytest.mark.parametrize(
    ("family", "kind", "layer"),
    [
        ("pixart", "PixArtSigmaPAGPipeline", "blocks.3"),
        ("hunyuan", "HunyuanDiTPAGPipeline", "blocks.5"),
        ("sd3", "StableDiffusion3PAGPipeline", "blocks.3"),
    ],
)
def test_perturbed_attention(family, kind, layer):
    """Its processors find guided rows by their place: over K*B rows they would find others."""
    pipe, _ = pipeline(family)
    cls = getattr(diffusers, kind)
    taken = inspect.signature(cls).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    pag = cls(**parts, pag_applied_layers=layer)
    with pytest.raises(ArchitectureError, match=f"{kind} has no one pass: perturbed attention"):
        tiue.one_pass(pag)


@pytest.mark.parametrize("by", ["kwargs", "argument"])
def test_ip_adapters_of_stable_diffusion_3(by):
    pipe, call = pipeline("sd3")
    embeds = torch.zeros(2, 1, 1, 8)
    given = {"ip_adapter_image_embeds": embeds}
    given = given if by == "argument" else {"joint_attention_kwargs": given}
    with pytest.raises(InputError, match="leave ip_adapter_image_embeds out"):
        tiue.one_pass(pipe)(**call, **given, guidance_scale=1.0)


def test_schedulers_that_draw_noise():
    stochastic = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    message = "draws noise at its steps; build it with stochastic_sampling=False"
    with pytest.raises(SchedulerError, match=message):
        OnePassSchedule.from_scheduler(stochastic, 4)
    pipe, call = pipeline("sd3", stochastic_sampling=True)
    with pytest.raises(SchedulerError, match=message):
        tiue.one_pass(pipe)
    pipe, call = pipeline("sd3")
    made = tiue.one_pass(pipe)
    made.scheduler = stochastic
    with pytest.raises(SchedulerError, match=message):
        made(**call, guidance_scale=1.0)
    pipe, call = pipeline("pixart")
    made = tiue.one_pass(pipe)
    made.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    with pytest.raises(SchedulerError, match="draws noise at its steps; use for instance DDIM"):
        made(**call, guidance_scale=1.0)
    with pytest.raises(InputError, match=r"eta=0\.5: one pass draws no noise at its steps"):
        tiue.one_pass(pipe)(**call, eta=0.5)
