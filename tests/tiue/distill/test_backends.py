"""The same distillation on PyTorch and on the Triton kernels."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.tiue.tiny import tiny_pipeline, tiny_unet
from tiue.distill.trainer import Trainer
from tiue_kernels import use_backend

LEARNING_RATE = 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets nothing beside a GPU")
def test_triton_trains_what_the_reference_trains(make_config, tmp_path, served, wide_tiles) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(3)
    unet = tiny_unet(attention_head_dim=2)  # heads of 8 channels, the least that a kernel takes
    tiny_pipeline(unet=unet).save_pretrained(tmp_path / "teacher")
    figures, weights = [], []
    for backends in (("reference",), ("triton", "reference")):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = make_config(
            teacher=str(tmp_path / "teacher"), steps=5, num_decoder_steps=2, batch_size=1,
            learning_rate=LEARNING_RATE, log_every=1,
        )  # fmt: skip
        trainer = Trainer(config)
        with use_backend(*backends):
            lines = (trainer.train() / "log.jsonl").read_text().splitlines()
        figures.append([json.loads(line) for line in lines])
        weights.append(dict(trainer.unet.named_parameters()))

    kernels = ("shared_skip_group_norm_silu", "broadcast_add_group_norm_silu", "noise_kl",
               "cross_timestep_attention", "geglu", "one_pass_combine",
               "group_norm_tokens")  # fmt: skip
    assert {name for name, backend in served if backend == "triton"} == set(kernels)
    assert [line["step"] for line in figures[0]] == [1, 2, 3, 4, 5]
    for expected, actual in zip(*figures, strict=True):
        for name in ("vsd", "kl", "lora", "grad_norm", "lora_grad_norm"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-4), (name, expected["step"])
    before = unet.state_dict()
    for name, expected in weights[0].items():
        moved = (expected - before[name]).abs().max()
        assert moved > LEARNING_RATE, name
        # Adam divides a gradient near zero by itself: its rounding moves a weight by a part of the
        # rate. The largest seen is 0.02 of it.
        apart = (weights[1][name] - expected).abs().max()
        assert apart < 0.1 * LEARNING_RATE, (name, apart)
