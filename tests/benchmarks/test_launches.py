"""The count of kernels and bytes that a pass launches on a GPU, made without one."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

pytest.importorskip("triton")

from benchmarks import launches
from benchmarks.gpu.pretend import DEVICE, CudaError, PretendGpu, pointers_touched
from testing.configs import CONFIGS
from tiue_kernels import functional
from tiue_kernels.triton import group_norm, shared_skip_group_norm_silu

HALF = 2  # bytes


def new(*shape):
    return torch.empty(shape, dtype=torch.float16, device=DEVICE)


def recorded(function, *shapes):
    with torch.no_grad(), PretendGpu() as gpu:
        tensors = [new(*shape) for shape in shapes]
        gpu.launches.clear()
        function(*tensors)
    return [(x.name, x.read, x.written) for x in gpu.launches]


def test_a_convolution_is_one_kernel_and_another_for_its_bias():
    found = recorded(lambda x, w, b: F.conv2d(x, w, b, padding=1), (2, 8, 4, 4), (6, 8, 3, 3), (6,))
    x, weight, out = 2 * 8 * 16 * HALF, 6 * 8 * 9 * HALF, 2 * 6 * 16 * HALF
    assert found == [
        ("convolution", x + weight, out),
        ("add_bias", out + 6 * HALF, out),
    ]


def test_a_slice_of_a_weight_is_copied_first():
    found = recorded(lambda x, w: F.conv2d(x, w[:, 8:]), (2, 8, 4, 4), (6, 16, 3, 3))
    weight = 6 * 8 * 9 * HALF
    assert found[0] == ("contiguous", weight, weight)
    assert [name for name, *_ in found] == ["contiguous", "convolution"]


def test_a_map_in_one_layout_meets_a_weight_in_the_other():
    def run(x, weight):
        out = F.conv2d(x, weight.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)

    found = recorded(run, (2, 8, 4, 4), (6, 8, 3, 3))
    assert [name for name, *_ in found] == ["clone", "contiguous", "convolution"]


def test_views_are_no_kernels_and_an_expanded_axis_is_read_once():
    def run(x, y):
        return x.view(2, 4, 3).transpose(1, 2)[:, None, :2, 1:] + y.expand(2, 1, 2, 3)

    found = recorded(run, (2, 12), (1, 1, 1, 3))
    assert found == [("add", (2 * 2 * 3 + 3) * HALF, 2 * 2 * 3 * HALF)]


def test_the_norm_of_torch_refuses_what_it_refuses_on_a_gpu():
    def run(x, weight):
        x = x.contiguous(memory_format=torch.channels_last)
        torch.native_group_norm(x, weight, weight, 2, 8, 16, 4, 1e-5)

    with pytest.raises(CudaError, match="contiguous"):
        recorded(run, (2, 8, 4, 4), (8,))


def test_a_triton_kernel_counts_what_it_reads_and_writes():
    found = recorded(functional.geglu, (3, 64))
    assert found == [("_forward_kernel", 3 * 64 * HALF, 3 * 32 * HALF)]


@pytest.mark.parametrize(("size", "kernels"), [(8, 1), (64, 2)])
def test_a_norm_of_large_groups_is_two_kernels(size, kernels):
    shape = (4, 320, size, size)
    found = recorded(
        lambda x, c, w: functional.timestep_sum_group_norm_silu(x, c, 32, w, w),
        *(shape, (4,), (320,)),
    )
    assert len(found) == kernels
    name, read, written = found[-1]
    maps, stats = 4 * 320 * size * size * HALF, 2 * 4 * 32 * 4
    assert name == "_forward_kernel"
    assert written == maps // 4 + stats
    partial = 0
    if kernels == 2:
        assert found[0][1] == maps  # the moments read the maps once more
        partial = found[0][2]
        assert partial > stats
    assert read == maps + (4 + 2 * 320) * HALF + partial


def test_branches_on_constants_decide_what_a_kernel_touches():
    kernel = shared_skip_group_norm_silu._forward_kernel
    flags = {"WHOLE": False, "STRADDLES": False, "CHANNELS_LAST": False}
    reads, writes = pointers_touched(kernel, flags | {"FIRST": True})
    assert writes == {"partial_ptr"}
    assert {"hidden_ptr", "skip_ptr"} <= reads
    reads, writes = pointers_touched(kernel, flags | {"FIRST": False})
    assert "partial_ptr" in reads - writes
    assert {"hidden_out_ptr", "skip_out_ptr", "hidden_stats_ptr", "skip_stats_ptr"} == writes


def test_a_map_that_is_not_there_is_not_read():
    options = {"HAS_HIDDEN": True, "HAS_SHARED": False, "HAS_EMBEDDING": False}
    reads, writes = pointers_touched(group_norm.moments_kernel, options)
    assert (reads, writes) == ({"hidden_ptr"}, {"partial_ptr"})


def test_the_published_form_runs_every_layer_once():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS["tiny"])
    kinds = launches.by_kind(launches.count("published", "tiny", latent_size=16))
    convolutions = sum(isinstance(layer, torch.nn.Conv2d) for layer in unet.modules())
    linear = sum(isinstance(layer, torch.nn.Linear) for layer in unet.modules())
    assert kinds["convolution"][0] == convolutions
    # The time embedding's two layers run for the encoder and for the decoder.
    assert kinds["product"][0] == linear + 2


def test_tables_show_what_was_counted_or_why_not(monkeypatch):
    count_of = launches.count
    monkeypatch.setattr(
        launches, "count", lambda form, model, layout, size: _refusing(count_of, form, layout)
    )
    measured = launches.measure({"tiny": 16}, ["one-step"])["tiny"]
    lines = launches.rows(measured)
    counted = count_of("one-step", "tiny", "nchw", 16)
    assert lines[0][:3] == ["one-step", "nchw", f"{len(counted)}"]
    assert lines[1][:3] == ["one-step", "nhwc", "refused"]
    kinds = launches.kind_rows(measured["one-step"]["nchw"])
    assert sum(int(line[1]) for line in kinds) == len(counted)


def _refusing(count, form, layout):
    if layout == "nhwc":
        raise CudaError("refused")
    return count(form, "tiny", "nchw", 16)


def test_goals_say_by_how_much_they_are_missed_and_why():
    met = {"kernels": 500, "read": 4e9, "written": 2e9}
    missed = {"kernels": 1200, "read": 20e9, "written": 12e9}
    models = {"sd15": {"tiue": {"nhwc": met}}, "sdxl": {"tiue": {"nhwc": missed}}}
    first, second, why = launches.against_goals(models)
    assert "550 kernels and 6.5 GB; now 500 (-50) and 6.00 (-0.50)" in first
    assert "1,150 kernels and 33 GB; now 1,200 (+50) and 32.00 (-1.00)" in second
    assert launches.WHY_NOT in why
    assert launches.against_goals({"sd15": models["sd15"]}) == [first]
