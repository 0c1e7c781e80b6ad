"""Trains the offline preset's feature network: `python -m tiue.evaluate.openmoji_training`.

Its accuracy is measured on what it has not been shown: the pictures through the embedded
autoencoder, which is how generated ones look, and, for a network trained on four pictures of five,
the kind of the fifth.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from tqdm import trange

from tiue.embedded.autoencoder import to_model_range
from tiue.embedded.commands import Work
from tiue.embedded.loop import cosine_rate, set_rate, step_generator
from tiue.embedded.networks import save_network
from tiue.evaluate.openmoji_network import WEIGHTS, OpenMojiFeatures, encode_names
from tiue.openmoji.data import Pictures, load_pictures
from tiue.openmoji.train import DEFAULT_WORK, pictures_file
from tiue.terminal import command_group

LEARNING_RATE = 3e-3
BATCH_SIZE = 128

app = command_group()


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shift, tint, blur and disturb pictures [B, 3, H, W] in [-1, 1], each its way."""

    def draw(least: float, greatest: float, *shape: int) -> Tensor:
        values = torch.rand((len(pictures), *shape), generator=generator)
        return least + (greatest - least) * values

    angle, scale = draw(-0.2, 0.2), draw(0.85, 1.25)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = draw(-0.15, 0.15), draw(-0.15, 0.15)
    rows = [torch.stack(row, dim=1) for row in ((cos, -sin, shift_x), (sin, cos, shift_y))]
    grid = nn.functional.affine_grid(
        torch.stack(rows, dim=1), list(pictures.shape), align_corners=False
    )
    # Taken from white, zeros beyond the border are white again.
    moved = 1 - nn.functional.grid_sample(1 - pictures, grid, align_corners=False)
    contrast, brightness = draw(0.7, 1.2, 1, 1, 1), draw(-0.15, 0.15, 3, 1, 1)
    tinted = moved * contrast + brightness
    soft = (tinted + tinted.roll(1, -1)) / 2
    soft = (soft + soft.roll(1, -2)) / 2
    tinted = torch.lerp(tinted, soft, draw(0, 1, 1, 1, 1))
    noise = torch.randn(pictures.shape, generator=generator)
    return tinted + draw(0, 0.2, 1, 1, 1) * noise


def train_network(pictures: Pictures, steps: int, seed: int) -> OpenMojiFeatures:
    """Train on pictures and names: cross-entropy of the own name among all of them.

    Args:
        pictures: OpenMoji's; drawn by their weights.
        steps: Updates.
        seed: Of the first weights and of everything that is drawn.

    Returns:
        The network.
    """
    torch.manual_seed(seed)
    network = OpenMojiFeatures()
    pooled = encode_names(pictures.prompts)  # [N, 192]
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    for step in trange(steps, mininterval=5):
        generator = step_generator(seed, step)
        chosen = pictures.sample(BATCH_SIZE, generator)
        shown = augment(to_model_range(pictures.images[chosen]), generator)
        shown = shown.contiguous(memory_format=torch.channels_last)
        cosines = network.embed_pictures(shown) @ network.embed_texts(pooled).T  # [B, N]
        scale = network.log_scale.clamp(max=math.log(100)).exp()
        loss = nn.functional.cross_entropy(scale * cosines, chosen)
        set_rate(optimizer, LEARNING_RATE * cosine_rate(step, steps, 50))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network.eval()


@torch.no_grad()
def name_accuracy(network: OpenMojiFeatures, shown: Tensor, names: list[str]) -> float:
    """Share of pictures [N, 3, 64, 64] in [-1, 1] whose own name, of all N, is nearest."""
    texts = network.embed_texts(encode_names(names))
    embedded = torch.cat([network.embed_pictures(part) for part in shown.split(256)])
    return (embedded @ texts.T).argmax(1).eq(torch.arange(len(names))).double().mean().item()


@torch.no_grad()
def reconstructions(pictures: Pictures) -> Tensor:
    """The pictures through the embedded autoencoder, [N, 3, 64, 64] in [-1, 1]."""
    from diffusers import AutoencoderTiny

    from tiue.openmoji import WEIGHTS as MODEL

    vae = AutoencoderTiny.from_pretrained(MODEL / "teacher", subfolder="vae").float().eval()
    parts = pictures.images.split(64)
    return torch.cat([vae(to_model_range(part)).sample.clamp(-1, 1) for part in parts])


def measure(network: OpenMojiFeatures, pictures: Pictures) -> dict[str, Any]:
    """Measure the accuracies that the preset states."""
    clean = to_model_range(pictures.images)
    disturbed = augment(clean, step_generator(10**6, 0))
    return {
        "names": len(pictures),
        "accuracy_pictures": name_accuracy(network, clean, pictures.prompts),
        "accuracy_disturbed": name_accuracy(network, disturbed, pictures.prompts),
        "accuracy_autoencoder": name_accuracy(network, reconstructions(pictures), pictures.prompts),
    }


@app.command()
def train(
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 1600,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and augmentation.")] = 0,
    output: Annotated[Path, typer.Option(help="File of the weights.")] = WEIGHTS,
    work: Work = DEFAULT_WORK,
) -> None:
    """Train the feature network of the openmoji preset and write it with its accuracies."""
    pictures = load_pictures(pictures_file(work))
    network = train_network(pictures, steps, seed)
    facts = {"steps": steps, "seed": seed, **measure(network, pictures)}
    save_network(network, facts, output)
    for name, value in facts.items():
        typer.echo(f"{name:22} {value if isinstance(value, int) else f'{value:.3f}'}")


if __name__ == "__main__":
    app()
