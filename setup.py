"""Entry point for setuptools; everything about the package is declared in pyproject.toml.

With TIUE_CUDA=1 csrc is compiled into the package, by tiue_kernels/cuda/build.py. The library uses
neither Python.h nor more of torch than its stable ABI, so one wheel serves every Python.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup

options = {}

if os.environ.get("TIUE_CUDA", "0") not in ("", "0"):
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py
    from setuptools.dist import Distribution

    def load_build():
        """tiue_kernels.cuda.build by its path: importing the package would import torch."""
        path = Path(__file__).parent / "tiue_kernels" / "cuda" / "build.py"
        spec = importlib.util.spec_from_file_location("tiue_build", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    class BuildWithCuda(build_py):
        def run(self):
            super().run()
            build = load_build()
            package = Path("tiue_kernels/cuda")
            output = package if self.editable_mode else Path(self.build_lib) / package
            objects = Path(self.get_finalized_command("build").build_temp).absolute()
            try:
                print(f"compiled {build.build(output.absolute(), objects=objects)}")
            except build.BuildError as error:
                sys.exit(f"error: {error}")

    class PlatformWheel(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    class PlatformDistribution(Distribution):
        def has_ext_modules(self):
            return True

    options = {
        "cmdclass": {"build_py": BuildWithCuda, "bdist_wheel": PlatformWheel},
        "distclass": PlatformDistribution,
    }

setup(**options)
