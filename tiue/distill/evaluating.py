"""Evaluation on the way: `tiue evaluate`'s figure of the student, and the best student kept.

VSD's loss says nothing of convergence: it is the distance between two teachers that both move.
"""

import json
import shutil
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DDIMScheduler
from PIL import Image

from tiue.distill.checkpoint import Checkpoints
from tiue.distill.config import DistillConfig
from tiue.distill.loading import is_xl, resolve_teacher
from tiue.distill.monitor import keep_lines_until
from tiue.distill.settings import CONFIG, to_plain, write_config
from tiue.errors import InputError
from tiue.evaluate.evaluation import Settings, evaluate
from tiue.evaluate.models import Model
from tiue.evaluate.protocol import check_metrics, find_preset
from tiue.files import append_line, whole_folder, write_json
from tiue.pipelines import TiUEPipeline
from tiue.unet import TiUEUNet

BEST, EVALUATIONS, BEST_FIGURE = "best", "evaluations", "best.json"
_LESS_IS_BETTER = ("fid", "kid")


class Evaluator:
    """Measures the student every so often, on prompts that it is not trained on.

    Args:
        config: The run's settings.
        accelerator: Its processes share the drawing.
        unet: The student.
        scheduler: Its scheduler.

    Raises:
        InputError: If the teacher is SDXL's, the student sharded, or metric or preset unknown.
        CheckpointError: If the teacher is no whole pipeline.
    """

    def __init__(
        self,
        config: DistillConfig,
        accelerator: Accelerator,
        unet: TiUEUNet,
        scheduler: DDIMScheduler,
    ) -> None:
        if config.sharding == "full" or is_xl(config.teacher):
            raise InputError(
                "evaluate_every draws with Stable Diffusion 1 and 2's pipeline and whole weights: "
                "set it to 0, and run `tiue evaluate` on checkpoints that were exported."
            )
        self.config, self.accelerator = config, accelerator
        self.protocol = find_preset(config.evaluate_preset).changed(
            num_prompts=config.evaluate_count
        )
        check_metrics([config.evaluate_metric])
        self.pipe = TiUEPipeline.from_pretrained(
            resolve_teacher(config.teacher), unet=unet, scheduler=scheduler
        ).to(accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)

    def measure(self, step: int) -> float:
        """Draw with the student's present weights, and compute the figure.

        Args:
            step: Student updates done.

        Returns:
            The figure, the same on every process; also a line of evaluations.jsonl.

        Raises:
            TiUEError: As `tiue evaluate`.
        """
        config, main = self.config, self.accelerator.is_main_process
        place = config.output / EVALUATIONS / f"step-{step:08d}"
        if main:
            # A run that went on from before this step, with other settings perhaps, made those of
            # another student; `evaluate` would take them for its own.
            shutil.rmtree(place, ignore_errors=True)
            keep_lines_until(config.output / f"{EVALUATIONS}.jsonl", step - 1)
        self.accelerator.wait_for_everyone()
        settings = Settings(
            protocol=self.protocol,
            metrics=[config.evaluate_metric],
            output=place,
            reference=config.evaluate_reference,
            prompts=config.evaluate_prompts,
            batch_size=config.batch_size,
            num_decoder_steps=config.num_decoder_steps,
            device=self.accelerator.device,
            progress=False,
        )
        facts = {"model": "student", "step": step, "num_decoder_steps": config.num_decoder_steps}
        found = evaluate(settings, Model(self._draw, facts))
        figure = [None if found is None else found["figures"][config.evaluate_metric]]
        (figure,) = broadcast_object_list(figure)
        if main:
            line = {"step": step, config.evaluate_metric: figure}
            append_line(config.output / f"{EVALUATIONS}.jsonl", line)
            if config.trackers:
                self.accelerator.log({f"evaluation/{config.evaluate_metric}": figure}, step)
        return figure

    def keep_best(self, step: int, figure: float, checkpoints: Checkpoints, scheduler: Any) -> bool:
        """Write the student to best/ if none there has a better figure of the same evaluation.

        Args:
            step: Student updates done.
            figure: What `measure` gave.
            checkpoints: Writes the student as it is now.
            scheduler: Goes beside it.

        Returns:
            Whether it is the best.

        Raises:
            OutputError: If it cannot be written.
        """
        place, main = self.config.output / BEST, self.accelerator.is_main_process
        better = [main and self._is_better(figure)]
        (better,) = broadcast_object_list(better)
        if not better:
            return False
        if not main:
            checkpoints.write_student(place, averaged=False)
            return True
        with whole_folder(place) as written:
            checkpoints.write_student(written / "unet", averaged=False)
            scheduler.save_pretrained(written / "scheduler")
            write_config(self.config, written / CONFIG)  # names the teacher, for `tiue export`
            found = {"step": step, self.config.evaluate_metric: figure, "measured": self._measured}
            write_json(written / BEST_FIGURE, found)
        return True

    @property
    def _measured(self) -> dict[str, Any]:
        """What two figures must share to be compared."""
        names = ("evaluate_preset", "evaluate_prompts", "evaluate_reference", "evaluate_count")
        settings = to_plain(self.config)
        return {name: settings[name] for name in names}

    def _is_better(self, figure: float) -> bool:
        metric = self.config.evaluate_metric
        try:
            known = json.loads((self.config.output / BEST / BEST_FIGURE).read_text())
            best, measured = known[metric], known["measured"]
        except (OSError, ValueError, KeyError):
            return True
        if measured != self._measured:
            return True
        return figure < best if metric in _LESS_IS_BETTER else figure > best

    def _draw(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        steps = self.config.num_decoder_steps
        with self.accelerator.autocast():
            return self.pipe(prompts, num_decoder_steps=steps, generator=generators).images
