"""One-pass transformers equal the repeated form, and remain their parents in all else."""

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig

import tiue
from tests.tiue.dit.models import (
    FAMILIES,
    STUDENTS,
    build,
    conditions,
    exact,
    repeated_form,
)
from tiue.errors import ArchitectureError, CheckpointError, InputError
from tiue.schedule import OnePassSchedule

TIMESTEPS = {1: [801], 2: [801, 301], 4: [751, 501, 251, 1], 8: list(range(901, 101, -100))}


def timesteps_of(count):
    return torch.tensor(TIMESTEPS[count], dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "border", "size"), [(1, 1, 8), (2, 2, 8), (4, 3, 8), (8, 1, 6)])
def test_the_pass_equals_the_repeated_form(family, count, border, size):
    model = build(family)
    if size != 8 and family in ("pixart", "pixart-sized"):
        size = 12  # its positions are made for one size, or interpolated
    latents, text, given = conditions(family, height=size, width=8)
    timesteps = timesteps_of(count)
    with exact(), torch.no_grad():
        student = STUDENTS[family].from_transformer(model, border)
        got = student.predict_noise(latents, timesteps, text, **given)
        expected = repeated_form(model, border, latents, timesteps, text, given)
    assert got.shape == (count, 2, 4, size, 8)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_parameter_equal_the_repeated_forms(family):
    model = build(family)
    latents, text, given = conditions(family)
    timesteps = timesteps_of(4)
    weight = torch.randn(4, 2, 4, 8, 8, dtype=torch.float64)
    grads = []
    with exact():
        student = STUDENTS[family].from_transformer(model, 2)
        for noise in (
            student.predict_noise(latents, timesteps, text, **given),
            repeated_form(model, 2, latents, timesteps, text, given),
        ):
            model.zero_grad()
            (noise * weight).sum().backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, theirs = grads
    # The repeated form computes what the shared blocks give twice, and throws one away.
    assert ours.keys() <= theirs.keys()
    assert len(ours) > 40
    for name, grad in ours.items():
        torch.testing.assert_close(
            grad, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_combined_pass_equals_combining_the_predictions(family):
    latents, text, given = conditions(family)
    schedule = OnePassSchedule.from_scheduler(
        DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False), 4
    )
    with exact(), torch.no_grad():
        student = STUDENTS[family].from_transformer(build(family), 2)
        timesteps = schedule.timesteps
        expected = schedule.combine(
            latents, student.predict_noise(latents, timesteps, text, **given)
        )
        got = student.one_pass(latents, schedule, text, **given)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_parents_to_the_bit(family):
    model = build(family, torch.float32)
    latents, text, given = conditions(family, dtype=torch.float32)
    student = STUDENTS[family].from_transformer(model)
    arguments = {
        "hidden_states": latents,
        "timestep": torch.full((2,), 501.0),
        "encoder_hidden_states": text,
        **given,
    }
    with torch.no_grad():
        ours = student(**arguments, return_dict=False)[0]
        theirs = model(**arguments, return_dict=False)[0]
    assert ours.equal(theirs)
    assert student.proj_out.weight is model.proj_out.weight


@pytest.mark.parametrize("family", ["pixart", "hunyuan", "sd3"])
def test_a_round_trip_keeps_weights_and_border_and_loads_in_diffusers(family, tmp_path):
    student = STUDENTS[family].from_transformer(build(family, torch.float32), 3)
    student.save_pretrained(tmp_path)
    again = STUDENTS[family].from_pretrained(tmp_path)
    assert again.num_shared_blocks == 3
    assert STUDENTS[family].from_pretrained(tmp_path, num_shared_blocks=1).num_shared_blocks == 1
    plain = STUDENTS[family].PARENT.from_pretrained(tmp_path)
    for model in (again, plain):
        state = model.state_dict()
        assert state.keys() == student.state_dict().keys()
        assert all(state[name].equal(value) for name, value in student.state_dict().items())


