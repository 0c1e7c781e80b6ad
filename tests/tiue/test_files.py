"""Files that people fetch: checkpoints, variants and adapters; pickles and wrong ones refused."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file

from testing import published_form
from tests.tiue.single_file import save_single_file
from tests.tiue.tiny import TEXT_DIM, tiny_pipeline
from tests.tiue.unets import make_inputs, make_unet
from tiue import TiUEPipeline, TiUEUNet, one_pass
from tiue.errors import CheckpointError, InputError


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "model"
    stock.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def single_file(stock, tmp_path_factory) -> Path:
    return save_single_file(stock, tmp_path_factory.mktemp("files") / "model.safetensors")


class Harm:
    """What a pickle does when it is loaded."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.fixture
def pickled(tmp_path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(pickle.dumps(Harm()))
    return path


def equal(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = module.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_checkpoint_of_one_file(stock, folder, single_file):
    pipe = TiUEPipeline.from_single_file(single_file, config=str(folder))
    for part in ("unet", "vae", "text_encoder"):
        assert equal(getattr(pipe, part), getattr(stock, part)), part
    unet = TiUEUNet.from_single_file(str(single_file), config=str(folder), subfolder="unet")
    assert type(unet) is TiUEUNet
    assert equal(unet, stock.unet)


@pytest.mark.parametrize("cls", [TiUEPipeline, TiUEUNet])
def test_single_files_that_are_refused(cls, folder, tmp_path, pickled):
    refused = {
        "there is no file": tmp_path / "missing.safetensors",
        "convert it": pickled,
        "from_pretrained": folder,
    }
    disguised, damaged = tmp_path / "pickle.safetensors", tmp_path / "damaged.safetensors"
    shutil.copy(pickled, disguised)
    damaged.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    refused |= {"is a pickle": disguised, "damaged": damaged}
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(1)}, other)
    refused["cannot load"] = other
    for message, path in refused.items():
        with pytest.raises(CheckpointError, match=message):
            cls.from_single_file(str(path), config=str(folder), local_files_only=True)


def test_a_folder_of_a_variant_alone_names_it(stock, tmp_path):
    stock.save_pretrained(tmp_path, variant="fp16")
    for load in (TiUEPipeline.from_pretrained, lambda p: TiUEUNet.from_pretrained(p / "unet")):
        with pytest.raises(CheckpointError, match="variant='fp16'"):
            load(tmp_path)
    assert equal(TiUEPipeline.from_pretrained(tmp_path, variant="fp16").unet, stock.unet)
    assert equal(TiUEUNet.from_pretrained(tmp_path / "unet", variant="fp16"), stock.unet)


def lora(pipe: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a LoRA as diffusers saves them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("to_q", "conv1")):
            out, into, *kernel = module.weight.shape
            for side, shape in (("A", (2, into, *kernel)), ("B", (out, 2, *[1] * len(kernel)))):
                noise = torch.randn(shape, generator=generator)
                weights[f"unet.{name}.lora_{side}.weight"] = 0.3 * noise
    return weights


def ip_adapter(pipe: Any) -> dict[str, torch.Tensor]:
    """Weights of an IP-Adapter for four image tokens."""
    weights = {
        "image_proj.proj.weight": torch.ones(4 * TEXT_DIM, 8),
        "image_proj.proj.bias": torch.ones(4 * TEXT_DIM),
        "image_proj.norm.weight": torch.ones(TEXT_DIM),
        "image_proj.norm.bias": torch.ones(TEXT_DIM),
    }
    crosses = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for index, name in enumerate(crosses):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for side in ("k", "v"):
            weights[f"ip_adapter.{2 * index + 1}.to_{side}_ip.weight"] = torch.ones(width, TEXT_DIM)
    return weights


LOADS = {
    "LoRA": lambda pipe, path: pipe.load_lora_weights(path.parent, weight_name=path.name),
    "IP-Adapter": lambda pipe, path: pipe.load_ip_adapter(
        str(path.parent), "", path.name, image_encoder_folder=None
    ),
    "textual inversion": lambda pipe, path: pipe.load_textual_inversion(
        path.parent, weight_name=path.name, token="<new>"
    ),
}
WEIGHTS = {
    "LoRA": lora,
    "IP-Adapter": ip_adapter,
    "textual inversion": lambda _pipe: {"<new>": torch.ones(TEXT_DIM)},
}


@pytest.mark.parametrize("kind", LOADS)
def test_adapters_in_safetensors_load_and_pickles_do_not(kind, tmp_path):
    pipe = one_pass(tiny_pipeline())
    before = pipe("apple", generator=torch.Generator().manual_seed(0), output_type="latent").images
    for name in ("weights.bin", "weights.safetensors"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Harm()))
        with pytest.raises(CheckpointError, match=r"(?s)weights_only=True.*save_file"):
            LOADS[kind](pipe, path)
    save_file(WEIGHTS[kind](pipe), tmp_path / "weights.safetensors")
    LOADS[kind](pipe, tmp_path / "weights.safetensors")
    more = {}
    if kind == "IP-Adapter":
        more = {"ip_adapter_image_embeds": [torch.ones(1, 1, 8)]}
    prompt = "<new> apple" if kind == "textual inversion" else "apple"
    after = pipe(
        prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **more
    ).images
    assert not torch.equal(before, after)


def test_a_pickled_lora_that_is_named_by_itself(stock, pickled, tmp_path):
    pipe = TiUEPipeline.from_pipe(stock)
    with pytest.raises(CheckpointError, match="pickled LoRA"):
        pipe.load_lora_weights(str(pickled))
    with pytest.raises(CheckpointError, match="pickled LoRA"):
        pipe.load_lora_weights(pickled.parent)
    with pytest.raises(InputError, match="use_safetensors"):
        pipe.load_lora_weights(tmp_path / "a.safetensors", use_safetensors=False)
    with pytest.raises(CheckpointError, match="cannot load"):
        pipe.load_lora_weights(tmp_path / "missing", weight_name="a.safetensors")


def test_a_folder_saved_with_a_lora_in_it(tmp_path):
    stock = tiny_pipeline()
    stock.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    stock.save_pretrained(tmp_path)
    for load in (TiUEPipeline.from_pretrained, lambda p: TiUEUNet.from_pretrained(p / "unet")):
        with pytest.raises(CheckpointError, match=r"fuse_lora\(\)"):
            load(tmp_path)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@torch.no_grad()
def test_quantised_weights_are_left_to_their_layers(config):
    quantization = pytest.importorskip("torchao.quantization")
    unet = make_unet("sd1").float()
    quantization.quantize_(
        unet.up_blocks,
        getattr(quantization, config)(),
        lambda module, _name: type(module) is torch.nn.Linear,
    )
    given = {name: value.float() for name, value in make_inputs().items()}
    timesteps = torch.tensor([751, 501, 251])
    inputs = (given["latents"], timesteps, given["prompt_embeds"])
    want = published_form.predict_noise(unet, *inputs)
    got = TiUEUNet.from_unet(unet).predict_noise(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
