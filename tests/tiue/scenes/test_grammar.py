"""Prompts: what they name, what is held out, what is told to somebody who asks for more."""

import random
from collections import Counter

import pytest

from tiue.scenes.config import CATEGORIES, OBJECTS, RELATIONS
from tiue.scenes.grammar import (
    LEVELS,
    Noun,
    Request,
    draw_request,
    held_out_pairs,
    held_out_relations,
    is_held_out,
    unknown_words,
    warn_of_unknown_words,
    weaken,
)


@pytest.mark.parametrize(
    ("request_", "text", "level"),
    [
        (
            Request((Noun("apple", "small"), Noun("rocket", "large")), "left of", "blue"),
            "a small apple left of a large rocket on a blue ground",
            "exact",
        ),
        (Request((Noun("apple"), Noun("rocket"))), "an apple and a rocket", "partial"),
        (Request((Noun("fruit"), Noun("fruit"))), "two fruits", "category"),
        (
            Request((Noun("animal"), Noun("thing"), Noun("plant")), None, "pink"),
            "an animal, a thing and a plant on a pink ground",
            "category",
        ),
        (
            Request((Noun("octopus", "large"),), None, "gray"),
            "a large octopus on a gray ground",
            "exact",
        ),
    ],
)
def test_what_a_prompt_says(request_, text, level):
    assert (str(request_), request_.level) == (text, level)


def test_a_tenth_of_the_pairs_and_of_the_relations_is_held_out_and_every_word_is_seen():
    assert len(held_out_pairs()) == 78  # of 40 * 39 / 2
    # 0.1 of 702 pairs in 4 relations, said both ways round
    assert len(held_out_relations()) == 2 * 281
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for first, relation, second in held_out_relations():
        assert (second, opposite[relation], first) in held_out_relations()
        assert frozenset((first, second)) not in held_out_pairs()
    seen = Counter(name for pair in held_out_pairs() for name in pair)
    assert max(seen.values()) < len(OBJECTS) - 1
    assert {relation for _, relation, _ in held_out_relations()} == set(RELATIONS)


@pytest.mark.parametrize("level", LEVELS)
def test_a_request_is_of_the_level_asked_for_and_not_held_out(level):
    generator = random.Random(0)
    requests = [draw_request(generator, level) for _ in range(300)]
    assert {request.level for request in requests} == {level}
    assert {len(request.nouns) for request in requests} == {1, 2, 3}
    assert not any(
        is_held_out(tuple(noun.name for noun in request.nouns), request.relation)
        for request in requests
    )
    assert {request.ground is None for request in requests} == (
        {False} if level == "exact" else {True, False}
    )


@pytest.mark.parametrize("level", ["exact", "partial"])
def test_a_held_out_request_is_one_that_training_never_shows(level):
    generator = random.Random(0)
    for _ in range(100):
        request = draw_request(generator, level, held_out=True)
        assert request.level == level
        assert is_held_out(tuple(noun.name for noun in request.nouns), request.relation)
    with pytest.raises(ValueError, match="category"):
        draw_request(generator, "category", held_out=True)


def test_a_weaker_request_names_nothing_that_the_scene_has_not():
    full = Request((Noun("apple", "small"), Noun("rocket", "large")), "left of", "blue")
    generator = random.Random(0)
    texts = Counter(str(weaken(full, generator)) for _ in range(4000))
    for text in (
        "a small apple left of a large rocket on a blue ground",
        "a large rocket right of a small apple on a blue ground",
        "an apple and a rocket",
        "a fruit and a vehicle",
        "a vehicle and a fruit on a blue ground",
    ):
        assert texts[text] > 0
    assert not any("rocket left of" in text or "apple right of" in text for text in texts)
    # Two orders, either said in full at 40 % and as one of sixteen partial forms at 40 %.
    share = texts["a small apple left of a large rocket on a blue ground"] / 4000
    assert share == pytest.approx(0.4 / 2 + 0.4 / 32, abs=0.03)


def test_two_of_three_objects_of_one_category_are_no_category_prompt():
    full = Request(
        (Noun("apple", "small"), Noun("pear", "small"), Noun("car", "small")), None, "gray"
    )
    generator = random.Random(0)
    levels = {weaken(full, generator).level for _ in range(200)}
    assert levels == {"exact", "partial"}


def test_unknown_words_are_named_once(caplog):
    assert unknown_words("a Small unicorn left of two fruits, on a BLUE ground") == ["unicorn"]
    warn_of_unknown_words(["a castle", "an apple", "a castle on a moon"])
    (record,) = caplog.records
    message = record.getMessage()
    assert "'castle', 'moon'" in message
    assert "grammar.py" in message
    caplog.clear()
    warn_of_unknown_words([str(draw_request(random.Random(0))) for _ in range(20)])
    assert not caplog.records


def test_forty_objects_in_five_categories():
    assert len(set(OBJECTS)) == 40
    assert {len(names) for names in CATEGORIES.values()} == {8}
