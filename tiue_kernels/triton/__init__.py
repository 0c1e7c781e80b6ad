"""Triton kernels and their launchers, one file an operator; each of them needs triton."""
