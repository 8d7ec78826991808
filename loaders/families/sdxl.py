"""The Stable Diffusion UNet (1.x, 2.x, SDXL and distilled variants), diffusers names.

By ComfyUI's own map (``unet_to_diffusers``). ComfyUI builds that map from the structure of the
model and finds the structure by comparing with a list of known models; here it is counted from
the keys, so that every UNet made of these blocks is read. Linear and 1x1-convolution projections
both occur; ComfyUI tells them apart by shape.

SVDQuant checkpoints fuse q, k and v of self-attention as ``attn1.to_qkv``; ComfyUI has a third of
the rows in each of ``attn1.to_q``, ``to_k`` and ``to_v``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..host import maps
from .base import Move, Shapes, take_apart
from .mapped import MappedFamily, count, moves_from

__all__ = ["SDUNet"]

FUSED = ".to_qkv."
UNCLIP = (768, 1024)  # widths of the text in Stable Diffusion 1 and 2, which unCLIP is made of


class SDUNet(MappedFamily):
    """UNets of Stable Diffusion 1.x, 2.x and XL."""

    name = "sdxl"
    display = "Stable Diffusion UNet"
    classes = ("UNet2DConditionModel",)
    signature = (
        "conv_in.weight",
        "time_embedding.linear_1.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        "up_blocks.0.resnets.0.conv1.weight",
    )
    unwritten: ClassVar = {
        "v_pred": "the scheduler's config says it",
        "ztsnr": "the scheduler's config says it",
    }

    def _table(self, keys: set[str], shapes: Shapes) -> Mapping[str, maps.Target]:
        return maps.native_names("unet", structure(keys))

    def native_table(self, natives: Mapping[str, tuple[int, ...]]) -> Mapping[str, maps.Target]:
        if not {"input_blocks.0.0.weight", "out.2.weight"} <= natives.keys():
            return {}
        table = maps.native_names("unet", maps.unet_structure(natives))
        # Both are ComfyUI's label_emb: sizes and crops beside the text in XL, a picture in unCLIP.
        other = "add_embedding." if _context(natives) in UNCLIP else "class_embedding."
        return {source: to for source, to in table.items() if not source.startswith(other)}

    def _moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        table = self._table(keys, shapes)
        made = moves_from(table, keys, shapes)
        for key in sorted(key for key in keys if FUSED in key):
            parts = [table.get(key.replace(FUSED, f".to_{part}.")) for part in "qkv"]
            if None not in parts:
                made += take_apart(key, [part.native for part in parts], shapes)
        return made

    def extras(self, keys: set[str], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``v_pred`` and ``ztsnr``, where the pipeline's scheduler says so.

        A UNet's own config does not tell what it predicts. Where the pipeline's
        ``scheduler_config.json`` stands under ``config["scheduler"]``, ComfyUI is told by the
        empty tensors that its own checkpoints use.
        """
        scheduler = config.get("scheduler") or {}
        if scheduler.get("prediction_type") != "v_prediction":
            return {}
        told = {"v_pred": torch.empty(0)}
        if scheduler.get("rescale_betas_zero_snr"):
            told["ztsnr"] = torch.empty(0)
        return told


def structure(keys: set[str]) -> dict[str, Any]:
    """What ``unet_to_diffusers`` wants to know: blocks, layers and transformer depths."""
    layers = [count(keys, f"down_blocks.{n}.resnets.") for n in range(count(keys, "down_blocks."))]
    down = [
        count(keys, f"down_blocks.{block}.attentions.{layer}.transformer_blocks.")
        for block, number in enumerate(layers)
        for layer in range(number)
    ]
    # the map walks the up blocks in order and takes from the end of the list
    up = [
        count(keys, f"up_blocks.{block}.attentions.{layer}.transformer_blocks.")
        for block, number in enumerate(reversed(layers))
        for layer in range(number + 1)
    ]
    return {
        "num_res_blocks": layers,
        "channel_mult": [1] * len(layers),
        "transformer_depth": down,
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": count(keys, "mid_block.attentions.0.transformer_blocks."),
    }


def _context(natives: Mapping[str, tuple[int, ...]]) -> int:
    """Width of the text, 0 where there is no cross attention."""
    ends = ".attn2.to_k.weight"
    return next((shape[1] for key, shape in natives.items() if key.endswith(ends)), 0)
