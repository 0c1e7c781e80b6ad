import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiue.cli import app
from tiue.distill import DistillConfig

ROOT = Path(__file__).parents[3]


def run(*arguments):
    return CliRunner().invoke(app, ["distill", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def arguments(make_config, tmp_path):
    config = make_config()
    return [
        "--teacher", config.teacher, "--prompts", config.prompts, "--output", tmp_path / "run",
        "--steps", 1, "--batch-size", 2, "--lora-rank", 2, "--cpu", "--trackers", "tensorboard",
    ]  # fmt: skip


def test_every_setting_is_an_option_with_its_help():
    output = run("--help").output
    for field in dataclasses.fields(DistillConfig):
        assert re.search(rf"--{field.name.replace('_', '-')}[ ,/]", output), field.name
    assert max(map(len, output.splitlines())) <= 80
    titles = re.findall(r"^(\S.*):$", output, re.MULTILINE)
    assert titles == ["Options", "Model and prompts", "Updates", "Losses",
                      "Memory, speed, determinism", "Checkpoints, log, pictures"]  # fmt: skip
    assert "Classifier-free guidance of the teacher" in " ".join(output.split())
    assert "-o, --output" in output


def test_the_program_that_the_help_names_exists():
    said = subprocess.run(
        [sys.executable, "-m", "tiue.distill", "--help"], capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert said.split()[:4] == ["Usage:", "python", "-m", "tiue"]
    assert importlib.util.find_spec("tiue.__main__") is not None


def test_settings_reach_the_run(arguments, tmp_path):
    result = run(*arguments, "--no-save-pipeline", "--kl-weight", 0)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "run") in result.output
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert line["step"] == 1
    assert line["kl"] == 0
    assert not (tmp_path / "run" / "pipeline").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--learning-rte", 1, "--learning-rate"),
        ("--config", "sd21", "sd21-base"),
        ("--prompt-drop", 2, "prompt_drop must be from 0 to 1"),
        ("--prompts", "nowhere.txt", "nowhere.txt"),
        ("--teacher", "nowhere", "nowhere"),
        ("--weighting", "sigma", "weighting"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, tmp_path, option, value, said):
    result = run(*arguments, option, value)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "unet").exists()
