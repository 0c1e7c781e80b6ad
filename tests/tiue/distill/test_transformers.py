"""PixArt and Stable Diffusion 3: from teacher and prompts to the student, and on again."""

import string
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

import tiue
from benchmarks.forms.models import empty_transformer
from testing.configs import TRANSFORMERS
from tests.tiue.dit.models import build
from tests.tiue.tiny import TEXT_DIM, tiny_scheduler, tiny_text_encoder, tiny_tokenizer
from tiue.distill.embeddings import StoredPrompts, embed_text
from tiue.distill.export import export_student
from tiue.distill.networks import PIXART, family_of
from tiue.distill.output import list_checkpoints
from tiue.distill.parts import check_family
from tiue.distill.settings import load_config
from tiue.distill.teacher import FlowSchedule, NoiseSchedule, noise_schedule_of
from tiue.distill.trainer import Trainer
from tiue.errors import ArchitectureError, CheckpointError, InputError, SchedulerError

CPU = torch.device("cpu")
STUDENTS = {
    "pixart": tiue.TiUEPixArtTransformer2DModel,
    "sd3": tiue.TiUESD3Transformer2DModel,
}


def tiny_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -2.0)]
    words += [(letter, -2.0) for letter in string.ascii_lowercase]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=12, d_kv=4, d_ff=24, num_layers=1, num_heads=2
    )
    return tokenizer, T5EncoderModel(config).eval()


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def tiny_pipeline(family: str) -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    tokenizer, t5 = tiny_t5()
    if family == "pixart":
        transformer = diffusers.PixArtTransformer2DModel(**TRANSFORMERS["pixart-tiny"])
        return diffusers.PixArtAlphaPipeline(tokenizer, t5, vae(), transformer, tiny_scheduler())
    clip = tiny_tokenizer()
    encoders = [tiny_text_encoder(len(clip), CLIPTextModelWithProjection) for _ in range(2)]
    config = TRANSFORMERS["sd3-tiny"] | {
        "joint_attention_dim": 2 * TEXT_DIM, "pooled_projection_dim": 2 * TEXT_DIM,
    }  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        diffusers.SD3Transformer2DModel(**config),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(), encoders[0], clip, encoders[1], tiny_tokenizer(), None, None,
    )  # fmt: skip


def loaded(family: str, folder) -> diffusers.DiffusionPipeline:
    """By diffusers alone, which wants to be told that T5 is missing."""
    if family == "pixart":
        return diffusers.PixArtAlphaPipeline.from_pretrained(folder)
    return diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folders = {}
    for family in STUDENTS:
        folders[family] = tmp_path_factory.mktemp(family)
        tiny_pipeline(family).save_pretrained(folders[family])
    return folders


@pytest.fixture
def settings(teachers):
    def make(family: str, **others):
        defaults = {"teacher": str(teachers[family]), "batch_size": 2, "num_decoder_steps": 2}
        return {**defaults, "kl_weight": 0.0 if family == "sd3" else 0.1, **others}

    return make


def weights(folder, family):
    return load_file(folder / family / "diffusion_pytorch_model.safetensors")


def test_noise_levels_of_a_flow_are_the_schedulers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = noise_schedule_of(scheduler)
    assert isinstance(schedule, FlowSchedule)
    timesteps = torch.arange(1000)
    torch.testing.assert_close(schedule.for_network(timesteps), scheduler.timesteps.flip(0))
    images, noise = torch.randn(2, 3, 4, 2, 2).double()
    some = torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(images, noise, some)
    assert torch.equal(noisy[2], noise[2])  # the highest level is noise alone
    velocity = schedule.target(images, noise)
    assert torch.equal(velocity, noise - images)
    back = schedule.to_noise(velocity, noisy, some).double()
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-6)  # it comes in float32
    assert schedule.prediction(velocity, noisy, some).equal(velocity.float())
    assert (schedule.lora_weight(some) == 1).all()

    diffusion = noise_schedule_of(tiny_scheduler())
    assert type(diffusion) is NoiseSchedule
    assert diffusion.target(images, noise) is noise
    assert torch.equal(diffusion.lora_weight(some), diffusion.at(some)[0])
    moving = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(SchedulerError, match="use_dynamic_shifting to false"):
        noise_schedule_of(moving)


