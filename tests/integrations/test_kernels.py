"""The folder that `make kernels` writes, loaded by Hugging Face's `kernels` as anyone would."""

import copy
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from kernels._rust import Build
from kernels.layer import use_kernel_forward_from_hub
from torch import nn
from typer.testing import CliRunner

import tiue_kernels.cuda
import tiue_kernels.functional
from integrations.kernels.write import app, variant, write
from tests.conftest import one_at_a_time
from tiue_kernels import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("kernels") / "out"
    write(place)
    return place


class NormThenSiLU(nn.GroupNorm):
    def forward(self, x):
        return nn.functional.silu(super().forward(x))


# Classes of their own: the mark is left on a class for good.
Norm = use_kernel_forward_from_hub("GroupNormSiLU")(type("Norm", (NormThenSiLU,), {}))


class MarkedGEGLU(GEGLU):
    pass


class MarkedResnet(ResnetBlock2D):
    pass


use_kernel_forward_from_hub("GEGLU")(MarkedGEGLU)
use_kernel_forward_from_hub("ResnetBlock2D")(MarkedResnet)

CASES = {
    "GEGLU": (lambda: MarkedGEGLU(12, 20), [(3, 5, 12)]),
    "ResnetBlock2D": (
        lambda: MarkedResnet(in_channels=8, out_channels=16, temb_channels=6, groups=4),
        [(2, 8, 6, 5), (2, 6)],
    ),
    "GroupNormSiLU": (lambda: Norm(4, 8), [(2, 8, 6, 5)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_the_folder_computes_what_it_stands_for(folder, name):
    torch.manual_seed(0)
    make, shapes = CASES[name]
    plain = make().double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    repository = LocalLayerRepository(folder, layer_name=name)
    fused = copy.deepcopy(plain)
    with use_kernel_mapping({name: {"cpu": repository}}):
        fused = kernelize(fused, mode=Mode.TRAINING, device="cpu", use_fallback=False)
    assert fused.forward.__func__ is not type(fused).forward
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    wanted = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    got, want = fused(*inputs), plain(*wanted)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(want)
    got.backward(grad)
    want.backward(grad)
    pairs = zip([*inputs, *fused.parameters()], [*wanted, *plain.parameters()], strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_its_operators_are_its_own(folder):
    module = LocalLayerRepository(folder, layer_name="GEGLU").load().forward.__globals__["geglu"]
    name = json.loads((folder / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
    assert module.__module__.startswith(f"{name}.functional")
    assert module is not tiue_kernels.functional.geglu
    mark = name.removeprefix("tiue_kernels_")
    assert hasattr(torch.ops, f"tiue_{mark}")
    assert getattr(torch.ops, f"tiue_{mark}").geglu_fwd is not torch.ops.tiue.geglu_fwd
    texts = [path.read_text("utf-8") for path in (folder / "build" / "torch-cuda").rglob("*.py")]
    assert not [text for text in texts if re.search(r"\btiue_kernels\b|\btiue::", text)]


def test_build_toml_is_one(folder):
    assert Build.open(folder) is not None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    place = tmp_path_factory.mktemp("compiled") / "out"
    write(place, ("cpu",))
    return place


def test_a_compiled_variant_is_preferred_and_runs_its_own_library(compiled, monkeypatch):
    monkeypatch.delenv("TIUE_CPU", raising=False)  # read when the variant is imported
    name = "ResnetBlock2D"
    repository = LocalLayerRepository(compiled, layer_name=name)
    torch.manual_seed(0)
    plain = MarkedResnet(in_channels=32, out_channels=32, temb_channels=None, groups=4)
    inputs = (torch.randn(4, 32, 32, 32), None)
    with torch.no_grad():
        want = plain(*inputs)
        with use_kernel_mapping({name: {"cpu": repository}}):
            fused = kernelize(plain, mode=Mode.INFERENCE, device="cpu", use_fallback=False)
        got = fused(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    package = fused.forward.__func__.__module__.partition(".")[0]
    cpu = importlib.import_module(f"{package}.cpu")
    assert package != "tiue_kernels"
    assert Path(cpu.__file__).parents[1].name == variant("cpu")
    assert cpu.loaded(), cpu.why_not()


def test_what_cannot_be_compiled_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("CXX", "no-such-compiler")
    runner, arguments = CliRunner(), [str(tmp_path / "out"), "--compile"]
    missing, unknown = (runner.invoke(app, [*arguments, target]) for target in ("cpu", "gpu"))
    assert missing.exit_code == 1
    assert str(missing.exception or missing.output).count("CXX=no-such-compiler was not found") == 1
    assert unknown.exit_code == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_two_libraries_of_gpu_kernels_live_in_one_process(host_library, tmp_path):
    namespace = "tiue_another_cuda"
    library = torch.library.Library(namespace, "DEF")
    for operator, schemas in tiue_kernels.cuda.SCHEMAS.items():
        for direction, schema in schemas.items():
            library.define(f"{operator}_{direction}{schema}")
    with one_at_a_time(build.cache_folder()):
        another = build.build("host", tmp_path, namespace=namespace)
    torch.ops.load_library(another)
    query = torch.randn(1, 8, 8)
    arguments = (query, query, query, 1, 1.0, None)
    ours, other = (
        getattr(torch.ops, name).cross_timestep_attention_fwd(*arguments)
        for name in ("tiue_cuda", namespace)
    )
    assert ours[0].equal(other[0])


def test_the_same_package_is_written_the_same(folder, tmp_path):
    name = write(tmp_path / "again")
    assert (folder / "build" / "torch-cpu" / "metadata.json").read_text().count(name) == 1
