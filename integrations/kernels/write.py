"""The operators in the layout of Hugging Face's `kernels`: `make kernels`, into out/kernels.

The package is written under a name of its own, made of its contents, and so are its operators'
namespaces: versions of it, and the installed package, live side by side in one process.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import tiue_kernels
from tiue.files import whole_folder

ROOT = Path(__file__).parents[2]
LAYERS = Path(__file__).parent / "layers.py"
# Of no use in a folder that is only read: commands.
LEFT_OUT = ("compile.py", "info.py", "tune.py", "tuning.py")
VARIANTS = ("cpu", "cuda", "rocm")
BUILD = """\
[general]
name = "tiue-kernels"
license = "Apache-2.0"
backends = ["cpu", "cuda", "rocm"]

[torch-noarch]
"""
CARD = """\
---
license: apache-2.0
tags: [kernels]
---

# Kernels of UNets

`GEGLU`, `ResnetBlock2D` and `GroupNormSiLU` for `kernelize`, in Triton on a GPU, in torch
elsewhere, forward and backward; `functional` has the operators under them. Written by
`make kernels` of TiUE.
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


def write(folder: Path) -> str:
    """Write the folder, whole or not at all.

    Args:
        folder: taken for itself; what it held is replaced.

    Returns:
        The package's name in it.
    """
    files = sources()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    name = f"tiue_kernels_{digest}"
    files = renamed(files, name)
    with whole_folder(folder) as beside:
        (beside / "build.toml").write_text(BUILD, encoding="utf-8")
        (beside / "README.md").write_text(CARD, encoding="utf-8")
        places = [beside / "torch-ext" / "tiue_kernels"]
        for backend in VARIANTS:
            place = beside / "build" / f"torch-{backend}"
            place.mkdir(parents=True)
            facts = {"id": name, "name": "tiue-kernels", "version": 1, "license": "Apache-2.0"}
            facts |= {"python-depends": [], "backend": {"type": backend}}
            (place / "metadata.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
            places.append(place)
        for place in places:
            for file, text in files.items():
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                (place / file).write_text(text, encoding="utf-8")
    return name


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "out/kernels")
    print(f"{target}: {write(target)} {tiue_kernels.__version__}")
