"""Pictures a second of `tiue serve` on this machine: `python -m benchmarks.load`.

The embedded model by default, on two addresses of this machine's own: with passes shared and with
passes of one picture. Clients ask for one picture after another, each as soon as the last came. It
ends by itself: `--requests` a case, and as many as `--flat` for the memory. Beside it the passes
alone, in this process and without a service: what sharing can gain at most.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.measure.machine import describe, slug
from benchmarks.measure.markdown import table
from tiue.files import write_json
from tiue.generate.loading import load
from tiue.generate.request import Request

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 8, 32)
BATCHES = {"batched": 16, "one at a time": 1}
ALONE = (1, 2, 4, 8, 16, 32)


@contextmanager
def served(max_batch: int, model: str | None) -> Iterator[tuple[int, psutil.Process]]:
    """A service without its page: its port and process."""
    command = [sys.executable, "-m", "tiue", "serve", "--no-page", "--port", "0"]
    command += ["--max-batch", str(max_batch), "--max-waiting", "128"]
    command += [] if model is None else ["--model", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready on "):
            sys.exit("the service did not start; its own words are above")
        try:
            yield int(line.rpartition(":")[2]), psutil.Process(process.pid)
        finally:
            process.terminate()


def client(port: int, prompts: list[str]) -> list[float]:
    """Ask for one picture of each prompt, over one connection: the seconds of each."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    seconds = []
    for seed, prompt in enumerate(prompts):
        body = json.dumps({"prompt": prompt, "seed": seed})
        start = time.perf_counter()
        connection.request(
            "POST", "/v1/images/generations", body, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        text = answer.read()
        seconds.append(time.perf_counter() - start)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {text.decode()}")
    connection.close()
    return seconds


def passes(port: int) -> tuple[float, float]:
    """Passes that a service has drawn, and pictures in them."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    count, total = (
        re.search(rf"^tiue_batch_size_{end} (\S+)$", text, re.MULTILINE) for end in ("count", "sum")
    )
    assert count is not None
    assert total is not None
    return float(count[1]), float(total[1])


def processor_seconds(process: psutil.Process) -> float:
    """Of all threads of a process, since it began."""
    times = process.cpu_times()
    return times.user + times.system


def measure(port: int, process: psutil.Process, clients: int, requests: int) -> dict[str, Any]:
    """One case: `requests` shared among clients."""
    each = max(2, requests // clients)
    before, busy = passes(port), processor_seconds(process)
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        lists = [["red apple", "rocket", "sun"][index % 3 : index % 3 + 1] * each
                 for index in range(clients)]  # fmt: skip
        seconds = sorted(s for found in pool.map(client, [port] * clients, lists) for s in found)
    wall = time.perf_counter() - start
    busy = processor_seconds(process) - busy
    count, pictures = (after - was for after, was in zip(passes(port), before, strict=True))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "clients": clients,
        "requests": len(seconds),
        "pictures_per_second": round(len(seconds) / wall, 2),
        "p50_ms": round(1000 * cuts[49], 1),
        "p99_ms": round(1000 * cuts[98], 1),
        "pictures_per_pass": round(pictures / count, 1),
        "cpu_ms_per_picture": round(1000 * busy / len(seconds), 1),
    }


def alone(model: str | None, rounds: int) -> list[dict[str, Any]]:
    """Passes of several sizes without a service, in turn: medians of milliseconds a picture."""
    pipe = load(Request(model=model), torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw(batch: int) -> dict[str, float]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        with pipe.record_timings() as stages:
            start, busy = time.perf_counter(), time.process_time()
            pipe(["red apple"] * batch, generator=generators)
            taken = {"wall": time.perf_counter() - start, "cpu": time.process_time() - busy}
        return {name: 1000 * s / batch for name, s in (taken | stages).items()}

    found: dict[int, list[dict[str, float]]] = {batch: [] for batch in ALONE}
    for turn in range(rounds + 1):
        for batch, times in found.items():
            taken = draw(batch)
            if turn:  # the first is for memory and caches
                times.append(taken)
    return [
        {"batch": batch}
        | {name: round(statistics.median(t[name] for t in times), 2) for name in times[0]}
        for batch, times in found.items()
    ]


def memory(port: int, process: psutil.Process, requests: int) -> dict[str, Any]:
    """Resident memory after a tenth of the requests and after all of them."""
    tenth = max(1, requests // 10)
    measure(port, process, 8, tenth)
    before = process.memory_info().rss
    measure(port, process, 8, requests - tenth)
    after = process.memory_info().rss
    return {
        "requests": requests,
        "mib_after_a_tenth": round(before / 2**20),
        "mib_at_the_end": round(after / 2**20),
    }


def section(results: list[dict[str, Any]]) -> Iterator[str]:
    """What the report says of these results."""
    if not results:
        yield "Not measured."
    for result in results:
        machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
        yield (
            f"`python -m benchmarks.load`, `tiue serve` of {result['model']}; {machine}. Clients on"
            " the same machine ask for one picture after another."
        )
        header = ["passes", "clients", "requests", "pictures a second", "p50", "p99"]
        header += ["pictures a pass", "CPU a picture"]
        rows = [
            [
                case["form"],
                str(case["clients"]),
                str(case["requests"]),
                f"{case['pictures_per_second']:g}",
                f"{case['p50_ms']:g} ms",
                f"{case['p99_ms']:g} ms",
                f"{case['pictures_per_pass']:g}",
                f"{case['cpu_ms_per_picture']:g} ms",
            ]
            for case in result["cases"]
        ]
        yield table(header, rows)
        one, best = result["alone"][0], min(result["alone"], key=lambda row: row["wall"])
        yield (
            "CPU a picture is the service's, over all threads. What sharing can gain at most, by"
            f" passes without a service: one picture alone {one['wall']:.1f} ms, at"
            f" {best['batch']} pictures {best['wall']:.1f} ms each:"
            f" {one['wall'] / best['wall']:.1f} x. Milliseconds a picture:"
        )
        stages = [name for name in result["alone"][0] if name not in ("batch", "wall", "cpu")]
        rows = []
        for row in result["alone"]:
            rest = row["wall"] - sum(row[name] for name in stages)
            times = [row["wall"], row["cpu"], *(row[name] for name in stages), rest]
            rows.append([str(row["batch"]), *(f"{time:.1f}" for time in times)])
        yield table(["pictures a pass", "time", "CPU", *stages, "rest"], rows)
        kept = result["memory"]
        yield (
            f"Resident memory over {kept['requests']} requests: {kept['mib_after_a_tenth']} MiB"
            f" after a tenth of them, {kept['mib_at_the_end']} MiB at the end."
        )


def main(
    requests: Annotated[int, typer.Option(min=2, help="Requests a case.")] = 200,
    flat: Annotated[int, typer.Option(min=20, help="Requests for the memory.")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each size without a service.")] = 9,
    model: Annotated[str | None, typer.Option(help="A folder; by default the embedded.")] = None,
    output: Annotated[Path | None, typer.Option(help="By default this machine's results.")] = None,
) -> None:
    """Measure, and write load.json."""
    cases = []
    kept: dict[str, Any] = {}
    for name, max_batch in BATCHES.items():
        with served(max_batch, model) as (port, process):
            measure(port, process, 1, 5)
            for clients in CLIENTS:
                cases.append({"form": name, **measure(port, process, clients, requests)})
                print(json.dumps(cases[-1]), flush=True)
            if max_batch > 1:
                kept = memory(port, process, flat)
                print(json.dumps(kept), flush=True)
    by_size = alone(model, rounds)
    print(json.dumps(by_size), flush=True)
    folder = output or RESULTS / slug(torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "load.json"
    found = {
        "machine": describe(torch.device("cpu")),
        "model": model or "openmoji",
        "cases": cases,
        "memory": kept,
        "alone": by_size,
    }
    write_json(path, found)
    print(path)


if __name__ == "__main__":
    typer.run(main)
