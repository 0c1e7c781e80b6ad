"""What `tiue generate` was asked for, and which of it does not go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue.embedded import EMBEDDED
from tiue.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class LoRA:
    """A LoRA and its weight.

    Attributes:
        source: a .safetensors file, a folder or a hub id.
        weight: 1 where none was given.
    """

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoRA:
        """Read FILE or FILE:weight.

        Raises:
            InputError: there is no file's name, or the weight is infinite or no number.
        """
        source, colon, weight = text.rpartition(":")
        try:
            parsed = cls(source, float(weight)) if colon else cls(text)
        except ValueError:
            parsed = cls(text)  # the colon of a drive
        if not parsed.source:
            raise InputError(f"--lora {text!r} names no file: give FILE or FILE:weight")
        if not math.isfinite(parsed.weight):
            raise InputError(f"--lora {text!r} has a weight that is no finite number")
        return parsed


@dataclass(frozen=True)
class Request:
    """The model and the pictures that a drawing begins with.

    Attributes:
        model: a folder, a hub id, one .safetensors file, or the name of a model in this package;
            None for the OpenMoji model.
        config: a folder or hub id that says how the parts of one file are made.
        variant: of the weights in a folder or on the hub, such as "fp16".
        loras: added to the UNet, with their weights.
        negative_prompt: what guidance leads away from.
        guidance_scale: of classifier-free guidance; none up to 1.
        image: what is drawn over.
        strength: how much of it is drawn anew, 0 to 1; None for the usual 0.8.
        mask: white where it is drawn anew.
        controlnet: a folder or hub id.
        control_image: what the ControlNet reads.
        vae: "tiny", or a folder or hub id; None for the model's own.
    """

    model: str | None = None
    config: str | None = None
    variant: str | None = None
    loras: list[LoRA] = field(default_factory=list)
    negative_prompt: str | None = None
    guidance_scale: float = 1.0
    image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    controlnet: str | None = None
    control_image: Path | None = None
    vae: str | None = None

    @property
    def embedded(self) -> str | None:
        """The model in this package that is meant; a folder of its name comes before it."""
        if self.model is None:
            return "openmoji"
        named = self.model in EMBEDDED and not Path(self.model).exists()
        return self.model if named else None

    @property
    def is_file(self) -> bool:
        """Whether the model is one file: by its name, so that a missing one is told as such."""
        name = self.model or ""
        return name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin")) or (
            Path(name).is_file() and bool(name)
        )

    def check(self) -> None:
        """See that what was asked for goes together.

        Raises:
            InputError: it does not; the message says what to add or to leave out.
        """
        wrong = [
            (self.variant and not self.model, "--variant is of a --model"),
            (self.variant and self.is_file, "--variant is of a folder, and --model is one file"),
            (self.config and not self.is_file, "--config is for a --model that is one file"),
            (
                self.negative_prompt and not self.guidance_scale > 1,
                "--negative-prompt has no effect without guidance: add --guidance-scale above 1",
            ),
            (self.mask and not self.image, "--mask needs the --image that it lies over"),
            (self.strength is not None and not self.image, "--strength is of an --image"),
            (
                self.strength is not None and not 0 < self.strength <= 1,
                f"--strength is above 0 and at most 1, got {self.strength}",
            ),
            (
                self.controlnet and not self.control_image,
                "--controlnet needs the --control-image that it reads",
            ),
            (self.control_image and not self.controlnet, "--control-image needs a --controlnet"),
            (
                self.controlnet and not self.model,
                "--controlnet needs the --model that it was made for",
            ),
            (self.loras and not self.model, "--lora needs the --model that it was made for"),
            (
                self.vae == "tiny" and not self.model,
                "--vae tiny is for a --model: the embedded model has a small one already",
            ),
        ]
        for is_wrong, message in wrong:
            if is_wrong:
                raise InputError(message)

    def pictures(self) -> Pictures:
        """Read the pictures.

        Raises:
            InputError: one is missing or no picture.
        """
        paths = ((self.image, "RGB"), (self.mask, "L"), (self.control_image, "RGB"))
        return Pictures(*(None if path is None else _open(path, mode) for path, mode in paths))


@dataclass(frozen=True)
class Pictures:
    """The pictures of a request."""

    image: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None

    def sized(self, width: int | None, height: int | None, factor: int) -> Pictures:
        """All of one size.

        Args:
            width: in pixels; by default that of the picture that is drawn over, or read.
            height: likewise.
            factor: pixels a latent, which sizes are multiples of.
        """
        first = self.image or self.control
        if first is None:
            return self
        size = [
            max(factor, (wanted or own) // factor * factor)
            for wanted, own in zip((width, height), first.size, strict=True)
        ]
        found = (self.image, self.mask, self.control)
        return Pictures(*(None if image is None else image.resize(size) for image in found))

    def arguments(self, strength: float | None) -> dict[str, Any]:
        """The pictures under the names of a diffusers call.

        Args:
            strength: how much of the image is drawn anew; None for 0.8.
        """
        if self.image is None:
            return {} if self.control is None else {"image": self.control}
        found = {"image": self.image, "strength": 0.8 if strength is None else strength}
        if self.mask is not None:
            width, height = self.image.size
            found |= {"mask_image": self.mask, "height": height, "width": width}
        return found if self.control is None else found | {"control_image": self.control}


def _open(path: Path, mode: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise InputError(f"there is no picture {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is no picture that can be read ({error})") from error
