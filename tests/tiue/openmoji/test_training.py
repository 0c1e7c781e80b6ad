"""Each stage: it learns, and an interrupted run ends with the same bits as an unbroken one."""

from dataclasses import replace

import pytest
import torch

from tests.tiue.openmoji.configs import AUTOENCODER, DECODER, TEACHER
from tiue.embedded.autoencoder import (
    AutoencoderTraining,
    DecoderTraining,
    build_autoencoder,
    encode_pictures,
    load_autoencoder,
    train_autoencoder,
)
from tiue.embedded.loop import run
from tiue.embedded.teacher import stratified_timesteps, train_tokenizer
from tiue.errors import CheckpointError
from tiue.openmoji.config import MAX_PROMPT_TOKENS
from tiue.openmoji.teacher import TeacherTraining


def autoencoder_stage(pictures):
    return AutoencoderTraining(pictures, AUTOENCODER)


def decoder_stage(pictures):
    torch.manual_seed(0)
    return DecoderTraining(build_autoencoder(AUTOENCODER), pictures, DECODER)


def teacher_stage(pictures, config=TEACHER):
    tokenizer = train_tokenizer(pictures.prompts, config.vocabulary, MAX_PROMPT_TOKENS)
    generator = torch.Generator().manual_seed(1)
    # one colour a picture: learned in a moment
    latents = torch.randn(len(pictures), 16, 1, 1, generator=generator).expand(-1, -1, 8, 8)
    return TeacherTraining(pictures, latents, tokenizer, config)


def tensors(state, prefix=""):
    """Every tensor in a nested state, by its place."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    if not isinstance(state, (dict, list)):
        return {}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {k: v for key, part in items for k, v in tensors(part, f"{prefix}.{key}").items()}


class InterruptedRunError(Exception):
    pass


def interrupt_after(last):
    def on_step(done):
        if done == last:
            raise InterruptedRunError

    return on_step


@pytest.mark.parametrize("stage", [autoencoder_stage, decoder_stage, teacher_stage])
def test_a_resumed_run_ends_with_the_same_bits(stage, pictures, tmp_path):
    unbroken = stage(pictures)
    run(unbroken, tmp_path / "unbroken", 6)
    with pytest.raises(InterruptedRunError):
        run(stage(pictures), tmp_path / "broken", 6, False, interrupt_after(3), save_every=2)
    resumed = stage(pictures)
    run(resumed, tmp_path / "broken", 6, resume=True)

    expected, got = tensors(unbroken.state_dict()), tensors(resumed.state_dict())
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_checkpoint_of_another_size_is_refused(pictures, tmp_path):
    run(teacher_stage(pictures), tmp_path, 1)
    other = teacher_stage(pictures, replace(TEACHER, channels=(32, 64)))
    with pytest.raises(CheckpointError, match="without --resume"):
        run(other, tmp_path, 2, resume=True)


def test_decoder_training_leaves_the_latents_alone(pictures):
    training = decoder_stage(pictures)
    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    training.step(0)
    after = training.model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_the_trained_autoencoder_gives_latents_of_unit_deviation(pictures, tmp_path):
    train_autoencoder(pictures, tmp_path, AUTOENCODER)
    latents = encode_pictures(load_autoencoder(tmp_path), pictures)
    assert latents.shape == (len(pictures), 16, 8, 8)
    torch.testing.assert_close(latents.std(), torch.tensor(1.0), rtol=1e-5, atol=0)


def test_a_missing_autoencoder_names_the_command(tmp_path):
    with pytest.raises(CheckpointError, match="train autoencoder"):
        load_autoencoder(tmp_path / "autoencoder")


def test_timesteps_are_one_from_each_of_equally_likely_parts():
    timesteps = stratified_timesteps(10, 1000, torch.Generator().manual_seed(0))
    parts = torch.arange(10)  # the share of timesteps under t is (t / 1000)^2
    assert ((timesteps + 1) / 1000).square().mul(10).gt(parts).all()
    assert (timesteps / 1000).square().mul(10).lt(parts + 1).all()


def test_the_last_timestep_is_the_largest_that_is_drawn(monkeypatch):
    # Once in some 30,000 steps of 32 pictures; the training ended in an IndexError.
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), 1 - 2**-24))
    timesteps = stratified_timesteps(32, 1000, torch.Generator())
    assert timesteps[-1] == 999


def test_prompts_are_dropped_and_swapped_for_aliases_as_often_as_configured(pictures):
    training = teacher_stage(pictures)
    pizza = pictures.prompts.index("pizza")
    ids = training.draw_prompts(torch.full((2000,), pizza), torch.Generator().manual_seed(0))
    share = {
        name: (ids == row).all(1).float().mean().item()
        for name, row in (
            ("empty", training.empty_ids[0]),
            ("alias", training.alias_ids[pizza]),
            ("prompt", training.prompt_ids[pizza]),
        )
    }
    assert share == pytest.approx({"empty": 0.1, "alias": 0.1, "prompt": 0.8}, abs=0.03)
