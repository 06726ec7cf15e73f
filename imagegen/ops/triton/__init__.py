"""Triton kernels, one file per op; each is imported when it first runs."""
