"""The byte conventions of NVFP4: each by its evidence, and never by a guess.

Every file is written in one convention by formulas of the tests' own; reading it in any other one
gives another weight, which each test proves of its own file.
"""

from __future__ import annotations

import pytest
import torch
from modelopt_cases import declaration, layer, pair_columns, tile, write
from support import pack
from test_modelopt_reader import read, relative

nvfp4 = pack("loaders.schemes.modelopt_nvfp4")
LowBitError = pack("quant.errors").LowBitError

EVEN = (128, 256)  # scales have one shape in rows and in tiles
UNEVEN = (96, 176)
PACKED = "double_blocks.0.img_attn.qkv"
NAMES = {(high, tiles): name for name, (high, tiles) in nvfp4.LAYOUTS.items()}
MODELOPT = {"quantization_config": declaration("NVFP4")}
LAYERS = {"format_version": "1.0", "layers": {"a": {"format": "nvfp4"}}}


def made(shape, high, tiles, name="a", seed=0, **more):
    """Tensors of one layer in a convention, and its meaning."""
    tensors, meaning = layer("nvfp4", shape, seed, high_first=high, tiles=tiles, **more)
    return {name: tensors}, meaning


def means(folder, meaning, name="a", **options):
    """Assert what is read; and that every other convention is another weight, or does not fit."""
    contents = read(folder, **options)
    weight = contents.entries[f"{name}.weight"].read()
    weight.check()
    assert relative(weight.dequantize(), meaning) <= 1e-6
    told = contents.facts["nvfp4 layout"]
    right = next(key for key, value in NAMES.items() if nvfp4.Layout(*key, "").told()[:-3] in told)
    others = 0
    for layout in nvfp4.LAYOUTS:
        if layout == NAMES[right]:
            continue
        try:
            wrong = read(folder, nvfp4_layout=layout).entries[f"{name}.weight"].read()
        except LowBitError as error:
            assert layout in error.what
            continue
        others += 1
        assert relative(wrong.dequantize(), meaning) > 0.5
    assert others >= 1
    return NAMES[right], told


def refused(folder, **options) -> LowBitError:
    with pytest.raises(LowBitError, match="Nothing tells how the bytes") as caught:
        read(folder, **options)
    assert "nvfp4_layout" in caught.value.remedy
    return caught.value


@pytest.mark.parametrize("shape", [EVEN, UNEVEN])
def test_modelopts_exports(shape, tmp_path):
    layers, meaning = made(shape, False, False)
    layout, why = means(write(tmp_path, layers, declaration("NVFP4")), meaning)
    assert layout == "low_rows" and "config.json" in why


def test_the_exporters_tiles_where_shapes_show_them(tmp_path):
    """low half first, unlike everything else in tiles"""
    layers, meaning = made(UNEVEN, False, True)
    assert list(layers["a"]["weight_scale"].shape) == [128, 12]
    metadata = MODELOPT | {"_quantization_metadata": LAYERS}
    folder = write(tmp_path, layers, declaration("NVFP4"), metadata)
    layout, why = means(folder, meaning)
    assert layout == "low_tiles" and "[128, 12]" in why


def test_one_uneven_layer_tells_of_all(tmp_path):
    layers, meaning = made(EVEN, False, True)
    more, other = made(UNEVEN, False, True, "b", 1)
    folder = write(tmp_path, layers | more, declaration("NVFP4"), MODELOPT)
    assert means(folder, meaning)[0] == "low_tiles"
    assert means(folder, other, "b")[0] == "low_tiles"
    rows, meaning = made(EVEN, False, False)
    uneven, _ = made(UNEVEN, False, False, "b", 1)
    folder = write(tmp_path / "rows", rows | uneven, declaration("NVFP4"), MODELOPT)
    assert means(folder, meaning)[0] == "low_rows"


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize(
    "metadata", [MODELOPT, MODELOPT | {"_quantization_metadata": LAYERS}], ids=["only", "layers"]
)
def test_a_rewritten_export_of_even_shapes_is_refused(tiles, metadata, tmp_path):
    """The exporter writes the same header and shapes with its scales in rows and in tiles."""
    layers, meaning = made(EVEN, False, tiles)
    folder = write(tmp_path, layers, declaration("NVFP4"), metadata)
    assert "rewritten" in refused(folder).found
    layout = "low_tiles" if tiles else "low_rows"
    assert means(folder, meaning, nvfp4_layout=layout) == (
        layout,
        nvfp4.Layout(False, tiles, f"set by nvfp4_layout {layout}").told(),
    )


