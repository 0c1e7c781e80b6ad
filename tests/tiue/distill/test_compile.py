"""torch.compile of student and teacher: the same run, and no graph is made twice."""

import json

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tiue.tiny import tiny_pipeline, tiny_unet
from tiue.distill.trainer import Trainer
from tiue.errors import InputError


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory):
    """Of one resnet and one transformer a level, one level: what dynamo reads in seconds."""
    folder = tmp_path_factory.mktemp("small")
    unet = tiny_unet(
        block_out_channels=(16,), mid_block_type=None, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    tiny_pipeline(unet=unet).save_pretrained(folder)
    return folder


def losses_of(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["vsd"], line["kl"], line["lora"]) for line in lines]


# "eager" runs what dynamo has traced: graphs and guards are those of every other backend.
def test_a_run_that_goes_on_compiled_is_the_same_run(make_config, small_teacher):
    settings = {"teacher": str(small_teacher), "batch_size": 2, "log_every": 1,
                "lora_learning_rate": 1e-2}  # fmt: skip
    plain = Trainer(make_config(steps=4, **settings))
    plain.train()
    output = Trainer(make_config(steps=1, **settings)).train()
    torch._dynamo.reset()
    counters.clear()
    resumed = Trainer(make_config(steps=4, output=output, resume=True, compile="eager", **settings))
    graphs = []
    resumed.student.optimizer.optimizer.register_step_post_hook(
        lambda *_: graphs.append(counters["stats"]["unique_graphs"])
    )
    resumed.train()
    # Student, frozen teacher and LoRA teacher; from the second update on the LoRA in training too.
    # The switch between both teachers makes none of them again.
    assert graphs == [3, 4, 4]
    assert not counters["graph_break"]
    pairs = zip(losses_of(output), losses_of(plain.config.output), strict=True)
    for own, other in pairs:
        assert own == pytest.approx(other, rel=1e-4, abs=1e-7)
    for name in ("student", "lora"):
        parameters = [getattr(trainer, name).parameters for trainer in (resumed, plain)]
        for own, other in zip(*parameters, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_backend_that_is_not_there_is_named(make_config):
    with pytest.raises(InputError, match=r"one of .*inductor.*; it is 'inducter'"):
        Trainer(make_config(compile="inducter"))
