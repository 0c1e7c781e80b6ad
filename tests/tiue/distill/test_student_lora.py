"""A student that is a LoRA: trained, kept, merged, loaded by PEFT and by plain diffusers."""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from peft import PeftModel

from tiue.distill.output import list_checkpoints
from tiue.distill.trainer import Trainer
from tiue.errors import OutputError


def draw(unet, trainer):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = trainer.text[torch.tensor([0])]
    with torch.no_grad():
        return unet(noise, torch.tensor([500]), text.tokens).sample


def test_a_student_that_is_a_lora(make_config, teacher_folder):
    settings = {"student_lora_rank": 4, "student_lora_alpha": 8, "batch_size": 1,
                "num_decoder_steps": 2, "learning_rate": 1e-2}  # fmt: skip
    config = make_config(**settings, steps=4, checkpoint_every=2)
    whole = Trainer(config)
    base = {n: p.detach().clone() for n, p in whole.unet.named_parameters()}
    output = whole.train()
    last = {n: p.detach().clone() for n, p in whole.unet.named_parameters()}
    moved = {n for n, p in whole.unet.named_parameters() if not torch.equal(p, base[n])}
    assert moved == {n for n in base if ".lora_" in n}
    assert len(whole.ema.shadow_params) == len(moved)

    # The average's LoRA in PEFT over the teacher, and merged in plain diffusers, draw the same.
    with torch.no_grad():
        for parameter, average in zip(whole.student.parameters, whole.ema.shadow_params,
                                      strict=True):  # fmt: skip
            parameter.copy_(average)
    expected = draw(whole.unet.eval(), whole)
    plain = UNet2DConditionModel.from_pretrained(teacher_folder / "unet").eval()
    assert not torch.allclose(draw(plain, whole), expected, atol=1e-3)
    merged = UNet2DConditionModel.from_pretrained(output / "unet").eval()
    torch.testing.assert_close(draw(merged, whole), expected, rtol=1e-4, atol=1e-4)
    adapted = PeftModel.from_pretrained(plain, output / "lora")
    torch.testing.assert_close(draw(adapted, whole), expected, rtol=1e-4, atol=1e-4)

    # Gone on with from the middle, bit for bit; the average kept in host memory changes nothing.
    middle = list_checkpoints(output / "checkpoints")[0]
    for place in list_checkpoints(output / "checkpoints")[1:]:
        place.rename(place.with_name("later"))
    resumed = Trainer(make_config(**settings, steps=4, output=output, resume=True, ema_on_cpu=True))
    assert (resumed.step, middle.name) == (2, "step-00000002")
    resumed.train()
    assert all(torch.equal(p, last[n]) for n, p in resumed.unet.named_parameters())
    averages = zip(resumed.ema.shadow_params, whole.ema.shadow_params, strict=True)
    assert all(torch.equal(*pair) for pair in averages)
    # Frozen weights take no float32 under mixed precision; the LoRA does.
    AcceleratorState._reset_state(reset_partial_state=True)
    half = Trainer(make_config(**settings, mixed_precision="bf16"))
    assert {p.dtype for p in half.student.parameters} == {torch.float32}
    assert half.unet.conv_in.weight.dtype == torch.bfloat16


def test_a_finished_student_is_put_on_the_hub(make_config, monkeypatch):
    told = []
    hub = "huggingface_hub.HfApi"
    monkeypatch.setattr(f"{hub}.create_repo", lambda _, name, **__: told.append(name))
    monkeypatch.setattr(f"{hub}.upload_folder", lambda _, **given: told.append(given))
    settings = {"steps": 1, "batch_size": 1, "num_decoder_steps": 2, "push_to_hub": "me/student"}
    output = Trainer(make_config(**settings)).train()
    assert told[0] == "me/student"
    assert told[1]["folder_path"] == output
    assert told[1]["allow_patterns"] == ["unet/*", "transformer/*", "scheduler/*", "lora/*"]

    def refuse(*_, **__):
        raise OSError("401")

    monkeypatch.setattr(f"{hub}.create_repo", refuse)
    again = Trainer(make_config(**settings, output=output, resume=True))
    with pytest.raises(OutputError, match=r"401.*hf auth login.*--resume"):
        again.train()
    assert (output / "unet" / "config.json").exists()
