"""Triton kernels, one module an op; installed as `co2s_fast.kernels`."""
