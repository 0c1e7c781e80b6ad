"""Every backend against the reference, on inputs that nobody thought of."""

import pytest
from hypothesis import given

from tests.fuzz.operators import calls, faults


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's of infinities, in the interpreter
@given(calls("triton"))
def test_triton(call):
    assert faults(call, "triton") == []


@pytest.mark.usefixtures("host_library")
@given(calls("cuda"))
def test_cuda_on_the_host(call):
    assert faults(call, "cuda") == []
