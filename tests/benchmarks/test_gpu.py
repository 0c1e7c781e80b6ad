"""`make gpu`: the whole flow on a CPU with tiny shapes, and what it does when parts fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import report, results
from benchmarks.gpu import run as gpu
from benchmarks.gpu.commands import Commands
from testing.operators import OPERATORS, kernel_backends

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--output", str(folder)]
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    environment = {name: os.environ[name] for name in os.environ if "XDIST" not in name}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_part_runs_on_a_cpu(smoke: Path) -> None:
    result = json.loads((smoke / "gpu.json").read_text())
    status = {part["name"]: part["status"] for part in result["parts"]}
    ran = ("tests", "graphs", "sanitizer", "ceilings", "tune", "operators", "one pass")
    assert status == {
        **dict.fromkeys(ran, "passed"),
        **dict.fromkeys(("build", "warm-up", "compiled"), "not run"),
    }
    assert result["smoke"]
    assert result["parity"]["passed"] > 5
    assert result["parity"]["failed"] == 0
    assert result["machine"]["torch"] == torch.__version__
    assert (smoke / "bench_one_pass.json").exists()


def test_figures_are_what_was_timed(smoke: Path) -> None:
    result = json.loads((smoke / "gpu.json").read_text())
    rows = {(r["operator"], r["direction"], r["form"]): r for r in result["operators"]}
    operators = {operator for operator, *_ in rows}
    assert operators == set(gpu.SMOKE_OPERATORS)
    row, eager = (rows["geglu", "forward", form] for form in ("tiue-triton", "eager"))
    # x is [4 rows, 64 tokens, 8 * 32 channels] in float32, the result half as wide.
    assert row["bytes"] == 4 * 64 * 256 * 4 * 3 // 2
    assert row["gb_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
    assert row["percent_of_copy"] == pytest.approx(
        100 * row["gb_s"] / result["ceilings"]["copy_gb_s"]
    )
    assert row["speedup_over_eager"] == pytest.approx(eager["median_s"] / row["median_s"])
    assert (row["gate"], eager["gate"]) == ("green", None)
    assert row["rounds"] == 2


def test_report_names_device_versions_and_figures(smoke: Path) -> None:
    result = json.loads((smoke / "gpu.json").read_text())
    text = (smoke / "gpu.md").read_text()
    assert text.startswith(f"# Smoke run, no measurement: {result['machine']['device']}")
    assert f"torch {torch.__version__}" in text
    assert "### geglu, backward" in text
    assert str(ROOT) not in text + json.dumps(result)


def test_the_one_pass_is_raced_in_every_form_that_runs_here(smoke: Path) -> None:
    rows = json.loads((smoke / "bench_one_pass.json").read_text())["benchmarks"]
    forms = {row["extra_info"]["form"] for row in rows}
    assert forms == {form for form in gpu.ONE_PASS_FORMS if "graph" not in form}
    not_run = rows[0]["extra_info"]["not_run"]
    assert set(not_run) == {"published-graph", "tiue-graph"}


def test_a_smoke_run_has_time_where_a_real_one_has_ten_minutes(tmp_path: Path) -> None:
    real, smoke = (gpu.Run(tmp_path, tmp_path / "work", flag, 60) for flag in (False, True))
    assert {real.budget(name) for name in gpu.BUDGETS} == set(gpu.BUDGETS.values())
    assert all(smoke.budget(name) > 3 * real.budget(name) for name in gpu.BUDGETS)
    assert gpu.MINUTES < 10


def test_smoke_never_writes_results(capsys) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--smoke"])
    assert "give it a folder" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main([])
        assert "no CUDA device" in capsys.readouterr().err


FAILURE = "test_decoder_shapes[geglu-triton-bf16-nchw-sd15_512_up3_transformer]"


@pytest.fixture
def parity() -> dict:
    failures = [{"test": FAILURE, "message": "output 0: 1.0e+00, allowed 1.0e-03"}]
    return {
        "tests": 3,
        "passed": 2,
        "failed": 1,
        "skipped": 0,
        "failures": failures,
        "skips": {},
        "complete": True,
    }


def test_a_red_gate_takes_the_speedup_away(smoke: Path, parity: dict) -> None:
    assert results.subject(FAILURE) == ("geglu", "triton")
    assert results.gate("geglu", "tiue", parity) == "red"
    assert results.gate("geglu", "tiue-triton", parity) == "red"
    assert results.gate("geglu", "tiue-reference", parity) == "green"
    assert results.gate("noise_kl", "tiue", parity) == "green"
    assert results.gate("geglu", "eager", parity) is None
    assert results.gate("noise_kl", "tiue", parity | {"complete": False}) == "not tested"
    assert results.gate("noise_kl", "tiue", None) == "not tested"

    result = json.loads((smoke / "gpu.json").read_text()) | {"parity": parity}
    for row in result["operators"]:
        row["gate"] = results.gate(row["operator"], row["form"], parity)
    text = report.markdown(result)
    assert FAILURE in text
    lines = text.split("### geglu, forward")[1].split("###")[0].splitlines()
    (triton,) = (line for line in lines if "| tiue-triton |" in line)
    assert " x |" not in triton
    assert triton.count("not green") == 2
    (eager,) = (line for line in lines if "| eager |" in line)
    assert "1.00 x" in eager


def test_goals_are_judged_on_green_gates_alone() -> None:
    row = {
        "operator": "cross_timestep_attention",
        "case": "sd15_512_up3_text-nchw",
        "form": "tiue",
        "direction": "forward",
        "speedup_over_eager": 1.4,
    }
    assert results.goals([row | {"gate": "green"}])[0]["met"] is False
    assert results.goals([row | {"gate": "red"}])[0]["met"] is None
    assert results.goals([row | {"gate": "green", "case": "sd15_512_up3_self-nchw"}])[0]["met"]


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(ROOT, tmp_path / "work", time.monotonic() + 3600, dict(os.environ))


def test_commands_end_and_say_how(commands: Commands) -> None:
    good = commands.run("good", [sys.executable, "-c", "print('=== done ===')"], budget=3600)
    assert (good.ok, good.said) == (True, "done")
    bad = commands.run("bad", [sys.executable, "-c", "import sys; sys.exit('broken')"], budget=3600)
    assert (bad.ok, bad.said) == (False, "exit status 1: broken")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_command_that_takes_too_long_may_write_its_results(
    commands: Commands, handler: object
) -> None:
    code = (
        "import time\n"
        "try:\n"
        "    print('started', flush=True)\n"
        "    time.sleep(3600)\n"
        "except KeyboardInterrupt: print('written', flush=True)\n"
    )
    before = signal.signal(signal.SIGINT, handler)  # ignored, as in a shell's background job
    try:
        command = commands.start("slow", [sys.executable, "-c", code])
    finally:
        signal.signal(signal.SIGINT, before)
    while "started" not in command.log.read_text():  # its time begins here on any machine
        time.sleep(0.01)
    slow = command.wait(1)
    assert slow.timed_out
    assert not slow.ok
    assert "out of time after 1 s: written" in slow.said


def test_a_part_that_fails_stops_nothing(tmp_path: Path) -> None:
    run = gpu.Run(tmp_path / "results", tmp_path / "work", smoke=True, seconds=3600)

    def broken() -> str:
        raise RuntimeError("cause")

    def failed() -> str:
        outcome = run.python("build", "-c", f"import sys; sys.exit({str(ROOT)!r} + '/csrc')")
        raise gpu.PartError(outcome.said, outcome)

    run.part("broken", broken)
    run.part("build", failed)
    run.part("fine", lambda: "went on")
    assert run.failed
    text = (run.folder / "gpu.md").read_text()
    assert text.index("RuntimeError: cause") < text.index("went on")
    assert "## Failed: build" in text
    assert str(ROOT) not in text


def test_architecture_of_a_card() -> None:
    assert gpu.architecture(9, 0) == "90a"
    assert gpu.architecture(8, 6) == "86"
    assert gpu.architecture(10, 0) == "100"


def test_every_operator_has_a_benchmark() -> None:
    files = {path.stem for path in (ROOT / "benchmarks").rglob("bench_*.py")}
    levels = {"bench_one_pass", "bench_block", "bench_host", "bench_pipeline", "bench_train_step"}
    levels |= {"bench_transformer"}
    assert files == {f"bench_{operator}" for operator in OPERATORS} | levels
    assert all((ROOT / gpu.benchmark_of(operator)).is_file() for operator in OPERATORS)
    grouped = gpu.groups(tuple(OPERATORS))
    assert sorted(member for members in grouped.values() for member in members) == sorted(OPERATORS)
    assert all(kernel_backends(name) for name in grouped if name != "compositions")


def test_nothing_but_the_one_pass_needs_diffusers() -> None:
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'tiue'): sys.modules[name] = None\n"
        "import benchmarks.gpu.run, benchmarks.conftest, benchmarks.gpu.sanitize\n"
        "import tests.tiue_kernels.test_kernels_on_gpu\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