@pytest.mark.parametrize("family", STUDENTS)
def test_text_reaches_teacher_and_student_as_the_pipeline_gives_it(
    family, make_config, settings, teachers
):
    trainer = Trainer(make_config(**settings(family)))
    batch = trainer._batches()[0]
    pipe = loaded(family, teachers[family])
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([300, 900])
    model = pipe.transformer
    with torch.no_grad():
        if family == "pixart":
            tokens, mask, _, _ = pipe.encode_prompt(batch.prompts, False)
            assert 0 < mask.sum() < mask.numel()
            given = {"encoder_attention_mask": mask}
            level = timesteps
        else:
            tokens, _, pooled, _ = pipe.encode_prompt(batch.prompts, None, None)
            given = {"pooled_projections": pooled}
            level = pipe.scheduler.timesteps.flip(0)[timesteps]
        torch.testing.assert_close(batch.text.tokens, tokens)
        wanted = model(noisy, timestep=level, encoder_hidden_states=tokens, **given).sample[:, :4]
        teacher = trainer.teacher
        found = teacher.guided_noise(noisy, timesteps, batch.text, trainer.text.empty, 1.0, False)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        schedule = trainer.schedule
        made = STUDENTS[family].from_transformer(model)
        wanted = made.predict_noise(noisy, schedule.timesteps, tokens, **given)
        found = trainer.student.network(noisy, batch.text)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    # The LoRA is on the attention of every block, on text's own projections too.
    adapted = {name for name, _ in teacher.unet.named_parameters() if "lora_A" in name}
    assert all(any(f"blocks.{i}." in name for name in adapted) for i in range(4))
    assert any("add_v_proj" in name for name in adapted) == (family == "sd3")


def test_the_score_of_a_flow_is_a_difference_of_velocities(make_config, settings):
    trainer = Trainer(make_config(**settings("sd3", guidance_scale=3.0, lora_guidance_scale=1.0)))
    step, batch = trainer.train_step, trainer._batches()[0]
    images, noise = torch.randn(2, 2, 4, 8, 8)
    with torch.no_grad():  # else both teachers are one
        for name, parameter in trainer.teacher.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    timesteps = torch.tensor([100, 999])
    found = step._score_gradient(images, noise, timesteps, batch.text)
    sigma = trainer.scheduler.sigmas.flip(0)[timesteps].view(2, 1, 1, 1)
    noisy = (1 - sigma) * images + sigma * noise

    def velocity(text):
        given = {"pooled_projections": text.pooled.expand(2, -1)}
        model = trainer.teacher.unet
        return model(noisy, text.tokens.expand(2, -1, -1), timestep=1000 * sigma.flatten(), **given)

    with torch.no_grad():
        trainer.teacher.unet.disable_adapters()
        own, none = velocity(batch.text).sample, velocity(trainer.text.empty).sample
        trainer.teacher.unet.enable_adapters()
        lora = velocity(batch.text).sample
    expected = sigma**2 * (none + 3 * (own - none) - lora)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[1].abs().max() > 1e-3  # at noise alone too, where the noises would not differ


