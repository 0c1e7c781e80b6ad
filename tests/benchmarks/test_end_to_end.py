"""The benchmark against what others take: rows are told as they are, and kept one by one."""

import json
from pathlib import Path

import pytest
import typer

from benchmarks import end_to_end
from benchmarks.end_to_end import NotRunError

FIGURES = {"seconds": [3.0, 2.0], "ready_s": 40.0, "peak_mib": 4321, "peak_making_mib": 6000}


def test_rows_are_written_one_by_one_and_the_others_stay(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "end_to_end.json"

    def measured(name: str, *_: object) -> dict:
        if name == "published":
            assert list(json.loads(path.read_text())["rows"]) == ["tiue"]
            return {"meaning": "published", "not_run": "no memory"}
        return {"meaning": name, **FIGURES}

    monkeypatch.setattr(end_to_end, "in_processes", measured)
    end_to_end.main(["tiue"], output=path)
    end_to_end.main(["published"], output=path)
    found = json.loads(path.read_text())
    assert list(found["rows"]) == ["tiue", "published"]
    text = "\n".join(end_to_end.section([found]))
    assert "| tiue | tiny | 2.50 s | 2.00 s to 3.00 s | 4,321 MiB | 6,000 MiB, 40 s |" in text
    assert "| published | tiny | not run: no memory |" in text
    with pytest.raises(typer.BadParameter, match="no row 'nothing': choose of tiue, published"):
        end_to_end.main(["nothing"], output=path)


def test_a_row_that_takes_too_long_is_stopped_and_said() -> None:
    found = end_to_end.in_processes("tiue-two-processes", "tiny", 1, minutes=0.001)
    assert found["not_run"] == "more than 0.001 minutes"
    assert found["processes"] == 2


def test_a_rival_that_is_not_installed_says_how(monkeypatch) -> None:
    monkeypatch.setattr(end_to_end.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotRunError, match="pip install stable-diffusion-cpp-python"):
        end_to_end.measure("sd-cpp-f16", "tiny", 1)
