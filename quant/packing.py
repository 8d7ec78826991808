"""Integers to packed words: the inverse of `kernels.reference.unpack`, from the same tables."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.spec import CodeFormat

__all__ = ["pack"]


def pack(values: Tensor, fmt: CodeFormat) -> Tensor:
    """Codes as the words of `fmt`, 1-D; a last block that is not full is padded with zero bits.

    Args:
        values: integers of any shape: signed ones for "int", bit patterns for "uint" and "float".
            Native floats are stored as they are. Values outside of the format are not checked.
    """
    values = values.reshape(-1)
    if not fmt.packed:
        if fmt.word == torch.uint16:
            return values.to(torch.int32).to(torch.int16).view(torch.uint16)
        return values.to(fmt.word)
    # Bits of a word may reach its sign bit, so words are put together in a wider type.
    values = values.to(torch.int16 if fmt.word == torch.uint8 else torch.int32)
    if fmt.kind == "int":
        values = values + (1 << (fmt.bits - 1))
    missing = -values.numel() % fmt.block_values
    if missing:
        values = torch.cat((values, values.new_zeros(missing)))
    blocks = values.view(-1, fmt.block_values)
    words = blocks.new_zeros((blocks.shape[0], fmt.block_words))
    for run in fmt.runs:
        block = blocks[:, run.value : run.value + run.count]
        for word, word_bit, width, value_bit in run.parts:
            part = ((block >> value_bit) & ((1 << width) - 1)) << word_bit
            words[:, word : word + run.count] |= part
    return words.to(fmt.word).view(-1)