@pytest.mark.parametrize("family", STUDENTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    family, make_config, settings, tmp_path
):
    others = {"num_shared_blocks": 1, "ema_decay": 0.9, "gradient_accumulation_steps": 2}
    whole = make_config(**settings(family, steps=3, save_pipeline=True, **others))
    Trainer(whole).train()
    parts = make_config(**settings(family, steps=2, sample_every=2, **others))
    Trainer(parts).train()
    assert [p.name for p in list_checkpoints(parts.output / "checkpoints")] == ["step-00000002"]
    assert list((parts.output / "samples").glob("*.png"))
    Trainer(replace(parts, steps=3, resume=True)).train()
    first, second = (weights(run.output, "transformer") for run in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = [list_checkpoints(run.output / "checkpoints")[-1] for run in (whole, parts)]
    loras = [load_file(place / "lora" / "adapter_model.safetensors") for place in last]
    assert all(torch.equal(loras[0][name], loras[1][name]) for name in loras[0])

    before = tiny_pipeline(family).transformer.state_dict()
    moved = {name for name, weight in first.items() if not torch.equal(weight, before[name])}
    # Positions are computed; nothing reads the words that leave Stable Diffusion 3's last block.
    still = {"pos_embed.pos_embed"} | {
        f"transformer_blocks.3.attn.add_q_proj.{kind}" for kind in ("weight", "bias")
    }
    assert first.keys() - moved <= still

    # A plain diffusers pipeline, which keeps the border for the one pass.
    plain = loaded(family, whole.output / "pipeline")
    assert type(plain.transformer) is STUDENTS[family].PARENT
    assert torch.equal(plain.transformer.proj_out.weight, first["proj_out.weight"])
    made = tiue.one_pass(plain, num_decoder_steps=2)
    assert made.transformer.num_shared_blocks == 1
    export = export_student(last[1], tmp_path / "export")
    again = loaded(family, export)
    average = weights(last[1], "transformer_ema")
    assert torch.equal(again.transformer.proj_out.weight, average["proj_out.weight"])
    assert type(again.scheduler) is type(made.scheduler) or family == "pixart"


@pytest.mark.parametrize("family", STUDENTS)
def test_memory_is_saved_and_the_update_stays(family, make_config, settings):
    found = {}
    for name, others in {
        "plain": {},
        "recomputed": {"recompute_feed_forward": True},
        "encoder": {"gradient_checkpointing": "encoder"},
        "all": {"gradient_checkpointing": "all"},
    }.items():
        config = make_config(**settings(family, steps=1, **others))
        Trainer(config).train()
        found[name] = weights(config.output, "transformer")
    for name, state in found.items():
        for key, weight in state.items():
            torch.testing.assert_close(weight, found["plain"][key], msg=f"{name}: {key}")


@pytest.mark.parametrize("family", STUDENTS)
def test_the_recipe_runs_on_a_tiny_model(family, make_config, settings):
    tiny, recipe = make_config(**settings(family)), load_config(family, output="o", embeddings="e")
    config = replace(
        recipe, teacher=tiny.teacher, prompts=tiny.prompts, embeddings=None, output=tiny.output,
        steps=1, batch_size=1, gradient_accumulation_steps=1, lora_rank=4, cpu=True,
        save_pipeline=False, trackers=(), sample_every=1,
    )  # fmt: skip
    Trainer(config).train()
    state = weights(config.output, "transformer")
    assert all(weight.isfinite().all() for weight in state.values())
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert list((config.output / "samples").glob("*.png"))


def test_a_student_may_be_a_lora(make_config, settings):
    config = make_config(**settings("pixart", steps=1, student_lora_rank=2))
    Trainer(config).train()
    merged = weights(config.output, "transformer")
    assert merged.keys() == tiny_pipeline("pixart").transformer.state_dict().keys()
    assert (config.output / "lora" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("family", STUDENTS)
def test_stored_embeddings_are_the_text_encoders(family, make_config, settings, tmp_path):
    config = make_config(**settings(family))
    prompts = ["red apple", "sun"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    for name, options in {"whole": {}, "unpadded": {"unpadded": True}}.items():
        folder = tmp_path / name
        embed_text(config.teacher, tmp_path / "prompts.txt", folder, cpu=True, **options)
        stored = StoredPrompts(folder, CPU)
        found, trainer = stored[torch.tensor([1, 0])], Trainer(make_config(**settings(family)))
        encoder_given = trainer.text[torch.tensor([trainer.text.prompts.index("sun"), 0])]
        expected = encoder_given.tensors()
        assert found.tensors().keys() == expected.keys()
        for key, tensor in expected.items():
            if key == "tokens" and name == "unpadded":  # behind the mask nothing is read
                kept = expected.get("mask", torch.ones(2, tensor.shape[1])).bool()
                assert torch.equal(found.tokens[kept], tensor[kept].half().float())
            else:
                assert torch.equal(found.tensors()[key], tensor.half().float()), key
        assert stored.empty.tensors().keys() == expected.keys()


def test_what_a_family_does_not_take_is_refused(make_config, settings, teachers, tmp_path):
    with pytest.raises(InputError, match="distilled with evaluate_every"):
        Trainer(make_config(**settings("pixart", evaluate_every=1)))
    with pytest.raises(InputError, match="distilled with sharding 'none'"):
        check_family(make_config(**settings("pixart", sharding="full")), PIXART)
    with pytest.raises(InputError, match="distilled with gan_weight"):
        Trainer(make_config(**settings("pixart", gan_weight=0.1, gan_pictures=tmp_path)))
    with pytest.raises(InputError, match="from 1 to 3 for the 4 blocks"):
        Trainer(make_config(**settings("pixart", num_shared_blocks=4)))
    with pytest.raises(InputError, match="a UNet has an encoder of its own"):
        Trainer(make_config(num_shared_blocks=2))
    with pytest.raises(InputError, match="leave it out"):
        Trainer(make_config(**settings("sd3", timestep_spacing="trailing")))
    with pytest.raises(CheckpointError, match="SD3Transformer2DModel and the teacher a PixArt"):
        Trainer(make_config(**settings("pixart", student=str(teachers["sd3"]))))
    build("hunyuan", torch.float32).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ArchitectureError, match="PixArtTransformer2DModel, SD3Transformer2DModel"):
        Trainer(make_config(**settings("pixart", student=str(tmp_path / "transformer"))))


def test_sizes_are_told_to_a_pixart_that_was_trained_with_them():
    config = TRANSFORMERS["pixart-tiny"] | {"use_additional_conditions": True}
    model = STUDENTS["pixart"](**config)
    text = tiue.distill.text.Text(torch.zeros(2, 5, 12), size=(64, 48, 0, 0, 64, 48))
    given = family_of(model).conditions(model, text)["added_cond_kwargs"]
    assert given["resolution"].tolist() == [[64, 48]] * 2
    torch.testing.assert_close(given["aspect_ratio"], torch.full((2, 1), 64 / 48))
    assert family_of(empty_transformer("sd3-tiny")).component == "transformer"
