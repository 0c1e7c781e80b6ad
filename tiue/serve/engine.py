"""What every door asks for: drawings, and the pictures of those that can share a pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from tiue.errors import InputError
from tiue.pipelines.inputs import check_unicode
from tiue.serve.limits import Limits
from tiue.terminal import MAX_SEED

STUDENT, TEACHER = "student", "teacher"
# The decoder's timesteps fill one batch: a request for hundreds would take the memory of hundreds.
MAX_DECODER_STEPS = 8
MAX_GUIDANCE = 30.0


@dataclass(frozen=True)
class Drawing:
    """One picture to draw.

    Attributes:
        prompt: what is asked for.
        seed: of its noise.
        height: pixels; None for the model's own.
        width: likewise.
        num_decoder_steps: K of the student.
        guidance_scale: of classifier-free guidance; none up to 1.
        negative_prompt: what guidance leads away from.
        image: what is drawn over, or None.
        strength: how much of it is drawn anew, over 0 to 1.
        skip_below: decoder timesteps of smaller weight are left out; None for none.
        model: `STUDENT` or `TEACHER`.
    """

    prompt: str
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_decoder_steps: int = 4
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    image: Image.Image | None = field(default=None, compare=False)
    strength: float = 0.8
    skip_below: float | None = None
    model: str = STUDENT

    @property
    def key(self) -> tuple[Any, ...]:
        """What one pass has once: drawings of equal keys can share it."""
        over = self.image is not None
        return (
            self.model,
            (self.height, self.width, over),
            self.num_decoder_steps,
            self.guidance_scale,
            self.strength if over else None,
            self.skip_below,
        )


@dataclass(frozen=True)
class Picture:
    """A picture and what it took.

    Attributes:
        image: RGB.
        seed: of its noise.
        seconds: of each stage of the pass that it shared.
        batch: pictures of that pass.
    """

    image: Image.Image
    seed: int
    seconds: dict[str, float]
    batch: int


@dataclass
class Rules:
    """What may be asked of a model, wherever it is.

    Attributes:
        name: of the model, as clients are told it.
        factor: pixels a latent, each way.
        size: width and height of its own, in pixels.
        limits: on what is asked.
        models: `STUDENT`, and `TEACHER` where there is one.
    """

    name: str
    factor: int
    size: tuple[int, int]
    limits: Limits
    models: tuple[str, ...] = (STUDENT,)

    def check(self, drawing: Drawing) -> Drawing:
        """A drawing with its size filled in, if it may be drawn.

        Raises:
            InputError: it may not; the message says what may.
        """
        limits = self.limits
        limits.check_text("the prompt", drawing.prompt)
        limits.check_text("the negative prompt", drawing.negative_prompt)
        check_unicode(drawing.prompt + drawing.negative_prompt)
        if not drawing.prompt.strip():
            raise InputError("the prompt is empty; say what to draw")
        if drawing.model not in self.models:
            raise InputError(f"there is no {drawing.model} here; there is {', '.join(self.models)}")
        if not 0 <= drawing.seed <= MAX_SEED:
            raise InputError(f"a seed is from 0 to {MAX_SEED}, got {drawing.seed}")
        if not 1 <= drawing.num_decoder_steps <= MAX_DECODER_STEPS:
            raise InputError(
                f"K is from 1 to {MAX_DECODER_STEPS}, got {drawing.num_decoder_steps}: take what"
                " the model was distilled for"
            )
        if not 0 <= drawing.guidance_scale <= MAX_GUIDANCE:  # NaN is in no range
            raise InputError(f"guidance is from 0 to {MAX_GUIDANCE:g}")
        if drawing.image is not None and not 0 < drawing.strength <= 1:
            raise InputError("strength is above 0 and at most 1")
        if drawing.image is not None and drawing.model == TEACHER:
            raise InputError("the teacher draws from a prompt alone, over no picture")
        sizes = [
            self._side(name, wanted, own)
            for name, wanted, own in zip(
                ("width", "height"), (drawing.width, drawing.height), self.size, strict=True
            )
        ]
        image = drawing.image if drawing.image is None else drawing.image.resize(sizes)
        return replace(drawing, width=sizes[0], height=sizes[1], image=image)

    def _side(self, name: str, wanted: int | None, own: int) -> int:
        if wanted is None:
            return own
        most = self.limits.max_side or own
        if wanted % self.factor or not self.factor <= wanted <= most:
            raise InputError(
                f"{name} is a multiple of {self.factor} from {self.factor} to {most}, got {wanted}"
            )
        return wanted


class Engine(Rules):
    """A student, perhaps its teacher, and what may be asked of them.

    A picture's noise comes from its own seed, so that its company in a pass changes nothing but the
    rounding of matrix products. Not for two threads at once: a batcher calls it from one.

    Args:
        pipe: a pipeline of one pass, text to image, on its device.
        name: of the model, as clients are told it.
        limits: on what is asked.
        teacher: a plain diffusers pipeline to compare with, or None.
        teacher_arguments: of its calls, such as the number of steps and the guidance.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        limits: Limits,
        teacher: Any = None,
        teacher_arguments: dict[str, Any] | None = None,
    ) -> None:
        from tiue.pipelines import one_pass

        own = pipe.unet.config.sample_size
        height, width = own if isinstance(own, (tuple, list)) else (own, own)
        factor = pipe.vae_scale_factor
        size = (width * factor, height * factor)
        self._pipes = {STUDENT: pipe} if teacher is None else {STUDENT: pipe, TEACHER: teacher}
        super().__init__(name, factor, size, limits.of_size(max(size)), tuple(self._pipes))
        self.teacher_arguments = teacher_arguments or {}
        self._over_picture: Callable[[], Any] = lambda: one_pass(_image_to_image(pipe))
        self._over: Any = None
        for known in self._pipes.values():
            known.set_progress_bar_config(disable=True)

    @property
    def rules(self) -> Rules:
        """These alone, for who checks elsewhere."""
        return Rules(self.name, self.factor, self.size, self.limits, self.models)

    def draw(self, drawings: Sequence[Drawing]) -> list[Picture]:
        """Draw in one pass.

        Args:
            drawings: checked, of equal keys.

        Returns:
            A picture each.
        """
        first = drawings[0]
        arguments: dict[str, Any] = {}
        if first.model == TEACHER:
            arguments = {"height": first.height, "width": first.width, **self.teacher_arguments}
        else:
            arguments = {
                "num_decoder_steps": first.num_decoder_steps,
                "guidance_scale": first.guidance_scale,
                "skip_below": first.skip_below,
            }
            if first.guidance_scale > 1:
                arguments["negative_prompt"] = [drawing.negative_prompt for drawing in drawings]
            if first.image is None:
                arguments |= {"height": first.height, "width": first.width}
            else:
                arguments["image"] = [drawing.image for drawing in drawings]
                arguments["strength"] = first.strength
        pipe = self._pipes[first.model]
        if first.image is not None:
            self._over = self._over or self._over_picture()
            pipe = self._over
        prompts = [drawing.prompt for drawing in drawings]
        # From the CPU whatever the device: a seed means the same noise everywhere.
        generators = [torch.Generator().manual_seed(drawing.seed) for drawing in drawings]
        if first.model == TEACHER:
            images, seconds = pipe(prompts, generator=generators, **arguments).images, {}
        else:
            with pipe.record_timings() as seconds:
                images = pipe(prompts, generator=generators, **arguments).images
        return [
            Picture(image, drawing.seed, dict(seconds), len(drawings))
            for image, drawing in zip(images, drawings, strict=True)
        ]

    def parts_of(self, drawing: Drawing) -> list[tuple[str, Drawing]]:
        """A drawing by its heaviest timestep alone, its two heaviest, and so on to all of them.

        Args:
            drawing: checked, of the student.

        Returns:
            A label and a drawing each; no whole row where two timesteps weigh the same.
        """
        pipe = self._pipes[STUDENT]
        strength = drawing.strength if drawing.image is not None else 1.0
        schedule = pipe._schedule(drawing.num_decoder_steps, strength)
        weights = schedule.noise_coefficients.abs()
        found: list[tuple[str, Drawing]] = []
        for bound in sorted(set(weights.tolist()), reverse=True):
            added = ", ".join(f"{t:g}" for t in schedule.timesteps[weights == bound].tolist())
            label = f"t={added}" if not found else f"+ t={added}"
            found.append((label, replace(drawing, skip_below=math.nextafter(bound, 0.0))))
        return found


def _image_to_image(pipe: Any) -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

    is_xl = "text_encoder_2" in pipe.components
    cls: Any = StableDiffusionXLImg2ImgPipeline if is_xl else StableDiffusionImg2ImgPipeline
    # Given by name: of its own accord `from_pipe` takes no AutoencoderTiny along.
    made = cls.from_pipe(pipe, vae=pipe.vae)
    made.set_progress_bar_config(disable=True)
    return made
