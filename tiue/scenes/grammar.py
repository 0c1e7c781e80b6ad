"""What a prompt asks for, and how it is said: a small grammar at three levels.

A `Request` is what a prompt names. It is drawn first, then a scene that fulfils it
(`tiue.scenes.scene`), so that the distribution of scenes given a prompt is known exactly:

- exact: objects, their sizes, how two of them stand to each other, the ground;
- partial: objects, and of the rest each with probability one half;
- category: categories in the place of objects.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from tiue.scenes.config import CATEGORIES, GROUNDS, OBJECTS, RELATIONS, SIZES

_log = logging.getLogger(__name__)

LEVELS = ("exact", "partial", "category")
LEVEL_SHARES = (0.4, 0.4, 0.2)
COUNT_SHARES = (0.3, 0.55, 0.15)  # of one, two and three objects
HELD_OUT_SHARE = 0.1
_NUMBERS = ("", "one", "two", "three")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Noun:
    """One object that a prompt asks for.

    Attributes:
        name: an object, or a category: any object of it.
        size: "small" or "large"; None where the prompt leaves it open.
    """

    name: str
    size: str | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """The objects that fulfil it."""
        return tuple(CATEGORIES[self.name]) if self.name in CATEGORIES else (self.name,)

    def __str__(self) -> str:
        words = f"{self.size} {self.name}" if self.size else self.name
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Request:
    """All that a prompt names; what it does not is random in the scene.

    Attributes:
        nouns: one to three objects or categories.
        relation: how the first stands to the second; None where the prompt leaves it open.
        ground: colour; None where the prompt leaves it open.
    """

    nouns: tuple[Noun, ...]
    relation: str | None = None
    ground: str | None = None

    @property
    def level(self) -> str:
        """ "exact", "partial" or "category"."""
        if any(noun.name in CATEGORIES for noun in self.nouns):
            return "category"
        sized = all(noun.size for noun in self.nouns)
        related = self.relation is not None or len(self.nouns) != 2
        return "exact" if sized and related and self.ground else "partial"

    def __str__(self) -> str:
        names = [noun.name for noun in self.nouns]
        if len(set(names)) == 1 and len(names) > 1:
            text = f"{_NUMBERS[len(names)]} {names[0]}s"
        elif self.relation:
            text = f"{self.nouns[0]} {self.relation} {self.nouns[1]}"
        else:
            *first, last = map(str, self.nouns)
            text = f"{', '.join(first)} and {last}" if first else last
        return f"{text} on a {self.ground} ground" if self.ground else text


@cache
def held_out_pairs() -> frozenset[frozenset[str]]:
    """Pairs of objects that no training scene holds together: a tenth of the 780."""
    pairs = list(itertools.combinations(OBJECTS, 2))
    random.Random(1).shuffle(pairs)
    return frozenset(frozenset(pair) for pair in pairs[: round(HELD_OUT_SHARE * len(pairs))])


@cache
def held_out_relations() -> frozenset[tuple[str, str, str]]:
    """(object, relation, other object) that no training scene of two shows, said either way round.

    The two occur together, in other relations.
    """
    triples = [
        (first, relation, second)
        for first, second in itertools.combinations(OBJECTS, 2)
        if frozenset((first, second)) not in held_out_pairs()
        for relation in RELATIONS
    ]
    random.Random(2).shuffle(triples)
    kept = triples[: round(HELD_OUT_SHARE * len(triples))]
    return frozenset(kept) | {(b, _OPPOSITE[relation], a) for a, relation, b in kept}


def holds_held_out_pair(names: tuple[str, ...]) -> bool:
    """Whether two of these objects are a held-out pair."""
    return any(frozenset(pair) in held_out_pairs() for pair in itertools.combinations(names, 2))


def is_held_out(names: tuple[str, ...], relation: str | None) -> bool:
    """Whether training has no scene of these objects, or none of the two in this relation."""
    return holds_held_out_pair(names) or (
        relation is not None and (names[0], relation, names[1]) in held_out_relations()
    )


def draw_request(
    generator: random.Random, level: str | None = None, held_out: bool | None = False
) -> Request:
    """Draws what a prompt asks for.

    Args:
        generator: source of the randomness.
        level: "exact", "partial" or "category"; by default one of them, by `LEVEL_SHARES`.
        held_out: True for what training never shows (two or three objects of which a pair is held
            out, or two in a held-out relation), False for what it does, None for either. A
            category names no object, so it is never held out.

    Returns:
        The request.

    Raises:
        ValueError: a category that is held out.
    """
    level = level or generator.choices(LEVELS, LEVEL_SHARES)[0]
    if level == "category" and held_out:
        raise ValueError("a category names no pair that could be held out")
    while True:
        request = _draw(generator, level)
        names = tuple(noun.name for noun in request.nouns)
        # A partial request may happen to name everything: drawn again.
        if request.level == level and held_out in (None, is_held_out(names, request.relation)):
            return request


def _draw(generator: random.Random, level: str) -> Request:
    count = generator.choices((1, 2, 3), COUNT_SHARES)[0]

    def named() -> bool:
        return level == "exact" or generator.random() < 0.5

    def some(choices: Iterable[str]) -> str | None:
        return generator.choice(tuple(choices)) if named() else None

    if level == "category":
        # Two or three of one category, or each of another: the grammar says no other.
        alike = count > 1 and generator.random() < 0.5
        kinds = tuple(CATEGORIES)
        names = [generator.choice(kinds)] * count if alike else generator.sample(kinds, count)
        return Request(tuple(map(Noun, names)), None, some(GROUNDS))
    nouns = tuple(Noun(name, some(SIZES)) for name in generator.sample(OBJECTS, count))
    return Request(nouns, some(RELATIONS) if count == 2 else None, some(GROUNDS))


def weaken(request: Request, generator: random.Random) -> Request:
    """Draws what a prompt of a scene says of all that is in it: a level, an order, what to name.

    Scenes that are drawn for wholly open requests and described so have the same conditional
    distribution as scenes that are drawn for the request: what is left out does not depend on it.

    Args:
        request: the exact request of a scene (`Scene.request`).
        generator: source of the randomness.

    Returns:
        A request that the scene fulfils.
    """
    order = generator.sample(range(len(request.nouns)), len(request.nouns))
    nouns = [request.nouns[i] for i in order]
    relation = request.relation
    if relation is not None and order == [1, 0]:
        relation = _OPPOSITE[relation]
    level = generator.choices(LEVELS, LEVEL_SHARES)[0]
    kinds = [category_of(noun.name) for noun in nouns]
    if level == "category" and len(set(kinds)) in (1, len(kinds)):
        nouns, relation = list(map(Noun, kinds)), None
    elif level != "exact":
        nouns = [noun if generator.random() < 0.5 else Noun(noun.name) for noun in nouns]
        relation = relation if generator.random() < 0.5 else None
    ground = request.ground if level == "exact" or generator.random() < 0.5 else None
    return Request(tuple(nouns), relation, ground)


@cache
def category_of(name: str) -> str:
    """The category of an object."""
    return next(kind for kind, names in CATEGORIES.items() if name in names)


_KNOWN = {
    *OBJECTS, *CATEGORIES, *(f"{name}s" for name in CATEGORIES), *GROUNDS, *SIZES, *_NUMBERS,
    *" ".join(RELATIONS).split(), "a", "an", "and", "on", "ground",
}  # fmt: skip
VOCABULARY = tuple(sorted(_KNOWN - {"", "one"}))


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt that the grammar has not, in their order."""
    return [word for word in re.findall(r"\w+", prompt.lower()) if word not in _KNOWN]


def warn_of_unknown_words(prompts: list[str]) -> None:
    """Says in the log, once a call, which words of the prompts the model was never shown."""
    words = list(dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt)))
    if words:
        _log.warning(
            "the scenes model does not know %s and draws as well as it can: its words and its"
            " grammar are in tiue/scenes/grammar.py, for instance 'a small apple left of a large"
            " rocket on a blue ground', 'an octopus and a clock', 'two fruits'",
            ", ".join(map(repr, words)),
        )
