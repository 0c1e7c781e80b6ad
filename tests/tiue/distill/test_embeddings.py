"""Embeddings on disk: what `tiue embed-text` writes, and a run that reads it."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.tiue.tiny import TEXT_DIM, TEXT_LENGTH, tiny_scheduler, tiny_unet, tiny_xl_unet
from tiue.cli import app
from tiue.distill import distill, embeddings
from tiue.distill.embeddings import StoredPrompts, embed_text
from tiue.distill.loading import load_text_encoder
from tiue.distill.parts import load_text
from tiue.errors import InputError, OutputError
from tiue.files import sha256

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
    expected = load_text_encoder(str(teacher_folder), CPU)(PROMPTS).tokens.half().float()
    assert stored.prompts == PROMPTS
    torch.testing.assert_close(stored[torch.tensor([4, 0, 3])].tokens, expected[[4, 0, 3]])
    empty = load_text_encoder(str(teacher_folder), CPU)([""]).tokens.half().float()
    torch.testing.assert_close(stored.empty.tokens, empty)
    shards = sorted(path.name for path in folder.glob("embeddings-*.safetensors"))
    assert shards == [f"embeddings-{n:05d}.safetensors" for n in range(3)]
    assert load_file(folder / shards[0])["prompt_embeds"].dtype == torch.float16


def test_smaller_forms_are_near_and_say_what_they_take(teacher_folder, prompts, tmp_path):
    said = []
    encoder = load_text_encoder(str(teacher_folder), CPU)
    expected, lengths = encoder(PROMPTS).tokens, encoder.lengths(PROMPTS)
    rows = torch.arange(5)
    for int8, unpadded in ((True, False), (False, True), (True, True)):
        folder = tmp_path / f"{int8}-{unpadded}"
        embed_text(str(teacher_folder), prompts, folder, None, 2, 64, True, said.append, int8,
                   unpadded)  # fmt: skip
        actual = StoredPrompts(folder, CPU)[rows].tokens
        bound = expected.abs().amax(0) / 254 * 1.001 if int8 else 1e-3 * expected.abs().amax()
        for row, length in enumerate(lengths):
            real = slice(0, length if unpadded else None)
            error = (actual[row] - expected[row]).abs()
            assert (error <= bound)[real].all()
            if unpadded:
                last = actual[row, length - 1]
                assert torch.allclose(actual[row, length:], last.expand_as(actual[row, length:]))
    per_token = TEXT_DIM * 1e-9
    sizes = [5 * TEXT_LENGTH * per_token, 2 * sum(lengths) * per_token, sum(lengths) * per_token]
    told = [line for line in said if "GB are free" in line]
    for line, size in zip(told, sizes, strict=True):
        assert line.startswith(f"The embeddings take {size:.3g} GB in ")


def test_embeddings_without_room_are_not_begun(teacher_folder, prompts, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"has 1e-06 GB left.*--int8 .*--unpadded"):
        embed_text(str(teacher_folder), prompts, tmp_path / "text", cpu=True)
    assert not list((tmp_path / "text").glob("*.safetensors"))


def test_sums_are_compared_once_and_when_a_file_has_changed(folder, monkeypatch):
    read = []
    monkeypatch.setattr(embeddings, "sha256", lambda path: read.append(path.name) or sha256(path))
    StoredPrompts(folder, CPU)
    assert read == []  # compared when they were written
    (folder / "embeddings-00001.safetensors").touch()
    StoredPrompts(folder, CPU)
    StoredPrompts(folder, CPU)
    assert read == ["embeddings-00001.safetensors"]


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
    ("make_unet", "reads"),
    [
        (lambda: tiny_unet(cross_attention_dim=48), "reads width 48, without"),
        (tiny_xl_unet, f"reads width {2 * TEXT_DIM}, with SDXL's"),
    ],
    ids=["width", "xl"],
)
def test_embeddings_that_the_teacher_cannot_read(make_config, folder, tmp_path, make_unet, reads):
    make_unet().save_pretrained(tmp_path / "teacher" / "unet")
    tiny_scheduler().save_pretrained(tmp_path / "teacher" / "scheduler")
    config = make_config(teacher=str(tmp_path / "teacher"), prompts=None, embeddings=folder)
    with pytest.raises(InputError, match=f"are of width {TEXT_DIM}, without.*{reads}.*embed-text"):
        distill(config)


def test_embeddings_of_another_teacher_are_told_of(make_config, folder, teacher_folder, caplog):
    config = make_config(prompts=None, embeddings=folder)
    for teacher, told in ((teacher_folder / ".." / teacher_folder.name, 0), (folder, 1)):
        caplog.clear()
        load_text(replace(config, teacher=str(teacher)), Accelerator(cpu=True), print)
        assert caplog.text.count("they must have the same text encoder") == told


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
    assert len(StoredPrompts(folder, CPU)[torch.arange(5)].tokens) == 5


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
