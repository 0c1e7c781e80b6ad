"""`tiue serve` as a process of its own: hang-ups, endings, restarts."""

import json
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.tiue.serve.conftest import PATIENCE, ask, served


@pytest.fixture(scope="module")
def service(folder):
    with served(folder, "--no-page", "--max-waiting", "40", "--max-images", "40") as found:
        yield found


@pytest.fixture
def address(service) -> str:
    return service[1]


def drawn(url: str, **settings) -> list[dict]:
    status, answer = ask(url, **settings)
    assert status == 200, answer
    return answer["data"]


def metric(url: str, pattern: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE) as answer:
        found = re.search(rf"^{pattern} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_for(what) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_listens_on_this_machine_alone_and_draws_the_same_twice(address):
    assert address.startswith("http://127.0.0.1:")
    assert drawn(address) == drawn(address)


def test_who_hangs_up_is_not_drawn_for(address):
    host, port = address.removeprefix("http://").split(":")
    before = metric(address, "tiue_batch_size_sum")
    body = json.dumps({"prompt": "apple", "n": 40, "size": "64x64"}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.encode() + body)
        wait_for(lambda: metric(address, "tiue_waiting_pictures") > 0)
    cancelled = 'tiue_requests_total{door="api",outcome="cancelled"}'
    wait_for(lambda: metric(address, re.escape(cancelled)) == 1)
    assert metric(address, "tiue_waiting_pictures") == 0
    assert metric(address, "tiue_batch_size_sum") - before < 40
    assert len(drawn(address)) == 1


def test_half_a_request_and_noise_leave_the_service_alone(address):
    host, port = address.removeprefix("http://").split(":")
    for data in (b"POST /v1/images/gen", b"\x16\x03\x01" + b"\0" * 99, b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(data)
    assert len(drawn(address)) == 1


def test_kill_9_then_a_start_and_an_end_after_what_was_begun(folder, service):
    """Last in this file: it kills the service of the tests above."""
    process, url = service
    first = drawn(url)
    process.kill()
    process.wait(PATIENCE)
    with pytest.raises(urllib.error.URLError):
        ask(url)
    with served(folder, "--no-page", "--port", url.rpartition(":")[2]) as (process, again):
        assert again == url
        assert drawn(again) == first
        answers = []
        asked = threading.Thread(target=lambda: answers.append(drawn(url, n=8, size="64x64")))
        asked.start()
        wait_for(lambda: metric(url, "tiue_waiting_pictures") > 0 or answers)
        process.send_signal(signal.SIGTERM)
        asked.join(PATIENCE)
        assert len(answers[0]) == 8
        assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
