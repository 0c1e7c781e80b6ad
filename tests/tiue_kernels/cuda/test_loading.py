"""What the loader, the build and the installation say when something is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiue_kernels import build, cuda

ROOT = Path(__file__).parents[3]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def test_why_not() -> None:
    assert cuda.why_not("geglu") == "not implemented"
    assert cuda.why_not() == cuda.why_not("cross_timestep_attention", "cuda")
    assert "xpu" in cuda.why_not("cross_timestep_attention", "xpu")
    assert cuda.available_ops() == (set(cuda.SCHEMAS) if cuda.loaded() else set())


def test_host_library_by_environment(host_library: Path) -> None:
    assert cuda.why_not("cross_timestep_attention", "cpu") is None
    code = "from tiue_kernels import cuda\nassert cuda.why_not('cross_timestep_attention', 'cpu') "
    assert run_python(code).returncode == 0  # without it, a reason
    # With it, none, and the dispatch runs it.
    code += (
        "is None\nimport torch, tiue_kernels\n"
        "q, k = torch.randn(4, 5, 16), torch.randn(2, 7, 16)\n"
        "run = lambda: tiue_kernels.functional.cross_timestep_attention(q, k, k, 2)\n"
        "expected = run()\n"
        "with tiue_kernels.use_backend('cuda'): actual = run()\n"
        "torch.testing.assert_close(actual, expected)\n"
    )
    done = run_python(code, TIUE_HOST_LIBRARY=str(host_library))
    assert done.returncode == 0, done.stderr


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIUE_CUDA_ARCHS", raising=False)
    assert build.architectures() == [
        "'-gencode=arch=compute_80,code=[sm_80,compute_80]'",
        "'-gencode=arch=compute_90a,code=[sm_90a]'",
    ]
    monkeypatch.setenv("TIUE_CUDA_ARCHS", "86, 120+PTX")
    assert len(build.architectures()) == 2
    with pytest.raises(build.BuildError, match="write for instance"):
        build.architectures("7.0")


def test_missing_tools_say_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(build.BuildError, match="CUDA_HOME"):
        build.find_nvcc()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(build.BuildError, match="pip install ninja"):
        build.find_ninja()


def test_job_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.job_count() == 7
    monkeypatch.delenv("MAX_JOBS")
    assert build.job_count() >= 1


@pytest.mark.parametrize("cuda_flag", ["0", "1"])
def test_metadata_needs_no_torch(cuda_flag: str) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel", reason="setuptools is older than 70")
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']; "
        "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run_python(code, TIUE_CUDA=cuda_flag)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("tiue")
