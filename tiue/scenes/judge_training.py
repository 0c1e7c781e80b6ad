"""Trains the judge on true scenes, half of them through the autoencoder, and measures it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tiue.embedded.autoencoder import load_autoencoder, to_model_range
from tiue.embedded.config import IMAGE_SIZE
from tiue.embedded.loop import cosine_rate, run, set_rate, step_generator
from tiue.embedded.networks import save_network
from tiue.files import sha256, write_file
from tiue.scenes.config import OBJECTS
from tiue.scenes.grammar import Noun, Request
from tiue.scenes.judge import (
    GROUND_NAMES,
    SIZE_NAMES,
    STRIDE,
    WEIGHTS,
    Finding,
    Judge,
    Look,
    decode,
    load_judge,
    look_at,
)
from tiue.scenes.scene import LOOSE, Scene, draw_scene, pixels, relation_of

CELLS = IMAGE_SIZE // STRIDE
# More of three than a prompt asks for: a step learns by its objects.
COUNTS = (0.2, 0.3, 0.5)
NEAR = 6.0  # pixels within which a found object is the one that is there
TEST_SEED = 10**6  # no training step draws from it


@dataclass(frozen=True)
class JudgeConfig:
    """The judge's training."""

    steps: int = 1000
    batch_size: int = 32
    # Passed through the autoencoder once: at every step it would be more than half of the time.
    pool: int = 2048
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    # All mild: what a person could not name should not pass for an object.
    blur: float = 1.0  # share of a binomial filter of 3 x 3, at most
    noise: float = 0.06  # deviation at most, of pictures in [-1, 1]
    contrast: float = 0.1
    brightness: float = 0.06
    latent_noise: float = 0.1  # at most, of the latents' deviation 0.5
    seed: int = 0


def draw_scenes(count: int, generator: random.Random) -> list[Scene]:
    """Draw loose scenes of one to three objects, what training holds out among them."""
    scenes = []
    for _ in range(count):
        nouns = generator.choices((1, 2, 3), COUNTS)[0]
        names = generator.sample(OBJECTS, nouns)
        request = Request(tuple(map(Noun, names)))
        scenes.append(draw_scene(request, generator, training=False, freedom=LOOSE))
    return scenes


@dataclass(frozen=True)
class Targets:
    """What the judge should give of B pictures with M objects.

    Attributes:
        heat: [B, 40, 16, 16], 1 in the cell of a centre and a Gaussian around it.
        cells: picture, row and column of every object, [M] each.
        large: [M] 0 or 1.
        offset: [M, 2].
        ground: [B].
    """

    heat: Tensor
    cells: tuple[Tensor, Tensor, Tensor]
    large: Tensor
    offset: Tensor
    ground: Tensor


def make_targets(scenes: list[Scene]) -> Targets:
    """Make the targets of scenes; the Gaussian's deviation is a sixth of an object's length."""
    placed = [(b, item) for b, scene in enumerate(scenes) for item in scene.objects]
    batch = torch.tensor([b for b, _ in placed])
    kinds = torch.tensor([OBJECTS.index(item.name) for _, item in placed])
    centres = torch.tensor([(item.x, item.y) for _, item in placed]) / STRIDE  # [M, 2]
    corners = centres.floor()
    sigma = torch.tensor([item.length for _, item in placed]) / STRIDE / 6
    steps = torch.arange(CELLS)
    columns = (steps - corners[:, :1]).square()  # [M, 16]
    rows = (steps - corners[:, 1:]).square()
    gaussians = (-(rows[:, :, None] + columns[:, None]) / (2 * sigma.square())[:, None, None]).exp()
    heat = torch.zeros(len(scenes), len(OBJECTS), CELLS, CELLS)
    heat[batch, kinds] = gaussians  # the objects of a scene are all different
    column, row = corners.long().T
    return Targets(
        heat,
        (batch, row, column),
        torch.tensor([float(SIZE_NAMES.index(item.size)) for _, item in placed]),
        centres - corners - 0.5,
        torch.tensor([GROUND_NAMES.index(scene.ground) for scene in scenes]),
    )


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's loss of a heat map, a sum: alpha = 2, beta = 4 (arXiv 1904.07850, equation 1)."""
    probability = logits.sigmoid()
    log_yes = nn.functional.logsigmoid(logits)
    log_no = nn.functional.logsigmoid(-logits)
    yes = (1 - probability).square() * log_yes
    no = (1 - heat).pow(4) * probability.square() * log_no
    return -torch.where(heat == 1, yes, no).sum()


def judge_loss(look: Look, targets: Targets) -> Tensor:
    """Heat, sizes, offsets and grounds, each a mean over objects or pictures."""
    batch, row, column = targets.cells
    heat = focal_loss(look.heat, targets.heat) / len(batch)
    large = nn.functional.binary_cross_entropy_with_logits(
        look.large[batch, row, column], targets.large
    )
    offset = nn.functional.l1_loss(look.offset[batch, :, row, column], targets.offset)
    ground = nn.functional.cross_entropy(look.ground, targets.ground)
    return heat + 0.5 * large + offset + 0.5 * ground


