"""A service of a tiny model, in this process or in one of its own."""

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest
import uvicorn
from starlette.testclient import TestClient

from tests.tiue.tiny import tiny_autoencoder_tiny, tiny_pipeline
from tiue import TiUEPipeline
from tiue.serve.api import make_app
from tiue.serve.engine import Engine
from tiue.serve.limits import Limits
from tiue.serve.page import add_page
from tiue.serve.server import Server
from tiue.serve.service import Service

ROOT = Path(__file__).parents[3]
HOSTS = ["127.0.0.1", "localhost"]
# Seconds until what has not come is taken for lost: a busy machine takes less for anything here.
PATIENCE = 1800.0


def tiny_engine(**limits) -> Engine:
    teacher = tiny_pipeline(vae=tiny_autoencoder_tiny())
    pipe = TiUEPipeline(**{**teacher.components, "safety_checker": None})
    limits = {"timeout": PATIENCE} | limits
    return Engine(pipe, "tiny", Limits(**limits), teacher, {"num_inference_steps": 2})


@contextmanager
def client(engine: Engine) -> Iterator[TestClient]:
    app = make_app(Service(engine), HOSTS)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as found:
        yield found


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny model, as a service in a process of its own loads it."""
    place = tmp_path_factory.mktemp("serve") / "model"
    tiny_pipeline().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def api(engine) -> Iterator[TestClient]:
    with client(engine) as found:
        yield found


class Slow:
    """Makes an engine wait in its passes for a word."""

    def __init__(self, engine: Engine) -> None:
        self.go, self.begun, self._draw = threading.Event(), threading.Event(), engine.draw
        engine.draw = self

    def __call__(self, drawings):
        if drawings[0].prompt != "warm":
            self.begun.set()
            assert self.go.wait(PATIENCE)
        return self._draw(drawings)


@contextmanager
def hosted(engine: Engine) -> Iterator[str]:
    """The page and the API in a thread of this process: their address."""
    service = Service(engine)
    app = add_page(make_app(service, HOSTS), service)
    urls: Queue[str] = Queue()
    server = Server(uvicorn.Config(app, port=0, log_level="warning"), urls.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield urls.get(timeout=PATIENCE)
    finally:
        server.handle_exit(signal.SIGINT, None)
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def served(folder: Path | None, *arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`tiue serve` of a model folder on a free port: the process and its address."""
    command = [sys.executable, "-m", "tiue", "serve", "--port", "0", "--device", "cpu"]
    command += ["--timeout", str(PATIENCE)]
    if folder is not None:
        command += ["--model", str(folder)]
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("ready on "), line + process.stderr.read()
        yield process, line.removeprefix("ready on ").strip()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


def ask(url: str, **settings) -> tuple[int, dict]:
    """Status and answer of a request for pictures, of an apple unless told otherwise."""
    body = json.dumps({"prompt": "apple", "seed": 3} | settings).encode()
    request = urllib.request.Request(
        f"{url}/v1/images/generations", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or "{}")
