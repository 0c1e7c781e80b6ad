"""Folders in, folders out, and every folder and argument that is refused."""

import json
import pickle
import socket
import warnings

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)

from tests.tiue.tiny import tiny_pipeline, tiny_scheduler, tiny_unet
from tiue import TiUEPipeline, TiUEUNet
from tiue.errors import ArchitectureError, CheckpointError, InputError, SchedulerError


def picture(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("red apple", generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture
def folder(stock, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def edit_index(folder, **changes) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_unet(folder, **changes) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_loads_a_stock_folder_and_saves_one_that_diffusers_loads(stock, folder, tmp_path):
    pipe = TiUEPipeline.from_pretrained(folder)
    want = picture(pipe)
    assert isinstance(pipe.unet, TiUEUNet)
    assert torch.equal(picture(TiUEPipeline.from_pipe(stock)), want)

    saved = tmp_path / "saved"
    pipe.save_pretrained(saved)
    assert torch.equal(picture(TiUEPipeline.from_pretrained(saved)), want)
    for loader in (StableDiffusionPipeline, DiffusionPipeline):
        plain = loader.from_pretrained(saved)
        assert type(plain) is StableDiffusionPipeline
        assert torch.equal(picture(TiUEPipeline.from_pipe(plain)), want)
        state, stock_state = plain.unet.state_dict(), stock.unet.state_dict()
        assert state.keys() == stock_state.keys()
        assert all(torch.equal(state[key], stock_state[key]) for key in state)
    index = json.loads((saved / "model_index.json").read_text())
    assert index == json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize("library", ["tiue", "tiue.unet"])
def test_loads_a_folder_that_names_the_student(stock, folder, library):
    edit_index(folder, unet=[library, "TiUEUNet"])
    pipe = TiUEPipeline.from_pretrained(folder)
    assert torch.equal(picture(pipe), picture(TiUEPipeline.from_pipe(stock)))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_loads_in_half_precision_and_nothing_warns(folder, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = TiUEPipeline.from_pretrained(folder, **{name: torch.bfloat16})
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_leaves_the_safety_checker_out(folder):
    edit_index(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert TiUEPipeline.from_pretrained(folder).safety_checker is None


def test_takes_components_in_the_place_of_the_folders(folder, tmp_path):
    torch.manual_seed(1)
    student = TiUEUNet.from_unet(tiny_unet())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert TiUEPipeline.from_pretrained(folder, unet=student).unet is student


def test_from_pipe_shares_everything():
    stock = tiny_pipeline().to(dtype=torch.bfloat16)
    for cls in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, TiUEPipeline):
        pipe = TiUEPipeline.from_pipe(cls(**stock.components, requires_safety_checker=False))
        assert pipe.vae is stock.vae
        own = dict(pipe.unet.named_parameters())
        assert own.keys() == dict(stock.unet.named_parameters()).keys()
        assert all(own[name] is value for name, value in stock.unet.named_parameters())
        assert pipe.unet.dtype == torch.bfloat16
    picture(pipe)


def test_stable_diffusions_own_scheduler_becomes_ddim(stock, folder, caplog):
    pndm = tiny_scheduler(PNDMScheduler, skip_prk_steps=True)
    pndm.save_pretrained(folder / "scheduler")
    edit_index(folder, scheduler=["diffusers", "PNDMScheduler"])
    pipe = TiUEPipeline.from_pretrained(folder)
    assert caplog.text.count("PNDMScheduler") == 1
    # The method's own schedule at K = 4: DDIM, leading spacing, offset 1.
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [751, 501, 251, 1]
    assert torch.equal(picture(pipe), picture(TiUEPipeline.from_pipe(stock)))


@pytest.mark.parametrize("cls", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_a_scheduler_that_draws_noise(folder, cls):
    noisy = tiny_scheduler(cls)
    with pytest.raises(SchedulerError):
        picture(TiUEPipeline.from_pretrained(folder, scheduler=noisy))
    pipe = TiUEPipeline.from_pipe(tiny_pipeline(scheduler=noisy))
    picture(pipe)
    pipe.scheduler = noisy
    with pytest.raises(SchedulerError):
        picture(pipe)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a local name was looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", ["missing", "./missing/model", "{tmp}/missing", "{tmp}"])
def test_no_such_folder(no_network, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder|no model_index\.json"):
        TiUEPipeline.from_pretrained(name.format(tmp=tmp_path))


def test_no_such_hub_model(tmp_path):
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        TiUEPipeline.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)


def test_a_unet_alone(folder):
    with pytest.raises(CheckpointError, match=r"unet=TiUEUNet\.from_pretrained"):
        TiUEPipeline.from_pretrained(folder / "unet")


def test_a_file(folder):
    with pytest.raises(CheckpointError, match="from_single_file"):
        TiUEPipeline.from_pretrained(folder / "model_index.json")


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_index(folder, text):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        TiUEPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "_class_name": "StableDiffusionXLPipeline",
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
            },
            r"StableDiffusionXLPipeline \(has text_encoder_2, tokenizer_2\)",
        ),
        (
            {
                "_class_name": "FluxPipeline",
                "transformer": ["diffusers", "FluxTransformer2DModel"],
                "unet": [None, None],
            },
            r"FluxPipeline \(has transformer; lacks unet\)",
        ),
        ({"unet": ["diffusers", "UNet2DModel"]}, "its unet is a UNet2DModel"),
        ({"vae": [None, None]}, "lacks vae"),
        ({"_class_name": ["my_pipeline", "MyPipeline"]}, "code of its own"),
    ],
    ids=["sdxl", "flux", "unconditional", "no-vae", "custom-code"],
)
def test_another_architecture(folder, changes, message):
    edit_index(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        TiUEPipeline.from_pretrained(folder)


def test_from_pipe_of_another_architecture():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    other = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(CheckpointError, match="DDPMPipeline"):
        TiUEPipeline.from_pipe(other)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_are_not_loaded(folder, part):
    class Harm:
        def __reduce__(self):
            return pytest.fail, ("a pickle was loaded",)

    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
        path.with_suffix(".bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match="convert it"):
        TiUEPipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="use_safetensors"):
        TiUEPipeline.from_pretrained(folder, use_safetensors=False)


def test_a_single_pickle_is_not_loaded(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert it"):
        TiUEPipeline.from_single_file(path)


def test_missing_and_damaged_weights(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load"):
        TiUEPipeline.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"vae holds no \.safetensors"):
        TiUEPipeline.from_pretrained(folder)


def test_weights_of_another_size(folder):
    edit_unet(folder, block_out_channels=[16, 64])
    with pytest.raises(CheckpointError, match=r"unet of .* of another shape"):
        TiUEPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (
            {
                "down_block_types": ("DownBlock2D",) * 2,
                "up_block_types": ("UpBlock2D",) * 2,
                "mid_block_type": None,
            },
            "cross-attention",
        ),
        ({"in_channels": 9}, "inpainting"),
        ({"cross_attention_dim": 24}, "width"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "SDXL",
        ),
    ],
    ids=["no-cross-attention", "inpainting", "another-text-encoder", "sdxl"],
)
def test_unets_that_do_not_fit(folder, unet, message):
    with pytest.raises(ArchitectureError, match=message):
        TiUEPipeline.from_pretrained(folder, unet=tiny_unet(**unet))
    with pytest.raises(ArchitectureError, match=message):
        TiUEPipeline.from_pipe(tiny_pipeline(unet=tiny_unet(**unet)))


TEXT = torch.zeros(1, 16, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "at least one"),
        ({"prompt": ["a", 1]}, "at least one"),
        ({"prompt": 3}, "prompt"),
        ({"prompt_embeds": TEXT}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": TEXT[0]}, r"\[prompts, tokens, 32\]"),
        ({"prompt": None, "prompt_embeds": TEXT[..., :24]}, r"\[prompts, tokens, 32\]"),
        ({"height": 33}, "the nearest are 32 and 36"),
        ({"width": 3}, "the nearest are 4 and 8"),
        ({"height": -32}, "multiple of 4"),
        ({"height": 0}, "multiple of 4"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\[1, 4, height, width\]"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"\[1, 4, height, width\]"),
        ({"latents": torch.zeros(4, 8, 8)}, r"\[1, 4, height, width\]"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 64}, "leave height and width out"),
        ({"num_decoder_steps": 0}, "num_decoder_steps"),
        ({"num_decoder_steps": -1}, "num_decoder_steps"),
        ({"num_decoder_steps": 1001}, "1000"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1"),
        ({"output_type": "jpg"}, "output_type"),
        ({"skip_below": 3.0}, "2.492"),
        (
            {"negative_prompt": ["a", "b"], "guidance_scale": 2.0},
            "2 texts in negative_prompt for 1",
        ),
        ({"negative_prompt": "a", "negative_prompt_embeds": TEXT}, "negative_prompt"),
        ({"ip_adapter_image_embeds": TEXT, "prompt": "a"}, "list"),
    ],
)
def test_bad_arguments(stock, arguments, message):
    pipe = TiUEPipeline.from_pipe(stock)
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "red apple"} | arguments)


def test_a_prompt_without_a_text_encoder(stock):
    pipe = TiUEPipeline.from_pipe(stock, text_encoder=None, tokenizer=None)
    with pytest.raises(InputError, match="no text encoder"):
        pipe("red apple")
    with pytest.raises(InputError, match="negative_prompt_embeds"):
        pipe(prompt_embeds=TEXT, guidance_scale=2.0)
    assert pipe(prompt_embeds=TEXT, clip_skip=1, output_type="latent").images.isfinite().all()


def test_a_unet_of_no_size(stock):
    pipe = TiUEPipeline.from_pipe(stock, unet=tiny_unet(sample_size=None))
    with pytest.raises(InputError, match="give height in pixels"):
        pipe("red apple")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red apple", height=16, width=24).images[0].size == (24, 16)
