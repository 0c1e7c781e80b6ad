"""The rows of the experiment and their settings, written down before any of them was run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiue.distill.settings import find_recipe, read_settings
from tiue.embedded.config import TEACHER_STEPS
from tiue.errors import InputError
from tiue.evaluate.protocol import PRESETS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "miniature"
WORK = ROOT / "runs" / "miniature"

SEEDS = (0, 1, 2)  # of a row's training, and of the noise that its pictures begin with
PROTOCOL = PRESETS["scenes"]
UPDATES, PILOT_UPDATES = 240, 80
PROMPTS = 8192  # to distil from: of the grammar, nothing held out among them
RATES = ("1e-5", "3e-5", "1e-4", "3e-4")
FAMILIES = ("k1", "k4")  # whose pilots choose a rate
TIMESTEPS = (751, 501, 251, 1)  # of K = 4

# A row differs from these in what it names. The LoRA teacher is not guided: the student is to draw
# what the guided teacher draws, and guidance of both would ask it for what neither is guided to.
SETTINGS: dict[str, Any] = {
    name: value
    for name, value in read_settings(find_recipe("scenes")).items()
    if name not in ("teacher", "cpu", "num_decoder_steps", "learning_rate")
} | {"steps": UPDATES, "kl_weight": 0.0, "lora_guidance_scale": 1.0}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: One word, of its files and commands.
        label: For the reader.
        steps: Of the loop over the whole UNet; None for the one pass.
        num_decoder_steps: K of the one pass.
        training: What differs from `SETTINGS`, for a student; None for the teacher's own weights.
        rate: The family of `FAMILIES` whose pilots chose its learning rate; empty for a pilot.
        compute_of: The row whose training compute it is given, in updates of its own.
        of: The row whose student it draws with.
        without: The timestep that is left out of the sum.
        missing: Why the row has no code, for one that is listed and not run.
    """

    name: str
    label: str
    steps: int | None = None
    num_decoder_steps: int | None = None
    training: dict[str, Any] | None = field(default=None)
    rate: str = ""
    compute_of: str | None = None
    of: str | None = None
    without: int | None = None
    missing: str = ""

    @property
    def is_pilot(self) -> bool:
        """Whether it is there to choose a rate."""
        return self.training is not None and not self.rate


def _student(k: int, name: str, label: str, compute_of: str | None = None, **changes: Any) -> Row:
    # One step of leading spacing is the one nearest to t = 0, where nothing is left to do.
    spacing = {"timestep_spacing": "trailing"} if k == 1 else {}
    training = {"num_decoder_steps": k, **spacing, **changes}
    # K = 2 and 8 take the rate of K = 4: what is compared with them does.
    rate = "" if "learning_rate" in changes else "k1" if k == 1 else "k4"
    return Row(
        name, label, num_decoder_steps=k, training=training, rate=rate, compute_of=compute_of
    )


def pilot_name(family: str, rate: str) -> str:
    """The name of the pilot of a family at a rate."""
    return f"{family}-rate-{rate}"


ROWS = {
    row.name: row
    for row in (
        *(
            Row(f"teacher-{n}", f"teacher, {n} steps", steps=n) for n in (TEACHER_STEPS, 10, 4)
        ),
        *(
            Row(
                f"one-pass-{k}", f"teacher in one pass, K = {k}, not distilled", num_decoder_steps=k
            )
            for k in (4, 1)
        ),
        *(
            _student(k, f"k{k}", f"student, K = {k}" + (", SwiftBrush's case" if k == 1 else ""))
            for k in (1, 2, 4, 8)
        ),
        _student(1, "k1-compute", "student, K = 1, training compute of K = 4", compute_of="k4"),
        _student(4, "k4-kl", "student, K = 4, KL 0.1", kl_weight=0.1),
        _student(1, "k1-kl", "student, K = 1, KL 0.1", kl_weight=0.1),
        _student(
            4, "k4-trailing", "student, K = 4, trailing spacing", timestep_spacing="trailing"
        ),
        _student(
            4, "k4-lora-guided", "student, K = 4, LoRA guided as the teacher",
            lora_guidance_scale=SETTINGS["guidance_scale"],
        ),
        *(
            Row(
                f"k4-without-{t}", f"student, K = 4, t = {t} left out of the sum",
                num_decoder_steps=4, of="k4", without=t,
            )
            for t in TIMESTEPS
        ),
        *(
            _student(
                int(family[1:]), pilot_name(family, rate), f"pilot, K = {family[1:]}, rate {rate}",
                learning_rate=float(rate), steps=PILOT_UPDATES,
            )
            for family in FAMILIES
            for rate in RATES
        ),
        Row(
            "lcm-4", "LCM distillation, 4 steps",
            missing="it needs consistency distillation of the guided teacher (Luo et al., 2023,"
            " arXiv 2310.04378), which `tiue distill` does not have.",
        ),
        Row(
            "k1-wide", "student, K = 1, wider UNet of K = 4's multiply-adds a picture",
            missing="it needs a wider UNet that has learnt the teacher's task first: a student"
            " begins as its teacher, whose weights fit no other width.",
        ),
    )
}  # fmt: skip


def find_rows(names: list[str]) -> list[Row]:
    """Look rows up.

    Args:
        names: Of `ROWS`.

    Returns:
        Them.

    Raises:
        InputError: There is none of a name, or it has no code.
    """
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise InputError(f"no row {', '.join(unknown)}: take some of {', '.join(ROWS)}")
    for name in names:
        if ROWS[name].missing:
            raise InputError(f"{name} cannot be run: {ROWS[name].missing}")
    return [ROWS[name] for name in names]
