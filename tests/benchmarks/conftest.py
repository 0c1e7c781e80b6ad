import pytest

from benchmarks.miniature import evaluation, parts, plots, report, sheets, training


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Folders of the experiment's in one of the test's: results, work, images, and the page."""
    for module in (training, evaluation, parts):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    for module in (training, evaluation):
        monkeypatch.setattr(module, "WORK", tmp_path / "work")
    for module in (plots, sheets):
        monkeypatch.setattr(module, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(report, "PAGE", tmp_path / "miniature.md")
    (tmp_path / "images").mkdir()
    return tmp_path
