"""The judge: its maps read back, its training, and what the shipped one gets right."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tiue.embedded.networks import save_network
from tiue.errors import CheckpointError, InputError
from tiue.scenes.config import OBJECTS
from tiue.scenes.grammar import Noun, Request
from tiue.scenes.judge import (
    FEATURE_WIDTH,
    Finding,
    Found,
    Judge,
    Look,
    decode,
    load_judge,
    look_at,
    pooled,
)
from tiue.scenes.judge_training import (
    JudgeConfig,
    JudgeTraining,
    Reconstructions,
    compare,
    draw_scenes,
    judge_loss,
    make_targets,
    measure,
    mirror,
)
from tiue.scenes.measures import finding_of
from tiue.scenes.scene import draw_scene, pixels

TINY = JudgeConfig(steps=4, batch_size=4, warmup_steps=1)


def perfect(scenes) -> Look:
    """What a judge without fault would give."""
    targets = make_targets(scenes)
    batch, row, column = targets.cells
    shape = (len(scenes), 16, 16)
    large, offset = torch.zeros(shape), torch.zeros(shape[0], 2, 16, 16)
    large[batch, row, column] = targets.large * 2 - 1
    offset[batch, :, row, column] = targets.offset
    ground = torch.nn.functional.one_hot(targets.ground, 8).float() * 20
    heat = targets.heat.clamp(1e-6, 1 - 1e-6).logit()
    return Look(heat, large * 20, offset, ground, [])


def test_targets_are_read_back_as_the_scenes():
    scenes = draw_scenes(40, random.Random(0))
    look = perfect(scenes)
    for scene, found in zip(scenes, decode(look), strict=True):
        known = finding_of(scene)
        assert found.ground == known.ground
        assert sorted((o.name, o.size) for o in found.objects) == sorted(
            (o.name, o.size) for o in known.objects
        )
        places = {o.name: (o.x, o.y) for o in known.objects}
        for thing in found.objects:
            assert (thing.x, thing.y) == pytest.approx(places[thing.name], abs=1e-3)
    everything = compare(scenes, decode(look))
    assert set(everything.values()) == {1.0}
    blank = replace(look, heat=torch.full_like(look.heat, -4.0))
    assert judge_loss(look, make_targets(scenes)) < 0.1 < judge_loss(blank, make_targets(scenes))


def test_one_peak_counts_in_its_neighbourhood():
    heat = torch.full((1, 40, 16, 16), -9.0)
    heat[0, 3, 5, 5], heat[0, 7, 5, 6], heat[0, 9, 12, 5], heat[0, 11, 1, 14] = 4, 3, 5, -2
    look = Look(heat, torch.ones(1, 16, 16), torch.zeros(1, 2, 16, 16), torch.eye(8)[:1], [])
    assert decode(look) == [
        Finding((Found(OBJECTS[9], "large", 22, 50), Found(OBJECTS[3], "large", 22, 22)), "white")
    ]


def test_compare_names_what_is_missed():
    scenes = draw_scenes(40, random.Random(1))
    known = [finding_of(scene) for scene in scenes]
    blind = [replace(finding, objects=finding.objects[1:]) for finding in known]
    found = compare(scenes, blind)
    total = sum(len(finding.objects) for finding in known)
    assert found["objects"] == pytest.approx(1 - 40 / total)
    assert (found["precision"], found["counts"], found["pictures"]) == (1, 0, 0)
    turned = [
        replace(f, objects=tuple(replace(o, x=64 - o.x, y=64 - o.y) for o in f.objects))
        for f in known
    ]
    assert compare(scenes, turned)["relations"] == 0
    assert compare(scenes, turned)["counts"] == 1


def test_mirrored_scenes_are_mirrored_pictures():
    scene = draw_scenes(1, random.Random(2))[0]
    upright = replace(scene, objects=tuple(replace(o, turn=0.0) for o in scene.objects))
    one, other = pixels([upright, mirror(upright)]).float()
    # Up to a pixel of rounding, a sprite's edge is where it was.
    assert (one.flip(2) - other).abs().mean() < 12
    assert (one - other).abs().mean() > (one.flip(2) - other).abs().mean() * 2


def train(first, last, state=None):
    scenes = draw_scenes(6, random.Random(5))
    training = JudgeTraining(Reconstructions(scenes, pixels(scenes)), TINY)
    if state is not None:
        training.load_state_dict(state)
    losses = [training.step(step) for step in range(first, last)]
    return losses, training


def test_training_goes_on_where_it_stopped():
    losses, whole = train(0, 4)
    first, half = train(0, 2)
    second, resumed = train(2, 4, half.state_dict())
    assert losses == first + second
    for name, value in whole.judge.state_dict().items():
        assert torch.equal(value, resumed.judge.state_dict()[name]), name


def test_weights_are_kept_in_float16(tmp_path):
    torch.manual_seed(0)
    judge = Judge().eval()
    save_network(judge, {"steps": 3}, tmp_path / "judge.safetensors")
    loaded, facts = load_judge(tmp_path / "judge.safetensors")
    assert facts == {"steps": 3}
    assert (tmp_path / "judge.safetensors").stat().st_size < 700_000
    pictures = pixels(draw_scenes(2, random.Random(0)))
    one, other = look_at(judge, pictures), look_at(loaded, pictures)
    torch.testing.assert_close(one.heat, other.heat, rtol=2e-2, atol=2e-2)
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    for name in ("broken", "missing"):
        with pytest.raises(CheckpointError, match=r"python -m tiue.scenes.train judge"):
            load_judge(tmp_path / f"{name}.safetensors")


@pytest.fixture(scope="module")
def shipped():
    return load_judge()[0]


def test_the_shipped_judge_sees_what_is_there(shipped):
    _, facts = load_judge()
    assert facts["true"]["objects"] >= 0.95
    found = measure(shipped, None, count=96, seed=7)["true"]
    # A sample of 96 pictures: what the facts say, within four standard errors.
    for name, value in found.items():
        assert value == pytest.approx(facts["true"][name], abs=0.1), name
    assert found["objects"] >= 0.93


def test_the_shipped_judge_sees_what_no_prompt_asks_for(shipped):
    """Nothing, and one object twice: what a model may draw by mistake."""
    empty = torch.full((1, 3, 64, 64), 170, dtype=torch.uint8)
    assert decode(look_at(shipped, empty)) == [Finding((), "gray")]
    generator = random.Random(4)
    scenes = []
    for name in OBJECTS[:12]:
        scene = draw_scene(
            Request((Noun(name), Noun("key" if name != "key" else "gift"))), generator
        )
        scenes.append(replace(scene, objects=tuple(replace(o, name=name) for o in scene.objects)))
    seen = decode(look_at(shipped, pixels(scenes)))
    twice = [Counter(o.name for o in f.objects) == {name: 2}
             for name, f in zip(OBJECTS, seen, strict=False)]  # fmt: skip
    assert sum(twice) >= 10


def test_features_are_means_over_the_picture(shipped):
    look = look_at(shipped, pixels(draw_scenes(3, random.Random(0))))
    means = torch.cat([m.mean(dim=(2, 3)) for m in (look.maps[2], look.maps[3])], dim=1)
    assert means.shape == (3, FEATURE_WIDTH)
    torch.testing.assert_close(pooled(look.features), means)


def test_pictures_of_another_size_are_refused(shipped):
    with pytest.raises(InputError, match="64 x 64, got 32 x 32"):
        look_at(shipped, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
