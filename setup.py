"""Entry point for setuptools; everything about the package is declared in pyproject.toml.

csrc is compiled into the package by tiue_kernels/build.py: the CPU path's library wherever there is
a C++ compiler (TIUE_CPU=0: not; TIUE_CPU=1: or the installation fails), the kernels for GPUs with
TIUE_CUDA=1. The libraries do not use Python.h, and of torch at most its stable ABI, so one wheel
serves every Python.
"""

import atexit
import functools
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution


def load_build():
    """tiue_kernels.build by its path: importing the package would import torch."""
    path = Path(__file__).parent / "tiue_kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("tiue_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def built() -> tuple[tuple[Path, ...], str]:
    """The files that were compiled, once an installation; why the CPU's are not there, or empty."""
    build, files = load_build(), []
    for target, default in (("cuda", "0"), ("cpu", "")):
        wanted = os.environ.get(f"TIUE_{target.upper()}", default)
        if wanted == "0" or (target == "cuda" and not wanted):
            reason = "it was left out (TIUE_CPU=0)"
            continue
        work = Path(tempfile.mkdtemp(prefix="tiue-"))
        atexit.register(shutil.rmtree, work, ignore_errors=True)
        try:
            library = build.build(target, work / target, work / "objects")
            files += [library, library.with_suffix(".sources")]
            reason = ""
            print(f"compiled {library.name}")
        except build.BuildError as error:
            if wanted:
                sys.exit(f"error: {error}")
            reason = str(error)
            print(f"without the CPU library, slower: {reason}")
    return tuple(files), reason


class BuildWithLibraries(build_py):
    def run(self):
        super().run()
        files, reason = built()
        root = (Path() if self.editable_mode else Path(self.build_lib)) / "tiue_kernels"
        note = root / "cpu" / "libtiue_cpu.not_built"
        note.unlink(missing_ok=True)
        for file in files:
            folder = root / file.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            # Renamed: a library that runs must not be written into.
            fresh = folder / f"{file.name}.{os.getpid()}"
            shutil.copy(file, fresh)
            fresh.replace(folder / file.name)
        if reason:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n", "utf-8")


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.has_ext_modules() else tag


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return bool(built()[0])


def description(readme: str, project: str) -> str:
    """README as a package index shows it, where links into this folder lead nowhere.

    They lead to the `Repository` among the project's URLs; while pyproject.toml names none,
    pictures are left out and links are their text.
    """
    repository = re.search(r'^Repository = "(.+?)/?"$', project, re.MULTILINE)
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    local = r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)"

    def absolute(link: re.Match) -> str:
        picture, text, path = link.groups()
        if repository is None:
            return "" if picture else text
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository[1]}/{kind}/v{version}/{path})"

    return re.sub(local, absolute, readme)


if __name__ == "__main__":  # a test imports this file
    setup(
        cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel},
        distclass=PlatformDistribution,
        long_description=description(
            *(Path(name).read_text("utf-8") for name in ("README.md", "pyproject.toml"))
        ),
        long_description_content_type="text/markdown",
    )
