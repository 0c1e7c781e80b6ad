"""CUDA graphs for real: recorded passes on an NVIDIA GPU, as a part of `make gpu`.

Without one the same tests run with what stands for a GPU, so that they themselves are tested.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from testing.problem import default_device
from tests.tiue.compiled.stand_in import StandInRecorder
from tests.tiue.tiny import tiny_scheduler
from tests.tiue.unets import make_inputs, make_unet
from tiue import OnePassSchedule, TiUEUNet
from tiue.compiled import GraphedCall

pytestmark = pytest.mark.gpu
DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
SCHEDULE = OnePassSchedule.from_scheduler(tiny_scheduler(), 4)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture(params=LAYOUTS)
def unet(request) -> TiUEUNet:
    unet = make_unet("sd1").float().to(DEVICE, memory_format=LAYOUTS[request.param])
    return TiUEUNet.from_unet(unet)


@pytest.fixture
def recorded(unet: TiUEUNet) -> GraphedCall:
    return GraphedCall(unet.one_pass, [unet], recorder=None if ON_GPU else StandInRecorder())


def arguments(size: tuple[int, int] = (8, 8), scale: float = 1.0) -> tuple:
    given = {name: x.float().to(DEVICE) for name, x in make_inputs(size).items()}
    return given["latents"] * scale, SCHEDULE, given["prompt_embeds"] * scale


def check(recorded: GraphedCall, unet: TiUEUNet, *args) -> torch.Tensor:
    """The recorded call gives what the call gives, with and without a recording made for it."""
    wanted = unet.one_pass(*args)
    for _ in range(2):
        got = recorded(*args)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    return got


def test_a_recording_gives_what_the_call_gives(recorded, unet) -> None:
    first = check(recorded, unet, *arguments())
    kept = first.clone()
    second = check(recorded, unet, *arguments(scale=0.5))
    assert torch.equal(first, kept)  # no later call writes into an earlier one's result
    assert not torch.allclose(first, second)
    assert len(recorded) == 1
    check(recorded, unet, *arguments(size=(8, 16)))
    assert len(recorded) == 2


def test_a_recording_follows_the_weights(recorded, unet) -> None:
    before = check(recorded, unet, *arguments())
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(1.1)
    assert not torch.allclose(check(recorded, unet, *arguments()), before)
    state = {name: 0.9 * x for name, x in copy.deepcopy(unet.state_dict()).items()}
    unet.load_state_dict(state)
    check(recorded, unet, *arguments())


def test_what_another_thread_does_on_the_gpu_ends_no_recording(recorded, unet) -> None:
    done = threading.Event()
    sums = []

    def work() -> None:
        while not done.is_set():
            x = torch.ones(1 << 16, device=DEVICE)
            sums.append((x + 1).sum().item())
            del x

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for size in ((8, 8), (16, 8), (8, 16)):
            check(recorded, unet, *arguments(size))
    finally:
        done.set()
        thread.join()
    assert len(recorded) == 3
    assert set(sums) == {2.0 * (1 << 16)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU alone")
def test_a_recording_moves_to_another_gpu(recorded, unet) -> None:
    first = check(recorded, unet, *arguments())
    unet.to("cuda:1")
    for scale in (1.0, 0.5):  # an empty recording gives the first result again
        given = arguments(scale=scale)
        moved = tuple(x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in given)
        second = check(recorded, unet, *moved)
        if scale == 1.0:
            torch.testing.assert_close(second.cpu(), first.cpu(), rtol=1e-4, atol=1e-5)
