"""What a picture got right, and whether what its prompt leaves open varies as it should.

The distribution of scenes given a request is known (`tiue.scenes.scene.draw_scene`), so the truth
beside every figure is drawn, not estimated. A `Finding` is what a judge saw in a picture, or what
is known of a true scene: the same functions measure both.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiue.embedded.config import IMAGE_SIZE
from tiue.scenes.grammar import Request
from tiue.scenes.judge import Finding, Found
from tiue.scenes.scene import Scene, relation_of

GRID = 3  # places are told apart on 3 x 3 fields
RIGHT = ("right", "objects", "count", "relation", "ground", "size")
VARIABLES = ("object", "place", "size", "relation", "ground")

# What is open: a variable, and the number of the noun that it belongs to (0 for the picture's).
Open = tuple[str, int]
Figure = tuple[float, float]  # value and standard error


def finding_of(scene: Scene) -> Finding:
    """What is known of a scene, in the terms of what a judge finds."""
    objects = tuple(Found(item.name, item.size, item.x, item.y) for item in scene.objects)
    return Finding(objects, scene.ground)


@dataclass(frozen=True)
class Verdict:
    """What a picture got right; None for what its prompt does not name.

    Attributes:
        matched: for each noun, the object that answers it.
        objects: every noun has its own object.
        count: there are as many objects as nouns.
        relation: the first two stand as asked.
        ground: its colour is as asked.
        size: all nouns with a size have an object of that size.
    """

    matched: tuple[Found | None, ...]
    objects: bool
    count: bool
    relation: bool | None
    ground: bool | None
    size: bool | None

    @property
    def right(self) -> bool:
        """Whether all that the prompt names is right, and nothing else is there."""
        return False not in (self.objects, self.count, self.relation, self.ground, self.size)


def judge_picture(request: Request, finding: Finding) -> Verdict:
    """Hold a picture against its request.

    Args:
        request: what was asked for.
        finding: what is there.

    Returns:
        The verdict of the best way to let objects answer nouns: most nouns, then the relation, then
        most sizes, then the surest objects.
    """
    nouns = request.nouns
    candidates = [
        [*(i for i, thing in enumerate(finding.objects) if thing.name in noun.choices), None]
        for noun in nouns
    ]
    best: tuple[tuple[int, ...], tuple[Found | None, ...]] | None = None
    for chosen in itertools.product(*candidates):
        used = [i for i in chosen if i is not None]
        if len(set(used)) < len(used):
            continue
        things = tuple(None if i is None else finding.objects[i] for i in chosen)
        related = request.relation is not None and _stands(things, request.relation)
        score = (len(used), int(related), sum(_sized(request, things)), -sum(used))
        if best is None or score > best[0]:
            best = score, things
    assert best is not None  # nobody answers anything: always possible
    matched = best[1]
    return Verdict(
        matched=matched,
        objects=None not in matched,
        count=len(finding.objects) == len(nouns),
        relation=None if request.relation is None else _stands(matched, request.relation),
        ground=None if request.ground is None else finding.ground == request.ground,
        size=None if not any(n.size for n in nouns) else all(_sized(request, matched)),
    )


def _stands(things: Sequence[Found | None], relation: str) -> bool:
    first, second = things[:2]
    return first is not None and second is not None and relation_of(first, second) == relation


def _sized(request: Request, things: Sequence[Found | None]) -> list[bool]:
    return [
        thing is not None and thing.size == noun.size
        for noun, thing in zip(request.nouns, things, strict=True)
        if noun.size
    ]


def open_values(request: Request, finding: Finding) -> dict[Open, list[Hashable]]:
    """What a picture shows of that which its prompt leaves open, where it shows it rightly.

    Args:
        request: what was asked for.
        finding: what is there.

    Returns:
        For each open variable its values: place, and object of a category and size where open, of
        every noun that is answered (nouns that are alike share theirs); relation and ground where
        open, if all nouns are answered.
    """
    verdict = judge_picture(request, finding)
    values: dict[Open, list[Hashable]] = defaultdict(list)
    for noun, thing in zip(request.nouns, verdict.matched, strict=True):
        if thing is None:
            continue
        number = request.nouns.index(noun)
        values["place", number].append((_field(thing.x), _field(thing.y)))
        if len(noun.choices) > 1:
            values["object", number].append(thing.name)
        if noun.size is None:
            values["size", number].append(thing.size)
    if verdict.objects:
        if request.ground is None:
            values["ground", 0].append(finding.ground)
        # Of two that are alike, none is the first.
        if request.relation is None and len(request.nouns) == 2 and len(set(request.nouns)) == 2:
            first, second = verdict.matched
            assert first is not None
            assert second is not None
            values["relation", 0].append(relation_of(first, second))
    return values


def _field(position: float) -> int:
    return min(GRID - 1, max(0, int(position * GRID / IMAGE_SIZE)))


def entropy(values: Sequence[Hashable]) -> float:
    """Entropy of the values' frequencies, in bits; 0 for none."""
    counts = Counter(values).values()
    return sum(-n / len(values) * math.log2(n / len(values)) for n in counts)


