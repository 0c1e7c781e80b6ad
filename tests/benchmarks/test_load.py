"""The load test's clients, against a service in this process, and what the report says of them."""

import os

import psutil
import pytest

from benchmarks import load
from tests.tiue.serve.conftest import hosted, tiny_engine


def test_clients_are_counted_and_timed(monkeypatch):
    engine = tiny_engine(max_waiting=128)
    sizes, draw = [], engine.draw

    def drawn(drawings):
        sizes.append(len(drawings))
        return draw(drawings)

    monkeypatch.setattr(engine, "draw", drawn)
    with hosted(engine) as url:
        port = int(url.rpartition(":")[2])
        case = load.measure(port, 8, 32)
        assert (case["clients"], case["requests"]) == (8, 32)
        assert 0 < case["p50_ms"] <= case["p99_ms"]
        assert case["pictures_per_second"] <= 8000 / case["p50_ms"] * 2
        kept = load.memory(port, psutil.Process(os.getpid()), 40)
        assert kept["requests"] == 40
        assert 100 < kept["mib_after_a_tenth"] < 100_000
    assert sum(sizes) >= 1 + 32 + 40
    assert max(sizes) > 1


def test_an_answer_that_is_no_picture_ends_the_test():
    with hosted(tiny_engine()) as url, pytest.raises(RuntimeError, match="400"):
        load.client(int(url.rpartition(":")[2]), [" "])


def test_the_report_says_what_was_measured():
    case = {"form": "batched", "clients": 8, "requests": 200, "pictures_per_second": 31.5}
    case |= {"p50_ms": 120.0, "p99_ms": 300.5}
    kept = {"requests": 2000, "mib_after_a_tenth": 700, "mib_at_the_end": 701}
    machine = {"device": "Some CPU, 2 cores"}
    result = {"machine": machine, "model": "openmoji", "cases": [case], "memory": kept}
    text = "\n".join(load.section([result]))
    assert "| batched | 8 | 200 | 31.5 | 120 ms | 300.5 ms |" in text
    assert "700 MiB after a tenth of them, 701 MiB at the end" in text
    assert list(load.section([])) == ["Not measured."]
