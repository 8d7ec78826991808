"""Loading: a path and settings to ComfyUI's MODEL.

Only public functions of the host are called; a MODEL is the host's own patcher over the host's own
model class, built from our operations. ``cached_patcher_init`` is set, so that whatever reloads a
model (TorchCompileModel, device selectors, hooks) reloads this one.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ...kernels.registry import registry
from ...quant.errors import LowBitError
from ..detect import MODEL_PREFIX
from ..layouts.composite import BESIDE, LAYOUT, CompositeSpec, marker
from ..layouts.dispatch import capability_of, decide
from ..layouts.native import native_format
from ..plan import Plan, make_plan
from ..schemes.base import SchemeOptions
from ..translate import Settings, translate
from . import compat
from .devices import use_searched_tiles
from .memory import watch
from .ops import make_ops
from .patches import install

__all__ = [
    "COMPUTE_DTYPES",
    "LoadOptions",
    "LoadReport",
    "hand_over",
    "hollow_model",
    "load_diffusion_model",
    "native_shapes",
]

compat.check()

ATTACHMENT = "lowbit"
BESIDE_NATIVE = (".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale")
NOT_WEIGHTS = (".comfy_quant", *BESIDE_NATIVE, *(f".weight_{name}" for name in BESIDE))
COMPUTE_DTYPES = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class LoadOptions:
    """The loader's inputs; see the node's tooltips."""

    scheme: str = "auto"
    matmul: str = "auto"
    compute_dtype: str = "auto"
    dequantize_fp32: str = "auto"
    backend: str = "auto"
    svdq_precision: str = "auto"
    svdq_rank: int = 0
    act_unsigned: str = "auto"
    nvfp4_layout: str = "auto"

    def of_scheme(self) -> SchemeOptions:
        """Those that the reader of a scheme asks for."""
        names = (field.name for field in fields(SchemeOptions))
        return SchemeOptions(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, kept on the MODEL as ``attachments["lowbit"]``.

    Attributes:
        path: The checkpoint.
        scheme: Its scheme.
        family: Display name of its family.
        options: The loader's inputs.
        compute_dtype: Dtype of activations.
        weight_bytes: Bytes of all weights as loaded.
        notes: ``{what was decided or changed while loading: layers}``.
    """

    path: str
    scheme: str
    family: str
    options: LoadOptions
    compute_dtype: torch.dtype
    weight_bytes: int
    notes: Mapping[str, int] = field(default_factory=dict)


def load_diffusion_model(
    path: str, options: Mapping[str, str | int] | LoadOptions, disable_dynamic: bool = False
) -> ModelPatcher:
    """Open a checkpoint as a MODEL.

    Args:
        path: File or folder.
        options: The loader's inputs.
        disable_dynamic: As the host's own loaders: without its Dynamic VRAM patcher.

    Raises:
        LowBitError: The checkpoint is broken, unknown, or cannot be used as asked.
    """
    if not isinstance(options, LoadOptions):
        options = LoadOptions(**options)
    _check_backend(options)
    plan = make_plan(path, options.scheme, options=options.of_scheme(), native_shapes=native_shapes)
    try:
        if plan.detection.scheme == "comfy":
            patcher = _load_untouched(plan, options, disable_dynamic)
        else:
            patcher = _load_quantized(plan, options, disable_dynamic)
    finally:
        plan.source.close()
    watch(patcher)
    patcher.set_attachments(
        ATTACHMENT,
        LoadReport(
            path=str(plan.path),
            scheme=plan.detection.scheme,
            family=plan.family.display,
            options=options,
            compute_dtype=patcher.model.manual_cast_dtype or patcher.model.get_dtype(),
            weight_bytes=patcher.model_size(),
            notes=Counter(note for entry in plan.entries.values() for note in entry.notes),
        ),
    )
    init = {field.name: getattr(options, field.name) for field in fields(options)}
    patcher.cached_patcher_init = (load_diffusion_model, (str(path), init))
    return patcher


def _check_backend(options: LoadOptions) -> None:
    if options.backend == "auto":
        return
    device = comfy.model_management.get_torch_device().type
    reason = registry.backend_status(device)[options.backend]
    if reason is not None:
        raise LowBitError(
            "The backend asked for cannot be used on this device.",
            found=f"{options.backend}: {reason}",
            expected=", ".join(
                name for name, why in registry.backend_status(device).items() if why is None
            ),
            remedy='Set backend to "auto".',
        )


# ------------------------------------------------------------------- the host's own formats


