"""`tiue generate --prompts`: what is drawn, what is not drawn twice, and on two processes."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.tiue.test_cli import names, run
from tests.tiue.test_files import lora
from tests.tiue.test_generate import assert_same, picture
from tests.tiue.tiny import tiny_pipeline
from tiue.errors import InputError
from tiue.files import sha256
from tiue.generate.many import read_jobs

ROWS = [{"prompt": "apple"}, {"prompt": "pear", "seed": 7}, {"prompt": "sun", "id": 3}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    tiny_pipeline().save_pretrained(folder / "model")
    lines = [json.dumps(row) for row in ROWS]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder


def words(place, output) -> list[str]:
    return [
        "generate", "--prompts", str(place / "prompts.jsonl"), "--output", str(output),
        "--model", str(place / "model"), "--device", "cpu", "-n", "2",
        "--batch-size", "2", "-k", "2",
    ]  # fmt: skip


def manifest(folder) -> list[dict]:
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_draws_what_the_command_draws_of_one_and_tells_of_it(place, tmp_path):
    result = run(*words(place, tmp_path / "out"))
    assert result.exit_code == 0, result.output
    rows = manifest(tmp_path / "out")
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("apple", 0), ("apple", 1), ("pear", 7), ("pear", 8), ("sun", 2), ("sun", 3),
    ]  # fmt: skip
    assert all(row["sha256"] == sha256(tmp_path / "out" / row["file"]) for row in rows)
    one = run(
        "generate", "pear", "--seed", 7, "--output", tmp_path / "one", "--model", place / "model",
        "--device", "cpu", "-k", 2,
    )  # fmt: skip
    assert one.exit_code == 0
    want = picture(tmp_path / "one" / "pear_seed7.png")
    assert_same(picture(tmp_path / "out" / rows[2]["file"]), want)
    assert np.abs(picture(tmp_path / "out" / rows[3]["file"]) - want).max() > 1


def test_goes_on_where_it_stopped_and_draws_the_same_on_two_processes(place, tmp_path):
    assert run(*words(place, tmp_path / "one")).exit_code == 0
    want = manifest(tmp_path / "one")
    for name in ("000002.png", "manifest.jsonl"):  # one of a batch: the batch is drawn again
        (tmp_path / "one" / name).unlink()
    kept = (tmp_path / "one" / "000004.png").stat().st_mtime_ns
    again = run(*words(place, tmp_path / "one"))
    assert "6 pictures, 2 drawn now" in again.output
    assert (tmp_path / "one" / "000004.png").stat().st_mtime_ns == kept
    assert manifest(tmp_path / "one") == want

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "tiue", *words(place, tmp_path / "two")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 pictures, 4 drawn now by this process" in done.stdout
    assert manifest(tmp_path / "two") == want


def test_another_run_does_not_go_into_the_folder(place, tmp_path):
    assert run(*words(place, tmp_path)).exit_code == 0
    before = names(tmp_path)
    for more in (("-k", "4"), ("--seed", "1"), ("--guidance-scale", "2")):
        result = run(*words(place, tmp_path), *more)
        assert result.exit_code == 2
        assert "holds the pictures of another" in result.stderr
    assert names(tmp_path) == before
    assert Image.open(tmp_path / "000000.png").size == (32, 32)


def test_pictures_of_another_lora_weight_or_scheduler_are_not_taken_for_these(place, tmp_path):
    save_file(lora(tiny_pipeline(), 0), tmp_path / "lora.safetensors")
    out = tmp_path / "out"
    half, whole = (("--lora", f"{tmp_path / 'lora.safetensors'}:{w}") for w in (0.5, 1))
    assert run(*words(place, out), *half).exit_code == 0
    assert "0 drawn now" in run(*words(place, out), *half).output
    result = run(*words(place, out), *whole)
    assert result.exit_code == 2
    assert "differs in lora_weights" in result.stderr

    model = shutil.copytree(place / "model", tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"leading"', '"trailing"'))
    result = run(*words(place, out), *half, "--model", str(model))
    assert result.exit_code == 2
    assert "differs in scheduler_sha256" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("\n \n", "holds no prompt"),
        ("{", "line 1 .* is no JSON"),
        ('{"prompt": "a"}\n["a"]', "line 2 .* no object"),
        ('{"text": "a"}', "no object with a"),
        ('{"prompt": " "}', "empty prompt"),
        ('{"prompt": "a", "seed": -1}', "no whole number"),
        ('{"prompt": "a", "seed": true}', "no whole number"),
        ('{"prompt": "a", "seed": 18446744073709551615}', "seeds go to"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_jobs(path, 0, 2)


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\u2028here\n\n dog \n", encoding="utf-8")
    jobs = read_jobs(tmp_path / "a.txt", 5, 1)
    assert [(job.name, job.prompt, job.seed) for job in jobs] == [
        ("000000.png", "a cat\u2028here", 5), ("000001.png", "dog", 6),
    ]  # fmt: skip


def test_prompts_or_a_file_of_them(place, tmp_path):
    for more in ([], ["apple", "--prompts", str(place / "prompts.jsonl")]):
        result = run("generate", *more, "--output", tmp_path)
        assert result.exit_code == 2
        assert "draw" in result.stderr
        assert "Usage" in result.stderr
