"""Control-LoRAs on low-bit layers: the ControlNet that they make of the model gets float weights.

Such a file holds the difference between a ControlNet and the model's first half, and the host
builds the ControlNet from what the model's state dict has: of a low-bit layer its packed codes,
which no ControlNet can multiply. So before sampling those weights are put in anew, dequantized.
They are the host's to free with the ControlNet, when sampling ends.
"""

from __future__ import annotations

from collections.abc import Iterator

import comfy.controlnet
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor

from ..layouts.composite import LAYOUT

__all__ = ["install"]

KEY = "lowbit_control"


def install(patcher: ModelPatcher) -> None:
    """Let a MODEL, and every clone of it, serve control-LoRAs."""
    patcher.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _sample)


def _sample(executor, guider, *positional, **named):
    """Around the sampler, after the host prepared the ControlNets."""
    for control in _controls(guider.conds):
        _give_floats(control, guider.inner_model)
    return executor(guider, *positional, **named)


def _controls(conds: dict[str, list[dict]]) -> Iterator[comfy.controlnet.ControlLora]:
    """Every control-LoRA of the conditionings, chained ones too, once."""
    seen = set()
    for cond in (cond for entries in conds.values() for cond in entries):
        control = cond.get("control")
        while control is not None:
            if isinstance(control, comfy.controlnet.ControlLora) and id(control) not in seen:
                seen.add(id(control))
                yield control
            control = control.previous_controlnet


def _give_floats(control: comfy.controlnet.ControlLora, model: torch.nn.Module) -> None:
    layers = dict(control.control_model.named_modules())
    dtype = control.manual_cast_dtype or model.get_dtype()
    for name, module in model.diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        key = f"{name}.weight"
        if not isinstance(weight, QuantizedTensor) or weight._layout_cls != LAYOUT:
            continue
        if name in layers and key not in control.control_weights:
            patched = module.patched
            if patched is None:
                found = weight.dequantize()
            else:
                found = patched.whole(module, weight, weight.device)
            comfy.utils.set_attr_param(control.control_model, key, found.to(dtype))
