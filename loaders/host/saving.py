"""Writing a MODEL to a container.

A low-bit MODEL is written as it is: its codes are those in the file, patches baked in as ComfyUI's
own ModelSave does. Containers with other names or formats than ComfyUI's need a recipe, and floats
to begin from.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ...quant.errors import LowBitError
from ...quant.recipe import Recipe
from ...quant.report import QuantizeReport
from ..families.facts import facts_of
from ..provenance import provenance
from ..quantize_chart import quantize_chart
from ..quantize_file import Progress, prepare, write_report
from ..store import TensorFile, check_room
from ..writers import CONTAINERS
from .compare import Sampling
from .loaded import name_of
from .rebuild import QUANTIZED, ModelFloats, kinds_of, measure

__all__ = ["save_model"]


def save_model(
    patcher: ModelPatcher,
    target: Path,
    container: str,
    *,
    recipe: Recipe | None = None,
    requantize: bool = False,
    seed: int = 0,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> QuantizeReport | None:
    """Write a MODEL with its patches baked in.

    Args:
        patcher: The MODEL; it is not changed.
        target: File or folder, as the container is one.
        container: Key of CONTAINERS.
        recipe: Quantizes a float MODEL while it is written; None writes a low-bit one.
        requantize: Let low-bit weights be rounded once more.
        seed: Of low-rank methods and stochastic rounding.
        sampling: Measures activations for recipes that need them.
        progress: Told before each layer; what it raises ends the work, and nothing is left.

    Returns:
        What quantizing cost, which also lies beside the file; None where that is not known.

    Raises:
        LowBitError: The MODEL cannot be written so.
    """
    lowbit = any(isinstance(p, QuantizedTensor) for p in patcher.model.diffusion_model.parameters())
    if recipe is None and container == "comfy":
        if not lowbit:
            raise _needs_recipe(patcher, "no low-bit layer")
        return _as_it_is(patcher, target, progress)
    if lowbit and not requantize:
        raise LowBitError(
            "A low-bit MODEL cannot be written so without rounding its weights once more.",
            file=name_of(patcher),
            found="low-bit layers"
            + ("" if recipe is None else " and a recipe")
            + f", to be written as {CONTAINERS[container].display}",
            expected='the container "comfy" without a recipe, which holds every layer as it is',
            remedy="Quantize the float model to that container (Quantize File, or this node with "
            "the float MODEL and a recipe), or switch requantize on to round once more.",
        )
    if recipe is None:
        report = patcher.get_attachment(QUANTIZED)
        if report is None:
            raise _needs_recipe(patcher, "no recipe")
        recipe = Recipe.from_json(report.recipe)
    measured = measure(patcher, recipe, sampling) if sampling is not None else {}
    source = ModelFloats(patcher, bake=True)
    kinds, stuck = kinds_of(source.model)
    _, facts = facts_of(source.shapes)
    job = prepare(
        source,
        recipe,
        CONTAINERS[container],
        facts=facts,
        kinds=kinds,
        stuck=stuck,
        dtype=source.dtype,
    )
    device = patcher.load_device
    report = job.run(target, device=device, seed=seed, progress=progress, activations=measured)
    report.chart = quantize_chart(report)
    return report


def _needs_recipe(patcher: ModelPatcher, found: str) -> LowBitError:
    return LowBitError(
        "There is nothing to write yet: the MODEL has to be quantized first.",
        file=name_of(patcher),
        found=found,
        expected="a recipe, or a MODEL that is low-bit",
        remedy="Connect a Quantization Recipe.",
    )


def _as_it_is(
    patcher: ModelPatcher, target: Path, progress: Progress | None
) -> QuantizeReport | None:
    # The host bakes patches while they are read off a model that is loaded with them.
    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model.diffusion_model
    state = patcher.model_state_dict_for_saving(model, "diffusion_model.")
    check_room(target, sum(tensor.nbytes for tensor in state.values()))
    report = patcher.get_attachment(QUANTIZED)
    metadata = {"format": "pt"}
    if report is not None:
        errors = {name: error.relative for name, error in report.layers.items()}
        recipe = Recipe.from_json(report.recipe)
        metadata |= provenance(recipe, name_of(patcher), None, errors)
    total = len(state)
    room = {"entries": total, "metadata_bytes": 65536 + 256 * total}
    with TensorFile(target, **room) as file:
        for number, name in enumerate(list(state)):
            if progress is not None:
                progress(number, total, name)
            file.add(name, _plain(state.pop(name)))
        if progress is not None:
            progress(total, total, "")
        file.finish(metadata)
    if report is not None:
        write_report(target, report)
    return report


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU: the host makes some of them only now.

    Powers of two are bytes in ComfyUI's files.
    """
    made = tensor.to("cpu").detach().contiguous()
    return made.view(torch.uint8) if made.dtype == torch.float8_e8m0fnu else made
