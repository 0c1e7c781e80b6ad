"""The operators in the layout of Hugging Face's `kernels`: `make kernels`, into out/kernels.

The package is written under a name of its own, made of its contents, and so are its operators'
namespaces: versions of it, and the installed package, live side by side in one process. Everywhere
it runs in Triton or torch; with `--compile cpu` or `--compile cuda` there are variants beside that
hold csrc compiled for this kind of computer, against torch's stable ABI, which `kernels` prefers.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import tiue_kernels
from tiue.files import whole_folder
from tiue.terminal import command_group
from tiue_kernels import build

ROOT = Path(__file__).parents[2]
LAYERS = Path(__file__).parent / "layers.py"
# Of no use in a folder that is only read: commands.
LEFT_OUT = ("compile.py", "info.py", "tune.py", "tuning.py")
VARIANTS = ("cpu", "cuda", "rocm")
GENERAL = """\
[general]
name = "tiue-kernels"
edition = 5
version = 1
license = "Apache-2.0"
backends = ["cpu", "cuda", "rocm"]

"""
NOARCH = "[torch-noarch]\n"
TORCH = "2.11"  # the oldest that a compiled library loads beside: build.TORCH_TARGET
CARD = """\
---
license: apache-2.0
tags: [kernels]
---

# Kernels of UNets

`GEGLU`, `ResnetBlock2D` and `GroupNormSiLU` for `kernelize`, in Triton on a GPU, in torch
elsewhere, forward and backward; `functional` has the operators under them. A variant named after
torch's stable ABI holds compiled kernels too. Written by `make kernels` of TiUE.
"""


def sources() -> dict[str, str]:
    """Every file of the package by its place, and the layers, as they stand here."""
    package = ROOT / "tiue_kernels"
    found = {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*"))
        if path.suffix in (".py", ".json") and path.name not in LEFT_OUT
    }
    found["layers.py"] = LAYERS.read_text(encoding="utf-8")
    found["__init__.py"] = re.sub(
        r"(?s)\Z", "\nfrom tiue_kernels import functional, layers  # noqa: E402, F401\n",
        found["__init__.py"], count=1,
    )  # fmt: skip
    return found


def renamed(files: dict[str, str], name: str) -> dict[str, str]:
    """The files with the package's and its operators' names made `name`'s own."""
    mark = name.removeprefix("tiue_kernels_")
    rules = (
        (r"\btiue_kernels\b", name),
        (r"\btorch\.ops\.tiue(_cuda|_cpu)?\b", rf"torch.ops.tiue_{mark}\1"),
        (r'Library\("tiue(_cuda|_cpu)?"', rf'Library("tiue_{mark}\1"'),
        (r"\btiue(_cuda|_cpu)?::", rf"tiue_{mark}\1::"),
    )
    found = {}
    for place, text in files.items():
        for pattern, put in rules:
            text = re.sub(pattern, put, text)
        found[place] = text
    return found


def stable_abi() -> str:
    """The rest of build.toml where csrc's kernels for GPUs are to be compiled."""
    places = [path.relative_to(ROOT).as_posix() for path in build.sources("cuda")]
    headers = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("csrc/**/*.h"))]
    headers = [path for path in headers if not path.startswith("csrc/cpu/")]
    torchs = [path for path in places if path.endswith(".cpp")] + headers
    own = [path for path in places if path.endswith(".cu")]
    return (
        f'[torch]\nminver = "{TORCH}"\nstable-abi = "{TORCH}"\nsrc = {json.dumps(torchs)}\n\n'
        f'[kernel.tiue]\nbackend = "cuda"\ndepends = ["torch"]\n'
        f'cuda-capabilities = ["8.0", "9.0a"]\nsrc = {json.dumps(own)}\n'
    )


def variant(target: str) -> str:
    """The folder of a compiled target, "cpu" or "cuda", in the words of `kernels`."""
    backend = f"cu{build.toolkit_version().replace('.', '')}" if target == "cuda" else "cpu"
    abi = f"torch-stable-abi{TORCH.replace('.', '')}"
    return f"{abi}-{backend}-{platform.machine()}-{platform.system().lower()}"


def write(folder: Path, compiled: tuple[str, ...] = ()) -> str:
    """Write the folder, whole or not at all.

    Args:
        folder: taken for itself; what it held is replaced.
        compiled: of "cpu" and "cuda", what is compiled here for variants of its own.

    Returns:
        The package's name in it.

    Raises:
        BuildError: what is to be compiled does not compile here.
    """
    files = sources()
    contents = [files, {target: build.fingerprint(target) for target in compiled}]
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]
    name = f"tiue_kernels_{digest}"
    files = renamed(files, name)

    def put(place: Path, backend: str | None = None) -> None:
        for file, text in files.items():
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_text(text, encoding="utf-8")
        if backend is not None:
            facts: dict[str, Any] = {"id": name, "name": "tiue-kernels", "version": 1}
            facts |= {"license": "Apache-2.0", "python-depends": [], "backend": {"type": backend}}
            (place / "metadata.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")

    with whole_folder(folder) as beside:
        text = GENERAL + (stable_abi() if "cuda" in compiled else NOARCH)
        (beside / "build.toml").write_text(text, encoding="utf-8")
        (beside / "README.md").write_text(CARD, encoding="utf-8")
        put(beside / "torch-ext" / "tiue_kernels")
        for backend in VARIANTS:
            put(beside / "build" / f"torch-{backend}", backend)
        for target in compiled:
            place = beside / "build" / variant(target)
            put(place, target)
            compile_into(place / target, target, f"tiue_{digest}_cuda")
        if "cuda" in compiled:
            shutil.copytree(ROOT / "csrc", beside / "csrc")
    return name


def compile_into(folder: Path, target: str, namespace: str) -> None:
    """Compile a target's library into a copy of the package, for operators of its own."""
    with tempfile.TemporaryDirectory() as work:
        library = build.build(target, Path(work), namespace=namespace)
        for file in (library, library.with_suffix(".sources")):
            shutil.copy(file, folder)


class Target(str, Enum):
    """What may be compiled for a variant of its own."""

    cpu = "cpu"
    cuda = "cuda"


app = command_group(__doc__)
Compiled = Annotated[
    list[Target] | None, typer.Option("--compile", help="Needs g++ (cpu) or nvcc (cuda).")
]


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Replaced as a whole.")] = Path("out/kernels"),
    compiled: Compiled = None,
) -> None:
    """Write the operators as a folder of Hugging Face's `kernels`."""
    try:
        name = write(folder, tuple(target.value for target in compiled or ()))
    except build.BuildError as error:
        sys.exit(f"error: {error}")
    typer.echo(f"{folder}: {name} {tiue_kernels.__version__}")


if __name__ == "__main__":
    app()
