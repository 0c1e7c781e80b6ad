"""The text encoder's own training: to say from a prompt what may be where, and on which ground.

Stable Diffusion's text encoder has learnt from pictures before a UNet sees it (CLIP), and so has
this one. Trained with the UNet alone, 18,600 updates left it blind to relations: with "left of" for
"right of" the UNet's error changed by 0.0 % at every timestep, while another size or object doubled
it. Here it takes some 1,000 updates until it tells them apart.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextModel, CLIPTokenizer

from tiue.embedded.loop import CHECKPOINT, decaying_rate, run, set_rate, step_generator
from tiue.embedded.teacher import build_text_encoder, tokenize, train_tokenizer
from tiue.errors import CheckpointError
from tiue.scenes.config import GROUNDS, MAX_PROMPT_TOKENS, OBJECTS, SIZES, TeacherConfig, TextConfig
from tiue.scenes.grammar import VOCABULARY, Request, weaken
from tiue.scenes.scene import WORLD, Scene, training_scenes

NOTHING = len(OBJECTS) * len(SIZES)  # the class of a place that is empty


def build_tokenizer() -> CLIPTokenizer:
    """Builds the scenes' tokenizer: 512 bytes, and the grammar's words as one token each."""
    return train_tokenizer(list(VOCABULARY), 2048, MAX_PROMPT_TOKENS)


def layout_of(scene: Scene) -> Tensor:
    """What is at each place of the grid, row by row.

    Args:
        scene: of `WORLD`.

    Returns:
        [25] classes: twice the number of the object that has its centre there, and 1 more where it
        is large; `NOTHING` for none.
    """
    places, sizes = WORLD.places, tuple(SIZES)
    layout = torch.full((len(places), len(places)), NOTHING)
    for item in scene.objects:
        kind = len(sizes) * OBJECTS.index(item.name) + sizes.index(item.size)
        layout[places.index(item.y), places.index(item.x)] = kind
    return layout.flatten()


class SceneHead(nn.Module):
    """One cross-attention, as the UNet's: every place asks the text what stands there.

    One more query asks for the ground. Without it the states do not tell grounds apart, and neither
    does a UNet that sees them.
    """

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        width = config.text_width
        self.queries = nn.Parameter(0.5 * torch.randn(len(WORLD.places) ** 2 + 1, width))
        self.attention = nn.MultiheadAttention(width, config.text_heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, NOTHING + 1)
        self.ground = nn.Linear(width, len(GROUNDS))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Text states [B, S, W] to logits of the places [B, 25, 81] and of the ground [B, 8]."""
        queries = self.queries.expand(len(states), -1, -1)
        seen, _ = self.attention(queries, states, states, need_weights=False)
        seen = self.norm(seen)
        return self.kind(seen[:, :-1]), self.ground(seen[:, -1])


class TextTraining:
    """Trains text encoder and head on scenes' exact facts; no picture is drawn.

    Args:
        scenes: to describe, of `WORLD`.
        model: the teacher's sizes.
        config: rates and step counts.
    """

    def __init__(self, scenes: list[Scene], model: TeacherConfig, config: TextConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.requests = [scene.request for scene in scenes]
        self.layouts = torch.stack([layout_of(scene) for scene in scenes])
        self.grounds = torch.tensor([tuple(GROUNDS).index(scene.ground) for scene in scenes])
        self.pairs = [i for i, request in enumerate(self.requests) if request.relation]
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(model, self.tokenizer).train()
        self.head = SceneHead(model)
        self.optimizer = torch.optim.AdamW(
            [*self.text_encoder.parameters(), *self.head.parameters()],
            lr=config.learning_rate, weight_decay=1e-3, fused=True,
        )  # fmt: skip

    def draw(self, step: int) -> tuple[list[str], list[int]]:
        """Draws prompts of a step, two thirds of them of two objects that name the relation.

        Returns:
            The prompts, and the numbers of their scenes.
        """
        generator = random.Random(int(torch.randint(2**62, (), generator=self._seeded(step))))
        related = round(self.config.related_share * self.config.batch_size)
        chosen = generator.choices(self.pairs, k=related)
        chosen += generator.choices(range(len(self.requests)), k=self.config.batch_size - related)
        prompts = [
            str(_weaken(self.requests[index], generator, number < related))
            for number, index in enumerate(chosen)
        ]
        return prompts, chosen

    def _seeded(self, step: int) -> torch.Generator:
        return step_generator(self.config.seed, step)

    def loss(self, prompts: list[str], chosen: list[int]) -> Tensor:
        """Cross-entropy of what is where, mean over places, and a tenth of the ground's."""
        states = self.text_encoder(tokenize(self.tokenizer, prompts)).last_hidden_state
        kinds, ground = self.head(states)
        places = cross_entropy(kinds.flatten(0, 1), self.layouts[chosen].flatten())
        return places + 0.1 * cross_entropy(ground, self.grounds[chosen])

    def step(self, step: int) -> float:
        """Takes one optimiser step, all its randomness drawn from its number; returns the loss."""
        config = self.config
        rate = decaying_rate(step, config.steps, config.warmup_steps, config.decay_share)
        set_rate(self.optimizer, config.learning_rate * rate)
        loss = self.loss(*self.draw(step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.text_encoder.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides its number."""
        return {
            "text_encoder": self.text_encoder.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


def _weaken(request: Request, generator: random.Random, related: bool) -> Request:
    said = weaken(request, generator)
    while related and said.relation is None:
        said = weaken(request, generator)
    return said


def train_text_encoder(
    folder: Path, model: TeacherConfig, config: TextConfig, resume: bool = False
) -> CLIPTextModel:
    """Trains the text encoder as `tiue.embedded.loop.run` does.

    Args:
        folder: receives `checkpoint.pt` and `training.json`.
        model: the teacher's sizes.
        config: rates and step counts.
        resume: go on from the folder's checkpoint.

    Returns:
        It.
    """
    training = TextTraining(training_scenes(config.pool, config.seed), model, config)
    run(training, folder, config.steps, resume)
    return training.text_encoder


def load_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Gives a text encoder the weights of `train_text_encoder`.

    Args:
        encoder: the teacher's.
        folder: of the training.

    Raises:
        CheckpointError: they are of other sizes.
    """
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    try:
        encoder.load_state_dict(state["training"]["text_encoder"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the text encoder in {folder} is of another configuration"
        ) from error