def augment(pictures: Tensor, config: JudgeConfig, generator: torch.Generator) -> Tensor:
    """Blur, tint and disturb pictures [B, 3, H, W] in [-1, 1] a little, each its way."""

    def draw(least: float, greatest: float, *shape: int) -> Tensor:
        values = torch.rand((len(pictures), *shape), generator=generator)
        return least + (greatest - least) * values

    filtered = nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    for dim in (2, 3):
        size = filtered.shape[dim] - 2
        first, middle, last = (filtered.narrow(dim, start, size) for start in range(3))
        filtered = (first + 2 * middle + last) / 4
    blurred = torch.lerp(pictures, filtered, draw(0, config.blur, 1, 1, 1))
    contrast = draw(1 - config.contrast, 1 + config.contrast, 1, 1, 1)
    shift = draw(-config.brightness, config.brightness, 3, 1, 1)
    noise = torch.randn(pictures.shape, generator=generator) * draw(0, config.noise, 1, 1, 1)
    return (blurred * contrast + shift + noise).clamp(-1, 1)


@torch.no_grad()
def reconstruct(
    vae: AutoencoderTiny,
    shown: Tensor,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pictures in [-1, 1] through the autoencoder, with noise on the latents.

    Args:
        vae: the autoencoder.
        shown: [B, 3, 64, 64].
        noise: greatest deviation, another for every picture.
        generator: of the noise.

    Returns:
        [B, 3, 64, 64] in [-1, 1].
    """
    latents = vae.encode(shown).latents
    if noise:
        scale = noise * torch.rand((len(shown), 1, 1, 1), generator=generator)
        latents = latents + scale * torch.randn(latents.shape, generator=generator)
    return vae.decode(latents).sample.clamp(-1, 1)


def mirror(scene: Scene) -> Scene:
    """The scene with left and right exchanged."""
    objects = (replace(o, x=IMAGE_SIZE - o.x, mirrored=not o.mirrored) for o in scene.objects)
    return replace(scene, objects=tuple(objects))


@dataclass(frozen=True)
class Reconstructions:
    """Scenes and their pictures through the autoencoder, uint8 [N, 3, 64, 64]."""

    scenes: list[Scene]
    images: Tensor


def load_reconstructions(cache: Path, autoencoder: Path, config: JudgeConfig) -> Reconstructions:
    """Passes scenes through the autoencoder, into a file the first time (a minute).

    Args:
        cache: a safetensors file; one of another configuration or autoencoder is written anew.
        autoencoder: folder of the autoencoder's training.
        config: number of scenes, noise on the latents, seed.

    Returns:
        The scenes.

    Raises:
        CheckpointError: there is no autoencoder.
    """
    vae = load_autoencoder(autoencoder)
    facts = {
        "autoencoder": sha256(autoencoder / "vae" / "diffusion_pytorch_model.safetensors"),
        "pool": str(config.pool),
        "noise": str(config.latent_noise),
        "seed": str(config.seed),
    }
    generator = step_generator(config.seed, TEST_SEED - 1)
    scenes = draw_scenes(config.pool, random.Random(generator.initial_seed()))
    try:
        with safe_open(cache, framework="pt") as file:
            if file.metadata() == facts:
                return Reconstructions(scenes, file.get_tensor("images"))
    except (OSError, SafetensorError):
        pass  # not there yet, or broken: made
    parts = [
        to_pixels(reconstruct(vae, to_model_range(pixels(scenes[i : i + 64])),
                              config.latent_noise, generator))
        for i in range(0, len(scenes), 64)
    ]  # fmt: skip
    images = torch.cat(parts)
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_file(cache, lambda path: save_file({"images": images}, path, facts))
    return Reconstructions(scenes, images)


def to_pixels(shown: Tensor) -> Tensor:
    """Pictures in [-1, 1] to uint8."""
    return shown.add(1).mul(127.5).round().byte()


class JudgeTraining:
    """The network and its optimiser; one call of `step` a batch, half of it fresh scenes."""

    def __init__(self, passed: Reconstructions | None, config: JudgeConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.passed = config, passed
        self.judge = Judge().train()
        self.judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.judge.parameters(), lr=config.learning_rate, weight_decay=1e-2, fused=True
        )

    def step(self, step: int) -> float:
        """Takes one optimiser step, all its randomness drawn from its number; returns the loss."""
        config = self.config
        generator = step_generator(config.seed, step)
        half = config.batch_size // 2 if self.passed is not None else 0
        scenes = draw_scenes(config.batch_size - half, random.Random(generator.initial_seed()))
        images = pixels(scenes)
        if self.passed is not None:
            chosen = torch.randint(len(self.passed.scenes), (half,), generator=generator)
            scenes = [*scenes, *(self.passed.scenes[i] for i in chosen.tolist())]
            images = torch.cat([images, self.passed.images[chosen]])
        flipped = torch.rand(len(scenes), generator=generator) < 0.5
        scenes = [mirror(s) if f else s for s, f in zip(scenes, flipped, strict=True)]
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        shown = to_model_range(images)
        shown = augment(shown, config, generator).contiguous(memory_format=torch.channels_last)
        loss = judge_loss(self.judge(shown), make_targets(scenes))
        set_rate(
            self.optimizer,
            config.learning_rate * cosine_rate(step, config.steps, config.warmup_steps),
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.judge.parameters(), 5.0)
        self.optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides its number."""
        return {"judge": self.judge.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.judge.load_state_dict(state["judge"])
        self.optimizer.load_state_dict(state["optimizer"])


def compare(scenes: list[Scene], findings: list[Finding]) -> dict[str, float]:
    """Hold what was found against what is there.

    Args:
        scenes: what is there.
        findings: what the judge found in their pictures.

    Returns:
        Shares: of the objects, those found by name within `NEAR` pixels (`objects`), of these with
        the right size (`sizes`); of what was found, what is there (`precision`); of the pictures,
        those with the right number of objects (`counts`) and ground (`grounds`), and those with
        everything right (`pictures`); of those with two objects, the right `relations`.
    """
    there = hit = sized = claimed = counted = grounds = whole = pairs = related = 0
    for scene, finding in zip(scenes, findings, strict=True):
        matched = []
        for item in scene.objects:
            matched.append(
                next(
                    (f for f in finding.objects if f.name == item.name
                     and max(abs(f.x - item.x), abs(f.y - item.y)) <= NEAR),
                    None,
                )
            )  # fmt: skip
        right = [f is not None and f.size == i.size
                 for f, i in zip(matched, scene.objects, strict=True)]  # fmt: skip
        there += len(matched)
        hit += sum(f is not None for f in matched)
        sized += sum(right)
        claimed += len(finding.objects)
        count = len(finding.objects) == len(scene.objects)
        ground = finding.ground == scene.ground
        relation = True
        if len(matched) == 2:
            first, second = matched
            relation = (
                first is not None
                and second is not None
                and relation_of(first, second) == scene.relation
            )
            pairs, related = pairs + 1, related + relation
        counted, grounds = counted + count, grounds + ground
        whole += all(right) and count and ground and relation
    return {
        "objects": hit / there,
        "sizes": sized / max(1, hit),
        "precision": hit / max(1, claimed),
        "counts": counted / len(scenes),
        "grounds": grounds / len(scenes),
        "relations": related / max(1, pairs),
        "pictures": whole / len(scenes),
    }


def measure(
    judge: Judge, vae: AutoencoderTiny | None, count: int = 1000, seed: int = TEST_SEED
) -> dict[str, dict[str, float]]:
    """Measure a judge on scenes that training did not draw, and on them through the autoencoder.

    Args:
        judge: in evaluation mode.
        vae: the autoencoder, if there is one.
        count: scenes.
        seed: of the scenes.

    Returns:
        `true` and, with an autoencoder, `autoencoder`: figures of `compare`.
    """
    scenes = draw_scenes(count, random.Random(seed))
    findings: dict[str, list[Finding]] = {"true": []}
    if vae is not None:
        findings["autoencoder"] = []
    for start in range(0, count, 64):
        pictures = pixels(scenes[start : start + 64])
        findings["true"] += decode(look_at(judge, pictures))
        if vae is not None:
            passed = to_pixels(reconstruct(vae, to_model_range(pictures)))
            findings["autoencoder"] += decode(look_at(judge, passed))
    return {name: compare(scenes, found) for name, found in findings.items()}


def train_judge(
    autoencoder: Path,
    folder: Path,
    config: JudgeConfig,
    resume: bool = False,
    output: Path = WEIGHTS,
) -> dict[str, Any]:
    """Train the judge and write it with what it was measured to get right.

    Args:
        autoencoder: folder of the autoencoder's training; where it holds none, half of each batch
            is not passed through one.
        folder: receives `checkpoint.pt` on the way.
        config: rates, steps, seed.
        resume: go on from the folder's checkpoint.
        output: file of the weights.

    Returns:
        The facts that lie beside the weights: training and `measure`'s figures.

    Raises:
        InputError: the packages of the `train` extra are missing.
        OutputError: `folder` or `output` cannot be written.
    """
    vae = passed = None
    if (autoencoder / "vae").is_dir():
        vae = load_autoencoder(autoencoder)
        passed = load_reconstructions(folder / "passed.safetensors", autoencoder, config)
    training = JudgeTraining(passed, config)
    run(training, folder, config.steps, resume)
    facts: dict[str, Any] = {"steps": config.steps, "seed": config.seed}
    save_network(training.judge, facts, output)
    judge, _ = load_judge(output)  # measured as it ships, in float16
    facts |= measure(judge, vae)
    save_network(judge, facts, output)
    return facts
