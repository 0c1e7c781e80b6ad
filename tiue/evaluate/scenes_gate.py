"""The scenes' gate before distillation: the teacher draws what is asked, one pass of it does not.

`python -m tiue.evaluate.scenes_gate` measures both; its exit status is 1 while the gate is shut.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tiue.embedded.config import DECODER_STEPS, GUIDANCE_SCALE, TEACHER_STEPS
from tiue.evaluate.evaluation import Settings, evaluate
from tiue.evaluate.models import load_model
from tiue.evaluate.protocol import PRESETS
from tiue.files import write_json
from tiue.scenes import WEIGHTS
from tiue.terminal import command_group

SPLIT = "exact, held out"  # of `tiue evaluate --preset scenes`
LEAST_OF_TEACHER = 0.85  # of the ceiling
MOST_OF_ONE_PASS = 0.5  # of the teacher's


@dataclass(frozen=True)
class Gate:
    """Shares of pictures that are all right, of exact prompts that training holds out.

    Attributes:
        ceiling: of true pictures, as the judge sees them.
        teacher: of the teacher's at 25 steps, guided.
        one_pass: of one pass of the same weights at K = 4, not distilled, guided alike.
        updates: that the teacher has had, where that is known.
    """

    ceiling: float
    teacher: float
    one_pass: float
    updates: int | None = None

    @property
    def passed(self) -> bool:
        """Whether there is something to distil, and a need to."""
        good = self.teacher >= LEAST_OF_TEACHER * self.ceiling
        return good and self.one_pass <= MOST_OF_ONE_PASS * self.teacher

    def __str__(self) -> str:
        return (
            f"{SPLIT}: teacher {self.teacher:.1%} of pictures all right at {TEACHER_STEPS} steps"
            f" (wanted: {LEAST_OF_TEACHER:.0%} of the ceiling's {self.ceiling:.1%}), one pass of it"
            f" {self.one_pass:.1%} (at most {MOST_OF_ONE_PASS:.0%} of the teacher's): "
            + ("passed" if self.passed else "not passed")
        )


def measure(teacher: Path, output: Path, updates: int | None = None) -> Gate:
    """Draws with the teacher, in 25 steps and in one pass, and judges both.

    Args:
        teacher: folder of its pipeline.
        output: receives pictures and results; a run that was stopped goes on there.
        updates: that it has had.

    Returns:
        The figures.
    """
    sides: dict[str, dict[str, Any]] = {
        "teacher": {"num_inference_steps": TEACHER_STEPS},
        "one-pass": {"num_decoder_steps": DECODER_STEPS},
    }
    found: dict[str, Any] = {}
    for name, steps in sides.items():
        settings = Settings(PRESETS["scenes"], ["lpips_diversity"], output / name)
        model = load_model(
            str(teacher), torch.device("cpu"), torch.float32, guidance_scale=GUIDANCE_SCALE, **steps
        )
        result = evaluate(settings, model)
        assert result is not None  # one process
        found[name] = result["scenes"]["splits"]
    own, one_pass = (_share(found[name]["model"]) for name in sides)
    return Gate(_share(found["teacher"]["true pictures"]), own, one_pass, updates)


def _share(splits: dict[str, Any]) -> float:
    share: float = splits[SPLIT]["figures"]["right"][0]
    return share


app = command_group()


@app.command()
def main(
    teacher: Annotated[
        Path | None, typer.Option(help="Its pipeline's folder; by default the shipped one.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where pictures and gate.json go.")] = Path(
        "runs/scenes/gate"
    ),
) -> None:
    """Measure whether the scenes' teacher is worth distilling, and needs it."""
    teacher = teacher or WEIGHTS / "teacher"
    training = teacher / "training.json"
    updates = json.loads(training.read_text("utf-8"))["steps"] if training.exists() else None
    found = measure(teacher, output, updates)
    write_json(output / "gate.json", dataclasses.asdict(found) | {"passed": found.passed})
    typer.echo(found)
    raise typer.Exit(0 if found.passed else 1)


if __name__ == "__main__":
    app()
