"""The counted memory of a recipe against tensors that are there."""

import pytest
import torch

from benchmarks import training_memory
from benchmarks.saved_bytes import SavedBytes
from tiue import OnePassSchedule
from tiue.distill import losses
from tiue.distill.optimizers import build_optimizer
from tiue.distill.parts import checkpoint_blocks
from tiue.distill.settings import load_config
from tiue.distill.step import Student
from tiue.distill.student import add_student_lora
from tiue.distill.teacher import Teacher, noise_schedule_of


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held_by(network, config):
    """Weights, gradients and moments of one Adam update, of what is trained."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(config, trained, 1e-3)
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return nbytes(trained), nbytes(p.grad for p in trained), nbytes(moments)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("tiny", {}),
        ("tiny", {"gradient_checkpointing": "encoder", "recompute_feed_forward": True}),
        ("tiny", {"student_lora_rank": 8}),
        ("pixart-tiny", {"recompute_feed_forward": True}),
        ("sd3-tiny", {"gradient_checkpointing": "all", "kl_weight": 0.0}),
    ],
)
def test_counted_parts_are_those_of_a_step(tmp_path, monkeypatch, model, settings):
    given = {"teacher": "t", "embeddings": "e", "output": "o", "batch_size": 2, "lora_rank": 4,
             "mixed_precision": "bf16"} | settings  # fmt: skip
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in given.items()))
    monkeypatch.setitem(training_memory.MODELS, str(recipe), model)
    counted = {name: size * 1e9 for name, size in training_memory.parts(str(recipe)).items()}

    config = load_config(recipe)
    scheduler = training_memory._scheduler(model)
    torch.manual_seed(0)
    half = torch.bfloat16 if config.student_lora_rank else torch.float32
    unet = training_memory._network(model).to(half).train()
    if config.student_lora_rank:
        add_student_lora(unet, config)
    checkpoint_blocks(unet, config)
    frozen = training_memory._network(model).to(torch.bfloat16)
    base = nbytes(frozen.parameters())
    noises = noise_schedule_of(scheduler)
    teacher = Teacher(frozen, noises, config.lora_rank, config.lora_alpha)
    weights, gradients, moments = held_by(unet, config)
    whole = nbytes(unet.parameters())
    assert counted["student's weights"] == pytest.approx(whole)
    assert counted["its gradients"] == pytest.approx(gradients)
    assert counted["its optimiser"] == pytest.approx(moments)
    assert counted["its average"] == pytest.approx(weights)
    assert counted["teacher, frozen"] == pytest.approx(base)
    own = sum(held_by(frozen, config))
    assert counted["LoRA teacher, its gradients and optimiser"] == pytest.approx(own)

    schedule = OnePassSchedule.from_scheduler(scheduler, config.num_decoder_steps)
    size = unet.config.sample_size
    latents = torch.randn(2, 4, size, size)
    text = training_memory._text(unet, model, 2)
    kept = []
    with torch.autocast("cpu", torch.bfloat16):
        saved = SavedBytes(unet)
        with saved:
            noise = Student(unet, schedule)(latents, text)
            losses.vsd_loss(schedule.combine(latents, noise), torch.randn_like(latents))
            if config.kl_weight:
                losses.kl_loss(noise)
        kept.append(saved.total)
        saved = SavedBytes(frozen)
        with saved:
            predicted = teacher.lora_noise(latents, torch.tensor([3, 700]), text)
            losses.lora_loss(predicted, torch.randn_like(latents), torch.ones(2, 1, 1, 1))
        kept.append(saved.total)
    # A counted step's loss has one tensor for two of these, and no scale of the signal.
    small = 4 * latents.numel() * latents.element_size()
    assert counted["kept for backward"] == pytest.approx(max(kept), abs=small)
    assert counted["in all"] == pytest.approx(
        sum(size for name, size in counted.items() if name != "in all")
    )