@pytest.mark.parametrize("family", ["pixart", "hunyuan", "sd3"])
def test_a_hooked_block_is_called_whole_and_right(family):
    model = build(family)
    latents, text, given = conditions(family)
    timesteps = timesteps_of(2)
    with exact(), torch.no_grad():
        student = STUDENTS[family].from_transformer(model, 2)
        expected = student.predict_noise(latents, timesteps, text, **given)
        calls = []
        for block in student.decoder_blocks:
            block.register_forward_hook(lambda *_: calls.append(1))
        got = student.predict_noise(latents, timesteps, text, **given)
    assert len(calls) == len(student.decoder_blocks)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["pixart", "sd3", "sd35"])
def test_layers_with_loras_give_what_the_repeated_form_gives(family):
    model = build(family)
    latents, text, given = conditions(family)
    timesteps = timesteps_of(2)
    student = STUDENTS[family].from_transformer(model, 2)
    before = student.predict_noise(latents, timesteps, text, **given)
    targets = ["to_q", "to_out.0", "ff.net.0.proj", "add_k_proj", "to_add_out"]
    student.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    student.to(torch.float64)
    grads = []
    with exact():
        got = student.predict_noise(latents, timesteps, text, **given)
        expected = repeated_form(model, 2, latents, timesteps, text, given)
        for noise in (got, expected):
            model.zero_grad()
            noise.square().sum().backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert not torch.allclose(got, before)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", ["pixart", "sd3", "sd35"])
def test_under_autocast_tokens_are_what_diffusers_blocks_make_of_them(family):
    model = build(family, torch.float32)
    latents, text, given = conditions(family, dtype=torch.float32)
    timesteps = timesteps_of(4)
    student = STUDENTS[family].from_transformer(model, 2)
    found = {}
    for name, run in {
        "ours": lambda: student.predict_noise(latents, timesteps, text, **given),
        "theirs": lambda: repeated_form(model, 2, latents, timesteps, text, given),
    }.items():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            noise = run()
        noise.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[name] = noise, grads
    exactly = student.predict_noise(latents, timesteps, text, **given)
    model.zero_grad()
    exactly.square().sum().backward()
    slopes = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (ours, own), (theirs, other) = found["ours"], found["theirs"]
    assert ours.dtype == theirs.dtype

    assert (ours - exactly).norm() <= 2 * (theirs - exactly).norm()
    for name, slope in slopes.items():
        assert own[name].dtype == torch.float32
        allowed = 2 * (other[name] - slope).norm() + 1e-2 * slope.norm()
        assert (own[name] - slope).norm() <= allowed, name


@pytest.mark.parametrize("border", [0, 4, -1, 2.0, True])
def test_a_border_outside_of_the_blocks_is_refused(border):
    with pytest.raises(InputError, match="from 1 to 3 for the 4 blocks"):
        STUDENTS["pixart"].from_transformer(build("pixart", torch.float32), border)


def test_another_family_is_refused_and_those_with_a_student_are_named(tmp_path):
    model = build("sd3", torch.float32)
    with pytest.raises(ArchitectureError, match="exist for HunyuanDiT2DModel, PixArt"):
        STUDENTS["hunyuan"].from_transformer(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="SD3Transformer2DModel"):
        STUDENTS["pixart"].from_pretrained(tmp_path)


def test_what_a_family_needs_and_has_not_got_is_named():
    student = STUDENTS["hunyuan"].from_transformer(build("hunyuan", torch.float32))
    latents, text, given = conditions("hunyuan", dtype=torch.float32)
    given.pop("text_embedding_mask_t5")
    with pytest.raises(InputError, match="text_embedding_mask_t5"):
        student.predict_noise(latents, [1.0], text, **given)
    sd3 = STUDENTS["sd3"].from_transformer(build("sd3", torch.float32))
    latents, text, _ = conditions("sd3", dtype=torch.float32)
    with pytest.raises(InputError, match="pooled_projections"):
        sd3.predict_noise(latents, [1.0], text)
    sized = STUDENTS["pixart-sized"].from_transformer(build("pixart-sized", torch.float32))
    latents, text, _ = conditions("pixart-sized", dtype=torch.float32)
    with pytest.raises(InputError, match="resolution"):
        sized.predict_noise(latents, [1.0], text)


def test_the_students_are_public_names():
    assert tiue.TiUEPixArtTransformer2DModel is STUDENTS["pixart"]
    assert tiue.TiUEHunyuanDiT2DModel is STUDENTS["hunyuan"]
    assert tiue.TiUESD3Transformer2DModel is STUDENTS["sd3"]