def test_black_forest_labs_packed_names(tmp_path):
    layers, meaning = made(EVEN, True, True, PACKED)
    plain = {"img_in": {"weight": torch.randn(8, 8)}}
    assert means(write(tmp_path, layers | plain), meaning, PACKED)[0] == "high_tiles"
    single, meaning = made(UNEVEN, True, True, "model.diffusion_model.single_blocks.3.linear1")
    folder = write(tmp_path / "b", single)
    assert means(folder, meaning, next(iter(single)))[0] == "high_tiles"


def test_packed_names_do_not_speak_against_shapes(tmp_path):
    layers, _ = made(UNEVEN, True, False, PACKED)
    assert "row by row" in refused(write(tmp_path, layers)).found


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("where", ["config", "metadata"])
def test_swap_weight_nibbles(swapped, where, tmp_path):
    """SGLang's converters: true where the file's bytes are not as ModelOpt writes them."""
    layers, meaning = made(EVEN, swapped, False)
    config = declaration("NVFP4", swap_weight_nibbles=swapped)
    if where == "config":
        folder = write(tmp_path, layers, config)
    else:  # both keys hold the flat config
        folder = write(
            tmp_path,
            layers,
            None,
            {"quantization_config": config, "_quantization_metadata": config},
        )
    layout, why = means(folder, meaning)
    assert layout == ("high_rows" if swapped else "low_rows") and "swap_weight_nibbles" in why


def test_a_config_that_says_both_is_refused(tmp_path):
    layers, _ = made(EVEN, True, False)
    folder = write(
        tmp_path,
        layers,
        declaration("NVFP4", swap_weight_nibbles=True),
        {"_quantization_metadata": declaration("NVFP4", swap_weight_nibbles=False)},
    )
    with pytest.raises(LowBitError, match="contradict each other") as caught:
        read(folder)
    assert "True (config.json)" in caught.value.found


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize(("shape", "tiles"), [(EVEN, False), (EVEN, True), (UNEVEN, False)])
def test_scales_without_a_declaration_are_refused(high, shape, tiles, tmp_path):
    """As the official LTX-2.5 file: the order of the bytes is nowhere."""
    layers, meaning = made(shape, high, tiles)
    folder = write(tmp_path, layers)
    error = refused(folder)
    assert ("shows how scales" in error.found) == (shape == UNEVEN)
    layout = NAMES[high, tiles]
    assert means(folder, meaning, nvfp4_layout=layout)[0] == layout


def test_a_config_of_another_producer_tells_nothing(tmp_path):
    layers, _ = made(EVEN, False, False)
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    opened = pack("loaders.source").open_source(write(tmp_path, layers, config))
    with pytest.raises(LowBitError, match="Nothing tells how the bytes"):
        pack("loaders.schemes.modelopt").read(opened)


def test_comfyuis_marks_beside_a_config_of_modelopt(tmp_path):
    """Converters leave the export's config behind: nothing tells whether they turned the bytes."""
    layers, _ = made(UNEVEN, True, True)
    metadata = {"_quantization_metadata": LAYERS}
    assert "ComfyUI" in refused(write(tmp_path, layers, declaration("NVFP4"), metadata)).found


@pytest.mark.parametrize(
    ("tiles", "asked"), [(False, "low_tiles"), (True, "low_rows"), (True, "high_rows")]
)
def test_an_override_against_the_shapes(tiles, asked, tmp_path):
    layers, _ = made(UNEVEN, False, tiles)
    with pytest.raises(LowBitError, match=f"{asked} that was asked for") as caught:
        read(write(tmp_path, layers, declaration("NVFP4")), nvfp4_layout=asked)
    assert caught.value.layer == "a.weight_scale"


