"""Reading a MODEL: what each of its weights is now, what is on it, and what it was loaded with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ..layouts.composite import LAYOUT
from ..model_report import Carried, LoadedWeight, ModelFacts, ModelReport
from .api import ATTACHMENT
from .lora_files import match_lora
from .memory import measured, plan_of
from .patches import fates

__all__ = ["name_of", "report_on"]

KINDS = {
    "Linear": "linear",
    "Embedding": "embedding",
    "Conv1d": "convolution",
    "Conv2d": "convolution",
    "Conv3d": "convolution",
}


def report_on(patcher: ModelPatcher, lora: str | Path | None = None) -> ModelReport:
    """A report on a MODEL of any loader.

    Args:
        patcher: The MODEL; it is neither loaded nor changed.
        lora: A LoRA file whose names are compared with the model's.

    Raises:
        LowBitError: The LoRA file cannot be read.
    """
    loaded = patcher.get_attachment(ATTACHMENT)
    found = measured(patcher)
    settings = {}
    if loaded is not None:
        settings = {"scheme": loaded.scheme, "family": loaded.family}
        settings |= {
            name: str(getattr(loaded.options, name))
            for name in ("matmul", "backend", "dequantize_fp32")
        }
    weights = list(_weights(patcher.model.diffusion_model))
    return ModelReport(
        ModelFacts(
            name=name_of(patcher),
            ours=loaded is not None or any(weight.spec is not None for weight in weights),
            loaded=settings,
            notes=dict(loaded.notes) if loaded is not None else {},
            device=patcher.load_device,
            dtype=patcher.model.manual_cast_dtype or patcher.model.get_dtype(),
            weights=weights,
            plan=plan_of(patcher),
            measured=(found.to_json(), found.text),
            carried=_carried(patcher),
            hooks=len({key for patches in patcher.hook_patches.values() for key in patches}),
            injections=tuple(patcher.injections),
            lora=None if lora is None else match_lora(patcher, lora),
        )
    )


def name_of(patcher: ModelPatcher) -> str:
    """Of the checkpoint, or of the model's class where nothing else is known."""
    loaded = patcher.get_attachment(ATTACHMENT)
    return type(patcher.model).__name__ if loaded is None else Path(loaded.path).name


def _weights(model: torch.nn.Module) -> Iterator[LoadedWeight]:
    """Every parameter, as it is now."""
    for prefix, module in model.named_modules():
        kind = _kind(module)
        for name, weight in module.named_parameters(prefix, recurse=False):
            shape = tuple(weight.shape)
            if not isinstance(weight, QuantizedTensor):
                dtype = str(weight.dtype).removeprefix("torch.")
                yield LoadedWeight(name, kind, shape, weight.nbytes, dtype)
                continue
            nbytes = sum(tensor.nbytes for tensor in weight.state_dict("").values())
            if weight._layout_cls == LAYOUT:
                spec = weight._params.spec
                format_ = " + ".join(dict.fromkeys(p.weight.format.name for p in spec.parts))
                asked = getattr(module, "asked", ("auto", "auto"))
                yield LoadedWeight(name, kind, shape, nbytes, format_, spec, asked=asked)
            else:
                format_ = getattr(module, "quant_format", None) or weight._layout_cls
                yield LoadedWeight(name, kind, shape, nbytes, format_, native=True)


def _kind(module: torch.nn.Module) -> str:
    """What a module does with its weight, by the host's names for its operations."""
    return next((KINDS[c.__name__] for c in type(module).__mro__ if c.__name__ in KINDS), "other")


def _carried(patcher: ModelPatcher) -> list[Carried]:
    """Patches of a kind that are carried alike, together."""
    alike = defaultdict(list)
    for fate in fates(patcher):
        alike[fate.kind, fate.carried, fate.strength].append(fate)
    return [
        Carried(
            *key,
            weights=len({fate.key for fate in group}),
            added_bytes=sum(fate.added_bytes for fate in group),
            retained=min(
                (f.retained_energy for f in group if f.retained_energy is not None), default=None
            ),
        )
        for key, group in alike.items()
    ]
