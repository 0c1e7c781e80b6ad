"""The gate: which figures it reads, and when it opens."""

from pathlib import Path

import pytest

from tiue.evaluate import scenes_gate as gate
from tiue.evaluate.scenes_gate import Gate


@pytest.mark.parametrize(
    ("ceiling", "teacher", "one_pass", "passed"),
    [
        (1.0, 0.85, 0.425, True),
        (0.98, 0.84, 0.1, True),  # 85.7 % of the ceiling
        (1.0, 0.84, 0.1, False),  # does not draw what is asked
        (1.0, 0.9, 0.46, False),  # does not need distilling
    ],
)
def test_a_teacher_passes_that_draws_and_has_to_be_distilled(ceiling, teacher, one_pass, passed):
    found = Gate(ceiling, teacher, one_pass)
    assert found.passed is passed
    assert str(found).endswith(": passed") is passed


def test_the_figures_are_those_of_held_out_exact_prompts(monkeypatch, tmp_path):
    asked = []

    def split(share):
        other = {"figures": {"right": [0.01, None]}}
        return {"exact": other, gate.SPLIT: {"figures": {"right": [share, 0.02]}}}

    def evaluate(settings, model):
        asked.append((settings.output.name, model))
        own = 0.9 if settings.output.name == "teacher" else 0.3
        return {"scenes": {"splits": {"model": split(own), "true pictures": split(0.99)}}}

    monkeypatch.setattr(gate, "evaluate", evaluate)
    monkeypatch.setattr(gate, "load_model", lambda name, *_, **steps: (name, steps))
    assert gate.measure(Path("folder"), tmp_path, 7) == Gate(0.99, 0.9, 0.3, 7)
    guided = {"guidance_scale": 2.5}
    assert asked == [
        ("teacher", ("folder", guided | {"num_inference_steps": 25})),
        ("one-pass", ("folder", guided | {"num_decoder_steps": 4})),
    ]
