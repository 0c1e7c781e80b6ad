"""Model folders that lack weights, hold others, or name code: refused before anything is drawn."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiue
from tests.tiue.tiny import tiny_pipeline
from tiue import TiUEPipeline, TiUEUNet
from tiue.distill import loading
from tiue.errors import (
    ArchitectureError,
    CheckpointError,
    InputError,
    SchedulerError,
    TiUEError,
)
from tiue.openmoji import load_openmoji_teacher

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
FIRST = {"unet": "conv_in", "vae": "decoder.conv_in", "text_encoder": "layers.0"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(stock, tmp_path):
    return shutil.copytree(stock, tmp_path / "model")


def edit_weights(folder, part, edit) -> int:
    """Write a part's file anew; returns how many tensors it lost."""
    path = folder / part / FILES[part]
    before = load_file(path)
    after = edit(dict(before))
    save_file({name: tensor.contiguous() for name, tensor in after.items()}, path)
    return len(before) - len(after)


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(word):
    return lambda weights: {name: x for name, x in weights.items() if word not in name}


@pytest.mark.parametrize("part", FILES)
def test_weights_that_are_missing(folder, part):
    count = edit_weights(folder, part, without(FIRST[part]))
    assert count
    with pytest.raises(
        CheckpointError, match=rf"{part} of .* lacks {count} weights? \(.*"
    ) as error:
        TiUEPipeline.from_pretrained(folder)
    assert str(error.value).count(FIRST[part]) == min(count, 3)


@pytest.mark.parametrize("part", FILES)
def test_a_file_without_tensors(folder, part):
    count = edit_weights(folder, part, lambda weights: {})
    with pytest.raises(
        CheckpointError, match=rf"{part} of .* lacks {count} weights \(.*, \.\.\.\)"
    ):
        TiUEPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", FILES)
def test_weights_of_another_shape(folder, part):
    def cut(weights):
        name = next(name for name in sorted(weights) if FIRST[part] in name)
        return weights | {name: weights[name][:-1]}

    edit_weights(folder, part, cut)
    with pytest.raises(CheckpointError, match=rf"{part} of .*1 weight \(.*\[.*\] for \[.*\]\)"):
        TiUEPipeline.from_pretrained(folder)


def test_a_config_with_more_layers_than_the_weights(folder):
    edit_json(folder / "text_encoder" / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"text_encoder .* lacks 16 weights"):
        TiUEPipeline.from_pretrained(folder)


def test_a_config_with_fewer_layers_is_said(folder, caplog):
    edit_json(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    TiUEPipeline.from_pretrained(folder)
    assert "text_encoder" in caplog.text
    assert "holds 16 weights" in caplog.text
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    ("part", "kind"),
    [("text_encoder", "T5EncoderModel"), ("vae", "VQModel"), ("text_encoder", "CLIPModel")],
)
def test_a_model_of_another_class(folder, part, kind):
    index = json.loads((folder / "model_index.json").read_text())
    edit_json(folder / "model_index.json", **{part: [index[part][0], kind]})
    with pytest.raises(CheckpointError, match=f"names a {kind} for its {part}"):
        TiUEPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", ["scheduler", "vae", "tokenizer", "feature_extractor"])
