"""The page's pictures in docs/images, of the embedded model: `python -m benchmarks.screenshots`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from testing.browser import PHONE, WIDE, find_chromium, open_page

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PROMPTS = ("red apple", "rocket", "octopus")


def main() -> None:
    """Serve, draw as a person would, photograph, end."""
    if find_chromium() is None:
        sys.exit("no Chromium on this machine: apt-get install chromium")
    command = [sys.executable, "-m", "tiue", "serve", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().removeprefix("ready on ").strip()
        try:
            for name, size in (("serve", WIDE), ("serve-phone", PHONE)):
                photograph(url, size, IMAGES / f"{name}.png")
        finally:
            server.terminate()


def photograph(url: str, size: dict[str, int], path: Path) -> None:
    """A page with three prompts drawn, the last of them in parts and beside the teacher's."""
    with open_page(url, size) as (page, wrong):
        for prompt in PROMPTS:
            page.get_by_label("Prompt", exact=True).fill(prompt)
            if prompt == PROMPTS[-1]:
                page.get_by_label("Show what each timestep adds").check()
                page.get_by_label("Compare with the teacher").check()
            page.get_by_role("button", name="Draw").click()
            page.get_by_text(f"{prompt} (3)").wait_for()
        page.get_by_text("The teacher's, of the same seeds").wait_for()
        page.wait_for_timeout(500)
        page.screenshot(path=path, full_page=True)
        assert not wrong, wrong
    print(path)


if __name__ == "__main__":
    main()
