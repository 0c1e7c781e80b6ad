"""What a run is built of, as its settings ask: accelerate, text, student, validation."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch import nn

from tiue.distill import loading
from tiue.distill.config import DistillConfig
from tiue.distill.embeddings import StoredPrompts
from tiue.distill.monitor import check_trackers
from tiue.distill.networks import UNET, Family, family_of
from tiue.distill.processes import require_shared_work
from tiue.distill.prompts import read_prompts
from tiue.distill.sharding import check_sharding
from tiue.distill.student import add_student_lora
from tiue.distill.text import EncodedPrompts, Encoder, Text, TextSource
from tiue.distill.validation import Validation
from tiue.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

WEIGHT_TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def start_accelerator(config: DistillConfig) -> Accelerator:
    """Start accelerate as the settings ask.

    Raises:
        DependencyError: If a tracker is not installed.
        InputError: If the processes cannot share the work.
    """
    check_trackers(config.trackers)
    if config.deterministic:
        # cuBLAS reads it at its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=config.cpu,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps,
            adjust_scheduler=False,
            sync_with_dataloader=False,
        ),
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.output), str(config.output / "logs")),
        step_scheduler_with_optimizer=False,
    )
    require_shared_work(accelerator.num_processes)
    if config.sharding == "full":
        check_sharding(config, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise InputError(
            "DeepSpeed wraps one network, and student and LoRA teacher are two: choose "
            "sharding 'full' (FSDP2) or plain data parallelism."
        )
    return accelerator


def load_text(
    config: DistillConfig, accelerator: Accelerator, report: Callable[[str], object]
) -> tuple[TextSource, tuple[list[str], Text] | None]:
    """The prompts' embeddings, and the validation prompts with theirs where pictures are due.

    A text encoder that all is made of beforehand is let go of here.
    """
    device = accelerator.device
    encoder: Encoder | None = None
    text: TextSource
    if config.embeddings is not None:
        verify = config.verify_embeddings and accelerator.is_local_main_process
        text = StoredPrompts(config.embeddings, device, verify)
        if not _is_same_place(text.teacher, config.teacher):
            logger.warning(
                "The embeddings in '%s' are of '%s', and the teacher is '%s': they must have the "
                "same text encoder, for no other is asked.",
                *(config.embeddings, text.teacher, config.teacher),
            )
    else:
        assert config.prompts is not None
        prompts = read_prompts(config.prompts, config.prompt_column, report)
        encoder = loading.load_text_encoder(config.teacher, device)
        text = EncodedPrompts(prompts, encoder, config.embedding_cache_mib << 20)
    if not config.sample_every:
        return text, None
    shown = list(config.validation_prompts) or text.prompts[:4]
    if set(shown) <= set(text.prompts):
        return text, (shown, text[torch.tensor([text.prompts.index(p) for p in shown])])
    encoder = encoder or loading.load_text_encoder(config.teacher, device)
    return text, (shown, encoder(shown))


def _is_same_place(one: str, other: str) -> bool:
    first, second = (Path(loading.resolve_teacher(name)).resolve() for name in (one, other))
    return first == second


def check_text(text: Text, unet: Any) -> None:
    """See that embeddings are what a teacher's UNet reads.

    Args:
        text: The empty prompt's.
        unet: The teacher's.

    Raises:
        InputError: If they are another text encoder's.
    """
    given = text.tokens.shape[-1]
    if family_of(unet) is not UNET:
        names = ("caption_channels", "joint_attention_dim")
        width = next(unet.config[name] for name in names if name in unet.config)
        if given != width:
            raise InputError(
                f"The embeddings are of width {given}; the teacher's transformer reads {width}. "
                "Write them of this teacher with `tiue embed-text`, or give the prompts themselves."
            )
        return
    widths = unet.config.cross_attention_dim
    read = {widths} if isinstance(widths, int) else set(widths)
    fits = unet.config.encoder_hid_dim is not None or read == {given}
    pooled = text.pooled is not None
    if not fits or pooled != (unet.config.addition_embed_type == "text_time"):
        kinds = {True: "with SDXL's pooled text", False: "without pooled text"}
        raise InputError(
            f"The embeddings are of width {given}, {kinds[pooled]}; the teacher's UNet reads width "
            f"{max(read)}, {kinds[unet.config.addition_embed_type == 'text_time']}. Write them of "
            "this teacher with `tiue embed-text`, or give the prompts themselves."
        )


def load_student(config: DistillConfig, teacher: Any) -> Any:
    """Load the UNet or transformer that is trained, with its blocks checkpointed as asked.

    Raises:
        CheckpointError: If it cannot be loaded, or does not fit the teacher.
        InputError: If a setting does not apply to its family.
    """
    # Weights that are not trained need no float32.
    kind = WEIGHT_TYPES[config.mixed_precision] if config.student_lora_rank else torch.float32
    unet = loading.load_network(config.student or config.teacher, kind).train()
    family = family_of(teacher)
    if not isinstance(unet, family.plain):
        raise CheckpointError(
            f"The student is a {family_of(unet).plain.__name__} and the teacher a "
            f"{family.plain.__name__}. Start from a network of the teacher's kind."
        )
    check_family(config, family)
    if config.num_shared_blocks is not None:
        unet.num_shared_blocks = config.num_shared_blocks
    for name in family.alike:
        own, taught = unet.config[name], teacher.config[name]
        if own != taught:
            raise CheckpointError(
                f"The student's {name} is {own} and the teacher's {taught}: they must share "
                "latents and text encoder. Start from a network of the teacher's kind."
            )
    if config.student_lora_rank:
        add_student_lora(unet, config)
    checkpoint_blocks(unet, config)
    return unet


def check_family(config: DistillConfig, family: Family) -> None:
    """Refuse settings that a family does not take.

    Raises:
        InputError: Naming the setting.
    """
    if family is UNET:
        if config.num_shared_blocks is not None:
            raise InputError(
                "num_shared_blocks is the border of a transformer; a UNet has an encoder of its "
                "own: leave it out."
            )
        return
    for name, off in (("gan_weight", 0), ("evaluate_every", 0), ("sharding", "none")):
        if getattr(config, name) != off:
            raise InputError(f"Transformers are distilled with {name} {off!r} alone so far.")


def checkpoint_blocks(unet: Any, config: DistillConfig) -> None:
    """Let backward compute again what the settings say, for less memory."""
    unet.recompute_feed_forward = config.recompute_feed_forward
    if config.gradient_checkpointing != "none":
        unet.enable_gradient_checkpointing()
    if config.gradient_checkpointing == "encoder" and family_of(unet) is not UNET:
        unet.checkpoint_decoder = False
    elif config.gradient_checkpointing == "encoder":
        for module in unet.up_blocks.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def compile_network(network: nn.Module, backend: str) -> None:
    """Let torch.compile have a network's calls, in place: names and hooks stay.

    Raises:
        InputError: If there is no such backend.
    """
    import torch._dynamo  # only where it is asked for: it takes seconds

    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise InputError(
            f"compile must be 'no' or a backend of torch.compile, one of "
            f"{', '.join(torch._dynamo.list_backends())}; it is '{backend}'."
        )
    # A run meets few shapes, each a graph of its own: rows of the student, of the teacher with
    # guidance, and of the LoRA. Its switch is a guard, so both settings keep their graphs.
    network.compile(backend=backend, dynamic=False)


def find_latent_shape(config: DistillConfig, unet: Any) -> tuple[int, int, int]:
    """C, H, W of a sample.

    Raises:
        InputError: If neither the settings nor the UNet name a size.
    """
    size = unet.config.sample_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    height, width = config.height or height, config.width or width
    if height is None or width is None:
        raise InputError("This network names no sample size; set height and width.")
    return (unet.config.in_channels, height, width)


def load_validation(
    config: DistillConfig,
    accelerator: Accelerator,
    shown: tuple[list[str], Text] | None,
    latent_shape: tuple[int, int, int],
) -> Validation | None:
    """What draws the validation prompts, or None where none are asked for or there is no VAE."""
    if shown is None:
        return None
    vae = loading.load_vae(config.teacher, accelerator.device)
    if vae is None:
        logger.warning("The teacher '%s' has no VAE: no pictures.", config.teacher)
        return None
    main = accelerator.is_main_process
    prompts, text = shown
    vae = vae if main else None
    return Validation(prompts, text, latent_shape, vae, config.seed)
