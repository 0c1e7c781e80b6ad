"""The scenes preset: what true pictures, wrong ones and one and the same come out as."""

import json
import random

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from tests.tiue.test_cli import run
from tiue.errors import InputError
from tiue.evaluate.evaluation import Settings, evaluate
from tiue.evaluate.models import Autoencoder, Model
from tiue.evaluate.protocol import PRESETS
from tiue.evaluate.result import compare, load_result, table
from tiue.evaluate.scenes_preset import SPLITS, SceneTest, draw_requests, split_name
from tiue.openmoji import WEIGHTS
from tiue.scenes.grammar import Noun, Request, is_held_out
from tiue.scenes.scene import compose, draw_scene, pixels

# The smallest whose every split has two prompts.
PROTOCOL = PRESETS["scenes"].changed(num_prompts=10, diversity_images=3)
METRICS = ["precision", "recall", "density", "coverage", "clip_score", "lpips_diversity"]
REQUESTS = {str(request): request for request in draw_requests(10, PROTOCOL.prompt_seed)}


class Artist:
    """Composes scenes that fulfil the prompt; or one scene a prompt; or empty grounds."""

    def __init__(self, kind="true", patience=None):
        self.kind, self.patience, self.seeds = kind, patience, []

    def draw(self, prompts, seeds):
        if self.patience is not None and len(self.seeds) >= self.patience:
            raise KeyboardInterrupt
        self.seeds += seeds
        return [self.one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def one(self, prompt, seed):
        if self.kind == "empty":
            return Image.new("RGB", (64, 64), (170, 170, 170))
        generator = random.Random(prompt if self.kind == "same" else seed)
        return compose(draw_scene(REQUESTS[prompt], generator, training=False))

    @property
    def model(self):
        return Model(self.draw, {"model": self.kind})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all: what is known of the true pictures is made once."""
    return tmp_path_factory.mktemp("scenes")


def settings(folder, name, **changes):
    values = {"protocol": PROTOCOL, "metrics": METRICS, "output": folder / name,
              "batch_size": 6, "progress": False}  # fmt: skip
    return Settings(**values | changes)


@pytest.fixture(scope="module")
def results(folder):
    return {
        kind: evaluate(settings(folder, kind), Artist(kind).model)
        for kind in ("true", "same", "empty")
    }


def test_requests_are_of_all_splits():
    requests = draw_requests(50, 0)
    assert requests[:10] == list(REQUESTS.values())
    for i, request in enumerate(requests):
        names = tuple(noun.name for noun in request.nouns)
        assert (request.level, is_held_out(names, request.relation)) == SPLITS[i % 5]


def test_true_pictures_are_right_and_varied(results):
    found = results["true"]
    figures, detail = found["figures"], found["scenes"]
    assert found["counts"] == {"generated": 30, "reference": 120, "skipped": 0}
    assert found["not_computed"] == {"clip_score": "the judge says what was drawn"}
    assert figures["scene_right"] > 0.8
    assert 0.7 < figures["scene_coverage"] < 1.3
    assert abs(figures["scene_energy"]) < 0.15
    assert set(detail["splits"]) == {"model", "true pictures"}
    assert set(detail["splits"]["model"]) == {"all", *(split_name(*split) for split in SPLITS)}
    assert detail["splits"]["true pictures"]["all"]["figures"]["right"][0] > 0.8
    assert set(detail["sets"]["true pictures"]) == set(METRICS[:4])
    lines = table(found).splitlines()
    row = next(line for line in lines if line.startswith("  exact, held out"))
    assert row.split()[3] == "2"
    assert f"{detail['splits']['model']['exact, held out']['figures']['right'][0]:.1%}" in row
    assert found["extractors"]["features"]["true"]["objects"] >= 0.95


def test_one_scene_a_prompt_is_right_and_not_varied(results):
    figures, true = results["same"]["figures"], results["true"]["figures"]
    assert figures["scene_right"] > 0.8
    assert figures["lpips_diversity"] == pytest.approx(0, abs=1e-6)
    assert figures["scene_entropy"] < 0.3
    assert figures["scene_coverage"] < 0.75 * true["scene_coverage"]
    assert figures["scene_energy"] > true["scene_energy"] + 0.2


def test_empty_pictures_are_wrong(results):
    figures = results["empty"]["figures"]
    assert (figures["scene_right"], figures["scene_objects"], figures["scene_coverage"]) == (0,) * 3
    assert "scene_entropy" not in figures
    assert figures["scene_energy"] > 1
    assert "open: entropy    not in both" in compare(results["true"], results["empty"])


def test_it_goes_on_where_it_stopped(results, folder):
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(folder, "stopped"), Artist(patience=12).model)
    artist = Artist()
    again = evaluate(settings(folder, "stopped"), artist.model)
    assert len(artist.seeds) == again["drawn_now"] == 18
    assert again["figures"] == results["true"]["figures"]
    assert again["scenes"] == results["true"]["scenes"]
    assert json.loads((folder / "stopped" / "result.json").read_text()) == again


def test_a_broken_cache_is_made_again(results, folder):
    for path in (folder / "scenes-truth").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    again = evaluate(settings(folder, "true"), Artist().model)
    assert again["scenes"] == results["true"]["scenes"]


def test_pictures_of_a_folder_and_the_autoencoder(results, folder):
    """The pictures that were drawn give what the model gave; they know no autoencoder."""
    given = evaluate(settings(folder, "given", pictures=folder / "true" / "pictures"))
    assert given["figures"] == results["true"]["figures"]
    vae = AutoencoderTiny.from_pretrained(WEIGHTS / "teacher", subfolder="vae")
    model = Model(Artist().draw, {"model": "true"}, Autoencoder(vae.float().eval()))
    found = evaluate(settings(folder, "true"), model)["scenes"]["splits"]
    assert found["model"] == results["true"]["scenes"]["splits"]["model"]
    passed, clean = found["through the autoencoder"]["all"], found["true pictures"]["all"]
    assert 0 < passed["figures"]["energy"][0] - clean["figures"]["energy"][0] < 0.5
    # OpenMoji's autoencoder was trained on white grounds alone.
    assert passed["figures"]["ground"][0] < clean["figures"]["ground"][0] == 1


def test_the_autoencoder_gives_back_the_picture():
    vae = AutoencoderTiny.from_pretrained(WEIGHTS / "teacher", subfolder="vae").float().eval()
    request = Request((Noun("apple"), Noun("rocket")), None, "white")
    picture = pixels([draw_scene(request, random.Random(0))])
    found = Autoencoder(vae)(picture)
    assert found.dtype == torch.uint8
    assert (found.float() - picture.float()).abs().mean() < 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "{true}"], "has its own reference: leave --reference out"),
        (["--prompts", "{true}"], "has its own prompts: leave --prompts out"),
        (["--num-prompts", "9"], "30 pictures in"),
    ],
)
def test_what_does_not_fit_is_refused(results, folder, options, message):
    pictures = folder / "true" / "pictures"
    words = [word.format(true=pictures) for word in options]
    command = ["evaluate", "--preset", "scenes", "--pictures", pictures, "--metrics", "precision"]
    refused = run(*command, "--output", folder / "refused", *words)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert not (folder / "refused").exists()
    with pytest.raises(InputError, match="2 pictures of each"):
        SceneTest(PROTOCOL.changed(diversity_images=1), folder, torch.device("cpu"))


def test_results_are_of_one_world(results, folder):
    path = folder / "true" / "result.json"
    known = load_result(path)
    assert compare(known, results["same"]).splitlines()[-1].startswith("energy distance")
    changed = load_result(path)
    changed["extractors"]["features"]["scenes_sha256"] = "other"
    with pytest.raises(InputError, match="they differ in features"):
        compare(changed, results["same"])
