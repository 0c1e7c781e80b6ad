"""The notebook runs from top to bottom; its last cell compares the served with the drawn."""

import json
from pathlib import Path

from PIL import Image

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("TIUE_NOTEBOOK_STEPS", "2")
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # no pictures in the repository's history
            exec("".join(cell["source"]), names)
    assert isinstance(names["served"], Image.Image)
    assert [json.loads(line)["step"] for line in names["losses"]][-1] == 2
    figures = names["result"]["figures"]
    assert 0 < figures["fid"] < 10
    assert figures["precision"] > 0.5
