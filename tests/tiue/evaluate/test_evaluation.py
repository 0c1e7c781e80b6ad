"""Whole evaluations: stopped and gone on with, on two ranks, of a folder, and what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.tiue.evaluate.test_features import save_inception
from tests.tiue.test_cli import run
from tests.tiue.tiny import tiny_pipeline
from tiue.errors import InputError, OutputError
from tiue.evaluate.evaluation import Settings, evaluate
from tiue.evaluate.generation import diversity_jobs, picture_jobs
from tiue.evaluate.models import Model, load_model
from tiue.evaluate.openmoji_preset import OpenMojiExtractor
from tiue.evaluate.protocol import METRICS, PRESETS
from tiue.evaluate.result import compare, load_result, table
from tiue.files import sha256

PROTOCOL = PRESETS["openmoji"].changed(
    num_prompts=100, kid_subset_size=50, kid_subsets=4, diversity_prompts=2, diversity_images=3
)
SET = list(METRICS[:6])


def blot(prompt: str, seed: int) -> Image.Image:
    """A picture that depends on its prompt and seed alone."""
    values = np.random.default_rng([seed, len(prompt)]).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((64, 64), Image.Resampling.BICUBIC)


class Artist:
    """Draws blots, notes what it was asked for, and may give up half-way."""

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience
        self.batches: list[list[int]] = []

    def draw(self, prompts, seeds):
        if self.patience is not None and len(self.batches) >= self.patience:
            raise KeyboardInterrupt
        self.batches.append(list(seeds))
        return [blot(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    @property
    def model(self) -> Model:
        return Model(self.draw, {"model": "blots"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A prompt list, a folder of 120 real pictures, and one of 100 that a model might have made."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("".join(f"{'x' * (i % 9)}{i}\n" for i in range(130)))
    for name, count, first in (("real", 120, 10_000), ("made", 100, 20_000)):
        (folder / name).mkdir()
        for i in range(count):
            blot("x" * (i % 9), first + i).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture
def settings(inputs, tmp_path):
    def make(output="out", **changes) -> Settings:
        values = {
            "protocol": PROTOCOL, "metrics": list(METRICS), "output": tmp_path / output,
            "prompts": inputs / "prompts.txt", "reference": inputs / "real",
            "batch_size": 16, "progress": False,
        }  # fmt: skip
        return Settings(**values | changes)

    return make


def test_a_whole_evaluation(settings):
    artist = Artist()
    found = evaluate(settings(), artist.model)
    assert set(METRICS) <= set(found["figures"])
    assert all(np.isfinite(value) for value in found["figures"].values())
    assert found["counts"] == {"generated": 100, "reference": 120, "skipped": 0}
    assert found["not_computed"] == {}
    assert found["extractors"]["features"]["kind"] == "openmoji"
    assert found["seeds"] == {"noise": 0, "prompts": 0, "metrics": 0}
    assert {"tiue", "torch", "torchmetrics", "prdc"} <= set(found["versions"])
    output = settings().output
    assert json.loads((output / "result.json").read_text()) == found
    assert Image.open(output / "sheet.png").width > 5 * 128
    lines = table(found).splitlines()
    assert lines[0].startswith("protocol   openmoji (changed): Offline")
    assert sum(" not computed" in line for line in lines) == 0
    seeds = [seed for batch in artist.batches for seed in batch]
    assert len(seeds) == len(set(seeds)) == 100 + 2 * 3


def test_stopped_half_way_it_goes_on_and_gives_the_same_figures(settings):
    whole = evaluate(settings("whole"), Artist().model)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings("stopped"), Artist(patience=3).model)
    output = settings("stopped").output
    assert len(list((output / "pictures").iterdir())) == 48
    assert not (output / "result.json").exists()
    # A batch of which one picture is missing is drawn again, whole.
    (output / "pictures" / "000020.png").unlink()
    artist = Artist()
    resumed = evaluate(settings("stopped"), artist.model)
    assert len(artist.batches[0]) == 16
    assert artist.batches[0][4] == 20
    assert sum(map(len, artist.batches)) == resumed["drawn_now"] == 106 - 32
    assert resumed["figures"] == whole["figures"]
    for part in ("pictures", "diversity"):
        for path in (output / part).iterdir():
            other = settings("whole").output / part / path.name
            assert path.read_bytes() == other.read_bytes()
    again = Artist()
    assert evaluate(settings("stopped"), again.model)["figures"] == whole["figures"]
    assert again.batches == []


def test_another_seed_gives_other_pictures_and_needs_another_folder(settings):
    first = evaluate(settings("a", metrics=SET), Artist().model)
    with pytest.raises(InputError, match=r"another evaluation \(it differs in seed\)"):
        evaluate(settings("a", metrics=SET, seed=1), Artist().model)
    second = evaluate(settings("b", metrics=SET, seed=1), Artist().model)
    assert first["figures"] != second["figures"]


def test_seeds_of_pictures_and_diversity_never_meet():
    prompts = ["a"] * 50
    seeds = [
        job.seed
        for seed in range(3)
        for job in (*picture_jobs(prompts, seed), *diversity_jobs(prompts[:5], 4, seed))
    ]
    assert len(seeds) == len(set(seeds))


def test_a_folder_of_pictures(settings, inputs):
    prompts = settings().output.parent / "made.txt"
    prompts.write_text("thing\n" * 100)
    found = evaluate(settings(pictures=inputs / "made", prompts=prompts))
    assert found["counts"]["generated"] == 100
    assert found["not_computed"] == {
        "lpips_diversity": "it draws several pictures a prompt, which needs --model"
    }
    assert set(found["figures"]) == {*METRICS[:7], "kid_deviation", "clip_score_deviation"}
    unpaired = evaluate(settings("other", pictures=inputs / "made", prompts=None))
    assert unpaired["not_computed"]["clip_score"] == "no prompts were given"
    assert "clip_score" not in unpaired["figures"]
    assert "CLIP score       not computed: no prompts were given" in table(unpaired)
    assert unpaired["figures"]["fid"] == found["figures"]["fid"]


def test_the_pictures_themselves_are_perfect(settings, inputs):
    found = evaluate(settings(pictures=inputs / "real", prompts=None, metrics=SET))["figures"]
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_files_that_are_no_pictures(settings, inputs, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for path in (inputs / "made").iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    (made / "notes.txt").write_text("no picture")
    options = {"pictures": made, "prompts": None, "metrics": SET}
    with pytest.raises(InputError, match=r"no whole pictures: notes.txt\..*--skip-unreadable"):
        evaluate(settings(**options))
    found = evaluate(settings(**options, skip_unreadable=True))
    assert found["counts"] == {"generated": 100, "reference": 120, "skipped": 1}
    assert "1 files skipped" in table(found)
    blot("x", 1).resize((60, 64)).save(made / "zz.png")
    with pytest.raises(InputError, match=r"zz.png is 60 x 64"):
        evaluate(settings(**options, skip_unreadable=True))
    mixed = evaluate(settings(**options, skip_unreadable=True, mixed_sizes=True))
    assert mixed["counts"]["generated"] == 101
    assert mixed["model"]["enlarged"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": "made"}, "100 pictures in .* and 130 prompts do not pair"),
        ({"pictures": "made", "prompts": None, "metrics": ["clip_score"]}, "nothing can be comp"),
        ({"prompts": "missing.txt"}, "cannot read prompts"),
        ({"reference": "missing"}, "there is no folder"),
        ({"protocol": PROTOCOL.changed(num_prompts=96)}, "fid needs 97 generated pictures and the"),
        ({"protocol": PROTOCOL.changed(num_prompts=131)}, "draws 131 prompts .* holds 130"),
        ({"protocol": PROTOCOL.changed(kid_subset_size=101)}, "kid needs 101 generated"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(settings, inputs, changes, message):
    changes = {n: inputs / v if isinstance(v, str) else v for n, v in changes.items()}
    artist = Artist()
    with pytest.raises(InputError, match=message):
        evaluate(settings(**changes), None if "pictures" in changes else artist.model)
    assert artist.batches == []
    assert not settings().output.exists()


def test_an_output_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        evaluate(settings("file/below"), Artist().model)


def test_both_or_neither_source_is_refused(settings, inputs):
    for changes in ({}, {"model": "openmoji", "pictures": inputs / "made"}):
        with pytest.raises(InputError, match="either --model or --pictures"):
            evaluate(settings(**changes))


def test_two_results_side_by_side(settings, tmp_path):
    first = evaluate(settings("a", metrics=SET), Artist().model)
    second = evaluate(settings("b", metrics=SET, seed=1), Artist().model)
    lines = compare(first, second).splitlines()
    row = next(line for line in lines if line.startswith("FID"))
    gap = second["figures"]["fid"] - first["figures"]["fid"]
    assert f"{gap:+.3f}" in row
    assert row.endswith("b is better" if gap < 0 else "a is better")
    changed = PROTOCOL.changed(precision_k=2)
    third = evaluate(settings("c", metrics=SET, protocol=changed), Artist().model)
    with pytest.raises(InputError, match=r"differ in precision_k \(3, 2\)"):
        compare(first, third)
    assert "DIFFERENT  precision_k (3, 2)" in compare(first, third, anyway=True)
    paths = [str(settings(name).output / "result.json") for name in ("a", "b", "c")]
    assert run("compare", *paths[:2]).output.splitlines() == lines
    refused = run("compare", paths[0], paths[2])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: these figures cannot be compared")
    assert "one file" in run("compare", paths[0], paths[0]).stderr


@pytest.mark.parametrize("content", ["", "{}", '{"format": 99, "figures": {}}', "[]"])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"no result of `tiue evaluate`"):
        load_result(path)
    with pytest.raises(InputError):
        load_result(tmp_path / "missing.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


def command(tiny, inputs, output):
    return [
        "--model", tiny, "--preset", "openmoji", "--reference", inputs / "real",
        "--prompts", inputs / "prompts.txt", "--num-prompts", 100, "--output", output,
        "--metrics", "fid,precision,recall,density,coverage,clip_score", "--device", "cpu",
        "--batch-size", 16, "-k", 2,
    ]  # fmt: skip


def test_the_command_draws_on_two_ranks_what_it_draws_on_one(tiny, inputs, tmp_path):
    alone = run("evaluate", *command(tiny, inputs, tmp_path / "one"))
    assert alone.exit_code == 0, alone.output
    assert "LPIPS diversity  not computed: not asked for" in alone.output
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [str(word) for word in command(tiny, inputs, tmp_path / "two")]
    done = subprocess.run(
        [*launch, "-m", "tiue.evaluate", *words],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (load_result(tmp_path / name / "result.json") for name in ("one", "two"))
    # A rank's batches hold other rows, whose products may round otherwise: 3e-6 seen with AVX-512.
    assert one["figures"] == pytest.approx(two["figures"], rel=1e-4)
    assert (one["drawn_now"], two["drawn_now"]) == (100, 52)
    assert one["model"]["num_decoder_steps"] == 2
    picture = np.asarray(Image.open(tmp_path / "one" / "pictures" / "000017.png"), dtype=int)
    model = load_model(str(tiny), torch.device("cpu"), torch.float32, num_decoder_steps=2)
    prompt = (inputs / "prompts.txt").read_text().splitlines()
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    want = np.asarray(model.draw([prompt[order[17]]], [17])[0], dtype=int)
    assert np.abs(picture - want).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "coco2017-5k"], "give their folder with --reference"),
        (["--preset", "coco2017-5k", "--reference", "{real}"], "give the prompts to draw with"),
        (["--preset", "coco2014-30k", "--reference", "{real}", "--prompts", "{prompts}"],
         "draws 30000 prompts and the list holds 130"),
        (["--preset", "coco2017-5k", "--reference", "{real}", "--prompts", "{prompts}",
          "--num-prompts", "100"], "inception-2015-12-05.pt"),
        (["--metrics", "fid,beauty"], "no metric beauty"),
        (["--pictures", "{real}"], "give either --model or --pictures"),
        (["--num-prompts", "90"], "fid needs 97 generated pictures and there are 90"),
    ],
)  # fmt: skip
def test_errors_of_the_command_are_one_line(
    tiny, inputs, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    places = {"real": inputs / "real", "prompts": inputs / "prompts.txt"}
    words = [argument.format(**places) for argument in arguments]
    result = run("evaluate", "--model", tiny, "--output", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_coco_with_local_files(tiny, inputs, tmp_path):
    """The preset's own path: Inception from a file, captions as COCO publishes them."""
    path = save_inception(tmp_path / "inception.pt", width=2048)
    entries = [{"image_id": i, "id": i, "caption": f"{i} letters"} for i in range(20)]
    captions = tmp_path / "captions_val2017.json"
    captions.write_text(json.dumps({"annotations": entries}))
    protocol = PRESETS["coco2017-5k"].changed(num_prompts=12, generated_size=32)
    found = evaluate(
        Settings(
            protocol, ["precision", "coverage"], tmp_path / "out", model=str(tiny),
            reference=inputs / "real", prompts=captions, features_weights=str(path),
            progress=False,
        )
    )  # fmt: skip
    assert found["extractors"]["features"]["sha256"] == sha256(path)
    assert found["counts"] == {"generated": 12, "reference": 120, "skipped": 0}
    assert found["reference"] == {"folder": "real", "enlarged": 120}
    assert set(found["figures"]) == {"precision", "coverage"}


