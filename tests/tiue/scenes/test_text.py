"""The text encoder's own training: what a layout is, what its prompts say, resumption, transfer."""

import re

import pytest
import torch

from tiue.embedded.loop import run
from tiue.errors import CheckpointError
from tiue.scenes.config import GROUNDS, OBJECTS, RELATIONS, TeacherConfig, TextConfig
from tiue.scenes.scene import Placed, Scene, training_scenes
from tiue.scenes.text import (
    NOTHING,
    TextTraining,
    layout_of,
    load_text_encoder,
    train_text_encoder,
)

MODEL = TeacherConfig(
    steps=1, text_width=32, text_layers=1, text_heads=2, text_feed_forward=32, channels=(32, 32)
)
CONFIG = TextConfig(steps=6, batch_size=12, warmup_steps=2, pool=64)


def training():
    return TextTraining(training_scenes(CONFIG.pool, 0), MODEL, CONFIG)


def placed(name, size, x, y):
    return Placed(name, size, 18.0, x, y, 0.0, False, (1.0, 1.0, 1.0))


def test_a_layout_is_row_by_row_and_knows_object_and_size():
    objects = (placed("apple", "small", 24.0, 16.0), placed("banana", "large", 48.0, 40.0))
    layout = layout_of(Scene(objects, "blue", (140, 190, 250)))
    expected = torch.full((25,), NOTHING)
    expected[1] = 2 * OBJECTS.index("apple")
    expected[3 * 5 + 4] = 2 * OBJECTS.index("banana") + 1
    assert layout.equal(expected)


def test_two_thirds_of_the_prompts_name_a_relation_that_their_scene_shows():
    drawn = training()
    prompts, chosen = drawn.draw(0)
    layouts = drawn.layouts[chosen]
    assert drawn.draw(0)[0] == prompts
    assert drawn.draw(1)[0] != prompts
    told = re.compile(rf"(\w+) ({'|'.join(RELATIONS)}) (?:an?) (?:small |large )?(\w+)")
    assert all(told.search(prompt) for prompt in prompts[:8])
    for prompt, index in zip(prompts, chosen, strict=True):
        if " on a " in prompt:
            assert f" on a {tuple(GROUNDS)[drawn.grounds[index]]} ground" in prompt
    for prompt, layout in zip(prompts, layouts, strict=True):
        if not (found := told.search(prompt)):
            continue
        places = {
            OBJECTS[kind // 2]: divmod(i, 5)
            for i, kind in enumerate(layout.tolist())
            if kind < NOTHING
        }
        (row, column), (other_row, other_column) = places[found[1]], places[found[3]]
        assert {
            "left of": column < other_column,
            "right of": column > other_column,
            "above": row < other_row,
            "below": row > other_row,
        }[found[2]]


def test_it_learns_and_a_resumed_run_ends_with_the_same_bits(tmp_path):
    unbroken = training()
    prompts, chosen = unbroken.draw(100)
    before = unbroken.loss(prompts, chosen).item()
    run(unbroken, tmp_path / "unbroken", 6)
    assert unbroken.loss(prompts, chosen).item() < before
    run(training(), tmp_path / "broken", 3)
    again = train_text_encoder(tmp_path / "broken", MODEL, CONFIG, resume=True)
    for name, value in unbroken.text_encoder.state_dict().items():
        assert again.state_dict()[name].equal(value), name
    other = training().text_encoder
    load_text_encoder(other, tmp_path / "broken")
    for name, value in again.state_dict().items():
        assert other.state_dict()[name].equal(value), name


def test_an_encoder_of_other_sizes_is_refused(tmp_path):
    train_text_encoder(tmp_path, MODEL, TextConfig(steps=1, batch_size=4, pool=16))
    wide = TextTraining(training_scenes(4, 0), TeacherConfig(steps=1), CONFIG).text_encoder
    with pytest.raises(CheckpointError, match="another configuration"):
        load_text_encoder(wide, tmp_path)
