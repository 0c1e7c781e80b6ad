"""The training pictures: a pool of scenes, rendered once into a file that is made again if lost."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tiue.embedded.autoencoder import encode_pictures
from tiue.files import write_file, write_lines
from tiue.scenes.grammar import Request, draw_request, weaken
from tiue.scenes.scene import pixels, training_scenes


@dataclass(frozen=True)
class ScenePool:
    """Scenes and their pictures.

    Attributes:
        images: [N, 3, 64, 64] uint8.
        requests: the exact request of each; a prompt says a part of it (`prompts`).
    """

    images: torch.Tensor
    requests: list[Request]

    def __len__(self) -> int:
        return len(self.requests)

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Draws scene indices [batch_size], with replacement."""
        return torch.randint(len(self), (batch_size,), generator=generator)

    def prompts(self, chosen: torch.Tensor, generator: torch.Generator) -> list[str]:
        """A prompt for each chosen scene, drawn anew: another level, order, facts named."""
        words = random.Random(int(torch.randint(2**62, (), generator=generator)))
        return [str(weaken(self.requests[index], words)) for index in chosen.tolist()]


def load_pool(cache: Path, count: int, seed: int) -> ScenePool:
    """Loads the pool, composing its pictures into `cache` the first time (a minute for 65,536).

    Args:
        cache: a safetensors file, written whole or not at all; one of another count, seed or world,
            or a damaged one, is written anew.
        count: scenes.
        seed: of the scenes.

    Returns:
        The pool.

    Raises:
        InputError: the packages of the `train` extra are missing.
        OutputError: `cache` cannot be written.
    """
    scenes = training_scenes(count, seed)
    world = hashlib.sha256(repr(scenes[:64]).encode()).hexdigest()

    def draw() -> torch.Tensor:
        return torch.cat([pixels(scenes[i : i + 1024]) for i in range(0, count, 1024)])

    images = _cached(cache, {"count": str(count), "seed": str(seed), "world": world}, draw)
    return ScenePool(images, [scene.request for scene in scenes])


def load_latents(cache: Path, pool: ScenePool, vae: AutoencoderTiny) -> torch.Tensor:
    """Loads the pool's latents [N, 16, 8, 8] float16, encoding them into `cache` the first time.

    Args:
        cache: a safetensors file; one of other pictures or another encoder is written anew.
        pool: the pictures.
        vae: the encoder.

    Returns:
        The scaled latents.
    """
    digest = hashlib.sha256(pool.images.numpy().data)
    for tensor in vae.encoder.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    digest.update(repr(vae.config.scaling_factor).encode())
    kind = {"sha256": digest.hexdigest()}
    return _cached(cache, kind, lambda: encode_pictures(vae, pool).half())


def write_prompts(path: Path, count: int = 20_000, seed: int = 0) -> None:
    """Writes prompts of the grammar to a text file, one a line, nothing held out among them."""
    generator = random.Random(seed)
    write_lines(path, [str(draw_request(generator)) for _ in range(count)])


def _cached(cache: Path, kind: dict[str, str], make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `cache` holds if it is of this kind; else what `make` makes, written there."""
    if cache.exists():
        try:
            with safe_open(cache, framework="pt") as file:
                if file.metadata() == kind:
                    return file.get_tensor("data")
        except SafetensorError:
            pass  # cut or damaged: made again
    data = make()
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_file(cache, lambda path: save_file({"data": data}, path, metadata=kind))
    return data
