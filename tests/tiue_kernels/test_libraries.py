"""Compiled libraries: what they need of torch, and those that are missing, broken or stale."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tiue_kernels import __version__, build, libraries
from tiue_kernels.cpu.library import Library

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


def test_a_library_of_another_version_is_not_loaded(cpu_library: Path, tmp_path: Path) -> None:
    other = tmp_path / cpu_library.name
    marked = cpu_library.read_bytes().replace(__version__.encode() + b"\0", b"9.9.9\0")
    other.write_bytes(marked)
    with pytest.raises(libraries.LibraryError, match=r"is of version 9\.9\.9 of the package"):
        Library(other)


def test_a_library_for_another_computer_is_not_loaded(cpu_library: Path, tmp_path: Path) -> None:
    other = tmp_path / cpu_library.name
    contents = bytearray(cpu_library.read_bytes())
    contents[18:20] = (21).to_bytes(2, "little")  # e_machine
    other.write_bytes(contents)
    with pytest.warns(RuntimeWarning, match="is for ppc64le, and this is") as caught:
        libraries.load(other, "CPU", CURE)
    assert len(caught) == 1


def test_a_form_that_is_not_there_is_refused(cpu_library: Path, monkeypatch) -> None:
    monkeypatch.setenv("TIUE_CPU_ISA", "sse9")
    with pytest.raises(libraries.LibraryError, match=r"no form 'sse9'.*portable, avx2, avx512"):
        Library(cpu_library)


def test_compilers_that_cannot_serve_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX=no-such-compiler was not found"):
        build.find_compiler()
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho '#define __GNUC__ 8'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(build.BuildError, match=r"is g\+\+ 8; the CPU library needs g\+\+ 11"):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler was found"):
        build.find_compiler()


def test_the_cpu_library_needs_nothing_of_torch(cpu_library: Path) -> None:
    for tool in ("nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: binutils are not installed")
    symbols = subprocess.check_output(["nm", "-DC", str(cpu_library)], text=True)
    assert not re.findall(r"\b(?:at|c10|torch)::|aoti_torch|std::", symbols)
    needed = subprocess.check_output(["readelf", "-d", str(cpu_library)], text=True)
    found = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert {name.split(".")[0] for name in found} <= {"libc", "libm"}


def test_no_form_of_the_cpu_library_lends_code_to_another(cpu_library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm: binutils are not installed")
    # Of two functions of one name the linker keeps either: one for AVX-512 stops an older computer.
    names = subprocess.check_output(["nm", "--defined-only", str(cpu_library)], text=True)
    assert not re.findall(r" [WVu] .*", names)


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


def test_stable_abi_only(cuda_library: Path) -> None:
    library = cuda_library
    for tool in ("nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: binutils are not installed")
    symbols = subprocess.check_output(["nm", "-DC", str(library)], text=True)
    assert not re.findall(r"^.*\b(?:at|c10)::.*$", symbols, re.MULTILINE)
    assert "aoti_torch_get_current_cuda_stream" not in symbols
    assert "aoti_torch_library_init_impl" in symbols
    needed = subprocess.check_output(["readelf", "-d", str(library)], text=True)
    assert not re.findall(r"NEEDED.*(?:cudart|cuda|python|c10|gomp)", needed)
