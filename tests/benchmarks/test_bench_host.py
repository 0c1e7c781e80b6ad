"""The host's time: processor time of one thread, of the forms that it says."""

import math
import os
import time

import pytest
import torch

from benchmarks import bench_host


def test_waiting_is_not_counted_and_work_is():
    def work():
        return sum(math.sqrt(i) for i in range(40_000))

    times = bench_host.medians({"waits": lambda: time.sleep(0.02), "works": work}, rounds=3)
    assert times["waits"] < 0.01
    assert times["works"] > times["waits"]


def test_the_passes_compute_the_same():
    calls = bench_host.passes()
    published, own = calls["published"](), calls["tiue"]()
    torch.testing.assert_close(own, published, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(calls["one-step"](), published, atol=1e-2)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="interpreter only")
def test_the_mocked_driver_refuses_the_interpreter():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), bench_host.mocked_driver():
        pass


def test_tables_hold_what_was_timed():
    found = {
        "passes": {"published": 0.08, "tiue": 0.1},
        "launched": {"published": 0.1, "tiue": 0.09},
        "operators": {"geglu": {"eager": 1e-5, "tiue": 2e-5, "launch": 3e-5, "triton": 1e-5}},
    }
    assert bench_host.pass_rows(found)[1] == ["tiue", "100.0 ms", "1.25 x"]
    assert bench_host.pass_rows(found)[2] == ["tiue, to the GPU's launches", "90.0 ms", "0.90 x"]
    assert bench_host.operator_rows(found) == [["geglu", "10 µs", "20 µs", "30 µs", "10 µs"]]


def test_the_goal_is_met_or_the_line_says_why_not():
    slow, fast = {"published": 0.1, "tiue": 0.13}, {"published": 0.1, "tiue": 0.09}
    line = bench_host.against_goal({"passes": slow, "launched": fast})
    assert "now 1.30 x on a CPU and 0.90 x to the GPU's launches. The rest is" in line
    assert bench_host.against_goal({"passes": fast}).endswith("now 0.90 x on a CPU.")
