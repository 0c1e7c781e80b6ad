"""Scenes fulfil their requests, and what a request leaves open is as random as it is said to be."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from tiue.embedded.config import IMAGE_SIZE, LATENT_SIZE
from tiue.errors import InputError
from tiue.scenes.config import CATEGORIES, GROUNDS, SIZES
from tiue.scenes.grammar import Noun, Request, draw_request, held_out_pairs, is_held_out
from tiue.scenes.scene import (
    LOOSE,
    MARGIN,
    WORLD,
    Placed,
    Scene,
    compose,
    draw_scene,
    pixels,
    training_scenes,
)


def test_a_scene_fulfils_its_request():
    generator = random.Random(0)
    for _ in range(200):
        request = draw_request(generator)
        scene = draw_scene(request, generator)
        for noun, item in zip(request.nouns, scene.objects, strict=True):
            assert item.name in noun.choices
            assert noun.size in (None, item.size)
            assert item.length == SIZES[item.size]
            assert {item.x, item.y} <= set(WORLD.places)
            assert (item.turn, item.tint) == (0, (1, 1, 1))
        assert request.relation in (None, scene.relation)
        assert request.ground in (None, scene.ground)
        for a, b in combinations(scene.objects, 2):
            gap = (a.length + b.length) / 2 + MARGIN
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= gap


def test_loose_objects_differ_in_place_length_turn_and_tint():
    generator = random.Random(0)
    items = [
        item
        for _ in range(200)
        for item in draw_scene(draw_request(generator), generator, freedom=LOOSE).objects
    ]
    for item in items:
        assert abs(item.length - SIZES[item.size]) <= LOOSE.length
        assert abs(item.turn) <= LOOSE.turn
        assert all(abs(factor - 1) <= LOOSE.tint for factor in item.tint)
        for place in (item.x, item.y):
            assert item.length / 2 <= place <= IMAGE_SIZE - item.length / 2
    for values in zip(*((i.x, i.y, i.length, i.turn, *i.tint) for i in items), strict=True):
        assert len(set(values)) == len(items)


def test_an_object_of_a_size_is_one_pattern_of_latents_wherever_it_stands():
    def cut(x: float, y: float) -> np.ndarray:
        rocket = Placed("rocket", "large", SIZES["large"], x, y, 0.0, False, (1.0, 1.0, 1.0))
        picture = np.asarray(compose(Scene((rocket,), "blue", (140, 190, 250))))
        left, top = int(x) - 16, int(y) - 16
        return picture[top : top + 32, left : left + 32]

    first, second = WORLD.places[:2]
    assert (cut(first, second) == cut(second, first)).all()
    assert (second - first) % (IMAGE_SIZE / LATENT_SIZE) == 0


def test_training_never_shows_what_is_held_out():
    for scene in training_scenes(300, 0):
        names = tuple(item.name for item in scene.objects)
        assert not is_held_out(names, scene.relation)
    first, second = sorted(next(iter(held_out_pairs())))
    request = Request((Noun(first), Noun(second)))
    assert len(draw_scene(request, random.Random(0), training=False).objects) == 2


def test_what_two_fruits_leave_open_is_uniform():
    generator = random.Random(0)
    request = Request((Noun("fruit"), Noun("fruit")))
    scenes = [draw_scene(request, generator) for _ in range(1500)]
    pairs = Counter(frozenset(item.name for item in scene.objects) for scene in scenes)
    allowed = [
        frozenset(pair)
        for pair in combinations(CATEGORIES["fruit"], 2)
        if frozenset(pair) not in held_out_pairs()
    ]
    assert set(pairs) == set(allowed)
    expected = 1500 / len(allowed)
    # Five standard deviations of a count.
    assert max(abs(count - expected) for count in pairs.values()) < 5 * expected**0.5
    grounds = Counter(scene.ground for scene in scenes)
    assert set(grounds) == set(GROUNDS)
    sizes = Counter(item.size for scene in scenes for item in scene.objects)
    assert sizes["small"] / 3000 == pytest.approx(0.5, abs=0.05)


def test_what_no_scene_can_fulfil_is_said():
    with pytest.raises(InputError, match="different objects"):
        draw_scene(Request((Noun("apple"), Noun("apple"))), random.Random(0))


def test_pictures_show_the_ground_and_the_object_where_it_is_placed():
    apple = Placed("apple", "large", 28, 20, 40, 0.0, False, (1.0, 1.0, 1.0))
    picture = np.asarray(compose(Scene((apple,), "blue", (140, 190, 250)))).astype(int)
    assert (picture[:20] == (140, 190, 250)).all()
    assert (picture[:, 40:] == (140, 190, 250)).all()
    red, green, _ = picture[40, 20]
    assert red > 200 > green
    darker = Placed("apple", "large", 28, 20, 40, 0.0, False, (0.5, 1.0, 1.0))
    tinted = np.asarray(compose(Scene((darker,), "blue", (140, 190, 250)))).astype(int)
    assert tinted[40, 20, 0] == pytest.approx(red / 2, abs=1)


def test_the_same_seed_gives_the_same_pictures():
    first, again = (pixels(training_scenes(6, 7)) for _ in range(2))
    assert first.shape == (6, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert first.equal(again)
