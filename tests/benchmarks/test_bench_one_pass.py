"""The benchmarks of every level run, on a tiny UNet; forms are compared before they are timed."""

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_block, multiply_adds, peak_memory
from benchmarks.bench_one_pass import default_forms, run_race
from benchmarks.conftest import chosen_forms
from benchmarks.forms import rivals
from benchmarks.forms.models import random_unet
from benchmarks.measure.interleave import interleave
from benchmarks.measure.race import Case
from testing.configs import CONFIGS

ROOT = Path(__file__).parents[2]


LEVELS = ("one_pass", "block", "train_step", "pipeline")


@pytest.fixture(scope="module")
def levels(tmp_path_factory) -> dict[str, list[dict]]:
    """The rows of every level on the tiny model, of one process: its start is what takes time."""
    path = tmp_path_factory.mktemp("results") / "bench.json"
    files = [f"benchmarks/bench_{level}.py" for level in LEVELS]
    options = ["--bench-model=tiny", "--bench-latents", "8", "--bench-rounds", "3"]
    options += ["--bench-steps", "2", "--bench-memory", "published", f"--benchmark-json={path}"]
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    environment = {name: os.environ[name] for name in os.environ if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    result = json.loads(text)
    assert result["machine_info"]["device"]
    assert "node" not in result["machine_info"]
    found: dict[str, list[dict]] = {level: [] for level in LEVELS}
    for row in result["benchmarks"]:
        found[Path(row["fullname"].partition("::")[0]).stem.removeprefix("bench_")].append(row)
    return found


@pytest.fixture
def rows(levels) -> list[dict]:
    return levels["one_pass"]


def test_forms_are_raced_on_one_case(rows):
    forms = {row["extra_info"]["form"]: row for row in rows}
    assert {"published", "full-steps", "one-step", "tiue"} <= set(forms)
    medians = {form: statistics.median(row["stats"]["data"]) for form, row in forms.items()}
    assert all(len(row["stats"]["data"]) == 3 for row in forms.values())
    info = forms["tiue"]["extra_info"]
    assert info["speedup_over"] == pytest.approx(
        {form: median / medians["tiue"] for form, median in medians.items()}
    )
    assert info["relative_difference"] < 1e-4
    assert "not equal by nature" in forms["full-steps"]["extra_info"]["compared"]
    assert info["num_decoder_steps"] == 2


def test_forms_that_cannot_run_say_why_in_the_json(rows):
    ran = {row["extra_info"]["form"] for row in rows}
    reasons = rows[0]["extra_info"]["not_run"]
    assert not ran & set(reasons)
    assert all(reasons.values())
    # Whether a CPU library lies in the package, which these tests hide, decides of tiue-openvino.
    wanted = set(default_forms(torch.device("cpu")))
    assert (ran | set(reasons)) ^ wanted <= {"tiue-openvino"}


def test_cost_is_stated_without_a_clock(rows):
    infos = [row["extra_info"] for row in rows]
    counted = {info["form"]: info["multiply_adds"] for info in infos if "multiply_adds" in info}
    assert set(multiply_adds.FORMS) <= set(counted)
    parts = multiply_adds.count("tiue", "tiny", 8, num_decoder_steps=2)
    assert counted["tiue"] == sum(part.total for part in parts.values())
    assert counted["full-steps"] == 2 * counted["one-step"]
    assert counted["tiue"] < counted["published"] < counted["full-steps"]


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_memory_grows_by_what_a_pass_allocates(rows, monkeypatch):
    assert rows[0]["extra_info"]["peaks_mib"]["published"] > 0

    def build(_setting):
        return lambda: torch.ones(2**26).sum()  # 256 MiB, freed before the call returns

    monkeypatch.setitem(rivals.FORMS, "published", rivals.Form(build, "a large temporary"))
    gc.collect()
    peak = peak_memory.measure("published", Case("tiny", 8), torch.float32)
    # What earlier tests left may be given back meanwhile.
    assert 224 <= peak / 2**20 < 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forms_of_other_numbers_are_held_against_their_own(dtype, monkeypatch):
    unet = random_unet("tiny", torch.device("cpu"), dtype)
    forms = ["tiue-lora", "one-step", "one-step-fused", "full-steps-fused"]
    race = run_race(Case("tiny", 8, num_decoder_steps=2), unet, forms, 1, [])
    assert race.not_run == {}
    assert set(race.seconds) == set(forms)  # what they are held against is not timed
    for form in ("tiue-lora", "one-step-fused", "full-steps-fused"):
        limit = 1e-4 if dtype == torch.float32 else 0.2
        assert race.of_form[form]["relative_difference"] < limit, form
        assert "multiply_adds" not in race.of_form[form]
    assert not hasattr(unet, "peft_config")  # the weights of the other forms are left as they are
    assert "Fused" not in str(unet)
    with monkeypatch.context() as patch:
        wrong = rivals.Form(rivals.FORMS["published"].build, "no LoRA", "published-lora")
        patch.setitem(rivals.FORMS, "tiue-lora", wrong)
        with pytest.raises(AssertionError, match="tiue-lora differs by"):
            run_race(Case("tiny", 8, num_decoder_steps=2), unet, ["tiue-lora"], 1, [])


def test_a_form_that_is_wrong_is_not_timed(monkeypatch):
    def build(setting):
        right = rivals.FORMS["published"].build(setting)
        return lambda: right() * 1.01

    monkeypatch.setitem(rivals.FORMS, "tiue", rivals.Form(build, "wrong"))
    unet = random_unet("tiny", torch.device("cpu"), torch.float32)
    with pytest.raises(AssertionError, match="tiue differs by"):
        run_race(Case("tiny", 8), unet, ["published", "tiue"], 1, [])


def test_a_rival_that_breaks_costs_no_other(monkeypatch):
    def broken(_setting):
        raise RuntimeError(f"cannot write {ROOT}/cache\nmore")

    monkeypatch.setitem(rivals.FORMS, "one-step", rivals.Form(broken, "broken"))
    unet = random_unet("tiny", torch.device("cpu"), torch.float32)
    race = run_race(Case("tiny", 8), unet, ["published", "one-step"], 1, [])
    assert race.not_run == {"one-step": "RuntimeError: cannot write cache"}
    assert set(race.seconds) == {"published"}


def test_half_types_are_held_against_float32():
    unet = random_unet("tiny", torch.device("cpu"), torch.bfloat16)
    race = run_race(Case("tiny", 8), unet, ["published", "tiue"], 1, [])
    assert 0 < race.of_form["tiue"]["relative_difference"] < 0.1


# g++ compiles a file for every distinct fusion: of one level 43 in both forms.
ONE_LEVEL = CONFIGS["tiny"] | {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
}


@pytest.mark.parametrize("form", ["published-compile", "tiue-compile"])
def test_compiled_forms_compute_the_same(form, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++: torch.compile generates C++ for a CPU")
    monkeypatch.setitem(CONFIGS, "one level", ONE_LEVEL)
    unet = random_unet("one level", torch.device("cpu"), torch.float32)
    race = run_race(Case("one level", 8, num_decoder_steps=2), unet, [form], 1, [])
    assert race.not_run == {}
    assert race.of_form[form]["relative_difference"] < 2e-5


def test_openvino_computes_the_same(rows):
    pytest.importorskip("openvino")
    infos = {row["extra_info"]["form"]: row["extra_info"] for row in rows}
    assert infos["published-openvino"]["relative_difference"] < 1e-4


def test_blocks(levels):
    rows = {row["name"]: row["extra_info"] for row in levels["block"]}
    assert len(rows) == 4
    for block in ("resnet", "transformer block"):
        published, tiue = (
            info
            for form in ("published", "tiue")
            for info in rows.values()
            if (info["block"], info["form"]) == (block, form)
        )
        assert tiue["multiply_adds"] < published["multiply_adds"]
        assert tiue["relative_difference"] < 2e-4


def test_training_steps(levels):
    infos = {row["extra_info"]["form"]: row["extra_info"] for row in levels["train_step"]}
    assert set(infos) == {"published", "tiue", "tiue-recompute"}
    assert all(info["relative_difference"] < 1e-4 for info in infos.values())
    saved = {form: info["saved_mib"] for form, info in infos.items()}
    assert saved["tiue-recompute"] < saved["tiue"] < saved["published"]


def test_pictures(levels):
    rows = levels["pipeline"]
    assert [row["extra_info"]["batch"] for row in rows] == [1, 8]
    for row in rows:
        stages = row["extra_info"]["stages_s"]
        assert sum(stages.values()) == pytest.approx(row["stats"]["median"])
        assert all(stages[name] > 0 for name in ("text encoder", "encoder", "decoder", "VAE"))


def test_unknown_forms_are_refused():
    asked = SimpleNamespace(getoption={"--bench-forms": ["tiue", "none"]}.get)
    with pytest.raises(pytest.UsageError, match="no form 'none': choose of published, tiue"):
        chosen_forms(asked, bench_block.FORMS, bench_block.FORMS)


def test_rounds_are_interleaved():
    calls = []

    def rival(name):
        return lambda: calls.append(name) or torch.zeros(())

    seconds = interleave({"a": rival("a"), "b": rival("b")}, rounds=4, device=torch.device("cpu"))
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(rounds) for rounds in seconds.values()] == [4, 4]


def test_rivals_of_fewer_rounds_take_part_in_the_first():
    calls = []
    rivals = {name: (lambda name=name: calls.append(name)) for name in ("slow", "fast")}
    seconds = interleave(rivals, {"slow": 1, "fast": 3}, torch.device("cpu"))
    assert calls == ["slow", "fast", "fast", "fast"]
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"slow": 1, "fast": 3}