def _load_untouched(plan: Plan, options: LoadOptions, disable_dynamic: bool) -> ModelPatcher:
    """A checkpoint without our weights: plain floats, or one of the host's own formats."""
    smoothed = [name for name in plan.source.tensors if name.endswith(".pre_quant_scale")]
    if smoothed and "pre_quant_scale" not in QUANT_ALGOS["nvfp4"]["parameters"]:
        raise LowBitError(
            "This ComfyUI would leave out the smoothing of the file's layers.",
            file=plan.path,
            layer=smoothed[0],
            expected="ComfyUI 0.30 or newer",
            remedy="Update ComfyUI.",
        )
    model_options = {}
    if COMPUTE_DTYPES[options.compute_dtype] is not None:
        model_options["dtype"] = COMPUTE_DTYPES[options.compute_dtype]
    try:
        if plan.source.kind == "file" and plan.family.name == "native":
            patcher = comfy.sd.load_diffusion_model(
                str(plan.path), model_options, disable_dynamic=disable_dynamic
            )
        else:
            sd = dict(_steps(plan, Settings(torch.bfloat16)))
            patcher = comfy.sd.load_diffusion_model_state_dict(
                sd, model_options, plan.source.metadata, disable_dynamic=disable_dynamic
            )
    except RuntimeError as error:
        raise _unsupported(plan, str(error)) from error
    if patcher is None:
        raise _unsupported(plan, "no model of this host has these weights")
    return patcher


def _steps(plan: Plan, settings: Settings):
    """Translated tensors with a progress bar; an interrupt leaves nothing behind."""
    bar = comfy.utils.ProgressBar(len(plan.moves))
    for key, tensor, _ in translate(plan, settings):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield key, tensor
        bar.update(1)


def _unsupported(plan: Plan, found: str) -> LowBitError:
    return LowBitError(
        "ComfyUI does not recognise the model in this checkpoint.",
        file=plan.path,
        found=found,
        expected="a diffusion model that this ComfyUI supports "
        f"(the names read as {plan.family.display}: {plan.evidence})",
        remedy="Update ComfyUI; if the model is newer than it, support has to come there first.",
    )


# ------------------------------------------------------------------------------- our weights


def _load_quantized(plan: Plan, options: LoadOptions, disable_dynamic: bool) -> ModelPatcher:
    for note in sorted({note for entry in plan.entries.values() for note in entry.notes}):
        logging.warning("LowBit: %s: %s", plan.path.name, note)
    device = comfy.model_management.get_torch_device()
    use_searched_tiles(device)
    wished = COMPUTE_DTYPES[options.compute_dtype]
    settings = Settings(
        dtype=wished or torch.bfloat16,
        expand=options.matmul == "expand",
        scale_dtype=(wished or torch.bfloat16) if options.dequantize_fp32 == "off" else None,
    )
    sd = dict(_steps(plan, settings))
    metadata = _metadata(plan)
    config = comfy.model_detection.model_config_from_unet(sd, "", metadata=metadata)
    if config is None:
        raise _unsupported(plan, f"{len(sd)} tensors, none of a known model")
    compute = wished or comfy.model_management.unet_manual_cast(
        None, device, config.supported_inference_dtypes
    )
    hand_over(sd, options, device, compute)
    given = {key: value for key, value in sd.items() if not key.endswith(".comfy_quant")}
    model_options = {"custom_operations": make_ops(compute, options.matmul, options.backend)}
    if wished is not None:
        model_options["dtype"] = wished
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(
            sd, model_options, metadata, disable_dynamic=disable_dynamic
        )
    except RuntimeError as error:
        raise _unsupported(plan, str(error)) from error
    if patcher is None:
        raise _unsupported(plan, "no model of this host has these weights")
    _account(patcher, given, plan)
    install(patcher)
    patcher.model.manual_cast_dtype = compute
    return patcher


def _metadata(plan: Plan) -> dict[str, str]:
    """The header's metadata for the host, without formats of layers that are ours by then.

    The host would mark them by it; and it would fail on ModelOpt's list, which has another form.
    """
    metadata = dict(plan.source.metadata)
    listed = metadata.pop("_quantization_metadata", None)
    if listed is not None and plan.detection.scheme != "modelopt":
        told = json.loads(listed)
        ours = {entry.key.removesuffix(".weight") for entry in plan.quantized()}
        told["layers"] = {
            layer: entry
            for layer, entry in told.get("layers", {}).items()
            if not {layer, f"{MODEL_PREFIX}{layer}"} & ours
        }
        metadata["_quantization_metadata"] = json.dumps(told)
    return metadata


