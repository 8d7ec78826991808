"""For programs that use the pack without ComfyUI's server: import this before all else of it.

ComfyUI looks for a GPU when it is imported, and fails where there is none unless its flag ``--cpu``
was given, which its server's command line has.
"""

from __future__ import annotations

import sys

import torch
from comfy.cli_args import args

__all__: list[str] = []

if "comfy.model_management" not in sys.modules and not torch.accelerator.is_available():
    args.cpu = True
