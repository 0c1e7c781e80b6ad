"""Tuning: what is tried, what is left out, and what wins. The kernels run in the interpreter."""

import json

import pytest
import torch

pytest.importorskip("triton")

from tiue_kernels import configs, tune
from tiue_kernels.triton import tuning
from tiue_kernels.triton.tuning import Problem

CPU = torch.device("cpu")
PROBLEMS = tuning.problems(["tiny"], ["nchw", "nhwc"], ["float32"], timesteps=2)
GEGLU = next(problem for problem in PROBLEMS if problem.operator == "geglu")


def test_every_call_of_a_decoder_is_there_once():
    assert len(set(PROBLEMS)) == len(PROBLEMS)
    found = {(problem.operator, problem.direction) for problem in PROBLEMS}
    assert {operator for operator, _ in found} == set(tuning._ARGUMENTS)
    assert {direction for _, direction in found} == {"fwd", "bwd"}
    shapes = {p.sizes for p in PROBLEMS if p.operator == "shared_skip_group_norm_silu"}
    assert shapes == {(2, 1, 64, 64, 2), (2, 1, 64, 32, 2), (2, 1, 64, 32, 4), (2, 1, 32, 32, 4)}


@pytest.mark.parametrize(
    "problem",
    {(p.operator, p.direction): p for p in PROBLEMS}.values(),
    ids=lambda problem: f"{problem.operator}-{problem.direction}",
)
def test_other_configurations_compute_the_same(problem: Problem):
    """The heuristic and the candidate that differs most from it, by the tuner's own criterion."""
    arguments = problem.arguments(CPU)
    check = tune.Checker(problem, arguments)
    choices = problem.choices()
    assert choices
    for bucket, heuristic in choices:
        tried = tuning.candidates(problem.operator, bucket, heuristic)
        assert tried[0] is heuristic
        assert len({tuple(config.items()) for config in tried}) == len(tried) > 3
        with configs.forced(problem.operator, bucket, tried[-1]), configs.recorded() as seen:
            assert check(problem.run("triton", arguments)) is None
        assert bucket in {name for _, name, _ in seen}


def test_a_cut_list_of_candidates_tries_every_axis():
    """`make gpu` takes 12 of up to 54."""
    axes = []
    for problem in {(p.operator, p.direction): p for p in PROBLEMS}.values():
        for bucket, heuristic in problem.choices():
            first, *nearest = tuning.candidates(problem.operator, bucket, heuristic)[:12]
            assert first is heuristic
            changed = [{a for a in config if config[a] != heuristic[a]} for config in nearest]
            assert sorted(changed, key=len) == changed
            alone = {axis for axes in changed if len(axes) == 1 for axis in axes}
            assert len(alone) >= 2
            axes.append(alone)
    assert max(map(len, axes)) == 4


def test_candidates_of_all_launches_compile_in_the_same_processes(monkeypatch, capsys):
    pools = []

    class Pool:
        def __init__(self, workers, mp_context):
            pools.append(workers)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, _, *jobs):
            return [f"capability {capability}" for *_, capability in zip(*jobs, strict=True)]

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    options = ["--models", "tiny", "--dtypes", "float32", "--most", "3", "--workers", "5"]
    tune.main(["--compile-only", "9.0", *options])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["why_not"] for line in lines} == {"capability (9, 0)"}
    assert len({tuple(line["launch"]) for line in lines}) > 10
    assert pools == [5]


def test_a_configuration_reaches_the_kernel(monkeypatch):
    from triton.runtime.jit import KernelInterface

    (bucket, heuristic), *_ = GEGLU.choices()
    wanted = {"BLOCK_R": 2, "BLOCK_C": 128, "num_warps": 8}
    launches = []
    monkeypatch.setattr(
        KernelInterface,
        "__getitem__",
        lambda _kernel, grid: lambda *args, **options: launches.append((grid, options)),
    )
    arguments = GEGLU.arguments(torch.device("meta"))
    with configs.forced("geglu", bucket, wanted):
        GEGLU.run("triton", arguments)
    GEGLU.run("triton", arguments)
    assert [options for _, options in launches] == [wanted, heuristic]
    assert launches[0][0] > launches[1][0]


def fastest(seconds):
    """A clock under which each configuration takes what a table says."""

    def clock(call):
        call()
        ((config,),) = ([*configs._forced.values()],)
        return seconds[config["BLOCK_R"]]

    return clock


def tried(*rows):
    return [{"BLOCK_R": count, "BLOCK_C": 128, "num_warps": 4} for count in rows]


@pytest.mark.parametrize(
    ("seconds", "winner"), [({8: 1.0, 4: 0.7, 1: 0.9}, 4), ({8: 1.0, 4: 0.99, 1: 2.0}, 8)]
)
def test_the_fastest_wins_if_it_gains_more_than_noise(seconds, winner):
    (bucket, _), *_ = GEGLU.choices()
    result = tune.tune(GEGLU, bucket, tried(8, 4, 1), CPU, fastest(seconds), rounds=2)
    assert result.config["BLOCK_R"] == winner
    assert result.gain == pytest.approx(1 / seconds[winner] if winner != 8 else 1.0)


def test_what_is_wrong_or_does_not_run_is_not_timed(monkeypatch):
    (bucket, _), *_ = GEGLU.choices()
    run = Problem.run

    def broken(self, backend, arguments):
        results = run(self, backend, arguments)
        rows = next(iter(configs._forced.values()), {}).get("BLOCK_R")
        if rows == 1:
            raise RuntimeError("out of resources")
        if rows == 4:
            results[0][0, 0, 0] += 1e-3
        if rows == 2:
            results[0][0, 0, 0] = torch.nan
        return results

    monkeypatch.setattr(Problem, "run", broken)
    seconds = {8: 1.0, 4: 0.1, 1: 0.1, 2: 0.1, 16: 0.5}
    result = tune.tune(GEGLU, bucket, tried(8, 4, 1, 2, 16), CPU, fastest(seconds), rounds=1)
    assert result.config["BLOCK_R"] == 16
    reasons = {config["BLOCK_R"]: reason for config, reason in result.left_out}
    assert set(reasons) == {1, 2, 4}
    assert "is off by" in reasons[4]
    assert "does not run: RuntimeError" in reasons[1]


def test_the_command_writes_what_gained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "Clock", lambda _: fastest({8: 1.0, 1: 0.5, 4: 0.9, 16: 2.0}))
    options = ["--smoke", "--models", "tiny", "--operators", "geglu", "--dtypes", "float32"]
    tune.main([*options, "--most", "3", "--rounds", "1", "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert path.name == "geglu,device_name=CPU,_interpreted.json"
    assert {config["BLOCK_R"] for config in content["configs"].values()} == {1}
    assert "2 of 2 launches tuned" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_what_can_be_done(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "--compile-only" in capsys.readouterr().err
