"""The CPU library for aarch64, each of whose functions runs in an emulator (qemu), for tests.

Debian: `apt-get install g++-aarch64-linux-gnu qemu-user-static`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tiue_kernels import build
from tiue_kernels.cpu.library import Library

FORM = "aarch64"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SYSTEM = "/usr/aarch64-linux-gnu"  # whose C library it is linked against


def is_there() -> bool:
    """Whether this computer has compiler and emulator."""
    return all(shutil.which(name) for name in (COMPILER, EMULATOR))


class EmulatedLibrary(Library):
    """As `Library`, on an aarch64 that is emulated.

    Args:
        native: the library of this computer, for what is no function of `csrc/cpu`.
        folder: where the library for aarch64 and its caller are compiled, once.
    """

    def __init__(self, native: Path, folder: Path) -> None:
        super().__init__(native, "portable")
        self.form = FORM
        self._caller = folder / "emulated"
        if not self._caller.exists():
            with mock.patch.dict(os.environ, CXX=COMPILER):
                build.build("cpu", folder)
            source = Path(__file__).with_name("emulated.cpp")
            command = [COMPILER, "-std=c++17", "-O1", str(source), "-o", str(self._caller), "-ldl"]
            subprocess.run(command, check=True)
        self._library = folder / build.LIBRARIES["cpu"]

    def _run(self, name: str, *arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        blocks = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        sent = bytearray(struct.pack("q", len(blocks)))
        for address, block in blocks.items():
            sent += struct.pack("q", block.nbytes()) + ctypes.string_at(address, block.nbytes())
        words, number = list[int](), 0.0
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                first = argument.untyped_storage().data_ptr()
                words += [2 + list(blocks).index(first), argument.data_ptr() - first]
            elif isinstance(argument, float):
                number = argument
            else:
                words += [1, 0] if argument is None else [0, argument]
        sent += struct.pack(f"{1 + len(words)}q", len(words) // 2, *words)
        sent += struct.pack("d", number)
        with tempfile.TemporaryDirectory() as place:
            given, made = Path(place, "given"), Path(place, "made")
            given.write_bytes(sent)
            function = f"tiue_portable_{name}"
            command = [EMULATOR, "-L", SYSTEM, self._caller, self._library, function, given, made]
            subprocess.run(command, check=True)
            got = made.read_bytes()
        start = 8
        for address, block in blocks.items():
            ctypes.memmove(address, got[start : start + block.nbytes()], block.nbytes())
            start += block.nbytes()
        return struct.unpack_from("q", got)[0]
