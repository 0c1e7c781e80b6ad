"""The command line, run in this process over a tiny model folder."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from tests.tiue.tiny import tiny_pipeline
from tiue import TiUEPipeline
from tiue.cli import app
from tiue.compiled.openvino import own_signal_stack
from tiue_kernels.info import report


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def run(*arguments) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def generate(model, output, *arguments):
    return run("generate", *arguments, "--model", model, "--output", output, "--device", "cpu")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_makes_a_picture_of_each_prompt_and_a_sheet(model, tmp_path):
    out = tmp_path / "new" / "out"
    result = generate(model, out, "red apple", "rocket", "--seed", 7)
    assert result.exit_code == 0, result.output
    assert names(out) == ["contact_sheet.png", "red-apple_seed7.png", "rocket_seed7.png"]
    pipe = TiUEPipeline.from_pretrained(model)
    want = pipe("rocket", generator=torch.Generator().manual_seed(7)).images[0]
    got = Image.open(out / "rocket_seed7.png")
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(want, dtype=int)).max() <= 1
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width > 2 * 128
    for stage in ("text encoder", "encoder", "decoder", "VAE", "total"):
        assert re.search(rf"^{stage} +\d+\.\d{{3}} s", result.output, re.MULTILINE)
    assert str(out / "rocket_seed7.png") in result.output


def test_pictures_do_not_depend_on_their_company(model, tmp_path):
    generate(model, tmp_path / "a", "rocket", "red apple", "--num-images", 2, "--batch-size", 3)
    generate(model, tmp_path / "b", "red apple", "--seed", 1)
    together = np.asarray(Image.open(tmp_path / "a" / "red-apple_seed1.png"), dtype=int)
    alone = np.asarray(Image.open(tmp_path / "b" / "red-apple_seed1.png"), dtype=int)
    assert len(names(tmp_path / "a")) == 5
    assert np.abs(together - alone).max() <= 1
    other = np.asarray(Image.open(tmp_path / "a" / "red-apple_seed0.png"), dtype=int)
    assert np.abs(together - other).max() > 1


def test_options_reach_the_pipeline(model, tmp_path):
    result = generate(
        model,
        tmp_path,
        "sun",
        "--height",
        16,
        "--width",
        24,
        "--dtype",
        "bfloat16",
        "--num-decoder-steps",
        2,
        "--guidance-scale",
        3,
        "--skip-below",
        0.05,
    )
    assert result.exit_code == 0, result.output
    picture = Image.open(tmp_path / "sun_seed0.png")
    assert picture.size == (24, 16)
    pipe = TiUEPipeline.from_pretrained(model, dtype=torch.bfloat16)
    want = pipe(
        "sun",
        height=16,
        width=24,
        num_decoder_steps=2,
        guidance_scale=3.0,
        skip_below=0.05,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(want))


def test_prompts_of_path_characters_stay_in_the_folder(model, tmp_path):
    out = tmp_path / "deep" / "out"
    result = generate(model, out, "../../etc/passwd", "/etc/passwd", "..", "etc: passwd?")
    assert result.exit_code == 0, result.output
    assert names(out) == [
        "contact_sheet.png",
        "etc-passwd_seed0.png",
        "etc-passwd_seed0_2.png",
        "etc-passwd_seed0_3.png",
        "image_seed0.png",
    ]
    assert names(tmp_path) == ["deep"]
    assert names(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sun", "--height", "33"], "height must be a positive multiple of 4"),
        (["sun", "--num-decoder-steps", "1001"], "1000"),
        (["sun", "--device", "cuda:99"], "no device 'cuda:99' here"),
        (["sun", "--device", "toaster"], "no device 'toaster' here"),
        (["sun", "--skip-below", "9"], "drops every decoder row"),
        (["sun", " "], "a prompt is empty"),
        (["sun", "--model", "/missing/model"], "no folder /missing/model"),
        (["sun", "--output", "{model}/model_index.json"], "cannot write to"),
        (["sun", "--output", "{model}/model_index.json/below"], "cannot write to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, tmp_path, arguments, message):
    arguments = [argument.format(model=model) for argument in arguments]
    defaults = {"--model": model, "--output": str(tmp_path)}
    extra = [part for pair in defaults.items() if pair[0] not in arguments for part in pair]
    result = run("generate", *arguments, *extra)
    assert result.exit_code == 2
    assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", result.stderr)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["sun", "--dtype", "int8"], ["sun", "--num-images", "0"], ["sun", "--colour", "red"]],
)
def test_usage_errors(arguments):
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_a_nan_is_one_line_and_exit_code_1(tmp_path):
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "model")
    result = generate(tmp_path / "model", tmp_path / "out", "sun")
    assert result.exit_code == 1
    assert re.fullmatch(r"error: the images hold NaN[^\n]*\n", result.stderr)
    assert names(tmp_path / "out") == []


def test_info_names_versions_device_and_kernels():
    result = run("info")
    assert result.exit_code == 0
    assert result.output.endswith(f"\n\n{report()}\n")
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", result.output, re.MULTILINE)
    assert re.search(r"^device +\w+", result.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["generate", "distill", "evaluate", "compare", "info"]),
        (["generate"], ["--seed", "--output", "--model", "--num-decoder-steps", "PROMPTS"]),
        (["distill"], ["--teacher", "--prompts", "--output"]),
        (["evaluate"], ["--model", "--preset", "--reference", "--skip-unreadable"]),
        (["compare"], ["A.JSON", "B.JSON", "--anyway"]),
    ],
)
def test_help_comes_without_loading_torch(command, words):
    program = (
        "import sys; from tiue.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: print('torch loaded' if 'torch' in sys.modules else '')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert all(word in result.stdout for word in words)
    assert "torch loaded" not in result.stdout


def exported_inputs(pipe) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Noise, text, and the pictures that the pipeline makes of them."""
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    text = pipe.encode_prompt(["red apple", "rocket"], torch.device("cpu"), 1, False)[0].detach()
    want = pipe(prompt_embeds=text, latents=noise, num_decoder_steps=3, output_type="np").images
    return noise, text, want


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_export_writes_a_program_that_draws_the_same(model, tmp_path, kind):
    path = tmp_path / ("tiue.pt2" if kind == "torch" else "tiue.xml")
    sizes = ["--batch", 2, "--height", 32, "--width", 48, "-k", 3]
    if kind == "openvino":
        openvino = pytest.importorskip("openvino")
    result = run("export", model, "--output", path, "--format", kind, *sizes)
    assert result.exit_code == 0, result.output
    assert "[2, 4, 8, 12]" in result.output
    noise, text, want = exported_inputs(TiUEPipeline.from_pretrained(model))
    if kind == "torch":
        got = torch.export.load(path).module()(noise, text).detach().numpy()
    else:
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        with own_signal_stack():
            program = openvino.Core().compile_model(path, "CPU", settings)
        got = program([noise.numpy(), text.numpy()])[0]
    np.testing.assert_allclose(got.transpose(0, 2, 3, 1), want, rtol=0, atol=2e-5)
    assert names(tmp_path) == (["tiue.pt2"] if kind == "torch" else ["tiue.bin", "tiue.xml"])


def test_export_says_what_is_wrong(model, tmp_path):
    result = run("export", model, "--output", tmp_path / "a.pt2", "--height", 30)
    assert result.exit_code == 2
    assert "height must be a positive multiple of 4" in result.output
    result = run("export", model, "--output", tmp_path / "a.onnx")
    assert result.exit_code == 2
    assert ".pt2" in result.output
    assert names(tmp_path) == []
