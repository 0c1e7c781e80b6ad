"""Triton kernels and their launchers, one file an operator. Needs triton; nothing imports it here."""
