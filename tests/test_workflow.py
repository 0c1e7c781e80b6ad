"""The public workflow and templates name what there is."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_workflow_calls_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    called = set(re.findall(r"make ([a-z-]+)", text))
    called |= set(jobs["quick"]["strategy"]["matrix"]["target"])
    assert {"lint", "test", "quick", "docs"} <= called
    assert called <= targets


def test_a_report_asks_for_tiue_info():
    for name in ("bug", "request"):
        path = ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml"
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        labels = [part["attributes"]["label"] for part in form["body"]]
        assert "What `tiue info` prints" in labels
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert citation["version"] == version[1]