def accuracy(requests: Sequence[Request], groups: Sequence[Sequence[Finding]]) -> dict[str, Figure]:
    """Shares of pictures that have something right, of those that were asked for it.

    Args:
        requests: of P prompts.
        groups: for each, what was found in its pictures.

    Returns:
        Those of `RIGHT` that any prompt asks for; the error is over prompts.
    """
    shares: dict[str, list[float]] = {name: [] for name in RIGHT}
    for request, findings in zip(requests, groups, strict=True):
        verdicts = [judge_picture(request, finding) for finding in findings]
        for name in RIGHT:
            told = [getattr(verdict, name) for verdict in verdicts]
            if None not in told:
                shares[name].append(sum(told) / len(told))
    return {name: mean_and_error(found) for name, found in shares.items() if found}


def mean_and_error(values: Sequence[float]) -> Figure:
    """Mean and its standard error; the error of one value is not known (NaN)."""
    over = torch.tensor(values, dtype=torch.float64)
    error = over.std().item() / math.sqrt(len(over)) if len(over) > 1 else math.nan
    return over.mean().item(), error


def variety(
    requests: Sequence[Request],
    groups: Sequence[Sequence[Finding]],
    truths: Sequence[Sequence[Sequence[Finding]]],
) -> dict[str, Figure]:
    """Hold the variety of what prompts leave open against that of true scenes.

    Args:
        requests: of P prompts.
        groups: for each, what was found in its M pictures.
        truths: sets of true scenes: of each, for each prompt, what is in M of them.

    Returns:
        `coverage`: different values that M pictures show rightly, over those that M true scenes do,
        mean over a prompt's open variables, then over prompts. `entropy`: bits over the truth's
        bits, of as many values, summed over variables and prompts; it does not see what is wrong,
        the coverage does. `coverage_VARIABLE` and `entropy_VARIABLE` likewise, of those of
        `VARIABLES` that are open. The errors are over prompts.
    """
    covered: dict[str, list[float]] = defaultdict(list)
    bits: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number, (request, findings) in enumerate(zip(requests, groups, strict=True)):
        drawn = _gather(request, findings)
        true = [_gather(request, truth[number]) for truth in truths]
        ratios: dict[str, list[float]] = defaultdict(list)
        pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for key in true[0]:
            got = drawn.get(key, [])
            # A fair number of values on both sides: entropy grows with it.
            alike = [values[key][: len(got)] for values in true]
            ratio = len(set(got)) * len(true) / sum(len(set(values[key])) for values in true)
            pair = (entropy(got), sum(map(entropy, alike)) / len(true))
            for name in ("", key[0]):
                ratios[name].append(ratio)
                pairs[name].append(pair)
        for name, found in ratios.items():
            covered[name].append(sum(found) / len(found))
            one, other = zip(*pairs[name], strict=True)
            bits[name].append((sum(one), sum(other)))
    figures = {}
    for name in ("", *VARIABLES):
        suffix = f"_{name}" if name else ""
        if covered[name]:
            figures[f"coverage{suffix}"] = mean_and_error(covered[name])
        if sum(other for _, other in bits[name]) > 0:
            figures[f"entropy{suffix}"] = _ratio(bits[name])
    return figures


def _gather(request: Request, findings: Sequence[Finding]) -> dict[Open, list[Hashable]]:
    gathered: dict[Open, list[Hashable]] = defaultdict(list)
    for finding in findings:
        for key, values in open_values(request, finding).items():
            gathered[key] += values
    return gathered


def _ratio(pairs: Sequence[tuple[float, float]]) -> Figure:
    """Ratio of two sums, its error by the residuals (delta method)."""
    over, under = torch.tensor(pairs, dtype=torch.float64).T
    ratio = (over.sum() / under.sum()).item()
    count = len(pairs)
    if count < 2:
        return ratio, math.nan
    residual = (over - ratio * under).std().item()
    return ratio, residual * math.sqrt(count) / under.sum().item()


def energy_distance(drawn: Tensor, true: Tensor) -> float:
    """Energy distance of two samples, unbiased, in units of the distance between true pictures.

    Args:
        drawn: features [M, D] of a prompt's pictures.
        true: features [N, D] of true scenes of the same prompt.

    Returns:
        (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / E|Y - Y'|: near 0, and also below, for equal
        distributions.

    Source: Székely and Rizzo, 2013, "Energy statistics", equation 2.
    """
    drawn, true = drawn.double(), true.double()
    within = _mean_apart(true)
    return ((2 * torch.cdist(drawn, true).mean() - _mean_apart(drawn)) / within - 1).item()


def _mean_apart(features: Tensor) -> Tensor:
    count = len(features)
    return torch.cdist(features, features).sum() / (count * (count - 1))


def energy(drawn: Tensor, true: Tensor) -> Figure:
    """Mean of the prompts' energy distances, and its error over prompts.

    Args:
        drawn: features [P, M, D] of the pictures of P prompts.
        true: features [P, N, D] of true scenes.
    """
    return mean_and_error([energy_distance(a, b) for a, b in zip(drawn, true, strict=True)])
