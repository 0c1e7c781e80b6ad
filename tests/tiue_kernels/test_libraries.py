"""Compiled libraries that are missing or broken."""

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
