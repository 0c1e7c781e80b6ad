"""Every form of the CPU library that this computer can run takes the same tests."""

import ctypes

import pytest

from tiue_kernels.build import CPU_FORMS


@pytest.fixture(params=CPU_FORMS)
def cpu_form(request, cpu_library) -> str:
    widest = ctypes.CDLL(str(cpu_library)).tiue_widest
    widest.restype = ctypes.c_char_p
    forms = list(CPU_FORMS)
    if forms.index(request.param) > forms.index(widest().decode()):
        pytest.skip(f"this computer has no {request.param}")
    return request.param