def test_a_module_that_the_index_names_is_not_imported(folder, tmp_path, monkeypatch, part):
    (tmp_path / "brought_along.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit_json(folder / "model_index.json", **{part: ["brought_along", "Thing"]})
    with pytest.raises(CheckpointError, match="brought_along, code that is not imported"):
        TiUEPipeline.from_pretrained(folder)
    assert "brought_along" not in sys.modules


@pytest.mark.parametrize("value", [["diffusers"], [1, 2], ["diffusers", ["AutoencoderKL"]]])
def test_an_index_that_names_no_class(folder, value):
    edit_json(folder / "model_index.json", vae=value)
    with pytest.raises(CheckpointError):
        TiUEPipeline.from_pretrained(folder)


def test_a_unet_alone(folder):
    edit_weights(folder, "unet", without("up_blocks.0"))
    with pytest.raises(CheckpointError, match=r"unet of .* lacks \d+ weights \(up_blocks\.0"):
        TiUEUNet.from_pretrained(folder / "unet")


def test_the_parts_of_a_distillation(folder):
    """A copy lacks a layer of each part: every loader names it."""
    lost = {part: edit_weights(folder, part, without(FIRST[part])) for part in FILES}
    for part, load in {
        "unet": lambda: loading.load_network(str(folder)),
        "text_encoder": lambda: loading.load_text_encoder(str(folder), CPU),
        "vae": lambda: loading.load_vae(str(folder), CPU),
    }.items():
        with pytest.raises(CheckpointError, match=rf"lacks {lost[part]} weights?"):
            load()
    pipe = tiny_pipeline()
    with pytest.raises(CheckpointError, match="lacks"):
        loading.load_pipeline_around(str(folder), pipe.unet, pipe.scheduler)


def test_a_whole_model_draws_what_it_drew(stock):
    """Loading by part changes nothing: the same tensors and types as diffusers' own loading."""
    pipe, plain = TiUEPipeline.from_pretrained(stock), tiny_pipeline()
    for part in FILES:
        ours, theirs = (getattr(p, part).state_dict() for p in (pipe, plain))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not getattr(pipe, part).training


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"attention_head_dim": 0}, "cannot load the unet"),
        ("unet/config.json", {"sample_size": 0}, "sample_size is 0"),
        ("unet/config.json", {"sample_size": -1}, "sample_size = -1"),
        ("unet/config.json", {"sample_size": "large"}, "sample_size = 'large'"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0"),
        ("vae/config.json", {"scaling_factor": "1"}, "scaling_factor = '1'"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor = nan"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "out of bounds"),
    ],
)
def test_a_config_that_no_model_has(folder, file, changes, message):
    edit_json(folder / file, **changes)
    with pytest.raises((CheckpointError, ArchitectureError, SchedulerError), match=message):
        TiUEPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_settings_that_are_null_one_by_one(folder, part):
    file = folder / part / "config.json"
    whole = json.loads(file.read_text())
    for name in whole:
        file.write_text(json.dumps(whole | {name: None}))
        try:
            pipe = TiUEPipeline.from_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            pipe("sun", height=16, width=16)
        except TiUEError:
            continue  # or it is drawn: null means the default in many


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("unet", "norm_eps", None),
        ("unet", "norm_eps", [1]),
        ("unet", "freq_shift", "x"),
        ("unet", "mid_block_scale_factor", float("nan")),
        ("unet", "attention_head_dim", -1),
        ("unet", "layers_per_block", [1, -1]),
        ("vae", "norm_num_groups", -1),
        ("text_encoder", "layer_norm_eps", None),
        ("text_encoder", "num_attention_heads", -1),
    ],
)
def test_a_setting_that_is_no_number(folder, part, name, value):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=f"the {part} of .* has {name} = .*a number"):
        TiUEPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_config_that_is_a_list(folder, part):
    (folder / part / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=f"cannot load the {part}"):
        TiUEPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_skip": 100}, "clip_skip must be a whole number under the text encoder's 2 layers"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"height": 64.0}, "height must be a whole number of pixels"),
        ({"generator": 5}, "generator must be a torch.Generator"),
        ({"generator": [5]}, "generator must be a torch.Generator"),
        ({"latents": np.zeros((1, 4, 8, 8), np.float32)}, "latents must be a tensor"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number"),
        ({"num_decoder_steps": "4"}, "num_decoder_steps must be a whole number"),
        ({"num_decoder_steps": [4]}, "num_decoder_steps must be a whole number"),
        ({"guidance_scale": None}, "guidance_scale must be a number"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number"),
        ({"guidance_rescale": "a"}, "guidance_rescale must be a number"),
        ({"skip_below": "a"}, "skip_below must be a number"),
        ({"timesteps": []}, "no steps to choose"),
        ({"cross_attention_kwargs": 5}, "cross_attention_kwargs must be a dict"),
        ({"negative_prompt": 5}, "negative_prompt must be a text"),
        ({"negative_prompt": [5]}, "negative_prompt must be a text"),
        ({"negative_prompt": "caf\udce9", "guidance_scale": 2.0}, "no UTF-8"),
        ({"prompt": "caf\udce9"}, "no UTF-8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_mean_nothing(drawing, arguments, message):
    with pytest.raises(InputError, match=message):
        drawing(**{"prompt": "red apple", "output_type": "latent"} | arguments)


@pytest.fixture(scope="module")
def drawing():
    pipe = TiUEPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    pipe("red apple", output_type="latent")  # K = 4 is known from here on
    return pipe


@pytest.mark.parametrize("tokens", [None, 10**30, 0, 400])
def test_a_tokenizer_that_knows_no_end_is_cut_at_the_text_encoders(folder, tokens, caplog):
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length")
    path.write_text(json.dumps(config if tokens is None else config | {"model_max_length": tokens}))
    pipe = TiUEPipeline.from_pretrained(folder)
    assert "its text encoder takes 16" in caplog.text
    pipe.set_progress_bar_config(disable=True)
    latents = [
        pipe(text, output_type="latent", generator=torch.Generator().manual_seed(0)).images
        for text in ("a " * 30, "a " * 14)
    ]
    assert torch.equal(*latents)  # start, 14 words, end


def test_a_tokenizer_with_more_words_than_the_text_encoder(folder):
    """Drawing would read outside of the table of embeddings."""
    edit_json(folder / "tokenizer" / "tokenizer_config.json", bos_token="<|start|endoftext|>")
    with pytest.raises(CheckpointError, match=r"tokenizer knows \d+ tokens, its text encoder \d+:"):
        TiUEPipeline.from_pretrained(folder)


def test_a_tokenizer_without_padding(folder):
    edit_json(folder / "tokenizer" / "tokenizer_config.json", pad_token=None)
    with pytest.raises(CheckpointError, match="tokenizer has no padding token"):
        TiUEPipeline.from_pretrained(folder)


@pytest.mark.parametrize("load", [tiue.load_openmoji, load_openmoji_teacher])
def test_the_embedded_model_loads_without_a_warning(load, recwarn):
    said: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = said.append
    names = ("diffusers", "transformers", "tiue")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        load()
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
    assert [record.getMessage() for record in said] == []
    assert [str(warning.message) for warning in recwarn] == []
