"""Evaluations on the way, by `tiue evaluate`'s own code, and the best student kept."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.tiue.evaluate.test_evaluation import blot
from tiue.distill.evaluating import Evaluator
from tiue.distill.export import export_student
from tiue.distill.trainer import Trainer
from tiue.errors import InputError
from tiue.files import sha256


def test_the_average_is_measured_and_the_best_one_kept(make_config, tmp_path):
    reference = tmp_path / "reference"
    reference.mkdir()
    for number in range(8):
        blot("x", number).save(reference / f"{number}.png")
    prompts = tmp_path / "held-out.txt"
    prompts.write_text("".join(f"thing {number}\n" for number in range(8)))
    config = make_config(
        steps=3, batch_size=4, num_decoder_steps=2, evaluate_every=1, evaluate_metric="density",
        evaluate_preset="openmoji", evaluate_prompts=prompts, evaluate_reference=reference,
        evaluate_count=8,
    )  # fmt: skip
    said = []
    trainer = Trainer(config, report=said.append)
    # Of a run that was gone on with from before this step: not this student's.
    old = config.output / "evaluations" / "step-00000002" / "pictures"
    old.mkdir(parents=True)
    for number in range(8):
        blot("x", number).save(old / f"{number:06d}.png")
    stale = {path.name: path.read_bytes() for path in old.iterdir()}
    (config.output / "evaluations.jsonl").write_text('{"step": 2, "density": 9}\n')
    averages = []
    sharp = iter([0.5, 0.9, 0.7])
    measure = Evaluator.measure

    def measured(self, step):
        """What it measures, with other figures in its place: which is best must be known."""
        assert measure(self, step) >= 0
        averages.append({n: p.detach().clone() for n, p in trainer.unet.named_parameters()})
        return next(sharp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "measure", measured)
        output = trainer.train()
    lines = [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    results = sorted((output / "evaluations").glob("step-*/result.json"))
    figures = [json.loads(path.read_text())["figures"]["density"] for path in results]
    assert figures == [line["density"] for line in lines]
    assert all(path.read_bytes() != stale[path.name] for path in old.iterdir())
    found = json.loads((output / "best" / "best.json").read_text())
    assert (found["step"], found["density"]) == (2, 0.9)
    # A figure of another evaluation is no better and no worse.
    assert not trainer._evaluator._is_better(0.8)
    trainer._evaluator.config = replace(config, evaluate_count=4)
    assert trainer._evaluator._is_better(0.8)
    best = UNet2DConditionModel.from_pretrained(output / "best" / "unet")
    assert all(torch.equal(p, averages[1][n]) for n, p in best.named_parameters())
    exported = export_student(output / "best", tmp_path / "exported")
    assert sha256(*(exported / "unet").glob("*.safetensors")) == sha256(
        *(output / "best" / "unet").glob("*.safetensors")
    )
    (output / "best" / "config.yaml").unlink()
    with pytest.raises(InputError, match="--teacher"):
        export_student(output / "best", tmp_path / "other")
    assert [line for line in said if "the best so far" in line][-1].startswith(
        "Step 2: density 0.9"
    )
    # Looking changed nothing.
    again = Trainer(make_config(steps=3, batch_size=4, num_decoder_steps=2))
    again.train()
    pairs = zip(again.unet.parameters(), trainer.unet.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_what_cannot_be_drawn_on_the_way_is_refused(make_config):
    with pytest.raises(InputError, match="no preset 'nowhere'"):
        Trainer(make_config(steps=1, evaluate_every=1, evaluate_preset="nowhere"))
