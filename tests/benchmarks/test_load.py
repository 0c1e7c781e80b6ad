"""The load test's clients, against a service in this process, and what the report says of them."""

import os

import psutil
import pytest

from benchmarks import load
from tests.tiue.serve.conftest import hosted, tiny_engine
from tests.tiue.tiny import tiny_pipeline


def test_clients_are_counted_and_timed(monkeypatch):
    engine = tiny_engine(max_waiting=128)
    sizes, draw = [], engine.draw

    def drawn(drawings):
        sizes.append(len(drawings))
        return draw(drawings)

    monkeypatch.setattr(engine, "draw", drawn)
    with hosted(engine) as url:
        port, process = int(url.rpartition(":")[2]), psutil.Process(os.getpid())
        assert load.passes(port) == (1, 1)
        case = load.measure(port, process, 8, 32)
        assert (case["clients"], case["requests"]) == (8, 32)
        assert 0 < case["p50_ms"] <= case["p99_ms"]
        assert case["pictures_per_second"] <= 8000 / case["p50_ms"] * 2
        assert case["pictures_per_pass"] == round(32 / (len(sizes) - 1), 1)
        assert case["cpu_ms_per_picture"] > 0
        kept = load.memory(port, process, 40)
        assert kept["requests"] == 40
        assert 100 < kept["mib_after_a_tenth"] < 100_000
    assert sum(sizes) >= 1 + 32 + 40
    assert max(sizes) > 1


def test_passes_alone_are_timed_by_size(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(load, "ALONE", (1, 3))
    rows = load.alone(str(tmp_path), rounds=3)
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        stages = sum(row[name] for name in ("text encoder", "encoder", "decoder", "VAE"))
        assert 0 < stages < 1.5 * row["wall"]  # medians of each need not add up


def test_an_answer_that_is_no_picture_ends_the_test():
    with hosted(tiny_engine()) as url, pytest.raises(RuntimeError, match="400"):
        load.client(int(url.rpartition(":")[2]), [" "])


def test_the_report_says_what_was_measured():
    case = {"form": "batched", "clients": 8, "requests": 200, "pictures_per_second": 31.5}
    case |= {"p50_ms": 120.0, "p99_ms": 300.5, "pictures_per_pass": 4, "cpu_ms_per_picture": 21.5}
    kept = {"requests": 2000, "mib_after_a_tenth": 700, "mib_at_the_end": 701}
    alone = [
        {"batch": 1, "wall": 40.0, "cpu": 44.0, "encoder": 20.0, "VAE": 15.0},
        {"batch": 8, "wall": 10.0, "cpu": 18.0, "encoder": 5.0, "VAE": 4.0},
    ]
    machine = {"device": "Some CPU, 2 cores"}
    result = {"machine": machine, "model": "openmoji", "cases": [case], "memory": kept}
    text = "\n".join(load.section([result | {"alone": alone}]))
    assert "| batched | 8 | 200 | 31.5 | 120 ms | 300.5 ms | 4 | 21.5 ms |" in text
    assert "| 8 | 10.0 | 18.0 | 5.0 | 4.0 | 1.0 |" in text
    assert "one picture alone 40.0 ms, at 8 pictures 10.0 ms each: 4.0 x" in text
    assert "700 MiB after a tenth of them, 701 MiB at the end" in text
    assert list(load.section([])) == ["Not measured."]
