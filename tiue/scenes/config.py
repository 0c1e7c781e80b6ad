"""The world of the scenes, and the sizes, rates and step counts of the models that draw them."""

from __future__ import annotations

from dataclasses import dataclass

from tiue.embedded import config as embedded

MAX_PROMPT_TOKENS = 24  # the longest prompt of the grammar has 22

# Told apart at 18 pixels, by colour or by outline. Name -> OpenMoji's file stem.
CATEGORIES: dict[str, dict[str, str]] = {
    "fruit": {
        "apple": "1F34E",
        "banana": "1F34C",
        "lemon": "1F34B",
        "strawberry": "1F353",
        "grape": "1F347",
        "watermelon": "1F349",
        "pear": "1F350",
        "kiwi": "1F95D",
    },
    "animal": {
        "panda": "1F43C",
        "pig": "1F437",
        "frog": "1F438",
        "penguin": "1F427",
        "fish": "1F41F",
        "octopus": "1F419",
        "fox": "1F98A",
        "bear": "1F43B",
    },
    "vehicle": {
        "rocket": "1F680",
        "car": "1F697",
        "boat": "26F5",
        "plane": "2708",
        "bicycle": "1F6B2",
        "train": "1F682",
        "tractor": "1F69C",
        "saucer": "1F6F8",
    },
    "plant": {
        "tree": "1F332",
        "cactus": "1F335",
        "sunflower": "1F33B",
        "rose": "1F339",
        "mushroom": "1F344",
        "palm": "1F334",
        "clover": "1F340",
        "leaf": "1F341",
    },
    "thing": {
        "house": "1F3E0",
        "umbrella": "2602",
        "star": "2B50",
        "heart": "2764",
        "key": "1F511",
        "ball": "26BD",
        "gift": "1F381",
        "clock": "23F0",
    },
}
OBJECTS = tuple(name for names in CATEGORIES.values() for name in names)

# The longer side of an object, in pixels.
SIZES: dict[str, float] = {"small": 18.0, "large": 28.0}

# Light enough that every object's black outline stands out.
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (170, 170, 170),
    "pink": (255, 170, 200),
    "yellow": (250, 235, 130),
    "green": (150, 215, 140),
    "blue": (140, 190, 250),
    "purple": (190, 150, 235),
    "brown": (190, 145, 100),
}

RELATIONS = ("left of", "right of", "above", "below")

TEN_PROMPTS = (
    "a large apple left of a small rocket on a blue ground",
    "a small panda above a large tractor on a green ground",
    "a large star below a small fish on a pink ground",
    "an octopus and a clock",
    "a mushroom right of a key",
    "a small house, a small tree and a small car on a white ground",
    "a bicycle on a yellow ground",
    "two fruits",
    "an animal and a vehicle on a purple ground",
    "three plants",
)


@dataclass(frozen=True)
class AutoencoderConfig(embedded.AutoencoderConfig):
    """The OpenMoji model's AutoencoderTiny, trained on with scenes: 64 x 64 to 16 x 8 x 8."""

    steps: int = 6000
    learning_rate: float = 1e-3
    pool: int = 8192


@dataclass(frozen=True)
class TextConfig:
    """The text encoder's own training, before the teacher's."""

    steps: int = 2400
    batch_size: int = 96
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_share: float = 0.25
    # Of prompts that name a relation, which is the longest to learn.
    related_share: float = 2 / 3
    pool: int = 65536
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(embedded.TeacherConfig):
    """The teacher of the scenes, in Stable Diffusion's own terms."""

    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 8e-4
    # The rate is constant and falls over the last fifth: a training that is taken up again with
    # more steps has lost nothing to a schedule that was made for fewer.
    decay_share: float = 0.2
    ema_decay: float = 0.999
    channels: tuple[int, ...] = (96, 160)
    text_width: int = 160
    text_heads: int = 5
    text_feed_forward: int = 480
    # Pictures rendered, and encoded once: half of the time of a step else. The prompts and which
    # of a picture's facts they name are drawn anew at every step.
    pool: int = 65536
