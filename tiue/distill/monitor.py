"""What a run shows: progress bar, log.jsonl, trackers, validation pictures, summary."""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available
from PIL import Image
from tqdm import tqdm

from tiue.distill.config import DistillConfig, Tracker
from tiue.distill.settings import to_plain
from tiue.distill.step import StepResult
from tiue.errors import DependencyError
from tiue.files import append_line, write_file, write_json
from tiue.images import contact_sheet, save_image

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

PROJECT = "tiue"
LOG, HISTORY, SUMMARY, SAMPLES = "log.jsonl", "history.jsonl", "summary.json", "samples"
_INSTALLED = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
}
_TIMESTEP_BIN = 100
_SHOWN = (
    "vsd", "kl", "clip", "gan", "lora", "critic", "score_norm", "grad_norm", "lora_grad_norm",
)  # fmt: skip


def check_trackers(trackers: tuple[Tracker, ...]) -> None:
    """See that trackers are installed.

    Raises:
        DependencyError: Naming the one that is not.
    """
    for name in trackers:
        if not _INSTALLED[name]():
            raise DependencyError(
                f"The tracker {name} is not installed: pip install {name}, or choose others with "
                "--trackers."
            )


class Monitor:
    """Follows one run; on other processes than the main one it does nothing.

    Args:
        config: The run's settings.
        accelerator: Has the trackers.
        step: Student updates done before.
        timestep_weights: Weight of the VSD difference at every timestep, [T].
    """

    def __init__(
        self, config: DistillConfig, accelerator: Accelerator, step: int, timestep_weights: Any
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self._main = accelerator.is_main_process
        self._progress = tqdm(
            total=config.steps, initial=step, unit="step", disable=not self._main, smoothing=0.05
        )
        self._started, self._first_step, self._images = time.monotonic(), step, 0
        self._ends: dict[str, dict[str, float]] = {}
        self._score: dict[int, list[float]] = defaultdict(list)
        self._weights = timestep_weights.tolist()
        if self._main:
            keep_lines_until(config.output / LOG, step)
        plain = {
            k: v if isinstance(v, int | float | str) else str(v)
            for k, v in to_plain(config).items()
        }
        if config.trackers:
            accelerator.init_trackers(PROJECT, plain)

    def after_step(
        self, step: int, result: StepResult, images: int, seconds: float, rate: float
    ) -> None:
        """Show what an update told.

        Args:
            step: Its number, from 1.
            result: Losses and norms.
            images: Samples of all processes.
            seconds: What it took.
            rate: The student's learning rate.

        Raises:
            OutputError: If log.jsonl cannot be written.
        """
        if not self._main:
            return
        self._images += images
        for timestep, rms in zip(result.timesteps, result.score_rms, strict=True):
            self._score[timestep // _TIMESTEP_BIN * _TIMESTEP_BIN].append(rms)
        figures = result.figures | {
            "learning_rate": rate,
            "images_per_second": images / seconds,
            "seconds": seconds,
        }
        memory = peak_memory(self.accelerator.device)
        if memory is not None:
            figures["memory_gib"] = memory / 2**30
        if not self._ends:
            self._ends["first"] = figures
        self._ends["last"] = figures
        shown = {name: f"{value:.3g}" for name, value in figures.items() if name != "seconds"}
        self._progress.set_postfix(shown, refresh=False)
        self._progress.update()
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._log({"step": step, **figures, **self._by_timestep()}, step)

    def pictures(self, step: int, images: list[Image.Image], labels: list[str]) -> None:
        """Write validation pictures as one sheet, `samples/step-<n>.png`, and to the trackers.

        Raises:
            OutputError: If the sheet cannot be written.
        """
        if not self._main:
            return
        sheet = contact_sheet(images, labels)
        folder = self.config.output / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        save_image(sheet, folder / f"step-{step:08d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(sheet)[None]
                tracker.log_images({"samples": pixels}, step, dataformats="NHWC")
            else:
                tracker.log_images({"samples": [sheet]}, step)

    def close(self, step: int, ended: str) -> dict[str, Any]:
        """End progress bar and trackers and write summary.json.

        Args:
            step: Student updates done.
            ended: Why the run ended, in a word or two.

        Returns:
            The summary.

        Raises:
            OutputError: If it cannot be written.
        """
        self._progress.close()
        seconds = time.monotonic() - self._started
        memory = peak_memory(self.accelerator.device)
        summary = {
            "ended": ended,
            "steps": step,
            "steps_this_time": step - self._first_step,
            "seconds": round(seconds, 1),
            "images": self._images,
            "images_per_second": round(self._images / seconds, 3),
            "processes": self.accelerator.num_processes,
            "peak_memory_gib": None if memory is None else round(memory / 2**30, 2),
            **self._ends,
        }
        if self.config.trackers:
            self.accelerator.end_training()
        if self._main:
            write_json(self.config.output / SUMMARY, summary)
        return summary

    def _log(self, line: dict[str, float], step: int) -> None:
        append_line(self.config.output / LOG, line)
        if self.config.trackers:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step)

    def _by_timestep(self) -> dict[str, float]:
        """Since the last line: mean score gradient, and weight, of each hundred timesteps."""
        figures = {}
        for first, values in sorted(self._score.items()):
            weights = self._weights[first : first + _TIMESTEP_BIN]
            figures[f"score_rms/t{first:03d}"] = sum(values) / len(values)
            figures[f"vsd_weight/t{first:03d}"] = sum(weights) / len(weights)
        self._score.clear()
        return figures


def keep_lines_until(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run makes again, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_file(path, lambda beside: beside.write_text("".join(kept), encoding="utf-8"))


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held: of the GPU on one, else of the host; or None.

    None where the system does not say: the CPU of a Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(summary: dict[str, Any], output: Path) -> str:
    """A summary in a few lines."""
    memory = summary["peak_memory_gib"]
    lines = [
        f"{summary['steps']} steps ({summary['steps_this_time']} now, {summary['ended']}), "
        f"{summary['images']} images in {summary['seconds']:.0f} s: "
        f"{summary['images_per_second']:.3g} a second on {summary['processes']} process(es), "
        + ("peak memory not known" if memory is None else f"peak memory {memory:.2f} GiB")
    ]
    first, last = summary.get("first", {}), summary.get("last", {})
    lines += [
        f"  {name:16} {first[name]:10.4g} -> {last[name]:10.4g}" for name in _SHOWN if name in first
    ]
    return "\n".join([*lines, f"The run is in {output}."])
