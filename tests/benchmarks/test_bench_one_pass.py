"""The benchmark runs, on a tiny UNet, and the report says what its JSON holds."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.interleave import interleave

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("results") / "cpu" / "bench_one_pass.json"
    path.parent.mkdir()
    options = ["--bench-model", "tiny", "--bench-latents", "8", "--bench-rounds", "3"]
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_one_pass.py", *options]
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    environment = {name: os.environ[name] for name in os.environ if "XDIST" not in name}
    done = subprocess.run(
        [*command, f"--benchmark-json={path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (loaded,) = report.load(path.parents[1])
    return loaded


def test_json_has_both_forms_and_their_ratio(result):
    forms = {row["extra_info"]["form"]: row for row in result["benchmarks"]}
    assert set(forms) == {"published", "tiue"}
    medians = {form: statistics.median(row["stats"]["data"]) for form, row in forms.items()}
    assert all(len(row["stats"]["data"]) == 3 for row in forms.values())
    speedup = forms["tiue"]["extra_info"]["speedup_over_published"]
    assert speedup == pytest.approx(medians["published"] / medians["tiue"])
    assert forms["tiue"]["extra_info"]["relative_difference"] < 2e-5


def test_json_names_the_device_but_not_the_host(result):
    assert result["machine_info"]["device"]
    assert "node" not in result["machine_info"]
    assert str(ROOT) not in json.dumps(result)


def test_report_writes_the_measured_numbers(result):
    tiue = next(row for row in result["benchmarks"] if row["extra_info"]["form"] == "tiue")
    median = f"{tiue['stats']['median'] * 1e3:.2f} ms"
    speedup = f"{tiue['extra_info']['speedup_over_published']:.2f} x"
    for text in (report.readme_block([result]), report.performance_page([result])):
        assert median in text
        assert speedup in text
    readme = f"before\n{report.START}\nold\n{report.END}\nafter\n"
    assert report.replace_block(readme, "new") == readme.replace("old", "new")
    with pytest.raises(ValueError, match="markers"):
        report.replace_block("no markers", "new")


def test_rounds_are_interleaved():
    calls = []

    def rival(name):
        return lambda: calls.append(name) or torch.zeros(())

    seconds = interleave({"a": rival("a"), "b": rival("b")}, rounds=4, device=torch.device("cpu"))
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(rounds) for rounds in seconds.values()] == [4, 4]
