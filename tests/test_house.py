"""Rules of the house that no other test would notice being broken."""

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiue
import tiue_kernels
from tests import planted
from tiue.openmoji.config import TEN_PROMPTS

ROOT = Path(__file__).parents[1]
FOLDERS = ("tiue", "tiue_kernels", "testing", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def modules(package) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    # A library that was compiled in place looks like an extension module.
    return [info.name for info in found if not info.name.rpartition(".")[2].startswith("libtiue")]


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_kernels_need_torch_alone():
    names = [name for name in modules(tiue_kernels) if not name.startswith("tiue_kernels.triton.")]
    assert "tiue_kernels.functional" in names
    run_python(
        "import importlib, sys\n"
        # None makes an import of the name fail as if it were not installed.
        "for name in ('diffusers', 'transformers', 'triton', 'tiue'): sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "tiue").rglob("*.py")), ids=lambda path: path.stem)
def test_method_stays_above_the_kernels(path):
    below = {name for name in imported_names(path) if name.split(".")[0] == "triton"}
    assert not below
    attributes = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert not {name for name in attributes if name.startswith("torch.ops")}


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}


def test_one_version():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r'^version = "(.+)"$', text, flags=re.MULTILINE)[1]
    assert tiue.__version__ == tiue_kernels.__version__ == declared
    assert importlib.metadata.version("tiue") == declared


@pytest.mark.parametrize(
    "name",
    ["tiue.schedule", "tiue_kernels.functional.transformers", "tiue_kernels.functional.outputs"],
)
def test_examples_of_docstrings_run(name: str) -> None:
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted
    assert not done.failed


def run_readme_example(number: int) -> dict:
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    names: dict = {}
    exec(blocks[number].split("```")[0], names)
    return names


def test_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_readme_example(0)
    colors = Image.open(tmp_path / "apple.png").convert("RGB").getcolors(maxcolors=2**16)
    assert colors is None or len(colors) > 10  # a picture, not one flat colour
    expected = names["unet"].one_pass(names["noise"], names["schedule"], names["prompt_embeds"])
    torch.testing.assert_close(names["latents"].detach(), expected, rtol=2e-5, atol=2e-5)


def test_readme_example_of_fused_modules_runs():
    names = run_readme_example(3)
    hidden, skip = names["hidden"], names["skip"]
    joined = torch.cat([hidden, skip.repeat(4, 1, 1, 1)], dim=1)
    temb = torch.randn(8, 384)
    expected = names["resnet"](joined, temb)
    torch.testing.assert_close(names["fused"](hidden, temb, skip), expected, rtol=1e-4, atol=1e-5)
    assert names["out"].shape == expected.shape
    assert {"up_blocks.0.resnets.1", "mid_block.resnets.0"} <= set(names["names"])


def test_demo_draws_the_ten_prompts():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").split("PROMPTS := ")[1]
    assert tuple(re.findall(r'"(.+?)"', lines.split("\n\n")[0])) == TEN_PROMPTS


def test_readme_links_exist():
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        targets = [part.split(")")[0] for part in text.split("](")[1:]]
        local = [target for target in targets if not target.startswith("https://")]
        assert local
        assert [target for target in local if not (ROOT / target).exists()] == []


def test_a_package_index_gets_links_that_lead_somewhere():
    spec = importlib.util.spec_from_file_location("tiue_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    readme = "![A page](docs/images/page.png) by [a paper](https://arxiv.org), [docs](docs/a.md)."
    named = 'version = "1.2.0"\n[project.urls]\nRepository = "https://example.org/tiue/"\n'
    assert setup.description(readme, named) == (
        "![A page](https://example.org/tiue/raw/v1.2.0/docs/images/page.png) by"
        " [a paper](https://arxiv.org), [docs](https://example.org/tiue/blob/v1.2.0/docs/a.md)."
    )
    unknown = setup.description(readme, 'version = "1.2.0"\n')
    assert unknown == " by [a paper](https://arxiv.org), docs."
    own = (ROOT / "README.md").read_text("utf-8"), (ROOT / "pyproject.toml").read_text("utf-8")
    assert not re.search(r"\]\((?!https?:|#)", setup.description(*own))


@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_still_has_its_place(fault):
    """`python -m tests.planted` takes minutes and is no part of the suite; docs list its faults."""
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.right) == 1
    assert fault.right != fault.wrong
    # A name that is no more would be an error of its own, which no check has to notice.
    names = set(re.findall(r"\b[A-Za-z_]\w*", fault.wrong))
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()
    listed = (ROOT / "docs" / "gpu_checks.md").read_text(encoding="utf-8").replace("`", "")
    assert f"{'CUDA' if 'csrc' in fault.file else 'Triton'}: {fault.what} |" in listed
