"""What a distillation run is made of: one dataclass, from which the command line is made too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tiue.errors import InputError

Spacing = Literal["leading", "trailing", "linspace"]
Weighting = Literal["sigma2", "uniform"]
Reduction = Literal["sum", "mean"]
MixedPrecision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of one distillation; the defaults are the published recipe (arXiv 2505.21960)."""

    teacher: Annotated[
        str,
        "Folder or hub id of the Stable Diffusion pipeline to distil (UNet, text encoder, "
        "tokenizer, scheduler; safetensors only).",
    ]
    prompts: Annotated[Path, "Text file with one prompt a line; no pictures are needed."]
    output: Annotated[Path, "Folder that receives the student, its checkpoints and the log."]
    student: Annotated[
        str | None,
        "UNet folder or pipeline to start from; the teacher's UNet when not given.",
    ] = None
    num_decoder_steps: Annotated[
        int,
        "Decoder timesteps K of the student, all run in one batch over one encoder pass.",
    ] = 4
    timestep_spacing: Annotated[
        Spacing | None,
        "The student's timestep spacing; the teacher's when not given. K = 1 needs 'trailing'.",
    ] = None
    steps: Annotated[int, "Student updates in all."] = 66_000
    batch_size: Annotated[int, "Prompts a step and process (published: 8 on each of 8 GPUs)."] = 8
    learning_rate: Annotated[float, "Adam's learning rate for the student."] = 1e-6
    lora_learning_rate: Annotated[float, "Adam's learning rate for the LoRA teacher."] = 1e-3
    adam_beta1: Annotated[float, "Adam's decay of the gradient's mean, both optimisers."] = 0.9
    adam_beta2: Annotated[float, "Adam's decay of the gradient's square, both optimisers."] = 0.999
    max_grad_norm: Annotated[float, "Gradient norm to clip at, student and LoRA alike."] = 1.0
    guidance_scale: Annotated[
        float,
        "Classifier-free guidance of the teacher; 1 runs its conditional half alone.",
    ] = 4.5
    lora_guidance_scale: Annotated[
        float,
        "The same for the LoRA teacher inside the VSD difference.",
    ] = 4.5
    weighting: Annotated[
        Weighting,
        "Weight of the VSD difference by timestep: 'sigma2' (published) is 1 - abar_t.",
    ] = "sigma2"
    min_timestep: Annotated[int, "Least timestep of the VSD term."] = 20
    max_timestep: Annotated[int, "Greatest timestep of the VSD term."] = 980
    kl_weight: Annotated[float, "Weight of the KL term that keeps predicted noise normal."] = 0.1
    kl_reduction: Annotated[
        Reduction,
        "Over the K*B noise maps: 'sum' (published) grows with K*B, 'mean' does not.",
    ] = "sum"
    lora_rank: Annotated[int, "Rank of the LoRA on the teacher's to_q and to_v."] = 64
    lora_alpha: Annotated[float, "Alpha of the LoRA: its output is scaled by alpha / rank."] = 108.0
    lora_updates: Annotated[int, "LoRA updates to one student update."] = 1
    prompt_drop: Annotated[
        float,
        "Share of the LoRA's prompts replaced by the empty one, so that guidance has meaning.",
    ] = 0.1
    ema_decay: Annotated[
        float,
        "Decay of the student's moving average, reached slowly; 0 keeps no average.",
    ] = 0.9999
    height: Annotated[
        int | None,
        "Latent height (pixels / 8 in Stable Diffusion); the UNet's sample size by default.",
    ] = None
    width: Annotated[
        int | None,
        "Latent width (pixels / 8 in Stable Diffusion); the UNet's sample size by default.",
    ] = None
    mixed_precision: Annotated[
        MixedPrecision,
        "Arithmetic of the networks; trained weights and losses stay float32.",
    ] = "no"
    cpu: Annotated[bool, "Train on the CPU even where there is a GPU."] = False
    seed: Annotated[int, "Seed of everything that is drawn."] = 0
    embedding_cache_mib: Annotated[
        int,
        "Encode every prompt once beforehand if the result fits in this much memory (MiB).",
    ] = 2048
    checkpoint_every: Annotated[int, "Student updates from one checkpoint to the next."] = 1000
    keep_checkpoints: Annotated[int, "Checkpoints kept, the newest ones."] = 2
    sample_every: Annotated[
        int,
        "Student updates between calls of the sample hook; 0 for none.",
    ] = 0
    log_every: Annotated[int, "Student updates between lines of log.jsonl."] = 10
    resume: Annotated[
        bool,
        "Go on from the newest checkpoint in the output folder, if any.",
    ] = False
    save_pipeline: Annotated[
        bool,
        "If the teacher is a whole pipeline, write one with the student in it as well.",
    ] = True

    def __post_init__(self) -> None:
        """Refuse values that no run can have.

        Raises:
            InputError: Naming the field, its value and what it takes.
        """
        at_least_one = (
            "num_decoder_steps", "steps", "batch_size", "lora_rank", "lora_updates",
            "checkpoint_every", "keep_checkpoints", "log_every",
        )  # fmt: skip
        for name in at_least_one:
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "lora_learning_rate", "lora_alpha", "max_grad_norm"):
            self._require(getattr(self, name) > 0, name, "more than 0")
        for name in ("kl_weight", "sample_every", "embedding_cache_mib"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._require(0 <= getattr(self, name) < 1, name, "from 0 to less than 1")
        for name in ("height", "width"):
            self._require(getattr(self, name) is None or getattr(self, name) >= 1, name, "positive")
        choices = {
            "timestep_spacing": (None, *get_args(Spacing)),
            "weighting": get_args(Weighting),
            "kl_reduction": get_args(Reduction),
            "mixed_precision": get_args(MixedPrecision),
        }
        for name, values in choices.items():
            self._require(getattr(self, name) in values, name, f"one of {values}")
        self._require(0 <= self.prompt_drop <= 1, "prompt_drop", "from 0 to 1")
        in_order = 0 <= self.min_timestep <= self.max_timestep
        self._require(in_order, "min_timestep", f"from 0 to max_timestep ({self.max_timestep})")

    def _require(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {wanted}; it is {getattr(self, name)!r}.")
