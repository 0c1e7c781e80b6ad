"""`pipe.compile`: the same pictures, whatever changes between two calls."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig

import tiue
from tests.tiue.compiled.stand_in import StandInRecorder
from tests.tiue.tiny import tiny_autoencoder_tiny, tiny_pipeline
from tiue import TiUEPipeline
from tiue.compiled import graphs
from tiue.errors import InputError

PROMPTS = ["red apple", "rocket"]


@pytest.fixture
def recorder(monkeypatch) -> StandInRecorder:
    """What `pipe.compile()` records with, in the place of a GPU."""
    stand_in = StandInRecorder()
    monkeypatch.setattr(graphs, "CudaRecorder", lambda: stand_in)
    return stand_in


def make(**components) -> TiUEPipeline:
    pipe = TiUEPipeline.from_pipe(tiny_pipeline(**components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    call = {"prompt": PROMPTS, "output_type": "np", "generator": generator} | arguments
    return pipe(**call).images


CALLS = {
    "plain": {},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "blue"},
    "size": {"height": 36, "width": 20},
    "three steps": {"num_decoder_steps": 3},
    "skip_below": {"skip_below": 0.05},
    "one prompt": {"prompt": "red apple"},
}


@pytest.mark.parametrize("vae", ["kl", "tiny"])
def test_one_graph_a_kind_of_call_and_the_same_pictures(recorder, vae: str) -> None:
    pipe = make(**({"vae": tiny_autoencoder_tiny()} if vae == "tiny" else {}))
    eager = {name: draw(pipe, **call) for name, call in CALLS.items()}
    assert pipe.compile() is pipe
    for _ in range(2):
        for name, call in CALLS.items():
            np.testing.assert_array_equal(draw(pipe, **call), eager[name])
    # A graph of the UNet for each kind, and of the VAE for each batch and size among them.
    assert len(recorder.recorded) == len(CALLS) + 3
    draw(pipe, guidance_scale=4.0)
    assert len(recorder.recorded) == len(CALLS) + 3
    latents = draw(pipe, output_type="latent")
    pipe._compiled = None
    assert torch.equal(draw(pipe, output_type="latent"), latents)


def _fused_lora(pipe: TiUEPipeline) -> None:
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    pipe.unet.fuse_lora(0.5)


CHANGES: dict[str, Callable[[TiUEPipeline], object]] = {
    "lora": lambda pipe: pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    ),
    "fused_lora": _fused_lora,
    "freeu": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "another_unet": lambda pipe: setattr(pipe, "unet", make(seed=5).unet),
    "another_vae": lambda pipe: setattr(pipe, "vae", make(seed=5).vae),
    "vae_weights": lambda pipe: pipe.vae.decoder.conv_out.bias.data.add_(0.5),
    "scheduler": lambda pipe: setattr(
        pipe, "scheduler", type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.02)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_leaves_a_stale_picture(recorder, change: str) -> None:
    compiled = make().compile()
    before = draw(compiled)
    torch.manual_seed(0)
    CHANGES[change](compiled)
    eager = TiUEPipeline.from_pipe(compiled)
    eager.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(compiled), draw(eager))
    assert not np.array_equal(draw(compiled), before)


def test_a_size_that_the_vae_does_not_divide_is_an_error(recorder) -> None:
    with pytest.raises(InputError, match="multiple of 4"):
        draw(make().compile(), height=30)


def test_the_stages_of_a_compiled_pipeline(recorder) -> None:
    pipe = make().compile()
    with pipe.record_timings() as timings:
        draw(pipe)
    assert list(timings) == ["text encoder", "one pass", "VAE"]


def embedded_pictures(backend: str | None) -> np.ndarray:
    pipe = tiue.load_openmoji()
    pipe.set_progress_bar_config(disable=True)
    if backend is not None:
        pipe.compile(backend)
    images = draw(pipe, prompt=["red apple", "rocket", "pizza"], output_type="pil")
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.parametrize("backend", ["openvino", "aot_eager"])
def test_pictures_of_the_embedded_model(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    assert np.abs(embedded_pictures(backend) - embedded_pictures(None)).max() <= 2


def test_pictures_of_the_embedded_model_by_the_cpu_library(request) -> None:
    expected = embedded_pictures(None)
    request.getfixturevalue("with_cpu_library")
    actual = embedded_pictures(None)
    assert (actual != expected).any()  # Winograd's sums are others
    assert np.abs(actual - expected).max() <= 2


def test_openvino_takes_a_lora() -> None:
    pytest.importorskip("openvino")
    pipe = make()
    CHANGES["lora"](pipe)
    expected = draw(pipe)
    pipe.compile("openvino")
    assert np.abs(draw(pipe) - expected).max() <= 1e-4
    assert all(len(call) == 1 for _, call in pipe._compiled._calls.values())
