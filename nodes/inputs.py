"""Inputs that several nodes have."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders.schemes.modelopt_nvfp4 import LAYOUTS

__all__ = ["scheme_inputs"]


def scheme_inputs() -> list[io.Input]:
    """What may be insisted on of files of one scheme or another."""
    return [*svdq_inputs(), *modelopt_inputs()]


def svdq_inputs() -> list[io.Input]:
    """What may be insisted on of an SVDQuant file. Other files do not read it."""
    return [
        io.Combo.Input(
            "svdq_precision",
            options=["auto", "int4", "nvfp4"],
            default="auto",
            optional=True,
            advanced=True,
            tooltip=(
                "SVDQuant files only. auto: as the tensors show. A choice that contradicts them "
                "is an error."
            ),
        ),
        io.Int.Input(
            "svdq_rank",
            default=0,
            min=0,
            max=1024,
            step=16,
            optional=True,
            advanced=True,
            tooltip=(
                "SVDQuant files only. Rank of the low-rank branches; 0: as the tensors show. "
                "Another one than theirs is an error."
            ),
        ),
        io.Combo.Input(
            "act_unsigned",
            options=["auto", "on", "off"],
            default="auto",
            optional=True,
            advanced=True,
            tooltip=(
                "SVDQuant int4 files only: whether the second layer of each MLP has shifted, "
                "unsigned activations. Few files say so. auto: yes in files for Nunchaku's "
                "engine, no in those of Nunchaku Lite. A wrong choice only degrades the image."
            ),
        ),
    ]


def modelopt_inputs() -> list[io.Input]:
    """What may be insisted on of a file of plain NVFP4 codes and scales."""
    return [
        io.Combo.Input(
            "nvfp4_layout",
            options=["auto", *LAYOUTS],
            default="auto",
            optional=True,
            advanced=True,
            tooltip=(
                "NVFP4 files without ComfyUI's markers only: which half of a byte holds the even "
                "column, and whether block scales stand in rows or in tiles. auto: as the file "
                "shows; an error where it does not. A wrong choice gives noise."
            ),
        ),
    ]
