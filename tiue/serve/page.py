"""The page: Gradio over the same service, so that its drawings share passes with the API's."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import io
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from PIL import Image

from tiue.errors import InputError, OutputError
from tiue.files import write_file
from tiue.serve.batching import ClosedError, QueueFullError
from tiue.serve.engine import MAX_DECODER_STEPS, MAX_GUIDANCE, TEACHER, Drawing, Engine, Picture
from tiue.serve.limits import Limits
from tiue.serve.service import Service

# A browser keeps about 5 MB a site; a thumbnail of 128 pixels is 5 KB.
_KEPT = 24
_THUMBNAIL = 128
_CSS = """
.gradio-container { max-width: 1100px !important; width: 100%; margin: 0 auto !important; }
.pictures .gallery-container, .pictures .grid-wrap { height: auto !important; }
.pictures .grid-wrap { min-height: 6rem !important; max-height: none !important; }
.pictures .grid-wrap { padding-top: 2rem; }
.pictures .grid-container { grid-template-columns:
    repeat(auto-fill, minmax(100px, 1fr)) !important; }
.stage { display: flex; gap: .5rem; align-items: center; font-size: .85rem; }
.stage span { flex: 0 0 11rem; } .stage i { height: .6rem; background: var(--color-accent); }
"""


def _upload(limits: Limits, **settings: Any) -> gr.Image:
    """A place to upload a picture to, decoded within limits; no address or path is followed.

    Methods of this one component: gradio writes a file beside every class made of its own.
    """
    component = gr.Image(sources=["upload"], **settings)
    move = component.async_move_resource_to_block_cache

    async def move_upload(path: Any) -> Any:
        # gradio would fetch an address, and of a mounted page it does not look where a path leads.
        if not Path(str(path)).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            message = "upload a picture; no address and no path is followed"
            raise gr.Error(message, print_exception=False)
        return await move(path)

    def decode(payload: Any) -> Image.Image | None:
        if payload is None:
            return None
        try:
            path = Path(payload.path or "")
            if not path.is_file() or path.stat().st_size > limits.max_upload:
                raise InputError(f"upload a picture of at most {limits.max_upload} bytes")
            return limits.read_picture(path.read_bytes())
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    component.async_move_resource_to_block_cache = move_upload
    component.preprocess = decode
    return component


class Page:
    """What the page's events do.

    Args:
        service: what draws.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def draw(
        self,
        prompt: str,
        count: float,
        steps: float,
        seed: float | None,
        guidance: float,
        negative: str,
        image: Image.Image | None,
        strength: float,
        compare: bool,
        parts: bool,
        history: Any,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        """Draw, and yield what has come so far: pictures, stages, parts, teacher's, history."""
        try:
            random = seed is None or seed < 0
            first = secrets.randbelow(2**32) if random else _whole("the seed", seed)
            one = Drawing(
                prompt=prompt or "",
                seed=first,
                num_decoder_steps=_whole("K", steps),
                guidance_scale=float(guidance),
                negative_prompt=negative or "",
                image=image,
                strength=float(strength),
            )
            number = _whole("the number of pictures", count)
            self._service.limits.check_count(number)
            wanted = [replace(one, seed=first + index) for index in range(number)]
            progress(0.1, desc=f"{len(self._service.batcher)} pictures before yours")
            pictures = await self._service.draw(wanted, "page")
            kept = [_entry(picture, one) for picture in pictures] + _entries(history)
            kept = kept[:_KEPT]
            hidden = [gr.update(value=[], visible=False)] * 2
            shown = [_captioned(pictures), _stages(pictures[0]), *hidden, kept, self.shown(kept)]
            yield shown
            if parts:
                progress(0.5, desc="what each timestep adds")
                labels, drawings = zip(*self._parts_of(one), strict=True)
                # One after another: no two have the same decoder rows, and share no pass.
                drawn = [(await self._service.draw([part], "page"))[0] for part in drawings]
                strip = [(p.image, label) for p, label in zip(drawn, labels, strict=True)]
                shown[2] = gr.update(value=strip, visible=True)
                yield shown
            if compare:
                progress(0.7, desc="the teacher draws")
                plain = [replace(drawing, model=TEACHER, image=None) for drawing in wanted]
                beside = _captioned(await self._service.draw(plain, "page"))
                shown[3] = gr.update(value=beside, visible=True)
                yield shown
        except asyncio.CancelledError:
            raise
        except (InputError, QueueFullError, ClosedError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        except TimeoutError as error:
            seconds = self._service.limits.timeout
            message = f"this took more than {seconds:g} s and was left"
            raise gr.Error(message, print_exception=False) from error

    def shown(self, history: Any) -> list[tuple[Image.Image, str]]:
        """The history as a gallery's pictures; what a browser kept is not trusted."""
        entries = _entries(history)
        limits = self._service.limits
        return [
            (limits.read_base64(entry["picture"]), f"{entry['prompt']} ({entry['seed']})")
            for entry in entries
        ]

    def again(self, history: Any, event: gr.SelectData) -> list[Any]:
        """The settings of a picture in the history."""
        entries = _entries(history)
        if not isinstance(event.index, int) or not 0 <= event.index < len(entries):
            raise gr.Error("that picture is not in the history", print_exception=False)
        entry = entries[event.index]
        names = ("prompt", "steps", "seed", "guidance", "negative")
        return [entry[name] for name in names]

    def _parts_of(self, drawing: Drawing) -> list[tuple[str, Drawing]]:
        engine = self._service.engine
        assert isinstance(engine, Engine)
        return engine.parts_of(engine.check(drawing))


def make_page(service: Service) -> gr.Blocks:
    """The page, not mounted anywhere yet.

    Args:
        service: what draws.
    """
    page, limits = Page(service), service.limits
    has_teacher = TEACHER in service.engine.models
    width, height = service.engine.size
    with gr.Blocks(
        title="TiUE", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=False
    ) as blocks:
        gr.Markdown(f"# TiUE\n{service.engine.name}, {width} x {height} pixels, in one pass")
        history = gr.BrowserState([], storage_key="tiue-history", secret="not a secret")
        with gr.Row():
            with gr.Column(min_width=320):
                prompt = gr.Textbox(label="Prompt", value="red apple", max_length=limits.max_prompt)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", min_width=120)
                    cancel = gr.Button("Cancel", min_width=120)
                with gr.Row():
                    count = gr.Slider(1, limits.max_images, 4, step=1, label="Pictures")
                    steps = gr.Slider(1, MAX_DECODER_STEPS, 4, step=1, label="Timesteps (K)")
                seed = gr.Number(0, precision=0, label="Seed (-1: another each time)")
                with gr.Accordion("More", open=False):
                    guidance = gr.Slider(
                        1, min(10, MAX_GUIDANCE), 1, step=0.1, label="Guidance (1: none)"
                    )
                    negative = gr.Textbox(
                        label="Negative prompt (with guidance)", max_length=limits.max_prompt
                    )
                    image = _upload(limits, label="Starting picture", height=200)
                    strength = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength")
                parts = gr.Checkbox(False, label="Show what each timestep adds")
                compare = gr.Checkbox(False, label="Compare with the teacher", visible=has_teacher)
            with gr.Column(min_width=320):
                pictures = _gallery("Pictures", columns=4)
                stages = gr.HTML(label="Time")
                strip = _gallery("What each timestep adds", columns=4, visible=False)
                teacher = _gallery("The teacher's, of the same seeds", columns=4, visible=False)
        kept = _gallery("History (kept in this browser)", columns=8)
        settings = [prompt, count, steps, seed, guidance, negative, image, strength, compare, parts]
        shown = [pictures, stages, strip, teacher, history, kept]
        quiet: dict[str, Any] = {"api_visibility": "private"}
        # Passes are the batcher's business: many events may wait for one at once.
        drawing = gr.on(
            [draw.click, prompt.submit],
            page.draw,
            [*settings, history],
            shown,
            concurrency_limit=limits.max_waiting,
            show_progress_on=pictures,
            **quiet,
        )
        cancel.click(None, cancels=[drawing], **quiet)
        blocks.load(page.shown, history, kept, **quiet)
        kept.select(page.again, history, [prompt, steps, seed, guidance, negative], **quiet)
    blocks.queue(max_size=4 * limits.max_waiting, api_open=False)
    return blocks


def add_page(app: FastAPI, service: Service) -> FastAPI:
    """Mount the page at the root of an API; nothing on it comes from another machine.

    Args:
        app: of `make_app`.
        service: the same.
    """
    # Fonts by name: gradio's own themes ask Google for theirs.
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        make_page(service),
        path="/",
        theme=theme,
        css=_CSS,
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=service.limits.max_upload,
    )


def _gallery(label: str, columns: int, visible: bool = True) -> gr.Gallery:
    gallery = gr.Gallery(
        label=label,
        visible=visible,
        elem_classes="pictures",
        fit_columns=False,
        columns=columns,
        format="png",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
    )
    postprocess = gallery.postprocess

    def stored(value: Any) -> Any:
        """As gradio's, but a full disk leaves no half of a file and spoils none that is shown."""
        try:
            folder = Path(gallery.GRADIO_CACHE)
            return postprocess([(_store(image, folder), text) for image, text in value or ()])
        except OutputError as error:
            raise gr.Error(
                "this machine cannot store the pictures (its disk may be full); the history in"
                " this browser is as it was. Make room and draw again",
                print_exception=False,
            ) from error

    gallery.postprocess = stored
    return gallery


def _store(image: Image.Image, folder: Path) -> str:
    """Where a picture lies as a PNG file, whole."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    path = folder / hashlib.sha256(data).hexdigest() / "image.png"
    if not path.exists():
        write_file(path, lambda beside: beside.write_bytes(data))
    return str(path)


def _whole(name: str, number: Any) -> int:
    if not isinstance(number, (int, float)) or number != number or int(number) != number:
        raise InputError(f"{name} is a whole number")
    return int(number)


def _captioned(pictures: Sequence[Picture]) -> list[tuple[Image.Image, str]]:
    return [(picture.image, f"seed {picture.seed}") for picture in pictures]


def _stages(picture: Picture) -> str:
    """Time and share of each stage of a pass, as bars."""
    total = sum(picture.seconds.values())
    rows = [
        f'<div class="stage"><span>{html.escape(name)}: {1000 * seconds:.0f} ms,'
        f' {seconds / total:.0%}</span><i style="width:{100 * seconds / total:.0f}%"></i></div>'
        for name, seconds in picture.seconds.items()
    ]
    head = f"{1000 * total:.0f} ms for a pass of {picture.batch}"
    return f'<div id="stages"><b>{head}</b>{"".join(rows)}</div>'


def _entry(picture: Picture, drawing: Drawing) -> dict[str, Any]:
    small = picture.image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return {
        "prompt": drawing.prompt[:200],
        "steps": drawing.num_decoder_steps,
        "seed": picture.seed,
        "guidance": drawing.guidance_scale,
        "negative": drawing.negative_prompt[:200],
        "picture": base64.b64encode(file.getvalue()).decode(),
    }


_KINDS: dict[str, Any] = {
    "prompt": str,
    "steps": int,
    "seed": int,
    "guidance": (int, float),
    "negative": str,
    "picture": str,
}


def _entries(history: Any) -> list[dict[str, Any]]:
    """What of a browser's history is one; another version of this page may have written it."""
    found = []
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, dict) and all(
            isinstance(entry.get(name), kind) for name, kind in _KINDS.items()
        ):
            try:
                Limits().read_base64(entry["picture"])
            except InputError:
                continue
            found.append(entry)
    return found[:_KEPT]
