import pytest
import torch
from diffusers import DDIMScheduler

from tests.tiue.tiny import TEXT_DIM, TEXT_LENGTH, tiny_scheduler, tiny_unet
from tiue.distill.losses import lora_loss
from tiue.distill.teacher import NoiseSchedule, Teacher, drop_prompts
from tiue.distill.text import Text
from tiue.errors import ArchitectureError

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def make_teacher(prediction_type="epsilon", **overrides):
    torch.manual_seed(0)
    scheduler = tiny_scheduler(prediction_type=prediction_type)
    teacher = Teacher(tiny_unet(**overrides), NoiseSchedule(scheduler), lora_rank=4, lora_alpha=8)
    with torch.no_grad():  # PEFT starts a LoRA as zero
        for parameter in teacher.lora_parameters:
            parameter.normal_(std=0.5)
    return teacher


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    embeds = torch.randn(3, TEXT_LENGTH, TEXT_DIM, generator=generator)
    empty = torch.randn(1, TEXT_LENGTH, TEXT_DIM, generator=generator)
    return noisy, torch.tensor([20, 500, 980]), Text(embeds), Text(empty)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_noise_schedule_agrees_with_the_scheduler(inputs, prediction_type):
    noisy, timesteps, *_ = inputs
    output = torch.flip(noisy, (0, 3))
    scheduler = tiny_scheduler(prediction_type=prediction_type)
    schedule = NoiseSchedule(scheduler)
    torch.testing.assert_close(
        schedule.add_noise(noisy, output, timesteps), scheduler.add_noise(noisy, output, timesteps)
    )
    # DDIM's estimate of the sample from its own reading of the output, and ours of the noise,
    # must make up x_t again.
    noise = schedule.to_noise(output, noisy, timesteps)
    scheduler.set_timesteps(1000)
    for row, timestep in enumerate(timesteps):
        sample = scheduler.step(output[row], timestep, noisy[row]).pred_original_sample
        again = schedule.add_noise(sample[None], noise[row][None], timestep[None])
        torch.testing.assert_close(again[0], noisy[row], rtol=1e-4, atol=1e-4)


def test_tables_keep_the_last_timesteps_apart_from_pure_noise():
    schedule = NoiseSchedule(tiny_scheduler())
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float32
    torch.testing.assert_close(
        schedule.alpha.double() ** 2 + schedule.sigma.double() ** 2,
        torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-6,
    )  # fmt: skip
    assert (schedule.sigma.diff() > 0).all()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guided_noise_is_guidance_over_two_separate_calls(inputs, prediction_type, lora):
    noisy, timesteps, embeds, empty = inputs
    teacher = make_teacher(prediction_type)
    one = {"guidance_scale": 1.0, "lora": lora}
    repeated = Text(empty.tokens.expand_as(embeds.tokens))
    conditional = teacher.guided_noise(noisy, timesteps, embeds, empty, **one)
    unconditional = teacher.guided_noise(noisy, timesteps, repeated, empty, **one)
    guided = teacher.guided_noise(noisy, timesteps, embeds, empty, 4.5, lora)
    expected = unconditional + 4.5 * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(guided, conditional, atol=1e-3)
    assert not guided.requires_grad


def test_one_call_serves_both_halves_and_guidance_of_one_runs_only_one(inputs):
    noisy, timesteps, embeds, empty = inputs
    teacher = make_teacher()
    rows = []
    teacher.unet.conv_in.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    teacher.guided_noise(noisy, timesteps, embeds, empty, 4.5, lora=False)
    teacher.guided_noise(noisy, timesteps, embeds, empty, 1.0, lora=True)
    assert rows == [6, 3]


def test_frozen_teacher_is_the_unet_without_its_adapter(inputs):
    noisy, timesteps, embeds, empty = inputs
    torch.manual_seed(0)
    plain = tiny_unet()
    expected = plain(noisy, timesteps, embeds.tokens).sample
    teacher = make_teacher()
    arguments = (noisy, timesteps, embeds, empty, 1.0)
    assert not torch.allclose(teacher.guided_noise(*arguments, lora=True), expected, atol=1e-2)
    assert torch.equal(teacher.guided_noise(*arguments, lora=False), expected)


def test_lora_training_leaves_the_frozen_weights_alone(inputs):
    noisy, timesteps, embeds, empty = inputs
    teacher = make_teacher()
    before = {name: p.detach().clone() for name, p in teacher.unet.named_parameters()}
    optimizer = torch.optim.Adam(teacher.lora_parameters, lr=1e-2)
    for _ in range(2):
        teacher.guided_noise(noisy, timesteps, embeds, empty, 4.5, lora=False)
        noise = teacher.lora_noise(noisy, timesteps, embeds)
        lora_loss(noise, torch.zeros_like(noise), torch.ones(3, 1, 1, 1)).backward()
        optimizer.step()
    for name, parameter in teacher.unet.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("lora_" in name), name


def test_lora_sits_on_every_query_and_value():
    teacher = make_teacher()
    wrapped = {n for n, m in teacher.unet.named_modules() if hasattr(m, "lora_A")}
    projections = {n for n, _ in tiny_unet().named_modules() if n.endswith(("to_q", "to_v"))}
    assert wrapped == projections
    # A and B of each, and nothing else, are trained.
    assert len(teacher.lora_parameters) == 2 * len(projections)


def test_half_precision_teacher_trains_its_lora_in_float32():
    torch.manual_seed(0)
    unet = tiny_unet().to(torch.bfloat16)
    teacher = Teacher(unet, NoiseSchedule(DDIMScheduler()), lora_rank=4, lora_alpha=8)
    assert {p.dtype for p in teacher.lora_parameters} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16


def test_half_precision_teacher_that_pools_its_text_runs_under_autocast(inputs):
    pooled = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    noisy, timesteps, embeds, empty = inputs
    expected = make_teacher(**pooled).guided_noise(noisy, timesteps, embeds, empty, 4.5, False)
    torch.manual_seed(0)
    unet = tiny_unet(**pooled).to(torch.bfloat16)
    teacher = Teacher(unet, NoiseSchedule(tiny_scheduler()), lora_rank=4, lora_alpha=8)
    with torch.autocast("cpu", torch.bfloat16):
        noise = teacher.guided_noise(noisy, timesteps, embeds, empty, 4.5, False)
        teacher.lora_noise(noisy, timesteps, embeds).sum().backward()
    assert (noise - expected).norm() < 0.05 * expected.norm()


def test_drop_prompts_replaces_the_chosen_rows():
    embeds, empty = torch.ones(3, 2, 2), torch.zeros(1, 2, 2)
    text, none = Text(embeds, torch.ones(3, 5)), Text(empty, torch.zeros(1, 5))
    dropped = drop_prompts(text, none, torch.tensor([True, False, True]))
    assert dropped.tokens[:, 0, 0].tolist() == dropped.pooled[:, 4].tolist() == [0, 1, 0]


def test_a_unet_with_conditions_besides_the_prompt_is_refused():
    with pytest.raises(ArchitectureError, match="besides the prompt"):
        make_teacher(class_embed_type="timestep")
