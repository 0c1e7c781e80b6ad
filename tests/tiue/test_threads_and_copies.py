"""One pipeline in several threads, and copies of one: each call answers as it does alone."""

import contextlib
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.tiue.test_attached import group_offload
from tests.tiue.test_lora import add_lora
from tests.tiue.test_one_pass_pipelines import gligen, pag
from tests.tiue.tiny import tiny_pipeline
from tiue import TiUEPipeline, one_pass


def draw(pipe, seed: int = 0, **arguments) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe("red apple", generator=generator, output_type="pt", **arguments).images


CALLS = [
    {"seed": 0},
    {"seed": 1, "guidance_scale": 3.0},
    {"seed": 0, "guidance_scale": 7.5, "negative_prompt": "rocket"},
    {"seed": 2, "num_decoder_steps": 2, "clip_skip": 1},
    {"seed": 3, "skip_below": 0.05},
]


def in_threads(pipe, calls) -> list[torch.Tensor]:
    """Every call twice, all at once: no call begins before all threads are there."""
    barrier = threading.Barrier(len(calls))

    def run(arguments):
        barrier.wait()
        return [draw(pipe, **arguments) for _ in range(2)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return [picture for pictures in pool.map(run, calls) for picture in pictures]


def test_calls_in_threads_give_what_they_give_alone():
    pipe = TiUEPipeline.from_pipe(tiny_pipeline())
    want = [draw(pipe, **arguments) for arguments in CALLS for _ in range(2)]
    fresh = TiUEPipeline.from_pipe(tiny_pipeline())
    for got, alone in zip(in_threads(fresh, CALLS), want, strict=True):
        assert torch.equal(got, alone)


def test_loras_at_different_scales_in_threads():
    pipe = TiUEPipeline.from_pipe(tiny_pipeline())
    add_lora(pipe.unet)
    calls = [{"cross_attention_kwargs": {"scale": scale}} for scale in (0.0, 0.5, 1.0)]
    want = [draw(pipe, **arguments) for arguments in calls for _ in range(2)]
    assert not torch.equal(want[0], want[-1])
    for got, alone in zip(in_threads(pipe, calls), want, strict=True):
        assert torch.equal(got, alone)


def cast_layers():
    pipe = tiny_pipeline()
    pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    return pipe, {}


def offloaded_leaves():
    pipe = tiny_pipeline()
    group_offload("leaf")(pipe)
    return pipe, {}


CHANGED_BY_CALLS = {
    "layerwise_casting": cast_layers,
    "group_offload": offloaded_leaves,
    "pag": lambda: pag(["mid"]),
    "gligen": gligen,
}


def most_at_once(pipe, arguments) -> int:
    """How many of two calls, begun together, are inside of the UNet at a time."""
    inside, most, other = [], [], threading.Barrier(2)

    def enter(*_):
        inside.append(1)
        most.append(len(inside))
        with contextlib.suppress(threading.BrokenBarrierError):
            other.wait(0.5)  # for the other call, if it can come
        inside.pop()

    handle = pipe.unet.register_forward_pre_hook(enter)
    try:
        in_threads(pipe, [arguments | {"seed": 0}, arguments | {"seed": 1}])
    finally:
        handle.remove()
    return max(most)


@pytest.mark.parametrize("name", CHANGED_BY_CALLS)
def test_calls_that_change_the_models_wait_for_each_other(name):
    pipe, arguments = CHANGED_BY_CALLS[name]()
    assert most_at_once(one_pass(pipe), arguments) == 1


def test_calls_that_change_nothing_run_side_by_side():
    assert most_at_once(one_pass(tiny_pipeline()), {}) == 2


def test_a_call_that_ends_in_an_error_leaves_no_processor_behind():
    pipe, arguments = pag(["mid"])
    drawn = one_pass(pipe)
    before = drawn.unet.attn_processors

    def fail(*_):
        raise RuntimeError("of the callback")

    with pytest.raises(RuntimeError, match="of the callback"):
        draw(drawn, callback_on_step_end=fail, **arguments)
    assert drawn.unet.attn_processors == before


@pytest.mark.parametrize("make", [TiUEPipeline.from_pipe, one_pass], ids=["class", "one_pass"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_draw_the_same_and_begin_uncompiled(make, copied):
    pipe = make(tiny_pipeline())
    pipe.compile()
    want = draw(pipe)
    other = copied(pipe)
    assert type(other) is type(pipe)
    assert other._compiled is None
    assert pipe._compiled is not None
    assert other.unet is not pipe.unet
    assert torch.equal(draw(other), want)
    other.unet.conv_in.weight.data.zero_()
    assert torch.equal(draw(pipe), want)  # nothing is shared
    assert not torch.equal(draw(other), want)
