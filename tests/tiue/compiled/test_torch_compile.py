"""torch.compile of the student: one graph, dynamic sizes, no read from the device."""

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from testing.tolerances import GOLDEN_RELATIVE, relative_error
from tests.tiue.test_adapters import CHANGES
from tests.tiue.tiny import tiny_scheduler
from tests.tiue.unets import make_conditioning, make_inputs, make_unet
from tiue import OnePassSchedule, TiUEUNet

SCHEDULE = OnePassSchedule.from_scheduler(tiny_scheduler(), 4)
# Tracing with symbolic sizes takes a minute for two levels.
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 2,
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def arguments(name: str, size: tuple[int, int], batch: int) -> tuple[Any, ...]:
    given = make_inputs(size, batch)
    return given["latents"], given["prompt_embeds"], make_conditioning(name, batch)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_one_pass_is_one_graph_for_every_size(name: str) -> None:
    unet = TiUEUNet.from_unet(make_unet(name, **ONE_LEVEL))
    compiled = torch.compile(unet.one_pass, fullgraph=True, backend="aot_eager", dynamic=True)
    # Torch takes sizes that are equal for one number: not square, and neither 8, 12 nor 16, which
    # are widths of these models. On a CPU its own convolutions ask whether K*B is under 16, and it
    # compiles once for each answer.
    for size, batch in (((14, 10), 2), ((16, 4), 3)):
        latents, text, conditioning = arguments(name, size, batch)
        want = unet.one_pass(latents, SCHEDULE, text, **conditioning)
        assert_close(compiled(latents, SCHEDULE, text, **conditioning), want)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@torch.no_grad()
def test_predict_noise_is_one_graph_for_every_size() -> None:
    unet = TiUEUNet.from_unet(make_unet("sd1", **ONE_LEVEL))
    compiled = torch.compile(unet.predict_noise, fullgraph=True, backend="aot_eager", dynamic=True)
    for size, batch in (((8, 12), 2), ((16, 4), 3)):
        latents, text, _ = arguments("sd1", size, batch)
        want = unet.predict_noise(latents, SCHEDULE.timesteps, text)
        assert_close(compiled(latents, SCHEDULE.timesteps, text), want)
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
@pytest.mark.parametrize("change", ["legacy_processor", "lora_on_attention", "freeu"])
def test_layers_that_are_called_whole_break_no_graph(change: str) -> None:
    unet = make_unet("sd1")
    CHANGES[change](unet)
    unet = TiUEUNet.from_unet(unet)
    latents, text, _ = arguments("sd1", (8, 12), 2)
    compiled = torch.compile(unet.one_pass, fullgraph=True, backend="eager")
    assert_close(compiled(latents, SCHEDULE, text), unet.one_pass(latents, SCHEDULE, text))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_latents() -> None:
    unet = TiUEUNet.from_unet(make_unet("sd1", **ONE_LEVEL))
    latents, text, _ = arguments("sd1", (4, 8), 1)
    compiled = unet.compile_one_pass("inductor")
    got, want = compiled(latents, SCHEDULE, text), unet.one_pass(latents, SCHEDULE, text)
    # The sines of the time embedding are float32 in diffusers, and inductor has its own.
    assert relative_error(got, want) <= GOLDEN_RELATIVE[torch.float32]


class NoReads(TorchDispatchMode):
    """Fails where the host would wait for a GPU: a value read, or a size that values decide."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "class_labels", "timestep_cond"])
def test_no_value_is_read_in_the_pass(name: str) -> None:
    unet = TiUEUNet.from_unet(make_unet(name))
    latents, text, conditioning = arguments(name, (8, 8), 2)
    with NoReads():
        unet.one_pass(latents, SCHEDULE, text, **conditioning)
        unet.predict_noise(latents, SCHEDULE.timesteps, text, **conditioning)


def test_a_read_would_be_noticed() -> None:
    with NoReads(), pytest.raises(AssertionError, match="waits"):
        torch.ones(()).item()
