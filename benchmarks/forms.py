"""The schemes that are measured: random weights in the normal form, made on the device at once.

Real quantization of a 12 B model takes minutes; a kernel's time depends on none of it. Codes are
random, scales such that the weight has the spread of a trained one, activations normal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["FORMS", "Form", "weight_of"]

SPREAD = 0.02
SHIFT_SAMPLE = 64  # rows that the spread of the codes is read off


@dataclass(frozen=True)
class Form:
    """A scheme.

    Attributes:
        title: As a reader knows it.
        format: Name of the number format of the codes.
        group: Inputs that share a scale, 0 for a whole row, -1 for the whole weight.
        modes: Values of the loader's ``matmul`` that are measured.
        wish: The matmul that its files ask for.
        rank: Of the low-rank branch.
        smooth: Whether activations are divided by a smoothing.
        two_level: A second scale over float8 ones.
        activation: Arguments of its ``ActivationSpec``, empty for none.
        peers: ``{mode: ((peer, settings), ...)}`` of other packages in the same arithmetic.
    """

    title: str
    format: str
    group: int
    modes: tuple[str, ...]
    wish: str | None = None
    rank: int = 0
    smooth: bool = False
    two_level: bool = False
    activation: tuple[tuple[str, object], ...] = ()
    peers: dict[str, tuple[tuple[str, dict], ...]] = field(default_factory=dict, hash=False)


def _sdnq(**settings) -> tuple[str, dict]:
    return ("sdnq", settings)


FORMS = {
    "uint4": Form(
        "SDNQ uint4",
        "uint4",
        64,
        ("dequantize", "int8", "fp8"),
        peers={
            "dequantize": (_sdnq(weights_dtype="uint4"), ("gemlite", {"kind": "A16W4"})),
            "int8": (_sdnq(weights_dtype="uint4", use_quantized_matmul=True),),
        },
    ),
    "uint4-svd": Form(
        "SDNQ uint4, rank 32",
        "uint4",
        128,
        ("dequantize", "int8"),
        rank=32,
        peers={
            "dequantize": (_sdnq(weights_dtype="uint4", use_svd=True, svd_rank=32),),
            "int8": (
                _sdnq(weights_dtype="uint4", use_svd=True, svd_rank=32, use_quantized_matmul=True),
            ),
        },
    ),
    "int8": Form(
        "SDNQ int8",
        "int8",
        0,
        ("dequantize", "int8"),
        "int8",
        peers={
            "dequantize": (_sdnq(weights_dtype="int8"), ("torchao", {"kind": "int8wo"})),
            "int8": (
                _sdnq(weights_dtype="int8", use_quantized_matmul=True),
                ("torchao", {"kind": "int8dq"}),
                ("gemlite", {"kind": "A8W8_int8"}),
            ),
        },
    ),
    "uint8": Form(
        "SDNQ uint8",
        "uint8",
        0,
        ("dequantize", "int8", "uint8"),
        "uint8",
        peers={
            "uint8": (
                _sdnq(
                    weights_dtype="uint8",
                    use_quantized_matmul=True,
                    quantized_matmul_dtype="uint8",
                ),
            ),
        },
    ),
    "fp8": Form(
        "SDNQ float8_e4m3fn",
        "float8_e4m3fn",
        0,
        ("dequantize", "fp8"),
        "fp8",
        peers={
            "dequantize": (_sdnq(weights_dtype="float8_e4m3fn"),),
            "fp8": (
                _sdnq(weights_dtype="float8_e4m3fn", use_quantized_matmul=True),
                ("torchao", {"kind": "fp8row"}),
                ("scaled_mm", {}),
                ("gemlite", {"kind": "A8W8_fp8"}),
            ),
        },
    ),
    "svdq-int4": Form(
        "SVDQuant int4, rank 32",
        "int4",
        64,
        ("dequantize", "int8", "fp8", "faithful"),
        "faithful",
        rank=32,
        smooth=True,
        activation=(("format", "int4"), ("group", 64)),
        peers={"faithful": (("nunchaku", {"precision": "int4", "rank": 32}),)},
    ),
    "svdq-nvfp4": Form(
        "SVDQuant nvfp4, rank 32",
        "float4_e2m1fn",
        16,
        ("dequantize", "int8", "fp8", "faithful"),
        "faithful",
        rank=32,
        smooth=True,
        two_level=True,
        activation=(("format", "float4_e2m1fn"), ("group", 16), ("scale", "float8_e4m3fn")),
        peers={"faithful": (("nunchaku", {"precision": "nvfp4", "rank": 32}),)},
    ),
    "modelopt-fp8": Form(
        "ModelOpt FP8",
        "float8_e4m3fn",
        -1,
        ("dequantize", "fp8", "faithful"),
        "faithful",
        activation=(
            ("format", "float8_e4m3fn"),
            ("group", -1),
            ("scale", "float32"),
            ("static", True),
        ),
    ),
    "modelopt-nvfp4": Form(
        "ModelOpt NVFP4",
        "float4_e2m1fn",
        16,
        ("dequantize", "fp8", "faithful"),
        "faithful",
        two_level=True,
        activation=(
            ("format", "float4_e2m1fn"),
            ("group", 16),
            ("scale", "float8_e4m3fn"),
            ("static", True),
        ),
    ),
    "awq": Form(
        "AWQ W4A16 (uint4, groups of 64)",
        "uint4",
        64,
        ("dequantize",),
        peers={"dequantize": (("torchao", {"kind": "int4wo"}),)},
    ),
}


def weight_of(form: Form, pack, rows: int, columns: int, device: str, seed: int = 0):
    """A random ``QuantizedWeight`` of a scheme.

    Args:
        form: The scheme.
        pack: ``support.pack``.
        rows: Outputs.
        columns: Inputs.
        device: Where its tensors lie.
        seed: Of everything random.
    """
    spec_module, reference = pack("kernels.spec"), pack("kernels.reference")
    fmt = pack("quant.dtypes").get_format(form.format)
    noise = torch.Generator(device=device).manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=noise, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, device=device)

    words = fmt.storage_numel(rows * columns)
    if fmt.kind == "native":  # random bytes could be NaN
        codes = torch.empty(words, dtype=fmt.word, device=device)
        for start in range(0, words, 1 << 26):
            part = codes[start : start + (1 << 26)]
            part.copy_((normal(part.numel()) * (fmt.qmax / 4)).clamp_(-fmt.qmax, fmt.qmax))
    else:
        shape = (words * fmt.word.itemsize,)
        codes = torch.randint(0, 256, shape, generator=noise, device=device, dtype=torch.uint8)
        codes = codes.view(fmt.word)
    groups = columns // form.group if form.group > 0 else 1
    code_shape = (rows, groups, form.group) if form.group > 0 else (rows, columns)
    sample = reference.decode(codes[: fmt.storage_numel(SHIFT_SAMPLE * 16)], fmt, SHIFT_SAMPLE * 16)
    middle = 0.0 if fmt.signed else float(sample.mean())
    step = SPREAD / float(sample.std())
    scale_shape = (rows, groups, 1) if form.group > 0 else (1 if form.group < 0 else rows, 1)
    scale = step * (0.75 + 0.5 * uniform(*scale_shape))
    tensors = {"codes": codes, "scale": scale}
    if form.two_level:
        tensors["scale_2"] = (scale.max() / 448).view(1, 1, 1)
        tensors["scale"] = (scale / tensors["scale_2"]).to(torch.float8_e4m3fn)
    if not fmt.signed:
        tensors["zero_point"] = -middle * scale
    if form.smooth:
        tensors["smooth"] = (0.5 + uniform(columns)).to(torch.bfloat16)
    if form.rank:
        tensors["svd_down"] = (normal(form.rank, columns) * columns**-0.5).to(torch.bfloat16)
        tensors["svd_up"] = (normal(rows, form.rank) * SPREAD).to(torch.bfloat16)
    activation = None
    if form.activation:
        activation = spec_module.ActivationSpec(**dict(form.activation))
        if activation.static:
            reach = 4.0  # of activations, in their own spread
            peak = pack("quant.dtypes").get_format(activation.format).qmax
            unit = reach / peak if activation.group < 0 else reach / (peak * 448)
            tensors["input_scale"] = torch.full((1,), unit, device=device)
    spec = spec_module.WeightSpec(
        format=fmt,
        shape=(rows, columns),
        code_shape=code_shape,
        rank=form.rank,
        smoothing="divide" if form.smooth else "",
        two_level=form.two_level,
        activation=activation,
    )
    weight = pack("quant.weight").QuantizedWeight(spec, tensors)
    weight.check()
    return weight
