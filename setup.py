"""Entry point for setuptools; everything about the package is declared in pyproject.toml.

With TIUE_CUDA=1 or TIUE_CPU=1 csrc is compiled into the package, by tiue_kernels/build.py. The
libraries use neither Python.h nor more of torch than its stable ABI, so one wheel serves every
Python.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup

TARGETS = [
    target
    for target in ("cuda", "cpu")
    if os.environ.get(f"TIUE_{target.upper()}", "0") not in ("", "0")
]
options = {}

if TARGETS:
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

    class BuildWithLibraries(build_py):
        def run(self):
            super().run()
            build = load_build()
            objects = Path(self.get_finalized_command("build").build_temp).absolute()
            root = Path() if self.editable_mode else Path(self.build_lib)
            for target in TARGETS:
                output = (root / "tiue_kernels" / target).absolute()
                try:
                    print(f"compiled {build.build(target, output, objects / target)}")
                except build.BuildError as error:
                    sys.exit(f"error: {error}")

    class PlatformWheel(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    class PlatformDistribution(Distribution):
        def has_ext_modules(self):
            return True

    options = {
        "cmdclass": {"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel},
        "distclass": PlatformDistribution,
    }

setup(**options)
