"""Recorded calls: never a result that the function itself would not give now."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.tiue.compiled.stand_in import StandInRecorder
from tests.tiue.test_adapters import CHANGES, ScaledProcessor, add_lora
from tests.tiue.tiny import tiny_scheduler
from tests.tiue.unets import make_conditioning, make_inputs, make_unet
from tiue import OnePassSchedule, TiUEUNet
from tiue.compiled import GraphedCall
from tiue.errors import InputError
from tiue_kernels import use_backend

SCHEDULE = OnePassSchedule.from_scheduler(tiny_scheduler(), 4)


class Recorded:
    """A student, its recorded call, and what was recorded."""

    def __init__(self, name: str = "sd1", max_graphs: int = 8, fails: Any = None) -> None:
        self.name = name
        self.unet = TiUEUNet.from_unet(make_unet(name))
        self.recorder = StandInRecorder(fails)
        self.call = GraphedCall(self.unet.one_pass, [self.unet], max_graphs, self.recorder)

    def check(self, size=(8, 8), batch=2, schedule=SCHEDULE, **changes) -> int:
        """The call equals the function; gives how many recordings there were so far."""
        given = make_inputs(size, batch)
        conditioning = {**make_conditioning(self.name, batch), **changes}
        args = (given["latents"], schedule, given["prompt_embeds"])
        got = self.call(*args, **conditioning)
        again = self.call(args[0] * 0.5, *args[1:], **conditioning)
        assert torch.equal(got, self.unet.one_pass(*args, **conditioning))
        assert torch.equal(again, self.unet.one_pass(args[0] * 0.5, *args[1:], **conditioning))
        assert not torch.equal(got, again)
        return len(self.recorder.recorded)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "gligen", "class_labels"])
def test_one_recording_serves_every_call_of_its_key(name: str) -> None:
    recorded = Recorded(name)
    assert recorded.check() == 1
    assert recorded.check() == 1
    assert recorded.recorder.recorded[0].replays == 4
    assert recorded.recorder.warm_ups == 1


def test_what_the_key_holds() -> None:
    recorded = Recorded()
    bias = torch.ones(2, 5, dtype=torch.float64)
    fewer = OnePassSchedule.from_scheduler(tiny_scheduler(), 3)
    trailing = OnePassSchedule.from_scheduler(tiny_scheduler(timestep_spacing="trailing"), 4)
    counts = [
        recorded.check(),
        recorded.check(batch=3),
        recorded.check(size=(8, 12)),
        recorded.check(size=(7, 9)),
        recorded.check(encoder_attention_mask=bias),
        recorded.check(schedule=fewer),
        recorded.check(schedule=trailing),
        recorded.check(cross_attention_kwargs={"scale": 1.0}),
    ]
    assert counts == list(range(1, 9))
    assert recorded.check() == 8
    with use_backend("reference"):
        assert recorded.check() == 9
    with torch.autocast("cpu", torch.bfloat16):
        given = make_inputs()
        args = (given["latents"], SCHEDULE, given["prompt_embeds"])
        assert torch.equal(recorded.call(*args), recorded.unet.one_pass(*args))


def test_the_least_recently_used_goes_first() -> None:
    recorded = Recorded(max_graphs=2)
    for batch in (1, 2, 1, 3):
        recorded.check(batch=batch)
    assert len(recorded.call) == 2
    assert recorded.check(batch=1) == 3
    assert recorded.check(batch=2) == 4


def test_the_output_is_the_callers_own() -> None:
    recorded = Recorded()
    given = make_inputs()
    first = recorded.call(given["latents"], SCHEDULE, given["prompt_embeds"])
    kept = first.clone()
    recorded.call(2 * given["latents"], SCHEDULE, given["prompt_embeds"])
    assert torch.equal(first, kept)


def in_place(unet: TiUEUNet) -> None:
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.01)


def optimiser_step(unet: TiUEUNet) -> None:
    optimiser = torch.optim.SGD(unet.parameters(), lr=1e-2)
    given = make_inputs()
    unet.predict_noise(
        given["latents"], SCHEDULE.timesteps, given["prompt_embeds"]
    ).sum().backward()
    optimiser.step()


def load_state_dict(unet: TiUEUNet) -> None:
    unet.load_state_dict({key: value * 1.01 for key, value in unet.state_dict().items()})


def write_to_data(unet: TiUEUNet) -> None:
    for parameter in unet.parameters():
        parameter.data.mul_(1.01)


SAME_STORAGE = {f.__name__: f for f in (in_place, optimiser_step, load_state_dict, write_to_data)}


@pytest.mark.parametrize("change", SAME_STORAGE)
def test_weights_written_in_place_need_no_new_recording(change: str) -> None:
    recorded = Recorded()
    recorded.check()
    before = recorded.unet.one_pass(*_inputs())
    SAME_STORAGE[change](recorded.unet)
    assert recorded.check() == 1
    assert not torch.equal(recorded.unet.one_pass(*_inputs()), before)


def _inputs() -> tuple[Any, ...]:
    given = make_inputs()
    return given["latents"], SCHEDULE, given["prompt_embeds"]


def replace_a_weight(unet: TiUEUNet) -> None:
    unet.conv_in.weight.data = unet.conv_in.weight.data * 1.5


def replace_a_layer(unet: TiUEUNet) -> None:
    unet.conv_in = torch.nn.Conv2d(4, 16, 3, padding=1).double()


def channels_last(unet: TiUEUNet) -> None:
    unet.to(memory_format=torch.channels_last)


MOVES: dict[str, Callable[[Any], Any]] = {
    **CHANGES,
    **{f.__name__: f for f in (replace_a_weight, replace_a_layer, channels_last)},
    "training": lambda unet: unet.train(),
}


@pytest.mark.parametrize("change", MOVES)
def test_any_other_change_is_recorded_anew(change: str) -> None:
    recorded = Recorded()
    recorded.check()
    MOVES[change](recorded.unet)
    assert recorded.check() == 2
    assert len(recorded.call) == 1
    assert recorded.check() == 2


def test_a_lora_is_loaded_scaled_fused_and_unloaded() -> None:
    recorded = Recorded()
    unet = recorded.unet
    plain = unet.one_pass(*_inputs())
    recorded.check()
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    unet.add_adapter(config, "style")
    unet.double()
    assert recorded.check() == 2
    loaded = unet.one_pass(*_inputs())
    unet.set_adapters(["style"], [0.5])
    assert recorded.check() == 3
    assert not torch.allclose(unet.one_pass(*_inputs()), loaded)
    recorded.check(cross_attention_kwargs={"scale": 0.3})
    recorded.check(cross_attention_kwargs={"scale": 0.7})
    recorded.check()
    assert len(recorded.recorder.recorded) == 5
    unet.fuse_lora(1.0)
    recorded.check()
    unet.unfuse_lora()
    recorded.check()
    unet.delete_adapters("style")
    recorded.check()
    torch.testing.assert_close(recorded.call(*_inputs()), plain, rtol=1e-9, atol=1e-9)


def test_a_lora_that_is_written_in_place_needs_no_new_recording() -> None:
    recorded = Recorded()
    add_lora(recorded.unet, ["to_q", "conv1", "conv_shortcut", "proj_in", "conv_out"])
    assert recorded.check() == 1
    before = recorded.unet.one_pass(*_inputs())
    for key, parameter in recorded.unet.named_parameters():
        if "lora_A" in key:
            parameter.data.mul_(-1)
    assert recorded.check() == 1
    assert not torch.allclose(recorded.call(*_inputs()), before)


def test_a_scale_that_an_attention_processor_holds() -> None:
    recorded = Recorded()
    processor = ScaledProcessor()
    processor.options = {"weights": [1.0]}
    recorded.unet.set_attn_processor(processor)
    assert recorded.check() == 1
    processor.options["weights"][0] = 2.0
    assert recorded.check() == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory\nsecond line"),
        RuntimeError("operation not permitted when stream is capturing"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(error: Exception, caplog) -> None:
    recorded = Recorded(fails=error)
    with caplog.at_level(logging.WARNING):
        assert recorded.check() == 0
        assert recorded.check(batch=3) == 0
    assert len(caplog.records) == 1
    assert str(error).split("\n")[0] in caplog.text
    assert "second line" not in caplog.text
    assert recorded.recorder.warm_ups == 2  # once a key
    recorded.recorder.fails = None
    assert recorded.check(batch=1) == 1


def test_offloaded_weights_are_not_recorded() -> None:
    from accelerate import cpu_offload

    recorded = Recorded()
    cpu_offload(recorded.unet.conv_in, torch.device("cpu"))
    given = make_inputs()
    args = (given["latents"], SCHEDULE, given["prompt_embeds"])
    assert torch.equal(recorded.call(*args), recorded.unet.one_pass(*args))
    assert not recorded.recorder.recorded


def test_bad_input_stays_an_error_and_an_empty_batch_stays_empty() -> None:
    recorded = Recorded()
    recorded.check()
    given = make_inputs()
    with pytest.raises(InputError, match="latents must be"):
        recorded.call(given["latents"][:, :3], SCHEDULE, given["prompt_embeds"])
    with pytest.raises(InputError, match="one row for each"):
        recorded.call(given["latents"], SCHEDULE, given["prompt_embeds"][:1])
    empty = recorded.call(given["latents"][:0], SCHEDULE, given["prompt_embeds"][:0])
    assert empty.shape == (0, 4, 8, 8)
    assert recorded.check() == 1


def test_recorded_in_inference_mode_and_called_outside() -> None:
    recorded = Recorded()
    with torch.inference_mode():
        recorded.check()
    assert recorded.check() == 1


def test_a_schedule_that_is_written_to_is_another_one() -> None:
    recorded = Recorded()
    schedule = OnePassSchedule.from_scheduler(tiny_scheduler(), 4)
    recorded.check(schedule=schedule)
    kept = schedule.noise_coefficients.clone()
    schedule.noise_coefficients.mul_(0.5)
    assert recorded.check(schedule=schedule) == 2
    schedule.noise_coefficients.copy_(kept)
    assert recorded.check(schedule=schedule) == 2
