"""Compiled libraries: what they need of torch, and those that are missing, broken or stale."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tiue_kernels import build, libraries

CURE = "TIUE_CUDA=1 pip install --no-build-isolation . (needs nvcc)"


def test_a_library_that_does_not_load_gives_one_warning(tmp_path: Path) -> None:
    broken = tmp_path / "libtiue_cuda.so"
    broken.write_bytes(b"no library")
    broken.with_suffix(".sources").write_text(build.fingerprint("cuda"))
    with pytest.warns(RuntimeWarning, match="does not load") as caught:
        reason = libraries.load(broken, "CUDA", CURE)
    assert len(caught) == 1
    assert reason == str(caught[0].message)
    assert "TIUE_CUDA=1 pip install --force-reinstall --no-deps --no-build-isolation ." in reason


def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    library = tmp_path / "libtiue_cuda.so"
    library.write_bytes(b"compiled from what csrc was yesterday")
    for sources in (None, "of yesterday"):
        if sources:
            library.with_suffix(".sources").write_text(sources)
        with pytest.warns(RuntimeWarning, match="was compiled from another version of csrc"):
            assert "Rebuild it with TIUE_CUDA=1" in libraries.load(library, "CUDA", CURE)


def test_a_missing_library_is_said_when_asked(tmp_path: Path, recwarn) -> None:
    assert "not built" in libraries.load(tmp_path / "libtiue_cuda.so", "CUDA", CURE)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("toolkit", "driver", "cure"),
    [
        ("13.0", 13000, None),
        ("12.9", 13010, None),
        ("12.9", 12020, None),  # minor versions are compatible
        ("13.0", 0, None),  # no driver: torch says so
        ("13.0", 12080, "this one is for 12.8: update the driver, or set CUDA_HOME to .* CUDA 12"),
    ],
)
def test_a_driver_older_than_the_runtime_is_said(tmp_path: Path, toolkit, driver, cure) -> None:
    library = tmp_path / "libtiue_cuda.so"
    library.with_suffix(".sources").write_text(f"{build.fingerprint('cuda')}\n{toolkit}")
    reason = libraries.why_no_driver(library, driver)
    assert reason is None if cure is None else re.search(cure, reason)
    assert libraries._why_stale(library, "cuda") is None


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ["cuda_library", "cpu_library"])
def test_stable_abi_only(name: str, request: pytest.FixtureRequest) -> None:
    library = request.getfixturevalue(name)
    for tool in ("nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: binutils are not installed")
    symbols = subprocess.check_output(["nm", "-DC", str(library)], text=True)
    assert not re.findall(r"^.*\b(?:at|c10)::.*$", symbols, re.MULTILINE)
    assert "aoti_torch_get_current_cuda_stream" not in symbols
    assert "aoti_torch_library_init_impl" in symbols
    needed = subprocess.check_output(["readelf", "-d", str(library)], text=True)
    assert not re.findall(r"NEEDED.*(?:cudart|cuda|python|c10|gomp)", needed)
