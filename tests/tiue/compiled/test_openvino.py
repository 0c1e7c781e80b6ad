"""OpenVINO against eager: the same latents, and none that are stale."""

import ctypes
import logging
import sys

import pytest
import torch

from testing.tolerances import GOLDEN_RELATIVE, relative_error
from tests.golden import load_golden, requires_golden
from tests.tiue.tiny import tiny_scheduler
from tests.tiue.unets import TEXT, make_unet
from tiue import OnePassSchedule, TiUEUNet
from tiue.compiled.openvino import Stack
from tiue.errors import DependencyError, InputError

SCHEDULE = OnePassSchedule.from_scheduler(tiny_scheduler(), 2)
BOUND = GOLDEN_RELATIVE[torch.float32]
# Weights of 8 bits are off by up to 1/510 of a channel's range; 0.0023 was seen.
INT8_RELATIVE = 0.02
SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


def inputs(batch: int = 2, size: tuple[int, int] = (4, 8)) -> tuple:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, *size, generator=generator)
    return latents, SCHEDULE, torch.randn(batch, 5, TEXT, generator=generator)


def student() -> TiUEUNet:
    return TiUEUNet.from_unet(make_unet("sd1", **SMALL)).float()


def test_a_missing_openvino_is_one_clear_error(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError, match=r"pip install 'tiue\[openvino\]'"):
        student().compile_one_pass("openvino")


def test_weights_that_change_in_any_way_are_noticed() -> None:
    pytest.importorskip("openvino")
    unet = student()
    compiled = unet.compile_one_pass("openvino")

    def check() -> None:
        error = relative_error(compiled(*inputs()), unet.one_pass(*inputs()))
        assert error <= BOUND

    check()
    (model,) = compiled._models.values()
    check()
    assert [model] == list(compiled._models.values())
    unet.conv_in.weight.data.neg_()  # counted by no version, and the bits' exclusive or is the same
    unet.conv_in.weight.data[0, 0, 0, 0] += 1
    check()
    with torch.no_grad():
        unet.conv_out.bias += 1
    check()


@pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack as Linux lays it out")
def test_signal_handlers_keep_their_stack() -> None:
    pytest.importorskip("openvino")

    def stack() -> tuple:
        found = Stack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found.at, found.flags, found.size

    before = stack()
    compiled = student().compile_one_pass("openvino")
    compiled(*inputs())
    assert len(compiled) == 1
    assert stack() == before


def test_one_dynamic_model_serves_batches_and_sizes() -> None:
    pytest.importorskip("openvino")
    unet = student()
    compiled = unet.compile_one_pass("openvino", dynamic=True)
    for batch, size in ((2, (4, 8)), (3, (6, 4))):
        given = inputs(batch, size)
        assert relative_error(compiled(*given), unet.one_pass(*given)) <= BOUND
    assert len(compiled) == 1


def test_half_precision_is_refused() -> None:
    pytest.importorskip("openvino")
    compiled = student().compile_one_pass("openvino")
    latents, schedule, text = inputs()
    with pytest.raises(InputError, match="float32"):
        compiled(latents.half(), schedule, text.half())
    with pytest.raises(InputError, match="latents must be"):
        compiled(latents[:, :3], schedule, text)
    assert compiled(latents[:0], schedule, text[:0]).shape == (0, 4, 4, 8)


def test_what_cannot_be_converted_runs_eagerly(caplog) -> None:
    pytest.importorskip("openvino")
    unet = student()
    # Python decides by a value: no program can.
    unet.conv_in.register_forward_hook(lambda _m, _a, out: out * 2 if out.sum() > 0 else out)
    compiled = unet.compile_one_pass("openvino")
    with caplog.at_level(logging.WARNING, "tiue"):
        for _ in range(2):
            assert torch.equal(compiled(*inputs()), unet.one_pass(*inputs()))
    assert len([record for record in caplog.records if "OpenVINO" in record.message]) == 1


def test_a_precision_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match="precision='int4': choose of float32, int8"):
        student().compile_one_pass("openvino", precision="int4")
    with pytest.raises(InputError, match="precision='int8' is for backend='openvino'; got None"):
        student().compile_one_pass(precision="int8")


def test_a_missing_nncf_is_one_clear_error(monkeypatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(DependencyError, match=r"pip install 'tiue\[int8\]'"):
        student().compile_one_pass("openvino", precision="int8")


def test_int8_is_near_and_follows_the_weights() -> None:
    pytest.importorskip("nncf")
    unet = student()
    compiled = unet.compile_one_pass("openvino", precision="int8")

    def check() -> None:
        error = relative_error(compiled(*inputs()), unet.one_pass(*inputs()))
        assert BOUND < error <= INT8_RELATIVE

    check()
    assert len(compiled) == 1
    unet.conv_in.weight.data.mul_(-1.5)
    check()


@requires_golden
def test_openvino_gives_the_published_numbers() -> None:
    pytest.importorskip("openvino")
    case = load_golden("sd1-like", torch.float32)
    compiled = case.unet.compile_one_pass("openvino")
    got = compiled(case.latents, case.schedule, case.prompt_embeds)
    assert relative_error(got, case.expected["pred_original_serial"]) <= BOUND
