"""The stages: a resumed run ends with the same bits, lost or damaged caches are made again."""

import json
import random
from dataclasses import replace

import pytest
import torch

from tiue.embedded.autoencoder import build_autoencoder
from tiue.embedded.config import AutoencoderConfig
from tiue.embedded.export import export_weights
from tiue.embedded.loop import decaying_rate, run
from tiue.errors import CheckpointError
from tiue.scenes import load_scenes_teacher
from tiue.scenes.config import MAX_PROMPT_TOKENS, TeacherConfig, TextConfig
from tiue.scenes.data import load_latents, load_pool, write_prompts
from tiue.scenes.grammar import draw_request
from tiue.scenes.teacher import TeacherTraining, save_averaged, train_teacher
from tiue.scenes.text import train_text_encoder
from tiue.schedule import OnePassSchedule

TEACHER = TeacherConfig(
    steps=6,
    batch_size=4,
    warmup_steps=2,
    channels=(32, 32),
    text_width=32,
    text_layers=1,
    text_heads=2,
    text_feed_forward=32,
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return load_pool(tmp_path_factory.mktemp("pool") / "pool.safetensors", 16, 0)


def training(pool, config=TEACHER):
    latents = torch.randn(len(pool), 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return TeacherTraining(pool, latents, config)


def test_a_resumed_run_ends_with_the_same_bits(pool, tmp_path):
    unbroken = training(pool)
    run(unbroken, tmp_path / "unbroken", 6)
    run(training(pool), tmp_path / "broken", 3)
    # Of six steps, the rate falls from the fifth: stopping after three changes no rate.
    resumed = training(pool)
    run(resumed, tmp_path / "broken", 6, resume=True)
    expected, got = unbroken.unet.state_dict(), resumed.unet.state_dict()
    assert [name for name in expected if not expected[name].equal(got[name])] == []
    assert all(
        a.equal(b)
        for a, b in zip(unbroken.ema.shadow_params, resumed.ema.shadow_params, strict=True)
    )


def test_bfloat16_loses_what_float32_does_and_keeps_its_weights_in_float32(pool):
    exact, rounded = training(pool), training(pool, replace(TEACHER, bf16=True))
    expected = [exact.step(step) for step in range(3)]
    got = [rounded.step(step) for step in range(3)]
    assert got == pytest.approx(expected, rel=0.02)
    assert got != expected
    assert {p.dtype for p in rounded.parameters} == {torch.float32}


def test_a_checkpoint_of_another_size_is_refused(pool, tmp_path):
    run(training(pool), tmp_path, 1)
    with pytest.raises(CheckpointError, match="without --resume"):
        run(training(pool, replace(TEACHER, channels=(32, 64))), tmp_path, 2, resume=True)


def test_a_teacher_in_training_is_exported_and_goes_on_from_there(pool, tmp_path):
    config = AutoencoderConfig(width=8, encoder_blocks=(0, 0, 1, 1), decoder_blocks=(1, 1, 1, 0))
    build_autoencoder(config).save_pretrained(tmp_path / "autoencoder" / "vae")
    first = training(pool)
    run(first, tmp_path / "teacher", 3)
    assert save_averaged(tmp_path / "autoencoder", tmp_path / "teacher", TEACHER) == 3
    export_weights(tmp_path, tmp_path / "weights", needs_decoder=False)
    shipped = tmp_path / "weights" / "teacher"
    again = training(pool)
    steps, seconds = again.load_exported(shipped)
    assert steps == 3
    for name, value in first.averaged_pipeline(None).unet.state_dict().items():
        torch.testing.assert_close(again.unet.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    run(again, tmp_path / "on", 5, first=3, seconds=seconds + 100)
    facts = json.loads((tmp_path / "on" / "training.json").read_text())
    assert facts["steps"] == 5
    assert facts["seconds"] >= 100
    with pytest.raises(CheckpointError, match="another configuration"):
        training(pool, replace(TEACHER, channels=(32, 64))).load_exported(shipped)
    with pytest.raises(CheckpointError, match="no training"):
        save_averaged(tmp_path / "autoencoder", tmp_path / "nothing", TEACHER)


def test_the_text_encoder_keeps_the_weights_of_its_own_training(pool, tmp_path):
    config = AutoencoderConfig(width=8, encoder_blocks=(0, 0, 1, 1), decoder_blocks=(1, 1, 1, 0))
    build_autoencoder(config).save_pretrained(tmp_path / "autoencoder" / "vae")
    stages = (pool, tmp_path / "autoencoder", tmp_path / "teacher", replace(TEACHER, steps=2))
    with pytest.raises(CheckpointError, match=r"run `\.\.\. text` before"):
        train_teacher(*stages)
    text = train_text_encoder(
        tmp_path / "text", TEACHER, TextConfig(steps=2, batch_size=4, warmup_steps=1, pool=16)
    )
    facts = tmp_path / "text" / "training.json"
    facts.rename(tmp_path / "facts")  # as where its training was stopped on the way
    with pytest.raises(CheckpointError, match=r"run `\.\.\. text` before"):
        train_teacher(*stages)
    (tmp_path / "facts").rename(facts)
    pipeline = train_teacher(*stages)
    for name, value in text.state_dict().items():
        assert pipeline.text_encoder.state_dict()[name].equal(value), name
    first = training(pool).averaged_pipeline(None)
    assert not pipeline.unet.conv_in.weight.equal(first.unet.conv_in.weight)


def test_every_word_is_one_token_and_every_prompt_fits(pool):
    tokenizer = training(pool).tokenizer
    generator = random.Random(0)
    for _ in range(200):
        prompt = str(draw_request(generator))
        tokens = tokenizer(prompt).input_ids
        assert len(tokens) == 2 + len(prompt.replace(",", " ,").split())
        assert len(tokens) <= MAX_PROMPT_TOKENS


def test_the_rate_stays_and_falls_at_the_end():
    rates = [decaying_rate(step, 100, 10, 0.2) for step in (0, 9, 10, 80, 90, 99)]
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])


def test_the_schedule_is_stable_diffusions():
    schedule = OnePassSchedule.from_scheduler(TeacherTraining.build_scheduler(), 4)
    assert schedule.timesteps.tolist() == [751, 501, 251, 1]
    assert schedule.latent_coefficient == pytest.approx(4.2346, abs=1e-4)
    assert schedule.prediction_type == "epsilon"


@pytest.mark.parametrize("damage", ["lost", "cut", "other"])
def test_a_pool_that_is_lost_damaged_or_another_is_made_again(pool, tmp_path, damage):
    cache = tmp_path / "pool.safetensors"
    load_pool(cache, 16, 1 if damage == "other" else 0)
    if damage == "lost":
        cache.unlink()
    if damage == "cut":
        cache.write_bytes(cache.read_bytes()[:-1000])
    again = load_pool(cache, 16, 0)
    assert again.images.equal(pool.images)
    assert again.requests == pool.requests


def test_latents_follow_the_encoder(pool, tmp_path):
    config = AutoencoderConfig(width=8, encoder_blocks=(0, 0, 1, 1), decoder_blocks=(1, 1, 1, 0))
    torch.manual_seed(0)
    vae = build_autoencoder(config).eval()
    cache = tmp_path / "latents.safetensors"
    first = load_latents(cache, pool, vae)
    assert first.shape == (16, 16, 8, 8)
    assert first.dtype == torch.float16
    written = cache.stat().st_mtime_ns
    assert load_latents(cache, pool, vae).equal(first)
    assert cache.stat().st_mtime_ns == written
    with torch.no_grad():
        vae.encoder.layers[0].weight.mul_(2)
    assert not load_latents(cache, pool, vae).equal(first)


def test_distillation_prompts_are_the_grammars(tmp_path):
    write_prompts(tmp_path / "prompts.txt", 50)
    lines = (tmp_path / "prompts.txt").read_text().splitlines()
    assert len(lines) == 50
    assert len(set(lines)) > 45


def test_a_missing_model_names_the_command(tmp_path):
    with pytest.raises(CheckpointError, match=r"scenes\.train"):
        load_scenes_teacher(weights=tmp_path)
