"""SDNQ checkpoints of every family beside FLUX: tensors of small models, and whole models.

Small models (everyday): each native tensor that the pack makes equals the package's own float32
dequantization, assembled by the family's moves. Whole models at the smallest width that ComfyUI's
detection takes (slow): the MODEL that the pack loads computes what diffusers computes with the
dequantized weights.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from comfy_models import comfy_forward, run_inputs
from safetensors.torch import load_file
from support import pack, run_oracle
from test_sdnq_models import expected_weights, native_tensor

WEIGHTS = 1e-6
OUTPUTS = 1e-5

CASES = ("uint4", "int8_mm", "uint4_svd", "dyn4_mixed_svd_mm", "uint4_had_svd")
CONVS = ("uint4_conv", "int8_conv_mm", "uint4_conv_svd")

#: small models of the oracle, and what they are
FAMILIES = {
    "chroma": "chroma",
    "qwen_image": "qwen_image",
    "qwen_image_edit": "qwen_image",
    "z_image": "z_image",
    "lumina2": "lumina2",
    "wan": "wan",
    "wan_i2v": "wan",
    "sd3": "sd3",
    "sd35": "sd3",
    "auraflow": "auraflow",
    "pixart_alpha": "pixart",
    "pixart_sigma": "pixart",
    "sdxl": "sdxl",
    "sd15": "sdxl",
}
PAIRS = [
    (name, case)
    for name, family in FAMILIES.items()
    for case in CASES + (CONVS if family == "sdxl" else ())
]

#: whole models of the oracle, with the width at which ComfyUI knows them
WHOLE = {
    "chroma_whole": ("chroma", 3072),
    "qwen_image_whole": ("qwen_image", 3072),
    "qwen_image_edit_whole": ("qwen_image", 3072),
    "z_image_whole": ("z_image", 3840),
    "lumina2_whole": ("lumina2", 2304),
    "wan": ("wan", 1536),
    "sd3": ("sd3", 512),
    "auraflow_whole": ("auraflow", 3072),
    "pixart_sigma": ("pixart", 1152),
    "sdxl_vega_whole": ("sdxl", 320),
    "sd15_whole": ("sdxl", 320),
    "flux": ("flux", 3072),
    "flux2": ("flux2", 3072),
}
WHOLE_PAIRS = [
    *((name, case) for name in WHOLE for case in ("uint4", "int8_mm")),
    # ComfyUI builds the model before it is known what is a convolution in there
    ("sdxl_vega_whole", "uint4_conv"),
    ("sdxl_vega_whole", "int8_conv_mm"),
    ("sd15_whole", "int8_conv_mm"),
]


@pytest.fixture(scope="module", autouse=True)
def host():
    return pack()


@pytest.fixture
def one_thread():
    """Tensors are tiny here: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with every case of the small models; gone after the module, for its size."""
    folder = tmp_path_factory.mktemp("families")
    run_oracle("sdnq_families.py", folder, "small", *("/".join(pair) for pair in PAIRS))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "case"), PAIRS)
@pytest.mark.usefixtures("one_thread")
def test_native_tensors_mean_what_the_package_says(made, name, case):
    golden = load_file(made / name / f"{case}.golden.safetensors")
    shapes = {key: tuple(value.shape) for key, value in golden.items()}
    make_plan = pack("loaders.plan").make_plan
    alone = make_plan(made / name / case)

    def native_shapes(wanted):
        """What the architecture would tell: ComfyUI does not build these widths."""
        single = {m.native: m.pieces[0].key for m in alone.moves if m.axis == "single"}
        return {key: shapes.get(single.get(key), shape) for key, shape in wanted.items()}

    plan = make_plan(made / name / case, native_shapes=native_shapes)
    assert plan.family.name == FAMILIES[name]
    assert {e.key for e in plan.quantized()} == set(golden)
    translate = pack("loaders.translate")
    settings = translate.Settings(torch.float32)
    native = {key: value for key, value, sources in translate.translate(plan, settings) if sources}
    quantized = 0
    for key, expected in expected_weights(plan, golden):
        got = native.pop(key)
        low_bit = hasattr(got, "_layout_cls")
        got = (got.dequantize() if low_bit else got).float()
        assert got.shape == expected.shape, key
        error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= WEIGHTS, f"{key} differs by {error:.2e}"
        quantized += low_bit
    assert native == {}
    assert quantized >= len(golden) // 4
    if "conv" in case:
        assert any(value.ndim == 4 for value in golden.values())
    alone.source.close()
    plan.source.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), WHOLE_PAIRS)
def test_whole_model_computes_what_diffusers_computes(tmp_path, name, case):
    family, width = WHOLE[name]
    try:
        run_oracle("sdnq_families.py", tmp_path, "whole", name, str(width), case)
        api, plans = pack("loaders.host.api"), pack("loaders.plan")
        options = {"matmul": "dequantize", "compute_dtype": "fp32"}
        patcher = api.load_diffusion_model(str(tmp_path / case), options)
        model = patcher.model.diffusion_model
        golden = load_file(tmp_path / f"{case}.golden.safetensors")
        plan = plans.make_plan(tmp_path / case, native_shapes=api.native_shapes)
        assert plan.family.name == family
        for key, expected in expected_weights(plan, golden):
            got, _ = native_tensor(model, key)
            error = (got - expected).abs().max() / expected.abs().max()
            assert error <= WEIGHTS, f"{key} differs by {error:.2e}"
        plan.source.close()
        del golden
        run = load_file(tmp_path / f"{case}.run.safetensors")
        out = comfy_forward(family, model, run_inputs(run))
        error = (out - run["out"]).abs().max() / run["out"].abs().max()
        print(f"relative error {error:.2e}")
        assert error <= OUTPUTS
    finally:
        shutil.rmtree(tmp_path)  # gigabytes
