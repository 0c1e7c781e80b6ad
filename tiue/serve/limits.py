"""How much may be asked for, and pictures from outside decoded within it."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass, replace

from PIL import Image

from tiue.errors import InputError

# Decoders that are fuzzed the most; the rest of Pillow's thirty is no service's business.
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Limits:
    """Of a service.

    Attributes:
        max_prompt: characters of a prompt.
        max_images: pictures a request.
        max_side: pixels of a picture, each way; None for twice the model's own.
        max_upload: bytes of a picture that is sent.
        max_upload_pixels: of a picture that is sent, known before it is decoded.
        max_batch: pictures of one pass.
        max_wait: seconds that a pass waits for others to join it.
        max_waiting: pictures that may wait; past it, requests are told to come back.
        timeout: seconds that a request may take.
    """

    max_prompt: int = 2000
    max_images: int = 8
    max_side: int | None = None
    max_upload: int = 8 * 2**20
    max_upload_pixels: int = 2**24
    max_batch: int = 8
    max_wait: float = 0.005
    max_waiting: int = 64
    timeout: float = 60.0

    def of_size(self, own: int) -> Limits:
        """These for a model whose pictures are `own` pixels a side."""
        return self if self.max_side else replace(self, max_side=2 * own)

    def check_text(self, name: str, text: str) -> None:
        """See that a text is not too long.

        Raises:
            InputError: it is.
        """
        if len(text) > self.max_prompt:
            raise InputError(
                f"{name} may have {self.max_prompt} characters, and this has {len(text)}"
            )

    def check_count(self, count: int) -> None:
        """See that a request asks for no more pictures than it may.

        Raises:
            InputError: it does, or for none.
        """
        if not 1 <= count <= self.max_images:
            raise InputError(f"n is from 1 to {self.max_images}, got {count}")

    def read_picture(self, data: bytes) -> Image.Image:
        """Decode a picture that came from outside.

        Args:
            data: a PNG, JPEG or WebP file.

        Returns:
            RGB.

        Raises:
            InputError: it is too large, or no such picture.
        """
        if len(data) > self.max_upload:
            raise InputError(f"a picture may have {self.max_upload} bytes, this has {len(data)}")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # Of the header: nothing has been decoded yet.
                if image.width * image.height > self.max_upload_pixels:
                    raise InputError(
                        f"a picture may have {self.max_upload_pixels} pixels, this has"
                        f" {image.width} x {image.height}"
                    )
                return image.convert("RGB")
        except InputError:
            raise
        # Pillow's plugins raise what they like at a damaged file.
        except Exception as error:
            raise InputError("the picture is no whole PNG, JPEG or WebP file") from error

    def read_base64(self, text: str) -> Image.Image:
        """Likewise, of base64, with or without the head of a data URL.

        Raises:
            InputError: likewise.
        """
        if text.startswith("data:"):
            text = text.partition(",")[2]
        try:
            return self.read_picture(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise InputError("the picture is no base64") from error
