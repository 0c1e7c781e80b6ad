"""A run or checkpoint as a complete pipeline folder."""

from pathlib import Path

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi

from tiue.distill.loading import load_pipeline_around
from tiue.distill.networks import FAMILIES, family_named
from tiue.distill.settings import CONFIG, load_config
from tiue.errors import CheckpointError, InputError, OutputError
from tiue.files import whole_folder


def export_student(run: Path, output: Path, teacher: str | None = None) -> Path:
    """Write a student with its teacher's other parts as one diffusers pipeline folder.

    Args:
        run: A run's output folder, its `best`, or one of its `checkpoints/step-<n>`.
        output: The folder to write; must not exist yet.
        teacher: Folder or hub id that text encoder, tokenizer and VAE come from; by default the
            one in the run's config.yaml.

    Returns:
        The folder, which `TiUEPipeline` and diffusers load.

    Raises:
        CheckpointError: If the folder holds no student, or the teacher is no whole pipeline.
        InputError: If the output exists, or no teacher is named.
        OutputError: If it cannot be written.
    """
    if output.exists():
        raise InputError(f"'{output}' exists already; give a new folder with --output.")
    # A checkpoint keeps both; the average is the better student.
    components = dict.fromkeys(family.component for family in FAMILIES)
    names = [
        name
        for component in components
        for name in (f"{component}_ema", component)
        if (run / name / "config.json").is_file()
    ]
    if not names or not (run / "scheduler").is_dir():
        raise CheckpointError(
            f"'{run}' holds no student (unet/ and scheduler/). Give the output folder of a "
            "finished `tiue distill`, or one of its checkpoints/step-<n>."
        )
    if teacher is None and not (run / CONFIG).is_file():
        raise InputError(f"'{run}' has no {CONFIG} that names its teacher: give it with --teacher.")
    teacher = teacher or load_config(run / CONFIG).teacher
    try:
        config = FAMILIES[0].plain.load_config(run / names[0])
        plain = family_named(config["_class_name"]).plain
        unet = plain.from_pretrained(run / names[0], use_safetensors=True)
        config = DDIMScheduler.load_config(run / "scheduler")
        flow = config["_class_name"].startswith("FlowMatch")
        scheduler_class = FlowMatchEulerDiscreteScheduler if flow else DDIMScheduler
        scheduler = scheduler_class.from_pretrained(run / "scheduler")
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"Cannot load the student in '{run}' ({error}).") from error
    pipeline = load_pipeline_around(teacher, unet, scheduler)
    if pipeline is None:
        raise CheckpointError(
            f"The teacher '{teacher}' is no whole pipeline (model_index.json and VAE); name one "
            "with --teacher."
        )
    with whole_folder(output) as written:
        pipeline.save_pretrained(written)
    return output


def push_student(run: Path, name: str) -> None:
    """Put a finished run's student on the hub: its whole pipeline, or else UNet and scheduler.

    Args:
        run: The run's output folder.
        name: Hub id owner/name; made if it is not there.

    Raises:
        OutputError: If it cannot be put there; the student stays in its folder.
    """
    whole = (run / "pipeline").is_dir()
    patterns = None if whole else ["unet/*", "transformer/*", "scheduler/*", "lora/*"]
    try:
        hub = HfApi()
        hub.create_repo(name, exist_ok=True)
        hub.upload_folder(
            repo_id=name, folder_path=run / "pipeline" if whole else run, allow_patterns=patterns
        )
    except (OSError, ValueError) as error:  # the hub's errors are of these
        raise OutputError(
            f"The student is in '{run}', and cannot be put on the hub as '{name}' ({error}). Log "
            "in with `hf auth login`, then go on with --resume: only this is left to do."
        ) from error
