"""`tiue serve`: the page and the API on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiue.devices import Dtype, find_device, find_dtype
from tiue.errors import CheckpointError, DependencyError, InputError
from tiue.generate.request import LoRA, Request
from tiue.serve.limits import Limits
from tiue.terminal import say

if TYPE_CHECKING:
    from tiue.serve.engine import Engine

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve_command(
    model: Annotated[
        str | None,
        typer.Option(help="As in `tiue generate`; by default the small model in this package."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A plain Stable Diffusion to compare with on the page: a folder or hub id. By"
            " default the embedded model's own teacher, with the embedded model."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="As in `tiue generate`.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="As in `tiue generate`.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own are open.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that clients may call this machine by, with another --host."),
    ] = None,
    page: Annotated[bool, typer.Option(help="The page for browsers, beside the API.")] = True,
    max_batch: Annotated[int, typer.Option(min=1, help="Pictures of one pass.")] = 8,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds that a pass waits for others to join.")
    ] = 5.0,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Pictures that may wait; then 429 with Retry-After.")
    ] = 64,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures a request.")] = 8,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Pixels; by default twice the model's own size.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take.")] = 60.0,
    device: Annotated[str, typer.Option(help="As in `tiue generate`.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="As in `tiue generate`.")] = Dtype.auto,
    compile: Annotated[bool, typer.Option("--compile", help="As in `tiue generate`.")] = False,
) -> None:
    """Serve a page and an HTTP API, whose requests share passes."""
    request = Request(model=model, loras=[LoRA.parse(text) for text in lora or ()], vae=vae)
    request.check()
    limits = Limits(
        max_batch=max_batch,
        max_wait=max_wait / 1000,
        max_waiting=max_waiting,
        max_images=max_images,
        max_side=max_side,
        timeout=timeout,
    )
    if max_images > max_waiting:
        raise InputError("--max-images of one request must fit in --max-waiting")
    try:
        import uvicorn

        from tiue.serve.api import make_app
        from tiue.serve.server import Server
        from tiue.serve.service import Service
    except ImportError as error:
        raise DependencyError(f"tiue serve needs pip install 'tiue[serve]' ({error})") from error
    engine = load_engine(request, teacher, limits, device, dtype, compile)
    local = host in LOCAL
    hosts = [*LOCAL, "[::1]", *(allowed_host or ())] if local or allowed_host else None
    service = Service(engine)
    app = make_app(service, hosts)
    if page:
        from tiue.serve.page import add_page

        app = add_page(app, service)
    # What was begun may end; only then is the rest cut off.
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=int(timeout) + 5,
        limit_concurrency=1000,
        h11_max_incomplete_event_size=2**16,
    )
    server = Server(config, lambda url: say(f"ready on {url}"))
    asyncio.run(server.serve())


def load_engine(
    request: Request,
    teacher: str | None = None,
    limits: Limits | None = None,
    device: str = "auto",
    dtype: Dtype = Dtype.auto,
    compile: bool = False,
) -> Engine:
    """The engine of a model, and of the teacher to compare it with.

    Args:
        request: names the model.
        teacher: a folder or hub id; None for the embedded model's own, or for none.
        limits: on what is asked; the usual by default.
        device: by name.
        dtype: of the weights.
        compile: whether to compile the student.

    Raises:
        CheckpointError: a model cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    from tiue.embedded import load_teacher, weights_folder
    from tiue.embedded.config import GUIDANCE_SCALE, TEACHER_STEPS
    from tiue.generate.loading import load
    from tiue.serve.engine import Engine

    place = find_device(device)
    kind = find_dtype(dtype, place)
    pipe = load(request, kind).to(place)
    if compile:
        pipe.compile(None if place.type == "cuda" else "openvino")
    beside: Any = None
    arguments: dict[str, Any] = {"num_inference_steps": TEACHER_STEPS, "guidance_scale": 7.5}
    if teacher is not None:
        try:
            beside = DiffusionPipeline.from_pretrained(teacher, dtype=kind, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load the teacher {teacher}: {error}") from error
    elif request.embedded is not None:
        beside = load_teacher(request.embedded, weights_folder(request.embedded), kind)
        arguments["guidance_scale"] = GUIDANCE_SCALE
    if beside is not None:
        beside = beside.to(place)
    name = request.embedded or Path(str(request.model)).name
    return Engine(pipe, name, limits or Limits(), beside, arguments)
