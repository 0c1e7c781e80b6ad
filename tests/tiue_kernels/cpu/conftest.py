"""Every form of the CPU library that this computer can run, or emulate, takes the same tests."""

import ctypes

import pytest

from tests.tiue_kernels.cpu import emulated
from tiue_kernels.build import CPU_FORMS
from tiue_kernels.cpu.library import Library


@pytest.fixture(params=[*CPU_FORMS, *([emulated.FORM] if emulated.is_there() else [])])
def cpu_form(request, cpu_library) -> str:
    widest = ctypes.CDLL(str(cpu_library)).tiue_widest
    widest.restype = ctypes.c_char_p
    forms = list(CPU_FORMS)
    if request.param in forms and forms.index(request.param) > forms.index(widest().decode()):
        pytest.skip(f"this computer has no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def emulated_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("aarch64")


@pytest.fixture
def loaded_cpu_library(cpu_library, cpu_form, emulated_folder) -> Library:
    if cpu_form == emulated.FORM:
        return emulated.EmulatedLibrary(cpu_library, emulated_folder)
    return Library(cpu_library, cpu_form)
