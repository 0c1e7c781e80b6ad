"""SDXL: two text encoders, pooled embeddings and sizes, from the prompts to the student."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.tiue.tiny import (
    TEXT_DIM,
    TEXT_LENGTH,
    tiny_scheduler,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)
from tiue import TiUEUNet
from tiue.distill.embeddings import StoredPrompts, embed_text
from tiue.distill.export import export_student
from tiue.distill.output import list_checkpoints
from tiue.distill.trainer import Trainer
from tiue.errors import CheckpointError

POOLED = 12
CPU = torch.device("cpu")
SIZE = (32, 32, 0, 0, 32, 32)  # 8 x 8 latents of 4 pixels each way


def tiny_xl_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, projection_dim=POOLED,
        bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    unet = tiny_unet(
        cross_attention_dim=2 * TEXT_DIM, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + POOLED,
        use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=tiny_vae(), unet=unet, scheduler=tiny_scheduler(), tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(), text_encoder=tiny_text_encoder(len(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(), add_watermarker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    tiny_xl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(teacher):
    return {"teacher": str(teacher), "batch_size": 1, "num_decoder_steps": 2}


def test_text_and_sizes_reach_both_unets_as_the_pipeline_gives_them(
    make_config, settings, teacher, tmp_path
):
    trainer = Trainer(make_config(**settings, mixed_precision="no"))
    pipe = StableDiffusionXLPipeline.from_pretrained(teacher, add_watermarker=False)
    (prompt,) = trainer._batches()[0].prompts
    tokens, none, pooled, none_pooled = pipe.encode_prompt(prompt, device="cpu")
    text = trainer._batches()[0].text
    torch.testing.assert_close(text.tokens, tokens)
    torch.testing.assert_close(text.pooled, pooled)
    assert text.size == SIZE
    assert not none.any()
    assert not none_pooled.any()

    noisy, timestep = torch.randn(1, 4, 8, 8), torch.tensor([300])
    size = torch.tensor([SIZE]).float()

    def predict(tokens, pooled):
        added = {"text_embeds": pooled, "time_ids": size}
        return pipe.unet(noisy, timestep, tokens, added_cond_kwargs=added).sample

    with torch.no_grad():
        conditional, unconditional = predict(tokens, pooled), predict(none, none_pooled)
        guided = unconditional + 4.5 * (conditional - unconditional)
        actual = trainer.teacher.guided_noise(noisy, timestep, text, trainer.text.empty, 4.5, False)
        torch.testing.assert_close(actual, guided, rtol=1e-4, atol=1e-4)
        other = trainer.teacher.guided_noise(
            noisy,
            timestep,
            text._replace(size=(64, 64, 0, 0, 64, 64)),
            trainer.text.empty,
            1,
            False,
        )
        assert not torch.allclose(other, conditional, atol=1e-4)
        outputs = trainer.student.network(noisy, text)
        added = {"text_embeds": pooled, "time_ids": size}
        expected = TiUEUNet.from_unet(pipe.unet).predict_noise(
            noisy, trainer.schedule.timesteps, tokens, added_cond_kwargs=added
        )
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)

    # The same from disk, in float16; the empty prompt is the pipeline's zeros there too.
    source = tmp_path / "prompts.txt"
    source.write_text(f"{prompt}\n")
    stored = StoredPrompts(embed_text(str(teacher), source, tmp_path / "text", cpu=True), CPU)
    kept = stored[torch.tensor([0])]
    torch.testing.assert_close(kept.tokens, tokens.half().float())
    torch.testing.assert_close(kept.pooled, pooled.half().float())
    assert not stored.empty.tokens.any()


def test_a_tiny_sdxl_is_distilled_and_resumes_bit_for_bit(make_config, settings, tmp_path):
    config = make_config(**settings, steps=20, checkpoint_every=10, sample_every=20)
    whole = Trainer(config)
    before = {n: p.detach().clone() for n, p in whole.unet.named_parameters()}
    whole.train()
    assert (config.output / "samples" / "step-00000020.png").exists()
    moved = [n for n, p in whole.unet.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)

    again = tmp_path / "again"
    shutil.copytree(config.output, again)
    shutil.rmtree(list_checkpoints(again / "checkpoints")[-1])
    resumed = Trainer(make_config(**settings, steps=20, output=again, resume=True))
    assert resumed.step == 10
    resumed.train()
    for own, other in zip(resumed.unet.parameters(), whole.unet.parameters(), strict=True):
        assert torch.equal(own, other)
    for own, other in zip(resumed.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(own, other)

    pipe = StableDiffusionXLPipeline.from_pretrained(export_student(again, tmp_path / "pipeline"))
    average = dict(zip(before, resumed.ema.shadow_params, strict=True))
    assert all(torch.equal(p, average[n]) for n, p in pipe.unet.named_parameters())


def test_a_student_of_another_kind_is_refused(make_config, settings, tmp_path):
    tiny_unet(cross_attention_dim=2 * TEXT_DIM).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="addition_embed_type is None and the teacher's"):
        Trainer(make_config(**settings, student=str(tmp_path)))
