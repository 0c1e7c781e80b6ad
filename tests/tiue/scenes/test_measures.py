"""What counts as right, and variety against distributions that are known."""

import math
import random

import pytest
import torch

from tiue.scenes.grammar import LEVELS, Noun, Request, draw_request
from tiue.scenes.judge import Finding, Found
from tiue.scenes.measures import (
    accuracy,
    energy_distance,
    entropy,
    finding_of,
    judge_picture,
    open_values,
    variety,
)
from tiue.scenes.scene import draw_scene

APPLE = Found("apple", "small", 15, 30)
ROCKET = Found("rocket", "large", 45, 30)
EXACT = Request((Noun("apple", "small"), Noun("rocket", "large")), "left of", "blue")


def seen(*objects: Found, ground: str = "blue") -> Finding:
    return Finding(objects, ground)


@pytest.mark.parametrize("level", LEVELS)
def test_true_scenes_are_right(level):
    generator = random.Random(3)
    for _ in range(40):
        request = draw_request(generator, level)
        assert judge_picture(request, finding_of(draw_scene(request, generator))).right


@pytest.mark.parametrize(
    ("finding", "wrong"),
    [
        (seen(ROCKET, APPLE), set()),
        (seen(APPLE), {"objects", "count", "relation", "size"}),
        (seen(APPLE, ROCKET, ROCKET), {"count"}),
        (seen(APPLE, Found("car", "large", 45, 30)), {"objects", "relation", "size"}),
        (seen(Found("apple", "large", 15, 30), ROCKET), {"size"}),
        (seen(Found("apple", "small", 50, 30), Found("rocket", "large", 20, 30)), {"relation"}),
        (seen(APPLE, ROCKET, ground="pink"), {"ground"}),
        (seen(), {"objects", "count", "relation", "size"}),
    ],
)
def test_what_is_wrong_is_named(finding, wrong):
    verdict = judge_picture(EXACT, finding)
    names = ("objects", "count", "relation", "ground", "size")
    assert {name for name in names if not getattr(verdict, name)} == wrong
    assert verdict.right == (not wrong)


def test_what_a_prompt_leaves_open_is_neither_right_nor_wrong():
    verdict = judge_picture(Request((Noun("apple"), Noun("rocket"))), seen(ROCKET, APPLE))
    assert (verdict.relation, verdict.ground, verdict.size) == (None, None, None)
    assert verdict.right
    assert verdict.matched == (APPLE, ROCKET)


def test_objects_answer_nouns_the_best_way():
    other = Found("apple", "large", 15, 60)
    request = Request((Noun("apple", "large"), Noun("rocket")), "below", None)
    verdict = judge_picture(request, seen(APPLE, other, ROCKET))
    assert verdict.matched == (other, ROCKET)
    assert not verdict.count
    # One object answers one noun.
    fruits = Request((Noun("fruit"), Noun("fruit")))
    assert judge_picture(fruits, seen(APPLE)).matched == (APPLE, None)


def test_open_values_are_of_what_is_rightly_there():
    request = Request((Noun("fruit"), Noun("vehicle")))
    assert open_values(request, seen(ROCKET, APPLE)) == {
        ("place", 0): [(0, 1)],
        ("object", 0): ["apple"],
        ("size", 0): ["small"],
        ("place", 1): [(2, 1)],
        ("object", 1): ["rocket"],
        ("size", 1): ["large"],
        ("ground", 0): ["blue"],
        ("relation", 0): ["left of"],
    }
    half = open_values(request, seen(APPLE))
    assert {name for name, _ in half} == {"place", "object", "size"}
    assert open_values(EXACT, seen(APPLE, ROCKET)).keys() == {("place", 0), ("place", 1)}
    two = open_values(Request((Noun("fruit"), Noun("fruit"))), seen(APPLE, APPLE))
    assert two["object", 0] == ["apple", "apple"]
    assert ("relation", 0) not in two


def test_entropy_in_bits():
    assert entropy("abcd") == 2
    assert entropy("aaab") == pytest.approx(0.75 * math.log2(4 / 3) + 0.5)
    assert entropy("aaaa") == entropy("") == 0


def test_accuracy_counts_prompts_that_ask():
    requests = [EXACT, Request((Noun("apple"),))]
    groups = [[seen(APPLE, ROCKET), seen(APPLE)], [seen(APPLE), seen(APPLE)]]
    found = accuracy(requests, groups)
    assert found["right"] == (0.75, pytest.approx(0.25))
    assert found["count"][0] == 0.75
    assert (found["relation"][0], found["ground"][0]) == (0.5, 1)
    assert math.isnan(found["relation"][1])  # one prompt asks for one: no error of it is known


def drawn(requests, count, seed):
    """`count` true scenes of each request."""
    generator = random.Random(seed)
    return [
        [finding_of(draw_scene(request, generator)) for _ in range(count)] for request in requests
    ]


@pytest.fixture(scope="module")
def known():
    generator = random.Random(0)
    requests = [draw_request(generator, LEVELS[i % 3]) for i in range(45)]
    return requests, [drawn(requests, 8, seed) for seed in range(3)]


def test_the_truth_varies_like_the_truth(known):
    requests, truths = known
    found = variety(requests, drawn(requests, 8, 99), truths)
    for name in ("object", "place", "size", "relation", "ground"):
        for figure in (f"coverage_{name}", f"entropy_{name}"):
            value, error = found[figure]
            assert value == pytest.approx(1, abs=4 * error), figure
    assert found["coverage"][0] == pytest.approx(1, abs=0.05)
    assert found["entropy"][0] == pytest.approx(1, abs=0.05)


def test_one_picture_again_and_again_has_no_variety(known):
    requests, truths = known
    collapsed = [group[:1] * 8 for group in drawn(requests, 1, 99)]
    found = variety(requests, collapsed, truths)
    assert found["coverage"][0] < 0.45
    assert found["entropy"][0] < 0.1
    # "two fruits" shows two places even in one picture: of one noun, there is nothing.
    assert found["entropy_ground"][0] == found["entropy_relation"][0] == 0


def test_wrong_pictures_cover_nothing_and_have_no_entropy(known):
    requests, truths = known
    empty = [[seen()] * 8 for _ in requests]
    found = variety(requests, empty, truths)
    assert found["coverage"] == (0, 0)
    assert "entropy" not in found  # of nothing that is right, there is none to compare
    # Half of the pictures are right and as varied as they should be: coverage falls, entropy not.
    half = [[*group[:4], *[seen()] * 4] for group in drawn(requests, 8, 99)]
    found = variety(requests, half, truths)
    assert 0.5 < found["coverage"][0] < 0.9
    assert found["entropy"][0] == pytest.approx(1, abs=0.08)


def test_energy_distance_of_normals():
    generator = torch.Generator().manual_seed(0)
    one, same, other = torch.randn(3, 400, 2, generator=generator)
    assert energy_distance(one, same) == pytest.approx(0, abs=0.02)
    shifted = energy_distance(one, other + 4)
    collapsed = energy_distance(one[:1].expand(8, 2), same)
    assert shifted > 1
    assert 0.1 < collapsed < shifted
    # By hand: E|X - Y| = 3, E|X - X'| = 0, E|Y - Y'| = 2.
    points = torch.tensor([[[0.0], [0.0]], [[2.0], [4.0]]])
    assert energy_distance(*points) == pytest.approx((2 * 3 - 0 - 2) / 2)
