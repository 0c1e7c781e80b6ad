"""Planted bugs stay plantable: the texts that they replace are in the code, once each."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.mutants.mutations import MUTATIONS, Mutation
from benchmarks.mutants.run import page, plant

ROOT = Path(__file__).parents[2]


def test_every_text_is_there_once():
    texts = {m.file: (ROOT / m.file).read_text("utf-8") for m in MUTATIONS}
    stale = [(m.file, m.before) for m in MUTATIONS if texts[m.file].count(m.before) != 1]
    assert stale == []
    assert [m for m in MUTATIONS if m.before == m.after] == []
    assert len(MUTATIONS) >= 60
    assert max(Counter((m.file, m.before) for m in MUTATIONS).values()) == 1


def test_the_tests_of_a_mutation_are_there():
    assert [m.tests[0] for m in MUTATIONS if not (ROOT / m.tests[0]).is_file()] == []


def test_a_bug_is_planted_and_a_stale_one_is_named(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = x\n")
    assert plant(tmp_path, Mutation("a.py", "x = 1", "x = 2", ())) == "x = 1\ny = x\n"
    assert (tmp_path / "a.py").read_text() == "x = 2\ny = x\n"
    with pytest.raises(ValueError, match="not once"):
        plant(tmp_path, Mutation("a.py", "x = 1", "x = 2", ()))


def test_the_page_counts_who_survived():
    row = {"file": "a.py", "before": "a | b", "after": "", "equal": ""}
    text = page(
        [
            row | {"tests": "failed"},
            row | {"tests": "timeout"},
            row | {"tests": "passed", "equal": "speed alone"},
            row | {"tests": "passed"},
        ]
    )
    assert "2 of 4 are\nkilled, 1 are equal" in text
    assert "1 survived" in text
    assert "a \\| b" in text
    assert "(nothing)" in text
