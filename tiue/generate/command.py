"""`tiue generate`: pictures of prompts, and a contact sheet of all of them."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from tiue.devices import Dtype, find_device, find_dtype
from tiue.errors import InputError, OutputError
from tiue.generate.request import LoRA, Request
from tiue.terminal import check_seeds, read_texts, say

# torch, diffusers and transformers take seconds to import: the command imports them, so that
# --help and usage errors come at once.


def generate_command(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPTS...", help='What to draw, each text in quotes: "red apple" "rocket".'
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Instead: a .jsonl of objects with prompt and perhaps seed, or a .txt of lines."
            " What is there already is not drawn again; `accelerate launch -m tiue generate`"
            " shares the work; a manifest tells prompt, seed, file and hash.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pictures; made if missing.")
    ] = Path("out"),
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="The same seed and prompt give the same picture; 1, 2, ... give others."
        ),
    ] = 0,
    num_images: Annotated[
        int,
        typer.Option("--num-images", "-n", min=1, help="Pictures a prompt, from seeds S, S+1, ..."),
    ] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            help="A Stable Diffusion 1.x, 2.x or XL model: a folder, a Hugging Face id such as"
            " senmaonk/loopfree-sd1.5, or one .safetensors file; or openmoji or scenes, the small"
            " models in this package, which need no network. By default openmoji.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_ID",
            help="With one .safetensors file: whose configuration and tokenizer to take, where the"
            " hub cannot be asked.",
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of the weights in a folder or on the hub, such as fp16.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]", help="A LoRA in .safetensors and its weight; several add up."
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="tiny|FOLDER_OR_ID",
            help="Another VAE. tiny is TAESD, a small one: on a CPU the VAE is a large part of the"
            " time.",
        ),
    ] = None,
    num_decoder_steps: Annotated[
        int,
        typer.Option(
            "--num-decoder-steps",
            "-k",
            min=1,
            help="Timesteps that the decoder runs at, in one batch. Use what the model was"
            " distilled for (4); fewer is faster.",
        ),
    ] = 4,
    height: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels; by default the model's own size, or the picture's."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels; by default the model's own size, or the picture's."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to draw over.", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of the picture is drawn anew, up to 1. By default 0.8."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="A picture, white where --image is drawn anew.", show_default=False),
    ] = None,
    controlnet: Annotated[
        str | None, typer.Option(metavar="FOLDER_OR_ID", help="A ControlNet made for the model.")
    ] = None,
    control_image: Annotated[
        Path | None,
        typer.Option(help="What the ControlNet reads: edges, depth, ...", show_default=False),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="auto is float16 on a CUDA GPU and float32 elsewhere.")
    ] = Dtype.auto,
    guidance_scale: Annotated[
        float,
        typer.Option(help="Classifier-free guidance if above 1. A distilled model needs none."),
    ] = 1.0,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from; of all prompts.")
    ] = None,
    skip_below: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Faster, and slightly different pictures: leave out timesteps whose weight is"
            " under this, for instance 0.05. Off by default.",
        ),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="CUDA graphs on a GPU, OpenVINO elsewhere: slow at the first picture, then faster;"
            " for many pictures of one size.",
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures computed at once; fewer need less memory.")
    ] = 8,
) -> None:
    """Draw a picture of each prompt, and a contact sheet of all of them."""
    if bool(prompts) == bool(prompt_file):
        raise typer.BadParameter("say what to draw: either PROMPTS or a file of them, --prompts")
    prompts = read_texts(prompts or [])
    check_seeds(seed, num_images)
    listed = None
    if prompt_file is not None:
        from tiue.generate.many import read_jobs

        listed = read_jobs(prompt_file, seed, num_images)
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("a prompt is empty; say what to draw")
    request = Request(
        model=model,
        config=config,
        variant=variant,
        loras=[LoRA.parse(text) for text in lora or ()],
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        image=image,
        strength=strength,
        mask=mask,
        controlnet=controlnet,
        control_image=control_image,
        vae=vae,
    )
    request.check()
    given = request.pictures()
    check_writable(output)

    from tiue.generate.loading import load
    from tiue.generate.many import MANIFEST, draw_batch, draw_many, own_device
    from tiue.images import contact_sheet, save_image
    from tiue.scenes.grammar import warn_of_unknown_words

    place = find_device(device)
    if listed is not None:
        place = own_device(place)
    pipe = load(request, find_dtype(dtype, place)).to(place)
    if request.embedded == "scenes":
        warn_of_unknown_words(prompts)
    if compile:
        pipe.compile(None if place.type == "cuda" else "openvino")
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: on a terminal only
    given = given.sized(width, height, pipe.vae_scale_factor)
    arguments = {
        "num_decoder_steps": num_decoder_steps,
        "guidance_scale": guidance_scale,
        "skip_below": skip_below,
        **(given.arguments(strength) or {"height": height, "width": width}),
    }
    if listed is not None:
        weights = [lora.weight for lora in request.loras]
        drawn = draw_many(pipe, listed, output, batch_size, arguments, negative_prompt, weights)
        if drawn is not None:
            say(f"{output / MANIFEST}: {len(listed)} pictures, {drawn} drawn now by this process")
        return
    jobs = [(prompt, seed + index) for prompt in prompts for index in range(num_images)]
    names = _file_names(jobs)
    pictures = []
    with pipe.record_timings() as timings:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            texts, seeds = (list(column) for column in zip(*batch, strict=True))
            images = draw_batch(pipe, texts, seeds, arguments, negative_prompt)
            for picture, name in zip(images, names[start:], strict=False):
                save_image(picture, output / name)
                say(output / name)
            pictures += images
    labels = [
        prompt if num_images == 1 else f"{prompt} (seed {own_seed})" for prompt, own_seed in jobs
    ]
    sheet = output / "contact_sheet.png"
    save_image(contact_sheet(pictures, labels, num_images if num_images > 1 else None), sheet)
    say(sheet)
    for stage, seconds in timings.items():
        say(f"{stage:12} {seconds:8.3f} s")
    say(f"{'total':12} {sum(timings.values()):8.3f} s for {len(pictures)} pictures")


def check_writable(folder: Path) -> None:
    """Make the folder and write to it once, before minutes are spent on what goes there.

    Raises:
        OutputError: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder} ({error.strerror}); give another folder with --output"
        ) from error


def _file_names(jobs: list[tuple[str, int]]) -> list[str]:
    """One name a picture; prompts that come down to the same text are told apart by a number."""
    from tiue.images import safe_file_name

    seen: Counter[str] = Counter()
    names = []
    for prompt, seed in jobs:
        stem = f"{safe_file_name(prompt)}_seed{seed}"
        seen[stem] += 1
        name = f"{stem}.png" if seen[stem] == 1 else f"{stem}_{seen[stem]}.png"
        names.append(os.fsdecode(name.encode()))  # UTF-8 under any locale
    return names
