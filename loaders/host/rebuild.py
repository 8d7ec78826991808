"""Quantizing a MODEL: a new model of the same configuration over our operations.

The source is read layer by layer and never changed. What comes out is the source patcher's clone
over the new model, so that patches, options and hooks come along; patches that are to be baked are
in the weights before these are quantized, and gone from the clone. The weights are those of the
file that the container "comfy" would hold.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ...quant.engine import Activations
from ...quant.errors import LowBitError
from ...quant.recipe import Recipe
from ...quant.report import QuantizeReport
from ..families.facts import facts_of
from ..layouts.composite import CODES, FORMAT, Held, from_json, wrap
from ..quantize_chart import quantize_chart
from ..quantize_file import Job, Progress, Work, prepare
from ..writers.comfy import Comfy
from .api import ATTACHMENT, LoadOptions, LoadReport, hand_over
from .carried import float32
from .compare import Sampling
from .devices import use_searched_tiles
from .loaded import KINDS, name_of
from .memory import watch
from .ops import make_ops
from .patches import install

__all__ = ["QUANTIZED", "ModelFloats", "job_of", "kinds_of", "measure", "quantize_model", "rebuilt"]

QUANTIZED = "lowbit_quantized"
"""Attachment of a MODEL that was quantized here: the report."""
MODEL = "diffusion_model."
ROOM = 4
"""Times the largest layer that is wanted free on the device."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {"linear": "linear", "convolution": "conv", "embedding": "embedding"}


# ------------------------------------------------------------------------------ what is read


class ModelFloats:
    """The float weights of a MODEL, see :class:`~..float_model.FloatModel`.

    Args:
        patcher: Taken off the device, so that its weights are without patches.
        bake: Read weights with the patches that are on the MODEL.

    Raises:
        LowBitError: A patch that would be baked changes the shape of a weight.
    """

    path = None

    def __init__(self, patcher: ModelPatcher, bake: bool = False) -> None:
        comfy.model_management.unload_model_and_clones(patcher)
        self.patcher = patcher
        self.model = patcher.model.diffusion_model
        self.dtype = compute_dtype(patcher)
        self.baked = {}
        if bake:
            self.baked = {key: p for key, p in patcher.patches.items() if key.startswith(MODEL)}
        for key, patches in self.baked.items():
            weight = self._tensors[key.removeprefix(MODEL)]
            shape = tuple(comfy.lora.calculate_shape(patches, weight, key))
            if shape != tuple(weight.shape):
                raise LowBitError(
                    "A patch that changes the shape of a weight cannot be baked in.",
                    layer=key,
                    found=f"{tuple(weight.shape)} that becomes {shape}",
                    expected="patches that keep shapes",
                    remedy="Leave the patches on the MODEL: they are applied exactly there.",
                )

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, as they are."""
        kept = set(self.model.state_dict())
        found = {}
        for prefix, module in self.model.named_modules():
            quantized = isinstance(getattr(module, "weight", None), QuantizedTensor)
            for name, tensor in module.named_parameters(prefix, recurse=False):
                last = name.rpartition(".")[2]
                if not quantized or last in ("weight", "bias"):
                    found[name] = tensor
            for name, tensor in module.named_buffers(prefix, recurse=False):
                if name in kept:
                    found[name] = tensor
        return found

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {
            key: self.dtype if key in self.lowbit else tensor.dtype
            for key, tensor in self._tensors.items()
        }

    @cached_property
    def lowbit(self) -> frozenset[str]:
        """Quantized weights, and plain ones in a dtype that nothing is calculated in."""
        return frozenset(
            key
            for key, tensor in self._tensors.items()
            if isinstance(tensor, QuantizedTensor)
            or (tensor.is_floating_point() and tensor.dtype.itemsize == 1)
        )

    def read(self, key: str) -> torch.Tensor:
        """The tensor of a native key, its patches baked in where that was asked for."""
        tensor = self._tensors[key].detach()
        if isinstance(tensor, QuantizedTensor):
            tensor = float32(tensor, self.model.get_submodule(key.rpartition(".")[0]))
        patches = self.baked.get(MODEL + key)
        if not patches:
            return tensor
        device = self.patcher.load_device
        patched = tensor.to(device, torch.float32, copy=True)
        patched = comfy.lora.calculate_weight(patches, patched, MODEL + key)
        return patched.to(self.dtypes[key])


def compute_dtype(patcher: ModelPatcher) -> torch.dtype:
    """What a MODEL calculates in."""
    found = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    if found in _FLOATS:
        return found
    return comfy.model_management.unet_manual_cast(
        found, patcher.load_device, patcher.model.model_config.supported_inference_dtypes
    )


# -------------------------------------------------------------------------------- the new model


@dataclass(frozen=True)
class Origin:
    """All that a quantized model is made of, to make it once more.

    Attributes:
        config: The host's configuration, with our operations.
        beside: Modules of the host's model beside the diffusion model.
        told: Values of the host's model that do not follow from its configuration.
        state: Tensors of the diffusion model.
        devices: Where it runs, and where it lies when it does not.
        compute: Dtype of activations.
    """

    config: object
    beside: Mapping[str, torch.nn.Module]
    told: Mapping[str, object]
    state: dict[str, torch.Tensor] = field(repr=False)
    devices: tuple[torch.device, torch.device]
    compute: torch.dtype

    def hollow(self) -> torch.nn.Module:
        """The host's model; its diffusion model is not filled."""
        state = {**self.state, **_states(self.beside)}
        model = _another(self.config).get_model(state, "")
        for name, module in self.beside.items():
            setattr(model, name, copy.deepcopy(module))
        for name, value in self.told.items():
            setattr(model, name, value)
        return model.to(self.devices[1])


