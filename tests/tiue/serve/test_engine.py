"""Drawings that share a pass are what each would be alone."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiue.serve.conftest import tiny_engine
from tiue.errors import InputError
from tiue.serve.engine import STUDENT, TEACHER, Drawing
from tiue.serve.limits import Limits


def array(picture) -> np.ndarray:
    return np.asarray(picture.image, dtype=int)


def drawings(engine, **settings) -> list[Drawing]:
    return [
        engine.check(Drawing(prompt, seed, **settings))
        for prompt, seed in (("apple", 3), ("pear", 5), ("apple", 9))
    ]


PHOTO = Image.effect_noise((40, 24), 90).convert("RGB")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 3.0, "negative_prompt": "pear", "num_decoder_steps": 2},
        {"image": PHOTO, "strength": 0.5},
        {"height": 16, "width": 24},
        {"model": TEACHER},
    ],
    ids=["plain", "guided", "over_picture", "size", "teacher"],
)
def test_a_picture_does_not_depend_on_its_batch(engine, settings):
    asked = drawings(engine, **settings)
    assert len({drawing.key for drawing in asked}) == 1
    together = engine.draw(asked)
    for drawing, picture in zip(asked, together, strict=True):
        alone = engine.draw([drawing])[0]
        # Other batches are other matrix products: a rounding, which may tip a byte.
        assert np.abs(array(picture) - array(alone)).max() <= 1
        assert (picture.seed, picture.batch, alone.batch) == (drawing.seed, 3, 1)
    assert np.abs(array(together[0]) - array(together[2])).max() > 1


def test_latents_of_a_batch_are_those_alone_to_a_rounding(engine):
    """Before bytes: relative to the largest, float32's rounding over some hundred sums."""
    pipe = engine._pipes[STUDENT]

    def latents(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, output_type="latent").images

    together = latents(["apple", "pear"], [3, 5])
    alone = torch.cat([latents(["apple"], [3]), latents(["pear"], [5])])
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_what_does_not_share_a_pass_has_another_key(engine):
    first = engine.check(Drawing("a"))
    same = engine.check(Drawing("b", seed=8, negative_prompt="c", strength=0.3))
    assert first.key == same.key
    for other in (
        {"height": 16},
        {"num_decoder_steps": 2},
        {"guidance_scale": 2.0},
        {"image": PHOTO},
        {"model": TEACHER},
        {"skip_below": 0.05},
    ):
        assert engine.check(Drawing("a", **other)).key != first.key


def test_guidance_and_a_picture_reach_the_pipeline(engine):
    plain = engine.draw(drawings(engine))[0]
    for settings in ({"guidance_scale": 3.0}, {"image": PHOTO, "width": 32, "height": 32}):
        assert np.abs(array(engine.draw(drawings(engine, **settings))[0]) - array(plain)).max() > 1


def test_the_parts_of_a_pass_end_in_the_whole(engine):
    whole = engine.check(Drawing("apple", 3))
    parts = engine.parts_of(whole)
    assert [label for label, _ in parts] == ["t=751", "+ t=501", "+ t=251", "+ t=1"]
    pictures = [array(engine.draw([part])[0]) for _, part in parts]
    np.testing.assert_array_equal(pictures[-1], array(engine.draw([whole])[0]))
    assert all(np.abs(a - b).max() > 1 for a, b in pairwise(pictures[:-1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "is empty"),
        ({"prompt": "a" * 2001}, "2000 characters"),
        ({"negative_prompt": "a" * 2001}, "2000 characters"),
        ({"prompt": "\ud800"}, "no UTF-8"),
        ({"seed": -1}, "a seed is"),
        ({"seed": 2**64}, "a seed is"),
        ({"num_decoder_steps": 0}, "K is"),
        ({"num_decoder_steps": 9}, "K is"),
        ({"guidance_scale": float("nan")}, "guidance is"),
        ({"guidance_scale": 1e9}, "guidance is"),
        ({"image": PHOTO, "strength": 0.0}, "strength is"),
        ({"image": PHOTO, "strength": float("nan")}, "strength is"),
        ({"height": 0}, "height is a multiple of 4 from 4 to 64"),
        ({"width": 68}, "width is"),
        ({"width": 30}, "width is"),
        ({"model": "../etc"}, "there is no"),
        ({"model": TEACHER, "image": PHOTO}, "over no picture"),
    ],
)
def test_what_may_not_be_drawn_is_told(engine, settings, message):
    with pytest.raises(InputError, match=message):
        engine.check(replace(Drawing("apple"), **settings))


def test_limits_of_a_model(engine):
    assert (engine.size, engine.limits.max_side) == ((32, 32), 64)
    assert tiny_engine(max_side=32).limits.max_side == 32
    with pytest.raises(InputError, match="n is from 1 to 8"):
        Limits().check_count(0)
