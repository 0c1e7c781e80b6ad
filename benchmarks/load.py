"""Pictures a second of `tiue serve` on this machine: `python -m benchmarks.load`.

The embedded model by default, on two addresses of this machine's own: with passes shared and with
passes of one picture. Clients ask for one picture after another, each as soon as the last came. It
ends by itself: `--requests` a case, and as many as `--flat` for the memory.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
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

from benchmarks.machine import describe, slug
from benchmarks.markdown import table
from tiue.files import write_json

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 8, 32)
BATCHES = {"batched": 8, "one at a time": 1}


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


def measure(port: int, clients: int, requests: int) -> dict[str, Any]:
    """One case: `requests` shared among clients."""
    each = max(2, requests // clients)
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        lists = [["red apple", "rocket", "sun"][index % 3 : index % 3 + 1] * each
                 for index in range(clients)]  # fmt: skip
        seconds = sorted(s for found in pool.map(client, [port] * clients, lists) for s in found)
    wall = time.perf_counter() - start
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "clients": clients,
        "requests": len(seconds),
        "pictures_per_second": round(len(seconds) / wall, 2),
        "p50_ms": round(1000 * cuts[49], 1),
        "p99_ms": round(1000 * cuts[98], 1),
    }


def memory(port: int, process: psutil.Process, requests: int) -> dict[str, Any]:
    """Resident memory after a tenth of the requests and after all of them."""
    tenth = max(1, requests // 10)
    measure(port, 8, tenth)
    before = process.memory_info().rss
    measure(port, 8, requests - tenth)
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
        rows = [
            [
                case["form"],
                str(case["clients"]),
                str(case["requests"]),
                f"{case['pictures_per_second']:g}",
                f"{case['p50_ms']:g} ms",
                f"{case['p99_ms']:g} ms",
            ]
            for case in result["cases"]
        ]
        yield table(header, rows)
        kept = result["memory"]
        yield (
            f"Resident memory over {kept['requests']} requests: {kept['mib_after_a_tenth']} MiB"
            f" after a tenth of them, {kept['mib_at_the_end']} MiB at the end."
        )


def main(
    requests: Annotated[int, typer.Option(min=2, help="Requests a case.")] = 200,
    flat: Annotated[int, typer.Option(min=20, help="Requests for the memory.")] = 2000,
    model: Annotated[str | None, typer.Option(help="A folder; by default the embedded.")] = None,
    output: Annotated[Path | None, typer.Option(help="By default this machine's results.")] = None,
) -> None:
    """Measure, and write load.json."""
    cases = []
    kept: dict[str, Any] = {}
    for name, max_batch in BATCHES.items():
        with served(max_batch, model) as (port, process):
            measure(port, 1, 5)
            for clients in CLIENTS:
                cases.append({"form": name, **measure(port, clients, requests)})
                print(json.dumps(cases[-1]), flush=True)
            if max_batch > 1:
                kept = memory(port, process, flat)
                print(json.dumps(kept), flush=True)
    folder = output or RESULTS / slug(torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "load.json"
    found = {
        "machine": describe(torch.device("cpu")),
        "model": model or "openmoji",
        "cases": cases,
        "memory": kept,
    }
    write_json(path, found)
    print(path)


if __name__ == "__main__":
    typer.run(main)