def _another(config):
    """The configuration once more; ``copy`` misreads the host's class, which has any attribute."""
    made = object.__new__(type(config))
    vars(made).update(vars(config))
    return made


def _states(modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


def _origin(patcher: ModelPatcher, compute: torch.dtype, matmul: str) -> Origin:
    old = patcher.model
    config = _another(old.model_config)
    dtype = old.get_dtype() if old.get_dtype() in _FLOATS else compute
    config.unet_config = {**config.unet_config, "dtype": dtype}
    config.manual_cast_dtype = compute
    config.custom_operations = make_ops(compute, matmul)
    return Origin(
        config,
        {
            name: copy.deepcopy(module)
            for name, module in old.named_children()
            if name != "diffusion_model"
        },
        {
            name: getattr(old, name)
            for name in ("model_type", "latent_format", "memory_usage_factor", "concat_keys")
            if hasattr(old, name)
        },
        dict(old.diffusion_model.state_dict()),
        (patcher.load_device, patcher.offload_device),
        compute,
    )


def _fill(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a hollow model its weights; none is shared but packed ones, which nobody writes into."""
    given = {key: _again(tensor) for key, tensor in state.items()}
    missing, unexpected = model.diffusion_model.load_state_dict(given, strict=False, assign=True)
    if missing or unexpected:
        raise LowBitError(
            "The model cannot be rebuilt from its configuration.",
            layer=(missing or unexpected)[0],
            found=f"{len(missing)} weights without a value, {len(unexpected)} values without a "
            "weight",
            expected=f"the weights of {type(model.diffusion_model).__name__} once",
            remedy="Please report which loader made the MODEL.",
        )


def _again(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, QuantizedTensor):
        return QuantizedTensor(tensor._qdata, tensor._layout_cls, tensor._params)
    return tensor.clone() if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor


def rebuilt(origin: Origin, disable_dynamic: bool = False) -> ModelPatcher:
    """The quantized model once more: what its ``cached_patcher_init`` calls."""
    class_ = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    model = origin.hollow()
    _fill(model, origin.state)
    patcher = class_(model, *origin.devices)
    install(patcher)
    watch(patcher)
    patcher.cached_patcher_init = (rebuilt, (origin,))
    return patcher


# --------------------------------------------------------------------------------- quantizing


def quantize_model(
    patcher: ModelPatcher,
    recipe: Recipe,
    *,
    bake: bool = False,
    matmul: str = "auto",
    seed: int = 0,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> tuple[ModelPatcher, QuantizeReport]:
    """A MODEL of the same configuration whose weights are low-bit.

    Args:
        patcher: The source; it is taken off the device, and else left as it is.
        recipe: How to quantize.
        bake: Bake the patches on it into the weights; without, they come along as patches.
        matmul: As the loader's input.
        seed: Of low-rank methods and stochastic rounding.
        sampling: A few steps that activations are measured in, for recipes that need them.
        progress: Told before each layer; what it raises ends the work.

    Raises:
        LowBitError: The recipe quantizes nothing, or a layer cannot be quantized as asked.
    """
    measured = measure(patcher, recipe, sampling) if sampling is not None else {}
    source = ModelFloats(patcher, bake)
    origin = _origin(patcher, source.dtype, matmul)
    model = origin.hollow()
    job = job_of(source, recipe, model.diffusion_model)
    device, home = origin.devices
    use_searched_tiles(device)
    _make_room(source, device)
    work = Work(job, device, seed, measured)
    state: dict[str, torch.Tensor] = {}
    for number, step in enumerate(job.steps):
        if progress is not None:
            progress(number, len(job.steps), step.name)
        stored = work.stored(step)
        made = _held(step.name, stored, source.dtype) if step.name in work.done else stored
        for key, tensor in made.items():
            plain = key in source.shapes and not isinstance(tensor, QuantizedTensor)
            copied = plain and tensor.is_floating_point() and tensor.dtype.itemsize > 1
            state[key] = tensor.to(home, copy=True) if copied else tensor.to(home)
    hand_over(state, LoadOptions(matmul=matmul), device, source.dtype)
    origin = Origin(**{**vars(origin), "state": state})
    _fill(model, state)
    if progress is not None:
        progress(len(job.steps), len(job.steps), "")
    made = _clone_over(patcher, model, origin, source.baked)
    family, _ = facts_of(source.shapes)
    made.set_attachments(
        ATTACHMENT,
        LoadReport(
            path=name_of(patcher),
            scheme=f"quantized here: {recipe.describe()}",
            family=family or type(model).__name__,
            options=LoadOptions(matmul=matmul),
            compute_dtype=source.dtype,
            weight_bytes=made.model_size(),
        ),
    )
    work.report.chart = quantize_chart(work.report)
    made.set_attachments(QUANTIZED, work.report)
    return made, work.report


def job_of(source: ModelFloats, recipe: Recipe, model: torch.nn.Module) -> Job:
    """What will be done to the layers of a model over our operations."""
    kinds, stuck = kinds_of(model)
    _, facts = facts_of(source.shapes)
    container = Comfy(_formats_of_host())
    return prepare(
        source, recipe, container, facts=facts, kinds=kinds, stuck=stuck, dtype=source.dtype
    )


def kinds_of(model: torch.nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Kinds of the layers that may be low-bit, and why others that have a weight may not."""
    kinds, stuck = {}, {}
    for name, module in model.named_modules():
        kind = next((KINDS[c.__name__] for c in type(module).__mro__ if c.__name__ in KINDS), None)
        if kind is not None and isinstance(module, comfy.ops.CastWeightBiasOp):
            kinds[name] = _KINDS[kind]
        elif "weight" in module._parameters:
            stuck[name] = f"{type(module).__name__}, which takes plain weights"
    return kinds, stuck


def _formats_of_host() -> dict[str, set[str]]:
    """ComfyUI's formats that this version of it has, with what they may have beside the weight."""
    return {name: told["parameters"] for name, told in QUANT_ALGOS.items() if name != FORMAT}


def _make_room(source: ModelFloats, device: torch.device) -> None:
    largest = max(torch.Size(shape).numel() for shape in source.shapes.values())
    comfy.model_management.free_memory(ROOM * 4 * largest, device)


def _held(
    name: str, stored: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Stored tensors of a layer as the operations load them."""
    mark = f"{name}.comfy_quant"
    told = json.loads(bytes(stored[mark].tolist()))
    if told["format"] != FORMAT:
        return dict(stored)
    spec = from_json(told["spec"])
    codes = [f"{name}.weight", *(f"{name}.weight_{c}" for c in CODES)][: len(spec.parts)]
    side = f"{name}.weight_side"
    held = Held(
        tuple(stored[key].view(torch.uint8) for key in codes), stored[side].view(torch.uint8)
    )
    made = {key: t for key, t in stored.items() if key not in (*codes, side)}
    made[f"{name}.weight"] = wrap(held, spec, dtype)
    return made


def _clone_over(
    patcher: ModelPatcher, model: torch.nn.Module, origin: Origin, baked: Mapping[str, list]
) -> ModelPatcher:
    """The source's clone over another model."""
    fresh = type(patcher)(model, *origin.devices)
    made = patcher.clone(model_override=fresh.get_clone_model_override())
    # What belongs to the source's weights.
    made.parent = None
    made.clone_base_uuid = uuid.uuid4()
    made.size = fresh.model_size()
    made.hook_backup, made.cached_hook_patches, made.current_hooks = {}, {}, None
    if baked:
        made.patches = {key: p for key, p in made.patches.items() if key not in baked}
        made.patches_uuid = uuid.uuid4()
    install(made)
    watch(made)
    made.cached_patcher_init = (rebuilt, (origin,))
    return made


# ---------------------------------------------------------------------------------- measuring


def measure(patcher: ModelPatcher, recipe: Recipe, how: Sampling) -> dict[str, Activations]:
    """Activations of a MODEL's layers while it samples.

    Args:
        patcher: With its patches, as it is used.
        recipe: Tells what is needed of the activations.
        how: The sampling.

    Returns:
        ``{native module: activations}`` of every linear layer that ran.
    """
    products = dict(recipe.refine)["error_feedback"]
    found: dict[str, Activations] = {}
    hooks = []
    for name, module in patcher.model.diffusion_model.named_modules():
        if any(c.__name__ == "Linear" for c in type(module).__mro__):
            hooks.append(module.register_forward_pre_hook(_adding(found, name, products)))
    latent = comfy.sample.fix_empty_latent_channels(patcher, how.latent["samples"])
    try:
        comfy.sample.sample(
            patcher,
            comfy.sample.prepare_noise(latent, how.seed),
            how.steps,
            how.cfg,
            how.sampler,
            how.scheduler,
            how.positive,
            how.negative,
            latent,
            denoise=how.denoise,
            disable_pbar=True,
            seed=how.seed,
        )
    finally:
        for hook in hooks:
            hook.remove()
    for activations in found.values():
        for name in ("second_moment", "products"):
            value = getattr(activations, name)
            setattr(activations, name, None if value is None else value.cpu())
    return found


def _adding(found: dict[str, Activations], name: str, products: bool) -> Callable:
    def add(module, given) -> None:
        if name not in found:
            found[name] = Activations(want_products=products)
        found[name].add(given[0])

    return add
