"""One update against the same update written by hand, and what goes with a sample."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.func import functional_call

from testing import published_form
from tiue.distill.data import SampleDraws
from tiue.distill.trainer import Trainer

CPU = torch.device("cpu")
BATCH, STEPS = 2, 4
SETTINGS = {
    "steps": 1, "batch_size": BATCH, "guidance_scale": 4.5, "lora_guidance_scale": 2.0,
    "learning_rate": 1e-3, "lora_learning_rate": 1e-2, "max_grad_norm": 0.25, "lora_rank": 4,
    "lora_alpha": 6.0, "prompt_drop": 0.5, "seed": 3, "kl_weight": 0.1, "lora_updates": 2,
}  # fmt: skip


class ByHand:
    """The equations of docs/method.md on plain diffusers networks, nothing shared or batched."""

    def __init__(self, folder, lora):
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.student = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.scheduler.set_timesteps(STEPS)
        self.lora = {name: p.detach().clone().requires_grad_() for name, p in lora.items()}

    def lora_weights(self):
        """W + alpha / rank B A in the place of every adapted W."""
        scale = SETTINGS["lora_alpha"] / SETTINGS["lora_rank"]
        weights = dict(self.unet.named_parameters())
        for name, a in self.lora.items():
            if ".lora_A." in name:
                b = self.lora[name.replace(".lora_A.", ".lora_B.")]
                layer = name.partition(".lora_A.")[0]
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * b @ a
        return weights

    def noise(self, weights, noisy, timestep, text):
        return functional_call(self.unet, weights, (noisy, timestep, text)).sample

    def guided(self, weights, noisy, timestep, text, empty, scale):
        unguided = self.noise(weights, noisy, timestep, empty)
        return unguided + scale * (self.noise(weights, noisy, timestep, text) - unguided)

    def student_loss(self, text, empty, z, timesteps, noise):
        outputs = published_form.predict_noise(self.student, z, self.scheduler.timesteps, text)
        x = published_form.combine(self.scheduler, z, outputs)
        alpha_bar = self.scheduler.alphas_cumprod.double()
        g = []
        with torch.no_grad():
            for row, t in enumerate(timesteps):
                noisy = alpha_bar[t].sqrt() * x[row] + (1 - alpha_bar[t]).sqrt() * noise[row]
                arguments = (noisy.float()[None], t, text[row : row + 1], empty)
                frozen = self.guided({}, *arguments, SETTINGS["guidance_scale"])
                lora = self.guided(self.lora_weights(), *arguments, SETTINGS["lora_guidance_scale"])
                g.append((1 - alpha_bar[t]) * (frozen - lora)[0].double())
        target = (x.double() - torch.stack(g)).detach()
        vsd = 0.5 * (x.double() - target).square().mean()
        kl = 0
        for value in outputs.double().flatten(0, 1):
            mean, variance = value.mean(), value.var(correction=1)
            kl = kl + 0.5 * (mean**2 + variance - 1 - variance.log())
        return vsd + SETTINGS["kl_weight"] * kl, x.detach()

    def lora_loss(self, x, text, empty, timesteps, noise, dropped):
        alpha_bar, total = self.scheduler.alphas_cumprod.double(), 0
        for row, t in enumerate(timesteps):
            noisy = alpha_bar[t].sqrt() * x[row] + (1 - alpha_bar[t]).sqrt() * noise[row]
            embeds = empty if dropped[row] else text[row : row + 1]
            noise_pred = self.noise(self.lora_weights(), noisy.float()[None], t, embeds)[0]
            total = total + alpha_bar[t].sqrt() * (noise_pred.double() - noise[row]).square().mean()
        return total / len(timesteps)


def captured(trained):
    told = []
    trained.optimizer.optimizer.register_step_pre_hook(
        lambda *_: told.append([p.grad.clone() for p in trained.parameters])
    )
    return told


def clipped(gradients):
    norm = torch.stack([g.double().norm() for g in gradients]).norm()
    scale = min(1.0, SETTINGS["max_grad_norm"] / (norm.item() + 1e-6))
    assert scale < 0.9, "nothing is clipped, so clipping is not tested"
    return [g * scale for g in gradients]


def assert_near(actual, expected):
    largest = max(g.abs().max() for g in expected)
    for own, other in zip(actual, expected, strict=True):
        assert (own - other).abs().max() < 1e-5 * largest


def test_an_update_equals_one_written_by_hand(make_config, teacher_folder):
    trainer = Trainer(make_config(**SETTINGS))
    with torch.no_grad():  # PEFT starts a LoRA as zero
        torch.manual_seed(1)
        for parameter in trainer.lora.parameters:
            parameter.normal_(std=0.3)
    names = [n for n, p in trainer.teacher.unet.named_parameters() if p.requires_grad]
    names = [name.replace(".default", "") for name in names]
    hand = ByHand(teacher_folder, dict(zip(names, trainer.lora.parameters, strict=True)))
    before = [p.detach().clone() for p in trainer.student.parameters]
    student_told, lora_told = captured(trainer.student), captured(trainer.lora)
    indices = trainer.order[range(BATCH)]
    text, empty = trainer.text[indices].tokens, trainer.text.empty.tokens
    trainer.train()

    draws, shape = SampleDraws(SETTINGS["seed"], range(BATCH), CPU), (4, 8, 8)
    z, timesteps, noise = draws.normal(shape), draws.integers(20, 980), draws.normal(shape)
    loss, x = hand.student_loss(text, empty, z, timesteps, noise)
    expected = torch.autograd.grad(loss, list(hand.student.parameters()))
    expected = clipped(expected)
    assert_near(student_told[0], expected)
    # Adam's first update, of the same gradients: m and v are those of one gradient.
    for parameter, start, g in zip(
        trainer.student.parameters, before, student_told[0], strict=True
    ):
        wanted = start - SETTINGS["learning_rate"] * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-7)

    parameters = list(hand.lora.values())
    optimizer = torch.optim.Adam(parameters, lr=SETTINGS["lora_learning_rate"])
    for told in lora_told:
        timesteps, noise = draws.integers(0, 999), draws.normal(shape)
        dropped = draws.chances(SETTINGS["prompt_drop"])
        loss = hand.lora_loss(x, text, empty, timesteps, noise, dropped)
        gradients = torch.autograd.grad(loss, parameters)
        largest = torch.stack([g.double().norm() for g in gradients]).norm()
        scale = min(1.0, SETTINGS["max_grad_norm"] / (largest.item() + 1e-6))
        assert_near(told, [scale * g for g in gradients])
        for parameter, g in zip(parameters, told, strict=True):
            parameter.grad = g
        optimizer.step()
    assert len(lora_told) == 2
    for parameter, wanted in zip(trainer.lora.parameters, parameters, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted.detach())


def test_a_sample_draws_the_same_in_any_batch():
    shape = (4, 2, 2)
    together = SampleDraws(0, range(6), CPU)
    parts = [SampleDraws(0, range(start, start + 2), CPU) for start in (0, 2, 4)]
    for draw in (
        lambda draws: draws.normal(shape), lambda draws: draws.integers(20, 980),
        lambda draws: draws.chances(0.5),
    ):  # fmt: skip
        assert torch.equal(draw(together), torch.cat([draw(part) for part in parts]))
    many = SampleDraws(1, range(4000), CPU)
    values = many.integers(3, 5)
    assert values.unique().tolist() == [3, 4, 5]
    assert many.normal((1,)).std() == pytest.approx(1, abs=0.05)
    assert many.chances(0.1).float().mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_optimisers_and_rates_follow_the_config(make_config, optimizer):
    config = make_config(
        optimizer=optimizer, weight_decay=0.1, lr_scheduler="constant_with_warmup",
        lr_warmup_steps=4, steps=2, lora_updates=2,
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.train()
    group = trainer.student.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(config.learning_rate * 2 / 4)
    lora = trainer.lora.optimizer.param_groups[0]
    assert lora["lr"] == pytest.approx(config.lora_learning_rate * 4 / 8)
    assert group["weight_decay"] == (0.1 if optimizer == "adamw" else 0)


@pytest.mark.parametrize("blocks", ["encoder", "all"])
def test_checkpointed_blocks_give_the_same_gradients(make_config, blocks):
    told = []
    for settings in ({}, {"gradient_checkpointing": blocks, "recompute_feed_forward": True}):
        trainer = Trainer(make_config(steps=1, **settings))
        told.append(captured(trainer.student))
        trainer.train()
        flags = {n: m.gradient_checkpointing for n, m in trainer.unet.named_modules()
                 if hasattr(m, "gradient_checkpointing")}  # fmt: skip
        on = {name.partition(".")[0] for name, flag in flags.items() if flag}
    assert on - {""} == {"down_blocks", "mid_block"} | ({"up_blocks"} if blocks == "all" else set())
    assert_near(told[1][0], told[0][0])