def hand_over(
    sd: dict[str, torch.Tensor],
    options: LoadOptions,
    device: torch.device,
    compute: torch.dtype,
) -> None:
    """Give every quantized weight its compute dtype and marker, in place.

    Where comfy-kitchen would run a layer's int8 product anyway, the layer becomes one in the
    host's own ``int8_tensorwise`` format: the same numbers, the host's own code, and a saved file
    that the host reads without this pack. So do FP8 and NVFP4 layers with static scales of
    activations, where the host multiplies them on tensor cores.
    """
    capability = capability_of(device)
    past_forward = compat.past_forward(sd)
    for key, weight in list(sd.items()):
        if not isinstance(weight, QuantizedTensor) or weight._layout_cls != LAYOUT:
            continue
        layer = key.removesuffix(".weight")
        spec = weight._params.spec
        kept = layer.endswith(past_forward)
        if not kept and _runs_in_kitchen(spec, options, device, compute):
            sd.update(compat.int8_tensorwise(layer, weight))
            continue
        parts = [(part.weight, part.wish) for part in spec.parts]
        native = native_format(parts, options.matmul, options.backend, capability)
        if native is not None and spec.axis == 0:
            tensors = compat.NATIVE[native](layer, weight)
            if tensors is not None:
                sd.update(tensors)
                continue
        params = replace(weight._params, orig_dtype=compute)
        sd[key] = QuantizedTensor(weight._qdata, LAYOUT, params)
        sd[f"{layer}.comfy_quant"] = marker(spec)


def _runs_in_kitchen(
    spec: CompositeSpec, options: LoadOptions, device: torch.device, compute: torch.dtype
) -> bool:
    """Whether comfy-kitchen would compute the whole layer."""
    decisions = [
        decide(p.weight, p.wish, options.matmul, options.backend, device, compute, p.scaled)
        for p in spec.parts
    ]
    return spec.axis == 0 and all(
        (decision.choice.implementation.operation, decision.choice.implementation.backend)
        == ("linear_int8", "comfy_kitchen")
        for decision in decisions
    )


def _account(patcher: ModelPatcher, given: dict[str, torch.Tensor], plan: Plan) -> None:
    """Every weight of the model was filled, and every tensor went somewhere.

    The host only logs both.
    """
    model = patcher.model
    loaded = set(model.model_config.process_unet_state_dict(dict(given)))
    diffusion_model = model.diffusion_model
    have = {key for key in diffusion_model.state_dict() if not key.endswith(NOT_WEIGHTS)}
    have |= {
        f"{name}.weight"
        for name, module in diffusion_model.named_modules()
        if "weight" in module.__dict__ and module.__dict__["weight"] is None
    }
    missing = sorted(have - loaded - set(plan.family.optional))
    surplus = sorted(key for key in loaded - have if not key.endswith(NOT_WEIGHTS))
    # Names that a model config only reads a fact from never become parameters.
    surplus = [key for key in surplus if "." in key]
    if not missing and not surplus:
        return
    found, first = ("missing", missing) if missing else ("unused", surplus)
    more = f" and {len(first) - 5} more" if len(first) > 5 else ""
    raise LowBitError(
        f"The checkpoint and ComfyUI's model do not match: {len(missing)} weights are missing, "
        f"{len(surplus)} would be unused.",
        file=plan.path,
        layer=first[0],
        found=f"{found}: " + ", ".join(first[:5]) + more,
        expected=f"every weight of {type(diffusion_model).__name__} once",
        remedy="The checkpoint is incomplete, or of a variant that this ComfyUI does not know.",
    )


def native_shapes(
    wanted: Mapping[str, tuple[int, ...] | None],
) -> dict[str, tuple[int, ...]]:
    """Shapes of the host's model for a set of native names, without memory.

    Args:
        wanted: As of :func:`hollow_model`.

    Returns:
        ``{native key: shape}``; empty where the host does not recognise the model.
    """
    model = hollow_model(wanted)
    if model is None:
        return {}
    return {key: tuple(value.shape) for key, value in model.diffusion_model.state_dict().items()}


def hollow_model(wanted: Mapping[str, tuple[int, ...] | None]) -> torch.nn.Module | None:
    """The host's model for a set of native names, on the meta device.

    Args:
        wanted: ``{native key: shape, or None where unknown}``; unknown ones are left out when
            the host detects the model.

    Returns:
        The model; None where the host does not recognise it.
    """
    sd = {
        key: torch.empty(shape, device="meta", dtype=torch.bfloat16)
        for key, shape in wanted.items()
        if shape is not None
    }
    try:
        config = comfy.model_detection.model_config_from_unet(sd, "")
        if config is None:
            return None
        config.set_inference_dtype(torch.bfloat16, None)
        config.custom_operations = comfy.ops.disable_weight_init
        return config.get_model(sd, "", device=torch.device("meta"))
    except (KeyError, RuntimeError, NotImplementedError):
        return None
