"""SDNQ's folder: diffusers names, the tensors of :mod:`..schemes.sdnq`, and its configuration.

What is written is what sdnq 0.2.8 writes for the same settings, so that it opens it: it learns the
stored shapes by running its own rules over the model, and they must come out alike. So the
configuration names every layer that is not quantized, and adds none by itself.

=================================  ============================================================
``config.json``                    diffusers' own, with ``quantization_config`` in it
``quantization_config.json``       the same once more, where sdnq looks first
``diffusion_pytorch_model…``       weights in shards of 5 GB
=================================  ============================================================
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from ...quant.dtypes import get_format
from ...quant.recipe import LayerRecipe
from .base import Container, Layer, Model

__all__ = ["Sdnq"]

VERSION = "0.2.8"


class Sdnq(Container):
    """A folder that diffusers opens with the sdnq package."""

    name = "sdnq"
    display = "SDNQ, diffusers folder"
    style = "diffusers"
    stem = "diffusion_pytorch_model"

    def why_not(self, recipe: LayerRecipe) -> tuple[str, str] | None:
        if recipe.method != "sdnq":
            return f"a layer of {recipe.method}", "layers of an SDNQ recipe"
        if any(recipe.coded):
            return (
                "scales that are rounded once more (scale_dtype, zero_point_dtype)",
                f"plain scales: sdnq {VERSION} cannot open files with others",
            )
        return None

    def tensors(self, layer: Layer, model: Model) -> dict[str, torch.Tensor]:
        (part,) = layer.parts
        weight, recipe = part.weight, part.recipe
        spec, direct = weight.spec, recipe.direct
        stored: dict[str, torch.Tensor] = {}
        for suffix, tensor in weight.tensors.items():
            if suffix == "codes":
                stored["weight"] = _codes(tensor, weight.spec, direct)
            elif suffix in ("svd_up", "svd_down"):
                # The side of a layer with a quantized product lies as that product takes it.
                stored[suffix] = tensor.t().contiguous() if recipe.matmul else tensor
            else:
                turned = (
                    direct
                    and tensor.dim() == 2
                    and spec.code_shape
                    == (
                        spec.rows,
                        spec.columns,
                    )
                )
                name = "scale" if suffix == "levels" else suffix
                stored[name] = tensor.t().contiguous() if turned else tensor
        made = {f"{layer.name}.{suffix}": tensor for suffix, tensor in stored.items()}
        if layer.bias is not None:
            made[f"{layer.name}.bias"] = layer.bias
        return made

    def metadata(self, model: Model) -> dict[str, str]:
        return {"format": "pt"}

    def files(self, model: Model) -> dict[str, Any]:
        told = self._settings(model)
        return {
            "config.json": {**model.config, "quantization_config": told},
            "quantization_config.json": told,
        }

    def _settings(self, model: Model) -> dict[str, Any]:
        base = dict(model.recipe.settings)
        by_dtype: dict[str, list[str]] = defaultdict(list)
        differing: dict[str, dict[str, Any]] = {}
        without_product = []
        for name, (recipe,) in model.quantized.items():
            _, told = model.recipe.settings_for(model.natives[name][0])
            changed = {key: value for key, value in told.items() if value != base[key]}
            if changed:
                differing[f"{name}.weight"] = changed
            if recipe.format != get_format(told["weights_dtype"]).name:
                by_dtype[recipe.format].append(f"{name}.weight")
                if told["use_quantized_matmul"] and not recipe.matmul:
                    without_product.append(f"{name}.weight")
        return {
            **base,
            "add_skip_keys": False,
            "modules_to_not_convert": [f"{name}.weight" for name in model.kept],
            "modules_dtype_dict": dict(by_dtype),
            "modules_quant_config": differing,
            "modules_to_not_use_matmul": without_product,
            "quant_method": "sdnq",
            "sdnq_version": VERSION,
        }


def _codes(codes: torch.Tensor, spec, direct: bool) -> torch.Tensor:
    fmt = spec.format
    if not fmt.packed:
        values = codes.view(spec.code_shape)
        return values.flatten(1).t().contiguous() if direct else values
    words = codes.reshape(-1)
    if fmt.bits == 1:
        return words.to(torch.int64)
    return words if fmt.block_words == 1 else words.view(-1, fmt.block_words)
