"""Embeddings on disk: what `tiue embed-text` writes, and a run that reads it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tiue.cli import app
from tiue.distill import distill
from tiue.distill.embeddings import StoredPrompts, embed_text
from tiue.distill.loading import load_text_encoder
from tiue.errors import InputError, OutputError

CPU = torch.device("cpu")
PROMPTS = ["red apple", "rocket", "cat face", "sun", "house"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def folder(teacher_folder, prompts, tmp_path):
    return embed_text(str(teacher_folder), prompts, tmp_path / "text", shard_size=2, cpu=True)


def test_rows_are_the_text_encoders_in_float16(folder, teacher_folder):
    stored = StoredPrompts(folder, CPU)
    expected = load_text_encoder(str(teacher_folder), CPU)(PROMPTS).half().float()
    assert stored.prompts == PROMPTS
    torch.testing.assert_close(stored[torch.tensor([4, 0, 3])], expected[[4, 0, 3]])
    empty = load_text_encoder(str(teacher_folder), CPU)([""]).half().float()
    torch.testing.assert_close(stored.empty, empty)
    shards = sorted(path.name for path in folder.glob("embeddings-*.safetensors"))
    assert shards == [f"embeddings-{n:05d}.safetensors" for n in range(3)]
    assert load_file(folder / shards[0])["prompt_embeds"].dtype == torch.float16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_shards_are_mapped_not_read(folder):
    stored = StoredPrompts(folder, CPU)
    with open("/proc/self/maps") as maps:
        assert str(folder / "embeddings-00001.safetensors") in maps.read()
    assert len(stored.prompts) == 5


def test_a_run_on_embeddings_loads_no_text_encoder(make_config, folder, teacher_folder, tmp_path):
    for part in ("unet", "scheduler"):
        (tmp_path / "teacher").mkdir(exist_ok=True)
        (tmp_path / "teacher" / part).symlink_to(teacher_folder / part)
    # There is no tokenizer and no text encoder to load.
    stored = make_config(
        teacher=str(tmp_path / "teacher"), prompts=None, embeddings=folder, log_every=1
    )
    encoded = make_config(log_every=1)
    logs = []
    for config in (stored, encoded):
        lines = (distill(config) / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    # The same prompts in the same order, so the figures differ by the rounding to float16 alone.
    for own, expected in zip(*logs, strict=True):
        for name in ("kl", "lora", "grad_norm"):
            assert own[name] == pytest.approx(expected[name], rel=1e-3), name


@pytest.mark.parametrize(
    "name", ["embeddings-00001.safetensors", "empty.safetensors", "prompts.jsonl"]
)
def test_a_damaged_file_is_named_and_written_anew(
    make_config, folder, teacher_folder, prompts, name
):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{name}' is damaged: its checksum"):
        distill(make_config(prompts=None, embeddings=folder))
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("embeddings-*")}
    embed_text(str(teacher_folder), prompts, folder, shard_size=2, cpu=True)
    assert path.read_bytes() == whole
    again = {p.name: p.stat().st_mtime_ns for p in folder.glob("embeddings-*")}
    assert {n for n in times if times[n] != again[n]} == ({name} & times.keys())
    StoredPrompts(folder, CPU)


def test_unfinished_embeddings_are_refused_and_gone_on_with(folder, teacher_folder, prompts):
    index = json.loads((folder / "index.json").read_text())
    del index["complete"]
    index["shards"] = index["shards"][:1]
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "embeddings-00002.safetensors").unlink()
    with pytest.raises(InputError, match="no finished embeddings"):
        StoredPrompts(folder, CPU)
    embed_text(str(teacher_folder), prompts, folder, shard_size=2, cpu=True)
    assert len(StoredPrompts(folder, CPU)[torch.arange(5)]) == 5


def test_embeddings_of_something_else_are_not_written_over(folder, teacher_folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("pizza\n")
    with pytest.raises(OutputError, match="prompts_sha256"):
        embed_text(str(teacher_folder), other, folder, shard_size=2, cpu=True)


def test_command(teacher_folder, prompts, tmp_path):
    arguments = ["embed-text", "--teacher", teacher_folder, "--prompts", prompts, "--cpu",
                 "--output", tmp_path / "text", "--shard-size", 4]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "5 embeddings in 2 shards" in result.output
    arguments[4] = tmp_path / "nowhere.txt"
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "nowhere.txt" in result.output
