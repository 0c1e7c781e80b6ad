"""What people attach to a pipeline's UNet takes part in the one pass, and changes no picture."""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from torch._dynamo.testing import CompileCounter

import tiue
from testing.tolerances import relative_error
from tests.tiue.tiny import tiny_pipeline, tiny_scheduler, tiny_unet
from tiue import OnePassSchedule, TiUEUNet

PROMPTS = ["red apple", "rocket"]


def make(**components: Any) -> Any:
    """A plain pipeline in one pass."""
    pipe = tiue.one_pass(tiny_pipeline(**components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"prompt": PROMPTS, "generator": generator, "output_type": "pt"} | arguments
    return pipe(**call).images


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return draw(make())


class TestHooks:
    def test_hooks_run_once_a_call_and_may_change_what_passes(self, expected) -> None:
        pipe, seen = make(), []
        before = pipe.unet.register_forward_pre_hook(
            lambda _unet, args, kwargs: seen.append(kwargs["schedule"].num_decoder_steps),
            with_kwargs=True,
        )
        after = pipe.unet.register_forward_hook(lambda _unet, _args, out: (out[0] * 0,))
        zero = draw(pipe)
        assert seen == [4]
        assert not torch.allclose(zero, expected, atol=1e-3)
        before.remove()
        after.remove()
        assert torch.equal(draw(pipe), expected)
        assert seen == [4]

    def test_hooks_run_in_the_units_own_one_pass(self) -> None:
        unet, calls = TiUEUNet.from_unet(tiny_unet()), []
        unet.register_forward_hook(lambda *_: calls.append(1))
        schedule = OnePassSchedule.from_scheduler(tiny_scheduler())
        unet.one_pass(torch.ones(1, 4, 8, 8), schedule, torch.ones(1, 5, 32))
        assert calls == [1]

    def test_a_replaced_forward_is_called(self, expected) -> None:
        pipe, calls = make(), []
        theirs = pipe.unet.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(len(args))
            return theirs(*args, **kwargs)

        pipe.unet.forward = forward
        assert torch.equal(draw(pipe), expected)
        assert len(calls) == 1

    def test_callbacks_are_called_once_and_may_change_the_latents(self, expected) -> None:
        steps = []

        def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> Any:
            steps.append((step, int(timestep), given["latents"].shape))
            return {"latents": given["latents"] * 0}

        black = draw(make(), callback_on_step_end=callback)
        assert steps == [(0, 751, (2, 4, 8, 8))]
        assert torch.equal(black[0], black[1])
        assert not torch.equal(black, expected)


def offload_by_accelerate(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_leaves_by_accelerate(pipe: Any) -> None:
    from accelerate import cpu_offload

    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(model, torch.device("cpu"))


def group_offload(level: str) -> Callable[[Any], None]:
    def attach(pipe: Any) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(pipe, shutil.rmtree, folder)
        pipe.unet.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=f"{level}_level",
            num_blocks_per_group=1 if level == "block" else None,
            offload_to_disk_path=folder,
        )

    return attach


class MergedBlock(BasicTransformerBlock):
    """As tomesd patches: a class of its own, which merges tokens of an even number of rows."""

    calls = 0

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(hidden_states, *args, **kwargs)


def patch_blocks(pipe: Any) -> None:
    MergedBlock.calls = 0
    for module in pipe.unet.modules():
        if type(module) is BasicTransformerBlock:
            module.__class__ = MergedBlock


ATTACHED: dict[str, Callable[[Any], object]] = {
    "accelerate_model_offload": offload_by_accelerate,
    "accelerate_leaf_offload": offload_leaves_by_accelerate,
    "group_offload_blocks": group_offload("block"),
    "group_offload_leaves": group_offload("leaf"),
    "patched_blocks": patch_blocks,
    "attention_slicing": lambda pipe: pipe.enable_attention_slicing(1),
}


@pytest.mark.parametrize("name", ATTACHED)
def test_what_is_attached_changes_no_picture(expected, name: str) -> None:
    pipe = make()
    ATTACHED[name](pipe)
    for _ in range(2):  # what is offloaded after a call comes back for the next
        if name.startswith("group_offload"):  # the weights lie in files: nothing else may be read
            for parameter in pipe.unet.parameters():
                parameter.data.fill_(float("nan"))
        assert relative_error(draw(pipe), expected) <= 1e-5
    if name == "patched_blocks":
        assert MergedBlock.calls == 2 * 4  # of a down block, the middle, and two of an up block


def hook_elsewhere(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    for module in pipe.components.values():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = torch.device("meta")


def group_elsewhere(pipe: Any) -> None:
    ATTACHED["group_offload_leaves"](pipe)
    for module in pipe.unet.modules():
        hook = getattr(module, "_diffusers_hook", None)
        if hook is not None and hook.get_hook("group_offloading") is not None:
            hook.get_hook("group_offloading").config.onload_device = torch.device("meta")


@pytest.mark.parametrize(
    ("place", "device"),
    [
        (lambda _pipe: None, "cpu"),
        (lambda pipe: pipe.to("meta"), "meta"),
        (lambda pipe: pipe.unet.to("meta"), "cpu"),
        (hook_elsewhere, "meta"),
        (group_elsewhere, "meta"),
    ],
    ids=["together", "moved", "split", "hooked", "grouped"],
)
def test_a_call_runs_where_diffusers_says(place: Callable[[Any], object], device: str) -> None:
    """One walk finds it where nothing is attached; else it is diffusers' own answer."""
    pipe = make()
    place(pipe)
    theirs = DiffusionPipeline._execution_device.fget(pipe)
    assert pipe._execution_device == theirs == torch.device(device)


def test_layerwise_casting_computes_in_the_type_of_computation() -> None:
    plain, cast = make(), make()
    with torch.no_grad():
        for parameter in plain.unet.parameters():
            parameter.copy_(parameter.bfloat16())
    cast.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    stored = {parameter.dtype for parameter in cast.unet.parameters()}
    assert torch.bfloat16 in stored
    assert relative_error(draw(cast), draw(plain)) < 0.02


class TestTorchCompile:
    def test_what_torch_compile_wraps_is_what_is_called(self, expected) -> None:
        pipe, counter = make(), CompileCounter()
        pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(draw(pipe), expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1
        with pipe.record_timings() as timings:
            draw(pipe)
        assert list(timings) == ["text encoder", "one pass", "VAE"]

    @pytest.mark.parametrize("method", ["compile", "compile_repeated_blocks"])
    def test_the_units_own_methods(self, expected, method: str) -> None:
        pipe, counter = make(), CompileCounter()
        getattr(pipe.unet, method)(backend=counter)
        torch.testing.assert_close(draw(pipe), expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count >= 1
