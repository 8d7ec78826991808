"""A LoRA file against a MODEL: which of its keys the host would use, told from its header alone.

The host reads a LoRA by asking the file for the names that its own key map knows, and only logs
what nobody asked for. So it is given the header as tensors that take no memory, and what it asks
for is written down: whatever kinds of LoRA the host learns to read, this knows them too.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import safe_open

from ...quant.errors import LowBitError
from ..header import read_header
from ..model_report import LoraMatch

__all__ = ["match_lora"]

TEXT_ENCODER = re.compile(r"lora_te\d*_|lora_prior_te_|text_encoders?\.|text_encoder_\d\.|te\d?\.")
ENDING = re.compile(
    r"([._](lora|lora_[A-Za-z_]+|alpha|dora_scale|diff|diff_b|set_weight|[wb]_norm|hada_\w+|lokr_\w+"
    r"|oft_\w+|rescale|reshape_weight|up|down|default|weight|bias))+$"
)
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}
KINDS |= {"diff": "difference", "set": "replacement"}
#: adapter -> where its weights hold DoRA's magnitudes
MAGNITUDES = {"lora": 4, "loha": 7, "lokr": 8, "oft": 3}
NEAREST = 2
LOOKED_UP = 40


class _Asked(dict):
    """A dict that writes down which of its keys were read."""

    def __init__(self, items: Mapping[str, torch.Tensor]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default=None):
        self.read.add(key)
        return super().get(key, default)


def match_lora(patcher: ModelPatcher, path: str | Path) -> LoraMatch:
    """Read a LoRA file's header and tell what it would do to a MODEL.

    Raises:
        LowBitError: It is no safetensors file, or a broken one.
    """
    path = Path(path)
    header, _, _ = read_header(path)
    shapes = {key: torch.zeros(()).expand(tuple(info.shape)) for key, info in header.items()}
    known = comfy.lora.model_lora_keys_unet(patcher.model, {})
    file = _Asked(comfy.lora_convert.convert_lora(shapes))
    try:
        patches = comfy.lora.load_lora(file, known, log_missing=False)
    except KeyError as error:
        raise LowBitError(
            "A LoRA file lacks a tensor.",
            file=path,
            layer=str(error.args[0]),
            found="the other half of the pair alone",
            expected="both",
            remedy="Download or convert the file again.",
        ) from error
    unread = [key for key in file if key not in file.read]
    of_text = {key for key in unread if TEXT_ENCODER.match(key)}
    missed = Counter(_pattern(ENDING.sub("", key)) for key in unread if key not in of_text)
    # In a state dict packed weights have the shape that they are packed in.
    shape_of = {key: tuple(weight.shape) for key, weight in patcher.model.state_dict().items()}
    shape_of |= {key: tuple(weight.shape) for key, weight in patcher.model.named_parameters()}
    misfits = {}
    for target, patch in patches.items():
        if (why := _misfit(patch, target, shape_of)) is not None:
            misfits[_key(target)] = why
    return LoraMatch(
        name=path.name,
        tensors=len(file),
        kinds=Counter(_kind(p) for target, p in patches.items() if _key(target) not in misfits),
        targets=tuple(dict.fromkeys(_key(t) for t in patches if _key(t) not in misfits)),
        missed=missed,
        nearest=_nearest(missed, known),
        misfits=misfits,
        text_encoder=len(of_text),
        strengths=_strengths(patcher, patches, shapes, path),
    )


def _key(target: str | tuple) -> str:
    """The weight that a target is, or is a slice of."""
    return target if isinstance(target, str) else target[0]


def _tensors(patch) -> tuple:
    """What an adapter, or a plain patch, holds."""
    return tuple(patch[1]) if isinstance(patch, tuple) else tuple(patch.weights)


def _kind(patch) -> str:
    name = patch[0] if isinstance(patch, tuple) else patch.name
    place = MAGNITUDES.get(name)
    told = KINDS.get(name, name)
    return f"DoRA ({told})" if place is not None and patch.weights[place] is not None else told


def _misfit(patch, target: str | tuple, shape_of: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why the host would leave a patch out, as far as shapes tell."""
    shape = shape_of.get(_key(target))
    if shape is None:
        return "the model has no such weight"
    if not isinstance(target, str) and target[1] is not None:
        dim, _, length = target[1]
        shape = (*shape[:dim], length, *shape[dim + 1 :])
    tensors = _tensors(patch)
    if isinstance(patch, tuple):
        found = tuple(tensors[0].shape)
        return None if found == shape else f"is for {_by(found)}, the model has {_by(shape)}"
    if patch.name != "lora" or any(tensors[place] is not None for place in (3, 5)):
        return None  # others only the host itself can tell
    up, down = tensors[:2]
    found = (up.shape[0], math.prod(down.shape[1:]))
    if found[0] * found[1] == math.prod(shape):
        return None
    return f"is for {_by(found)}, the model has {_by(shape)}"


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _nearest(missed: Iterable[str], known: Iterable) -> dict[str, tuple[str, ...]]:
    """Patterns of names that the host knows and that look most like those it does not."""
    there = sorted({_pattern(name) for name in known if isinstance(name, str)})
    found = {}
    for pattern in sorted(missed)[:LOOKED_UP]:
        if near := difflib.get_close_matches(pattern, there, NEAREST, cutoff=0.6):
            found[pattern] = tuple(near)
    return found


def _strengths(
    patcher: ModelPatcher, patches: Mapping, shapes: Mapping[str, torch.Tensor], path: Path
) -> tuple[float, ...]:
    """Strengths of this file on the MODEL: that of the patches whose tensors are the file's."""
    names = {id(tensor): key for key, tensor in shapes.items()}
    for target, patch in patches.items():
        tensor = _tensors(patch)[0]
        name = names.get(id(tensor))
        if name is None or _key(target) not in patcher.patches:
            continue
        with safe_open(path, framework="pt") as file:
            mine = file.get_tensor(name)
        return tuple(
            entry[0]
            for entry in patcher.patches[_key(target)]
            if _same(mine, entry[1])
            and entry[3] == (None if isinstance(target, str) else target[1])
        )
    return ()


def _same(mine: torch.Tensor, patch) -> bool:
    theirs = _tensors(patch)[0] if isinstance(patch, tuple) or hasattr(patch, "weights") else None
    return (
        isinstance(theirs, torch.Tensor)
        and theirs.shape == mine.shape
        and torch.equal(theirs.cpu(), mine.to(theirs.dtype))
    )
