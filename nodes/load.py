"""Load Quantized Diffusion Model."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.registry import BACKENDS
from ..loaders.host.api import COMPUTE_DTYPES, LoadOptions, load_diffusion_model
from ..loaders.layouts.dispatch import MATMUL_MODES
from ..loaders.plan import SCHEMES
from ..quant.errors import LowBitError
from .checkpoints import diffusion_models, fingerprint, path_of
from .inputs import scheme_inputs

__all__ = ["LowBitLoadDiffusionModel"]


class LowBitLoadDiffusionModel(io.ComfyNode):
    """A checkpoint of any scheme as an ordinary MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitLoadDiffusionModel",
            display_name="Load Quantized Diffusion Model",
            category="LowBit/loaders",
            description=(
                "Opens a quantized diffusion checkpoint (SDNQ, SVDQuant / Nunchaku, NVIDIA "
                "ModelOpt, ModelSlim, bitsandbytes, torchao, quanto, ComfyUI's own formats, or "
                "plain) as an ordinary MODEL for every sampler, LoRA and ControlNet node. Scheme "
                "and model family are told from the file."
            ),
            search_aliases=[
                "sdnq",
                "svdquant",
                "nunchaku",
                "modelopt",
                "modelslim",
                "bitsandbytes",
                "torchao",
                "quanto",
                "quantized",
                "int8",
                "fp8",
                "uint4",
                "int4",
                "nvfp4",
                "nf4",
                "low bit",
                "unet loader",
            ],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=diffusion_models(),
                    tooltip=(
                        "A file or a checkpoint folder under models/diffusion_models or "
                        "models/diffusers. A pipeline folder is listed by its transformer."
                    ),
                ),
                io.Combo.Input(
                    "scheme",
                    options=list(SCHEMES),
                    default="auto",
                    tooltip=(
                        "How the file is quantized. auto tells it from the tensors; a choice that "
                        "contradicts them is an error."
                    ),
                ),
                io.Combo.Input(
                    "matmul",
                    options=list(MATMUL_MODES),
                    default="auto",
                    tooltip=(
                        "How Linear layers multiply. auto: as the file asks where this device has "
                        "a kernel for it, else dequantize. dequantize: exact weights, float "
                        "matmul. int8, uint8, fp8, fp16: activations are quantized too (faster "
                        "with a kernel, a little less exact). faithful: as the file asks, on any "
                        "device. expand: rounds every layer to dense int8 at load."
                    ),
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(COMPUTE_DTYPES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Precision of activations. auto: what ComfyUI chooses for this device.",
                ),
                io.Combo.Input(
                    "dequantize_fp32",
                    options=["auto", "on", "off"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Precision of the stored scales. auto and on: as the file has them, "
                        "computed in float32. off: rounded to the compute dtype, which saves a "
                        "little memory."
                    ),
                ),
                io.Combo.Input(
                    "backend",
                    options=["auto", *sorted(b.name for b in BACKENDS)],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Which kernels to use. auto: the best that runs here. A backend that "
                        "cannot run here is an error that says why."
                    ),
                ),
                *scheme_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="An ordinary MODEL.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: str | int) -> str:
        """Loads again when the file was replaced."""
        try:
            return fingerprint(model)
        except LowBitError as error:
            return str(error)  # execute raises it where the user sees it

    @classmethod
    def execute(
        cls,
        model: str,
        scheme: str,
        matmul: str,
        compute_dtype: str = "auto",
        dequantize_fp32: str = "auto",
        backend: str = "auto",
        svdq_precision: str = "auto",
        svdq_rank: int = 0,
        act_unsigned: str = "auto",
        nvfp4_layout: str = "auto",
    ) -> io.NodeOutput:
        """Load it."""
        options = LoadOptions(
            scheme,
            matmul,
            compute_dtype,
            dequantize_fp32,
            backend,
            svdq_precision,
            svdq_rank,
            act_unsigned,
            nvfp4_layout,
        )
        return io.NodeOutput(load_diffusion_model(str(path_of(model)), options))