def test_steps_of_the_whole_unet(tiny):
    cpu = torch.device("cpu")
    model = load_model(str(tiny), cpu, torch.float32, num_inference_steps=3, guidance_scale=2.0)
    assert model.facts["num_inference_steps"] == 3
    assert "num_decoder_steps" not in model.facts
    pipe = tiny_pipeline()
    want = pipe("sun", num_inference_steps=3, guidance_scale=2.0,
                generator=torch.Generator().manual_seed(5)).images[0]  # fmt: skip
    got = model.draw(["sun"], [5])[0]
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(want, dtype=int)).max() <= 1
    with pytest.raises(InputError, match=r"a model that draws in one pass, not with openmoji-tea"):
        load_model("openmoji-teacher", cpu, torch.float32, student=tiny)


def test_other_weights_are_another_evaluation(tiny):
    cpu = torch.device("cpu")
    first = load_model(str(tiny), cpu, torch.float32).facts
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1
    pipe.save_pretrained(tiny.parent / "changed" / "model")
    second = load_model(str(tiny.parent / "changed" / "model"), cpu, torch.float32).facts
    assert {n for n in first if first[n] != second[n]} == {"weights_sha256"}
    student = tiny.parent / "changed" / "model"
    assert load_model(str(tiny), cpu, torch.float32, student=student).facts == second


def test_the_shipped_network_says_how_good_it_is(tmp_path):
    facts = OpenMojiExtractor(torch.device("cpu")).describe()
    assert facts["names"] == 1918
    assert facts["accuracy_autoencoder"] > 0.5
    with pytest.raises(InputError, match="64 x 64 pictures, got 32 x 32"):
        OpenMojiExtractor(torch.device("cpu"))(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(OSError, match="openmoji_training"):
        OpenMojiExtractor(torch.device("cpu"), tmp_path / "other.safetensors")