def test_an_override_of_a_file_without_nvfp4(tmp_path):
    folder = write(tmp_path, {"a": layer("fp8")[0]}, declaration("FP8"))
    with pytest.raises(LowBitError, match="no layer is NVFP4") as caught:
        read(folder, nvfp4_layout="low_rows")
    assert caught.value.found == "fp8"
    with pytest.raises(LowBitError, match="cannot have") as caught:
        read(folder, nvfp4_layout="sideways")
    assert "low_rows" in caught.value.expected


def test_layers_in_both_orders_are_refused(tmp_path):
    rows, _ = made(UNEVEN, False, False, "a")
    tiles, _ = made(UNEVEN, False, True, "b")
    with pytest.raises(LowBitError, match="different orders") as caught:
        read(write(tmp_path, rows | tiles, declaration("NVFP4")))
    assert caught.value.layer == "b" and "a has" in caught.value.found


@pytest.mark.parametrize("shape", [(96, 176), (128, 128), (256, 352)])
def test_padding_of_columns_to_sixteen_groups(shape, tmp_path):
    """The exporter's ``row_col`` pads bytes to 16, but scales to 16 groups: 8 would be the size."""
    tensors, meaning = layer("nvfp4", shape)
    scale = tensors["weight_scale"].view(torch.uint8)
    groups = -(-scale.shape[1] // 16) * 16
    scale = torch.nn.functional.pad(scale, (0, groups - scale.shape[1]))
    width = -(-tensors["weight"].shape[1] // 16) * 16
    weight = torch.nn.functional.pad(tensors["weight"], (0, width - tensors["weight"].shape[1]))
    tensors |= {"weight": weight, "weight_scale": tile(scale.view(torch.float8_e4m3fn))}
    folder = write(tmp_path, {"a": tensors}, declaration("NVFP4"))
    entry = read(folder, nvfp4_layout="low_tiles").entries["a.weight"]
    assert entry.shape == (shape[0], width * 2) and entry.spec.code_shape[2] == 16
    assert relative(entry.read().dequantize()[:, : shape[1]], meaning) <= 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_padded_layers_are_cut_where_the_architecture_says(seed, tmp_path):
    """90 rows stored as 96, 336 columns as 352."""
    tensors, meaning = layer("nvfp4", (96, 352), seed, high_first=True, tiles=True, bias=False)
    small = {"weight": torch.ones(90), "bias": torch.ones(336)}
    folder = write(tmp_path, {PACKED: tensors, "norm": small})
    opened = pack("loaders.source").open_source(folder)
    modelopt = pack("loaders.schemes.modelopt")
    entry = modelopt.read(opened).entries[f"{PACKED}.weight"]
    assert entry.doubtful and entry.shape == (96, 352)
    told = {f"{PACKED}.weight": (90, 336)}
    entry = modelopt.read(opened, told.get).entries[f"{PACKED}.weight"]
    weight = entry.read()
    weight.check()
    assert entry.shape == (90, 336) and not entry.doubtful
    assert relative(weight.dequantize(), meaning[:90, :336]) <= 1e-6
    with pytest.raises(LowBitError, match="not the one its architecture has"):
        modelopt.read(opened, {f"{PACKED}.weight": (64, 336)}.get)


@pytest.mark.parametrize("seed", range(4))
def test_tiles_and_halves_by_their_formulas(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, groups = 128 * (1 + seed % 3), 4 * (1 + seed)
    scales = torch.randint(0, 256, (rows, groups), generator=generator, dtype=torch.uint8)
    assert torch.equal(nvfp4.from_tiles(tile(scales)), scales)
    codes = torch.randint(0, 16, (rows, groups), generator=generator)
    low, high = pair_columns(codes), pair_columns(codes, True)
    assert torch.equal(nvfp4.swap_halves(low), high) and not torch.equal(low, high)


def test_comfy_kitchen_has_the_same_tiles_and_halves():
    """What ComfyUI's own kernels read is what the tests' formulas write."""
    from comfy_kitchen import float_utils

    scales = torch.randint(0, 256, (200, 11), dtype=torch.uint8)
    assert torch.equal(float_utils.to_blocked(scales, flatten=False), tile(scales))
    codes = torch.randint(0, 16, (8, 32))
    swapped = float_utils.swap_nibbles(pair_columns(codes))
    assert torch.equal(swapped, pair_columns(codes, True))
