"""How commands end: one line for what went wrong, and pictures where nobody reads what is said."""

import errno
import os
import re
import sys

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from tests.tiue.tiny import tiny_pipeline
from tiue.cli import app
from tiue.errors import InputError
from tiue.terminal import OneLineErrors, read_texts, say


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("terminal")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def full_device():
    return open("/dev/full", "w")


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize(
    ("stdout", "reason"),
    [(full_device, os.strerror(errno.ENOSPC)), (closed_pipe, os.strerror(errno.EPIPE))],
)
def test_pictures_do_not_stop_where_nothing_can_be_printed(
    model, tmp_path, monkeypatch, capsys, stdout, reason
):
    with stdout() as file:
        monkeypatch.setattr(sys, "stdout", file)
        arguments = ["generate", "sun", "moon", "--model", model, "--output", str(tmp_path)]
        app([*arguments, "--batch-size", "1", "--device", "cpu"], standalone_mode=False)
    monkeypatch.undo()
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["contact_sheet.png", "moon_seed0.png", "sun_seed0.png"]
    for path in tmp_path.iterdir():
        Image.open(path).load()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "printed" in line]
    assert len(warnings) == 1
    assert reason in warnings[0]


def test_a_line_is_printed(capsys):
    say("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sun", "--seed", str(2**64)], "seeds go to 18446744073709551615"),
        (["sun", "--seed", str(2**64 - 1), "--num-images", "2"], "seeds go to"),
        (["sun", "--height", "100000000"], "height must be at most 16384"),
        (["caf\udce9"], "no UTF-8"),
        (["sun", "--guidance-scale", "nan"], "guidance_scale must be a finite number"),
        (["sun", "--guidance-scale", "inf"], "guidance_scale must be a finite number"),
        (["sun", "--guidance-scale", "-5"], "guidance_scale must be a number from 0 to 1000"),
        (["sun", "--guidance-scale", "1e30"], "guidance_scale must be a number from 0 to 1000"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(model, tmp_path, arguments, message):
    arguments = ["generate", *arguments, "--model", model, "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_texts_are_utf_8_whatever_the_locale_says():
    """As Python reads "café" where the locale's encoding is ASCII."""
    assert read_texts(["caf\udcc3\udca9", "sun", "café"]) == ["café", "sun", "café"]
    with pytest.raises(InputError, match="no UTF-8"):
        read_texts(["caf\udce9"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nto"),
    ],
)
def test_want_of_memory_is_one_line(error):
    small = typer.Typer(cls=OneLineErrors)

    @small.command()
    def one() -> None:
        raise error

    @small.command()
    def other() -> None:
        raise RuntimeError("a bug")

    result = CliRunner().invoke(small, ["one"])
    assert result.exit_code == 1
    assert re.fullmatch(r"error: out of memory [^\n]*; ask for less at once\n", result.stderr)
    assert isinstance(CliRunner().invoke(small, ["other"]).exception, RuntimeError)
