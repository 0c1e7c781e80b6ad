"""Two replicas on this machine, one killed under load; needs the `ray` extra: `make test-ray`."""

import base64
import concurrent.futures
import io
import json
import os
import signal
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.tiue.serve.conftest import ask
from tiue.errors import InputError
from tiue.serve.command import load_engine
from tiue.serve.engine import Drawing

# Ray's patience is for idle machines; read at import.
for name in (
    "RAY_raylet_start_wait_time_s",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S",
):
    os.environ.setdefault(name, "180")
ray = pytest.importorskip("ray", reason="needs the ray extra: make test-ray")

PORT = 8765
PROMPTS = ("apple", "pear", "sun")


@pytest.fixture(scope="module")
def address(folder):
    from ray import serve

    from tiue.serve.ray import Settings, app

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        settings = Settings(
            model=str(folder), min_replicas=2, max_batch=4, max_waiting=100, device="cpu"
        )
        serve.run(app(settings), name="tiue")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def picture(answer: dict) -> np.ndarray:
    data = base64.b64decode(answer["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)), dtype=int)


def replicas() -> set[int]:
    """Processes that draw."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if line.startswith("ray::ServeReplica:tiue:Drawer"):
            found.add(process.pid)
    return found


def test_one_of_two_replicas_is_killed_under_load(folder, address):
    from tiue.generate.request import Request

    engine = load_engine(Request(model=str(folder)), device="cpu")
    asked = [(PROMPTS[seed % 3], seed) for seed in range(90)]
    expected = [engine.draw([engine.check(Drawing(*one))])[0].image for one in asked]
    before = replicas()
    assert len(before) == 2
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, address, prompt=p, seed=s) for p, s in asked]
        while sum(answer.done() for answer in answers) < 20:
            time.sleep(0.01)
        os.kill(min(before), signal.SIGKILL)
        assert sum(answer.done() for answer in answers) < 80
        answers = [answer.result() for answer in answers]
    for (status, answer), wanted in zip(answers, expected, strict=True):
        # Its own picture, to a rounding, or a word why not.
        if status == 200:
            assert np.abs(picture(answer) - np.asarray(wanted, dtype=int)).max() <= 1
        else:
            assert status == 503
            assert answer["error"]["message"]
    assert sum(status == 200 for status, _ in answers) >= 0.9 * len(answers)
    end = time.monotonic() + 120
    while len(replicas() - {min(before)}) < 2:  # another takes its place
        assert time.monotonic() < end
        time.sleep(0.2)
    assert ask(address, seed=3)[0] == 200


def test_the_api_is_the_same(address):
    status, answer = ask(address, n=3, size="16x16")
    assert (status, [one["seed"] for one in answer["data"]]) == (200, [3, 4, 5])
    for settings, message in (
        ({"prompt": " "}, "is empty"),
        ({"size": "31x8"}, "multiple of"),
        ({"lora": "a"}, "lora"),
        ({"n": 9}, "n is from 1 to 8"),
    ):
        status, answer = ask(address, **settings)
        assert status == 400
        assert message in answer["error"]["message"]
    with urllib.request.urlopen(f"{address}/ready", timeout=20) as ready:
        assert json.load(ready) == {"status": "ready"}
    request = urllib.request.Request(f"{address}/health", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 400


def test_what_serve_run_is_told_is_read_or_refused():
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as run

    from tiue.serve.ray import app

    run(app, {})
    drawer = run(app, {"min_replicas": "2", "max_replicas": "8", "max_batch": "4"})
    config = drawer._bound_deployment.init_args[1]._bound_deployment._deployment_config
    assert config.autoscaling_config.min_replicas == 2
    assert config.autoscaling_config.max_replicas == 8
    assert config.max_ongoing_requests == 8
    for arguments in ({"replicas": "2"}, {"min_replicas": "0"}, {"max_waiting": "4"}):
        with pytest.raises((ValueError, InputError)):
            run(app, arguments)
