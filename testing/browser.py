"""A headless Chromium that tells of whatever goes wrong in a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Nothing but the page itself may speak to a network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 1.8e6  # milliseconds; a busy machine may take longer than the 30 s of the default
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def open_page(url: str, size: dict[str, int] | None = None) -> Iterator[tuple[Any, list[str]]]:
    """A page of an address, in a browser of its own.

    Args:
        url: of the page.
        size: of the window; `WIDE` by default.

    Yields:
        Playwright's page, and a list that grows by what went wrong: messages on the console,
        exceptions, failed answers, requests to other machines.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), headless=True, args=FLAGS
        )
        page = browser.new_context(viewport=size or WIDE).new_page()
        page.set_default_timeout(PATIENCE)
        wrong: list[str] = []
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if not r.ok else None)

        def request(asked: Any) -> None:
            if not asked.url.startswith((url, "data:", "blob:")):
                wrong.append(f"request to {asked.url}")

        page.on("request", request)
        page.goto(url)
        page.get_by_role("button", name="Draw").wait_for()
        yield page, wrong
        browser.close()
