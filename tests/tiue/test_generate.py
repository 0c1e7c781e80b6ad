"""`tiue generate` over any model, with what people attach to one."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import save_file

from tests.tiue.single_file import save_single_file
from tests.tiue.test_cli import generate, names, run
from tests.tiue.test_files import lora
from tests.tiue.tiny import tiny_autoencoder_tiny, tiny_pipeline, tiny_xl_parts
from tiue import TiUEPipeline, TiUEXLPipeline, one_pass
from tiue.errors import InputError
from tiue.generate.request import LoRA


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model in a folder, one in a file, two LoRAs, a VAE, a ControlNet and pictures."""
    folder = tmp_path_factory.mktemp("generate")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "model")
    pipe.save_pretrained(folder / "fp16", variant="fp16")
    save_single_file(pipe, folder / "model.safetensors")
    for index, name in enumerate(("a", "b")):
        save_file(lora(pipe, index), folder / f"{name}.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tiny_autoencoder_tiny().save_pretrained(folder / "vae")
        control = ControlNetModel.from_unet(
            pipe.unet, conditioning_embedding_out_channels=(8, 8, 16)
        )
        for parameter in control.controlnet_mid_block.parameters():
            torch.nn.init.normal_(parameter)
        control.save_pretrained(folder / "control")
    noise = np.random.default_rng(0).integers(0, 255, (26, 18, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "image.png")
    Image.fromarray(noise[::-1].copy()).save(folder / "edges.png")
    Image.fromarray(np.repeat([[0], [255]], 13, axis=0).repeat(18, 1).astype(np.uint8)).save(
        folder / "mask.png"
    )
    (folder / "text.png").write_text("no picture")
    (folder / "pickle.bin").write_bytes(b"\x80\x04")
    return folder


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def drawn(place: Path, output: Path, *arguments: Any, model: str = "model") -> np.ndarray:
    """The one picture of a command."""
    arguments = tuple(str(a).replace("{}", str(place)) for a in arguments)
    result = generate(place / model, output, "apple", *arguments)
    assert result.exit_code == 0, result.output
    return picture(output / "apple_seed0.png")


def expected(pipe: Any, prompt: str = "apple", **arguments: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(0)]
    found = pipe([prompt], generator=generator, **arguments).images[0]
    return np.asarray(found, dtype=int)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1


def test_one_file_draws_what_the_folder_draws(place, tmp_path):
    want = drawn(place, tmp_path / "folder")
    got = drawn(place, tmp_path / "file", "--config", "{}/model", model="model.safetensors")
    np.testing.assert_array_equal(got, want)
    variant = drawn(place, tmp_path / "variant", "--variant", "fp16", model="fp16")
    np.testing.assert_array_equal(variant, want)


def test_the_models_in_the_package_by_name(tmp_path, monkeypatch, caplog):
    by_default = run("generate", "apple", "--output", tmp_path / "a")
    by_name = run("generate", "apple", "--model", "openmoji", "--output", tmp_path / "b")
    assert by_default.exit_code == by_name.exit_code == 0, by_name.output
    drawn = [picture(tmp_path / side / "apple_seed0.png") for side in "ab"]
    assert (drawn[0] == drawn[1]).all()

    # The scenes model says which words it was never shown; its student is not distilled yet.
    missing = run("generate", "apple", "--model", "scenes", "--output", tmp_path / "c")
    if missing.exit_code:
        assert "python -m tiue.scenes.train" in missing.output
    asked = []

    def load(name, weights, dtype):
        asked.append((name, weights.parent.name))
        return TiUEPipeline(**tiny_pipeline().components)

    monkeypatch.setattr("tiue.generate.loading.load_student", load)
    prompt = "a small apple and a dragon"
    result = run("generate", prompt, "--model", "scenes", "--output", tmp_path / "d")
    assert result.exit_code == 0, result.output
    assert asked == [("scenes", "scenes")]
    (said,) = [r.getMessage() for r in caplog.records if "does not know" in r.getMessage()]
    assert "'dragon'" in said
    assert "'apple'" not in said


def test_sdxl(tmp_path):
    pipe = StableDiffusionXLPipeline(**tiny_xl_parts(), add_watermarker=False)
    pipe.save_pretrained(tmp_path / "model")
    result = generate(tmp_path / "model", tmp_path / "out", "apple", "--guidance-scale", 2)
    assert result.exit_code == 0, result.output
    want = expected(TiUEXLPipeline.from_pretrained(tmp_path / "model"), guidance_scale=2.0)
    assert_same(picture(tmp_path / "out" / "apple_seed0.png"), want)


def test_loras_and_their_weights(place, tmp_path):
    pipe = TiUEPipeline.from_pretrained(place / "model")
    for name in ("a", "b"):
        pipe.load_lora_weights(place, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    got = drawn(place, tmp_path, "--lora", "{}/a.safetensors:0.5", "--lora", "{}/b.safetensors")
    assert_same(got, expected(pipe))
    assert np.abs(got - expected(TiUEPipeline.from_pretrained(place / "model"))).max() > 1


def test_a_lora_and_its_weight_are_read():
    assert LoRA.parse("a.safetensors") == LoRA("a.safetensors", 1.0)
    assert LoRA.parse("a.safetensors:-0.5") == LoRA("a.safetensors", -0.5)
    assert LoRA.parse(r"C:\loras\a.safetensors") == LoRA(r"C:\loras\a.safetensors", 1.0)
    assert LoRA.parse("owner/lora:2") == LoRA("owner/lora", 2.0)
    for text in ("", ":0.5"):
        with pytest.raises(InputError, match="names no file"):
            LoRA.parse(text)
    for text in ("a.safetensors:nan", "a.safetensors:-inf"):
        with pytest.raises(InputError, match="no finite number"):
            LoRA.parse(text)


def test_guidance_and_another_vae(place, tmp_path):
    from diffusers import AutoencoderTiny

    pipe = TiUEPipeline.from_pretrained(
        place / "model", vae=AutoencoderTiny.from_pretrained(place / "vae")
    )
    want = expected(pipe, negative_prompt="pear", guidance_scale=3.0)
    options = ("--negative-prompt", "pear", "--guidance-scale", 3, "--vae", "{}/vae")
    assert_same(drawn(place, tmp_path, *options), want)


IMAGE = ("--image", "{}/image.png", "--strength", 0.6)
MASK = ("--mask", "{}/mask.png")
CONTROL = ("--controlnet", "{}/control", "--control-image", "{}/edges.png")
PICTURES = {
    "image": (StableDiffusionImg2ImgPipeline, IMAGE),
    "mask": (StableDiffusionInpaintPipeline, IMAGE + MASK),
    "controlnet": (StableDiffusionControlNetPipeline, CONTROL),
    "controlnet_over_image": (StableDiffusionControlNetImg2ImgPipeline, IMAGE + CONTROL),
}


@pytest.mark.parametrize("task", PICTURES)
def test_pictures_to_begin_with(place, tmp_path, task):
    cls, options = PICTURES[task]
    parts, arguments = {}, {}
    size = (16, 24)  # of 18 x 26, in whole latents
    image, edges, mask = (
        Image.open(place / f"{name}.png").resize(size) for name in ("image", "edges", "mask")
    )
    if "--image" in options:
        arguments |= {"image": [image], "strength": 0.6}
    if "--mask" in options:
        arguments |= {"mask_image": [mask], "height": size[1], "width": size[0]}
    if "--controlnet" in options:
        parts["controlnet"] = ControlNetModel.from_pretrained(place / "control")
        arguments["control_image" if "image" in arguments else "image"] = [edges]
    plain = TiUEPipeline.from_pretrained(place / "model")
    want = expected(one_pass(cls.from_pipe(plain, **parts)), **arguments)
    got = drawn(place, tmp_path, *options)
    assert got.shape == (24, 16, 3)
    assert_same(got, want)


def test_a_picture_over_an_image_with_a_tiny_vae(place, tmp_path):
    """The embedded model's kind, which `from_pipe` takes along only when it is told to."""
    plain = drawn(place, tmp_path / "plain", "--vae", "{}/vae", "--height", 24, "--width", 16)
    over = drawn(place, tmp_path / "over", "--vae", "{}/vae", *IMAGE)
    assert over.shape == plain.shape == (24, 16, 3)
    assert np.abs(over - plain).max() > 1


def test_several_pictures_over_one_image(place, tmp_path):
    one = drawn(place, tmp_path / "one", *IMAGE)
    arguments = [str(a).replace("{}", str(place)) for a in IMAGE]
    result = generate(
        place / "model", tmp_path / "two", "apple", "pear", "-n", 2, *arguments, "--height", 24
    )
    assert result.exit_code == 0, result.output
    assert len(names(tmp_path / "two")) == 5
    assert_same(picture(tmp_path / "two" / "apple_seed0.png"), one)


def test_compile_asks_for_openvino_on_a_cpu(place, tmp_path, monkeypatch):
    asked = []  # converting takes minutes; tests/tiue/compiled does so
    monkeypatch.setattr(TiUEPipeline, "compile", lambda _self, backend: asked.append(backend))
    drawn(place, tmp_path, "--compile")
    assert asked == ["openvino"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{}/none.safetensors"], "there is no file"),
        (["--model", "{}/pickle.bin"], "convert it"),
        (["--model", "{}/a.safetensors", "--config", "{}/model"], "cannot load"),
        (["--model", "{}/fp16"], "variant='fp16'"),
        (["--model", "{}/model", "--variant", "fp8"], "fp8"),
        (["--model", "{}/model", "--config", "{}/model"], "--config is for"),
        (["--model", "{}/model.safetensors", "--variant", "fp16"], "--model is one file"),
        (["--variant", "fp16"], "--variant is of a --model"),
        (["--lora", "{}/a.safetensors"], "--lora needs the --model"),
        (["--model", "{}/model", "--lora", "{}/none.safetensors"], "there is no LoRA"),
        (["--model", "{}/model", "--lora", "{}/pickle.bin"], "weights_only=True"),
        (["--model", "{}/model", "--lora", "{}/model.safetensors"], "LoRA"),
        (["--model", "{}/model", "--negative-prompt", "pear"], "--guidance-scale above 1"),
        (["--model", "{}/model", "--strength", "0.5"], "--strength is of an --image"),
        (["--image", "{}/image.png", "--strength", "1.5"], "--strength is above 0"),
        (["--image", "{}/none.png"], "there is no picture"),
        (["--image", "{}/text.png"], "no picture that can be read"),
        (["--mask", "{}/mask.png"], "--mask needs the --image"),
        (["--model", "{}/model", "--controlnet", "{}/control"], "needs the --control-image"),
        (["--control-image", "{}/edges.png"], "needs a --controlnet"),
        (["--controlnet", "{}/control", "--control-image", "{}/edges.png"], "needs the --model"),
        (
            ["--model", "{}/model", "--controlnet", "{}/vae", "--control-image", "{}/edges.png"],
            "holds a AutoencoderTiny",
        ),
        (["--model", "{}/model", "--vae", "{}/none"], "there is no folder"),
        (["--model", "{}/model", "--vae", "{}/model/unet"], "no AutoencoderKL"),
        (["--vae", "tiny"], "--vae tiny is for a --model"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_exit_code_2(place, tmp_path, arguments, message):
    arguments = [argument.replace("{}", str(place)) for argument in arguments]
    result = run("generate", "apple", "--output", tmp_path, "--device", "cpu", *arguments)
    assert result.exit_code == 2, result.output
    assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", result.stderr), result.stderr
    assert names(tmp_path) == []
