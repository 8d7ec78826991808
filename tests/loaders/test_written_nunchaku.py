"""Nunchaku files that this pack writes, read by addresses that are stated apart from its code.

Every tensor is gathered from the file by the formulas of ``svdq_layouts`` (written from the
kernels' indexing). What comes out must be the weight that the engine quantized, exactly, and the
bias must follow the rules of Nunchaku's engine.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import svdq_layouts as layouts
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import oracle, pack
from test_written_sdnq import quantize

SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LowBitError = pack("quant.errors").LowBitError


@pytest.fixture(scope="module")
def models():
    """Folders of small float models of the families that the engine has."""
    return oracle("tiny_models.py", "tiny", "flux", "qwen_image", "z_image")


def wide(folder, target, family):
    """A copy whose feed-forward layers have a width that the engine takes."""
    if family != "z_image":
        return folder
    target.mkdir()
    weights = load_file(next(folder.glob("diffusion_pytorch_model*.safetensors")))
    torch.manual_seed(0)
    for key, value in weights.items():
        if ".feed_forward." in key:
            shape = [1024 if size == 682 else size for size in value.shape]
            weights[key] = torch.randn(shape) * 0.06
    save_file(weights, target / "diffusion_pytorch_model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def gathered(stored: torch.Tensor, place) -> torch.Tensor:
    """Elements of a stored tensor at the places of a logical one."""
    return stored.reshape(-1)[torch.from_numpy(np.ascontiguousarray(place))]


def nibbles(stored: torch.Tensor, place) -> torch.Tensor:
    raw = stored.contiguous().reshape(-1).view(torch.uint8)
    place = torch.from_numpy(np.ascontiguousarray(place))
    return (raw[place // 2] >> (place % 2 * 4).to(torch.uint8)) & 15


def vector(stored: torch.Tensor) -> torch.Tensor:
    return gathered(stored, layouts.vector_place(np.arange(stored.numel()))).float()


def w4a4(file, module, names):
    """``(residual before smoothing, smooth, low-rank product, stored bias)`` of a layer."""
    smooth_name, down_name, up_name = names
    get = lambda suffix: file[f"{module}.{suffix}"]  # noqa: E731
    rows, half = get("qweight").shape
    columns = half * 2
    n, k = np.arange(rows)[:, None], np.arange(columns)[None]
    codes = nibbles(get("qweight"), layouts.codes_nibble(n, k, columns))
    groups = get("wscales").shape[0]
    g = np.arange(groups)[None]
    if groups == columns // 16:
        place = layouts.micro_scale_byte(n, g, groups, 4)
        raw = get("wscales").reshape(-1).view(torch.uint8)[torch.from_numpy(place)]
        scale = raw.view(torch.float8_e4m3fn).float() * get("wtscale").float()
        values = E2M1[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    else:
        scale = gathered(get("wscales"), layouts.int4_scale_place(n, g, groups)).float()
        values = codes.float() - 16 * (codes > 7)
    residual = values * scale.repeat_interleave(columns // groups, dim=1)
    ranks = get(down_name).shape[1]
    r = np.arange(ranks)
    down = layouts.rank_place(r[:, None], k, k, r[:, None], ranks)
    up = layouts.rank_place(n, r[None], n, r[None], ranks)
    product = gathered(get(up_name), up).float() @ gathered(get(down_name), down).float()
    return residual, vector(get(smooth_name)), product, vector(get("bias"))


def awq(file, module, splits):
    """``(weight, bias)`` in chunk-major order, as the model has them but for raised scales."""
    quarter, half = file[f"{module}.qweight"].shape
    rows, columns = quarter * 4, half * 2
    n, k = np.arange(rows)[:, None], np.arange(columns)[None]
    codes = nibbles(file[f"{module}.qweight"], layouts.awq_nibble(n, k, columns)).float()
    spread = lambda t: t.float().t().repeat_interleave(64, dim=1)  # noqa: E731
    weight = codes * spread(file[f"{module}.wscales"]) + spread(file[f"{module}.wzeros"])
    bias = file[f"{module}.bias"].float()
    order = torch.arange(rows).view(rows // splits, splits).t().reshape(-1)
    return weight[order], bias[order]


def quantized(weight, recipe, name, shape):
    """What the engine makes of a weight: its float meaning."""
    engine, recipes = pack("quant.engine"), pack("quant.recipe")
    facts = pack("loaders.families.facts").FACTS
    decided = recipe.decide(name, shape, "linear", facts)
    assert isinstance(decided, recipes.LayerRecipe)
    made, _ = engine.quantize_layer(weight, decided)
    return made.dequantize()


FAMILIES = {
    "flux": ("FluxTransformer2DModel", "NunchakuFluxTransformer2dModel",
             ("smooth", "lora_down", "lora_up")),
    "qwen_image": ("QwenImageTransformer2DModel", "NunchakuQwenImageTransformer2DModel",
                   ("smooth_factor", "proj_down", "proj_up")),
    "z_image": ("ZImageTransformer2DModel", "NunchakuZImageTransformer2DModel",
                ("smooth_factor", "proj_down", "proj_up")),
}  # fmt: skip

UNSIGNED = ("mlp_fc2", "mlp_context_fc2", "img_mlp.net.2", "txt_mlp.net.2")


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_independent_addresses_give_the_model_back(models, tmp_path, family, precision):
    folder = wide(models / family, tmp_path / "wide", family)
    target = tmp_path / f"svdq-{precision}_r32-model.safetensors"
    report = quantize(folder, target, {"precision": precision}, "nunchaku", "svdquant")
    file = load_file(target)
    class_name, model_class, names = FAMILIES[family]
    with safe_open(target, "pt") as opened:
        told = opened.metadata()
    assert told["model_class"] == model_class
    assert json.loads(told["config"])["_class_name"] == class_name
    form = json.loads(told["quantization_config"])
    group = 64 if precision == "int4" else 16
    assert (form["rank"], form["weight"]["group_size"]) == (32, group)
    assert ("comfy_config" in told) == (family == "flux")

    plan = pack("loaders.plan").make_plan(folder)
    floats = pack("loaders.float_model").FileFloats(plan)
    back = pack("loaders.families.reverse").reverse(floats.shapes, "nunchaku")
    assemble = pack("loaders.float_model").assemble
    source = {
        move.native: assemble(move, lambda key: floats.read(key).to(torch.bfloat16)).float()
        for move in back.moves
    }
    plan.source.close()
    modules = {key.removesuffix(".qweight") for key in file if key.endswith(".qweight")}
    assert {name.partition("[")[0] for name in report.layers} == modules
    for module in sorted(modules):
        meant, bias = source[f"{module}.weight"], source.get(f"{module}.bias")
        error = report.layers[module].relative
        if f"{module}.wzeros" in file:
            splits = 3 if module.startswith("single") else 6
            weight, found = awq(file, module, splits)
            raised = torch.zeros(splits)
            raised[[1] if splits == 3 else [1, 4]] = 1
            expected = bias.view(splits, -1) + raised[:, None]
            assert torch.equal(found, expected.view(-1).to(torch.bfloat16).float()), module
        else:
            residual, smooth, product, found = (
                w4a4(file, module, names)
                if f"{module}.bias" in file
                else (*w4a4({**file, f"{module}.bias": torch.zeros(len(meant))}, module, names)[:3],
                      None)
            )  # fmt: skip
            weight = residual / smooth + product
            shifted = precision == "int4" and module.endswith(UNSIGNED)
            shift = SHIFT * (residual / smooth).sum(1) if shifted else torch.zeros(len(meant))
            true = torch.zeros(len(meant)) if bias is None else bias
            if family == "z_image":
                assert found is None and bias is None
            else:
                assert torch.allclose(found, true - shift, rtol=2**-8, atol=1e-5), module
                assert not shifted or shift.abs().max() > 0.01
        measured = (weight - meant).norm() / meant.norm()
        assert abs(measured - error) < 1e-3 * error, (module, measured, error)
    plain = {key for key in source if key.rpartition(".")[0] not in modules}
    for key in plain - set(file):  # refiners' projections are apart in the file
        head, _, end = key.partition(".to_qkv.")
        found = torch.cat([file[f"{head}.to_{p}.{end}"] for p in "qkv"])
        assert torch.equal(found.float(), source[key]), key
    for key in plain & set(file):
        assert torch.equal(file[key].float(), source[key]), key


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_open_in_ours(models, tmp_path, family, precision):
    folder = wide(models / family, tmp_path / "wide", family)
    target = tmp_path / f"svdq-{precision}_r32-model.safetensors"
    quantize(folder, target, {"precision": precision}, "nunchaku", "svdquant")
    make_plan = pack("loaders.plan").make_plan
    floats = pack("loaders.float_model").FileFloats
    plans = [make_plan(folder), make_plan(target)]
    source, found = map(floats, plans)
    assert plans[1].detection.scheme == "svdq"
    assert found.shapes == source.shapes
    for key in source.shapes:
        expected, value = source.read(key).float(), found.read(key).float()
        if key in found.lowbit:
            assert (value - expected).norm() < 0.2 * expected.norm(), key
        else:  # bf16, and 1 was added to some biases
            assert torch.allclose(value, expected, rtol=2**-8, atol=2**-8), key
    for plan in plans:
        plan.source.close()


def test_what_the_engine_cannot_hold_is_told(models, tmp_path):
    target = tmp_path / "a.safetensors"
    with pytest.raises(LowBitError, match="cannot hold this layer") as caught:
        quantize(models / "flux", target, {"weights_dtype": "uint4"}, "nunchaku", "sdnq")
    assert "sdnq" in caught.value.found
    with pytest.raises(LowBitError, match="cannot hold this layer") as caught:
        quantize(models / "flux", target, {"modulation": "keep"}, "nunchaku", "svdquant")
    assert "modulation" in caught.value.found
    wan = oracle("tiny_models.py", "tiny", "wan") / "wan"
    with pytest.raises(LowBitError, match="names of nunchaku"):
        quantize(wan, target, {}, "nunchaku", "svdquant")
    assert not list(tmp_path.iterdir())
