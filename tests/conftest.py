"""Triton must be told to interpret before anything imports it, and ComfyUI's packages do."""

import triton_host

# torch brings Triton on Linux alone.
collect_ignore_glob = [] if triton_host.INSTALLED else ["kernels/test_triton_*.py"]
