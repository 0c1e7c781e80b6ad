"""What a distillation run is made of: one dataclass, from which the command line is made too."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args

from tiue.errors import InputError

Spacing = Literal["leading", "trailing", "linspace"]
Weighting = Literal["sigma2", "uniform"]
Reduction = Literal["sum", "mean"]
MixedPrecision = Literal["no", "fp16", "bf16"]
OptimizerName = Literal["adam", "adamw", "adamw8bit"]
RateSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
Checkpointing = Literal["none", "encoder", "all"]
Sharding = Literal["none", "full"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of one distillation; the defaults are one published process (arXiv 2505.21960)."""

    teacher: Annotated[
        str,
        "Folder or hub id of the Stable Diffusion pipeline to distil (UNet, text encoder, "
        "tokenizer, scheduler; safetensors only); 'openmoji' and 'scenes' are in this package.",
    ]
    output: Annotated[Path, "Folder that receives the student, its checkpoints and the logs."]
    prompts: Annotated[
        str | None,
        "Prompts: a .txt (one a line), .jsonl (JourneyDB's too) or .parquet file, or a Hugging "
        "Face data set as hub id or 'id:split'. No pictures are needed.",
    ] = None
    prompt_column: Annotated[
        str | None,
        "Column of the prompt in .jsonl, .parquet and data sets, 'Task2.Caption' for a nested one; "
        "by default the first known one (Task2.Caption, caption, prompt, text).",
    ] = None
    embeddings: Annotated[
        Path | None,
        "Folder that `tiue embed-text` wrote, in the place of prompts: no text encoder is loaded.",
    ] = None
    verify_embeddings: Annotated[
        bool, "Compare every embedding shard with its checksum before the first step."
    ] = True
    embedding_cache_mib: Annotated[
        int,
        "Without such a folder: encode every prompt beforehand if that takes no more memory (MiB).",
    ] = 2048
    student: Annotated[
        str | None,
        "UNet folder or pipeline to start from; the teacher's UNet when not given.",
    ] = None
    student_lora_rank: Annotated[
        int,
        "Train a LoRA of this rank on the student's attention and feed-forward in the place of all "
        "its weights, for far less memory; written as lora/ (PEFT) and merged as unet/. 0: all.",
    ] = 0
    student_lora_alpha: Annotated[
        float, "Alpha of the student's LoRA: its output is scaled by alpha / rank."
    ] = 64.0
    num_shared_blocks: Annotated[
        int | None,
        "Blocks of a transformer that run once; by default those of the folder that it starts "
        "from, or half. A UNet has an encoder of its own.",
    ] = None
    num_decoder_steps: Annotated[
        int,
        "Decoder timesteps K of the student, all run in one batch over one encoder pass.",
    ] = 4
    timestep_spacing: Annotated[
        Spacing | None,
        "The student's timestep spacing; the teacher's when not given. K = 1 needs 'trailing'.",
    ] = None
    height: Annotated[
        int | None,
        "Latent height (pixels / 8 in Stable Diffusion); the UNet's sample size by default.",
    ] = None
    width: Annotated[
        int | None,
        "Latent width (pixels / 8 in Stable Diffusion); the UNet's sample size by default.",
    ] = None

    steps: Annotated[int, "Student updates in all."] = 66_000
    batch_size: Annotated[
        int, "Prompts of a micro-batch of one process (published: 8 on each of 8 GPUs)."
    ] = 8
    gradient_accumulation_steps: Annotated[
        int, "Micro-batches of a process to one update, of the student and of the LoRA alike."
    ] = 1
    optimizer: Annotated[
        OptimizerName,
        "'adam' (published) and 'adamw' are torch's fused ones; 'adamw8bit' is bitsandbytes'.",
    ] = "adam"
    learning_rate: Annotated[float, "Learning rate of the student."] = 1e-6
    lora_learning_rate: Annotated[float, "Learning rate of the LoRA teacher."] = 1e-3
    lr_scheduler: Annotated[
        RateSchedule, "Course of both learning rates over the run; 'constant' as published."
    ] = "constant"
    lr_warmup_steps: Annotated[int, "Updates in which the rates grow linearly from 0."] = 0
    adam_beta1: Annotated[float, "Adam's decay of the gradient's mean, both optimisers."] = 0.9
    adam_beta2: Annotated[float, "Adam's decay of the gradient's square, both optimisers."] = 0.999
    weight_decay: Annotated[float, "Decoupled weight decay of 'adamw' and 'adamw8bit'."] = 0.0
    max_grad_norm: Annotated[float, "Gradient norm to clip at, student and LoRA alike."] = 1.0
    ema_decay: Annotated[
        float,
        "Decay of the student's moving average, reached slowly; 0 keeps no average.",
    ] = 0.9999

    ema_on_cpu: Annotated[
        bool, "Keep the average in host memory; every update then copies the weights there."
    ] = False

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
        "Over all K*B noise maps of an update (every process and micro-batch): 'sum' grows with "
        "K*B, 'mean' does not. Published: 0.1 x the sum over K*B = 32 maps of each of 8 GPUs, "
        "averaged, which is 0.0125 with 'sum' over all 256, or 3.2 with 'mean'.",
    ] = "sum"
    lora_rank: Annotated[int, "Rank of the LoRA on the teacher's to_q and to_v."] = 64
    lora_alpha: Annotated[float, "Alpha of the LoRA: its output is scaled by alpha / rank."] = 108.0
    lora_updates: Annotated[int, "LoRA updates to one student update."] = 1
    prompt_drop: Annotated[
        float,
        "Share of the LoRA's prompts replaced by the empty one, so that guidance has meaning.",
    ] = 0.1
    clip_weight: Annotated[
        float, "Weight of the CLIP loss at the start; 0 (the paper's results) loads no CLIP."
    ] = 0.0
    clip_weight_end: Annotated[float, "Weight of the CLIP loss at the last step."] = 0.0
    clip_target: Annotated[
        float, "Mean cosine of text and picture from which the CLIP loss is 0."
    ] = 0.35
    clip_model: Annotated[str, "Folder or hub id of the CLIP model."] = (
        "openai/clip-vit-large-patch14"
    )
    clip_vae: Annotated[
        str, "Folder or hub id of the AutoencoderTiny that decodes for the CLIP loss."
    ] = "madebyollin/taesd"
    gan_weight: Annotated[
        float, "Weight of the GAN loss (DMD2's: 1e-3); 0, as published, needs no pictures."
    ] = 0.0
    gan_pictures: Annotated[
        Path | None,
        "Real pictures of the GAN loss: a folder of them, encoded at the start, or a .safetensors "
        "file with their `latents` [N, C, H, W], scaled as the UNet takes them.",
    ] = None
    gan_critic_weight: Annotated[
        float, "Weight of the critic's loss beside the LoRA's own, whose layers it trains too."
    ] = 0.01

    mixed_precision: Annotated[
        MixedPrecision,
        "Arithmetic of the networks; trained weights and losses stay float32.",
    ] = "no"
    gradient_checkpointing: Annotated[
        Checkpointing,
        "Blocks of the student whose activations backward computes again: none, encoder, all.",
    ] = "none"
    compile: Annotated[
        str,
        "Backend of torch.compile for student and teacher ('inductor'), which takes minutes at the "
        "start; 'no' runs them as they are.",
    ] = "no"
    sharding: Annotated[
        Sharding,
        "'full' spreads both networks, gradients, optimisers and average over all processes "
        "(FSDP2); FSDP in `accelerate config` asks for the same.",
    ] = "none"
    recompute_feed_forward: Annotated[
        bool, "Backward runs the first product of every feed-forward again, for less memory."
    ] = False
    deterministic: Annotated[
        bool, "Only deterministic algorithms, so that a GPU too gives the same bits twice."
    ] = False
    cpu: Annotated[bool, "Train on the CPU even where there is a GPU."] = False
    seed: Annotated[int, "Seed of everything that is drawn."] = 0

    divergence_factor: Annotated[
        float,
        "Stop when a loss or gradient norm stays above this many times its running mean; 0: never.",
    ] = 100.0
    checkpoint_every: Annotated[int, "Student updates from one checkpoint to the next."] = 1000
    keep_checkpoints: Annotated[int, "Checkpoints kept, the newest ones."] = 2
    resume: Annotated[
        bool,
        "Go on from the newest checkpoint in the output folder, if any.",
    ] = False
    allow_change: Annotated[
        tuple[str, ...],
        "Settings that may differ from the checkpoint's when a run goes on, although they decide "
        "what the weights become; recorded in history.jsonl.",
    ] = ()
    log_every: Annotated[int, "Student updates between lines of log.jsonl and trackers."] = 10
    trackers: Annotated[
        tuple[Tracker, ...], "accelerate's trackers to log to, beside log.jsonl."
    ] = ("tensorboard",)
    sample_every: Annotated[
        int,
        "Student updates between validation pictures (and calls of the sample hook); 0 for none.",
    ] = 0
    evaluate_every: Annotated[
        int,
        "Student updates between evaluations of the student (its average), whose best one is kept "
        "in best/; 0 for none. [eval]",
    ] = 0
    evaluate_metric: Annotated[
        str, "The figure of `tiue evaluate` that decides: fid, kid, precision, clip_score, ..."
    ] = "kid"
    evaluate_preset: Annotated[str, "Protocol of `tiue evaluate`."] = "coco2017-5k"
    evaluate_prompts: Annotated[
        Path | None, "Prompts that the student is not trained on; the openmoji preset has its own."
    ] = None
    evaluate_reference: Annotated[Path | None, "Folder of pictures to compare with."] = None
    evaluate_count: Annotated[int, "Pictures drawn for an evaluation, one a prompt."] = 1000
    validation_prompts: Annotated[
        tuple[str, ...], "Prompts of the validation pictures; the first four by default."
    ] = ()
    save_pipeline: Annotated[
        bool,
        "If the teacher is a whole pipeline, write one with the student in it as well.",
    ] = True
    push_to_hub: Annotated[
        str | None,
        "Hub id owner/name that receives the finished student; needs a login (hf auth login).",
    ] = None

    def __post_init__(self) -> None:
        """Refuse values that no run can have.

        Raises:
            InputError: Naming the field, its value and what it takes.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            self._require(finite, field.name, "finite")
        self._require(0 <= self.seed < 2**63, "seed", "from 0 to less than 2^63")
        at_least_one = (
            "num_decoder_steps", "steps", "batch_size", "gradient_accumulation_steps", "lora_rank",
            "lora_updates", "checkpoint_every", "keep_checkpoints", "log_every",
            "evaluate_count",
        )  # fmt: skip
        for name in at_least_one:
            self._require(getattr(self, name) >= 1, name, "at least 1")
        positive = (
            "learning_rate", "lora_learning_rate", "lora_alpha", "student_lora_alpha",
            "max_grad_norm", "gan_critic_weight",
        )  # fmt: skip
        for name in positive:
            self._require(getattr(self, name) > 0, name, "more than 0")
        not_negative = (
            "kl_weight", "sample_every", "embedding_cache_mib", "weight_decay", "lr_warmup_steps",
            "clip_weight", "clip_weight_end", "gan_weight", "student_lora_rank",
            "evaluate_every",
        )  # fmt: skip
        for name in not_negative:
            self._require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._require(0 <= getattr(self, name) < 1, name, "from 0 to less than 1")
        for name in ("height", "width"):
            self._require(getattr(self, name) is None or getattr(self, name) >= 1, name, "positive")
        shared = self.num_shared_blocks
        self._require(shared is None or shared >= 1, "num_shared_blocks", "at least 1")
        choices = {
            "timestep_spacing": (None, *get_args(Spacing)),
            "weighting": get_args(Weighting),
            "kl_reduction": get_args(Reduction),
            "mixed_precision": get_args(MixedPrecision),
            "optimizer": get_args(OptimizerName),
            "lr_scheduler": get_args(RateSchedule),
            "gradient_checkpointing": get_args(Checkpointing),
            "sharding": get_args(Sharding),
        }
        for name, values in choices.items():
            self._require(getattr(self, name) in values, name, f"one of {values}")
        self._require(
            set(self.trackers) <= set(get_args(Tracker)), "trackers", f"of {get_args(Tracker)}"
        )
        unknown = set(self.allow_change) - {field.name for field in fields(self)}
        self._require(not unknown, "allow_change", "names of settings")
        self._require(0 <= self.prompt_drop <= 1, "prompt_drop", "from 0 to 1")
        in_order = 0 <= self.min_timestep <= self.max_timestep
        self._require(in_order, "min_timestep", f"from 0 to max_timestep ({self.max_timestep})")
        factor = self.divergence_factor
        self._require(factor == 0 or factor > 1, "divergence_factor", "0, or more than 1")
        if self.gan_weight and self.gan_pictures is None:
            raise InputError(
                "gan_weight needs gan_pictures: a folder of real pictures, or a .safetensors file "
                "of their latents. Without pictures, set gan_weight to 0."
            )
        if (self.prompts is None) == (self.embeddings is None):
            raise InputError(
                "A run needs prompts or embeddings, one of the two: a file of prompts, or the "
                "folder that `tiue embed-text` wrote."
            )

    def _require(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {wanted}; it is {getattr(self, name)!r}.")
