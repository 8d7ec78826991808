"""Every layout through the host's streaming helpers, which a CPU run never reaches by itself."""

from __future__ import annotations

from functools import cache

import citizens
import comfy.memory_management as memory
import comfy.model_management as mm
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from support import pack

OFFSET_OF_VRAM_PAGE = 1024


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def some_weights() -> dict[str, QuantizedTensor]:
    """One composite of every format and of every kind of storage."""
    made, composite = citizens.made, citizens.composite
    weight = floats(48, 96)
    found = {}
    for fmt in pack("quant.dtypes").all_formats():
        if fmt.name != "float8_e8m0fnu":  # holds scales only
            found[fmt.name] = composite(made(weight, fmt.name))
    found["grouped"] = composite(made(weight, "int8", group_size=32))
    found["tensor-wise"] = composite(made(weight, "uint8", group_size=-2))
    found["bf16 scales"] = composite(made(weight, "uint4", scale_dtype=torch.bfloat16))
    found["low rank"] = composite(made(weight, "uint4", svd_rank=8))
    found["rotated"] = composite(made(weight, "uint4", hadamard_group_size=32, svd_rank=8))
    found["codebook"] = composite(made(weight, "uint4", use_codebook=True))
    found["one codebook"] = composite(made(weight, "uint3", use_codebook=True, group_size=-2))
    found["conv"] = composite(made(floats(6, 8, 3, 3), "uint5"))
    found["conv 3d"] = composite(made(floats(6, 8, 2, 3, 3), "int6", group_size=4))
    found["conv 1d"] = composite(made(floats(6, 8, 3), "int8"))
    dense = pack("loaders.translate")._dense(floats(16, 96).to(torch.bfloat16))
    found["mixed rows"] = composite(
        {
            "q": made(weight, "uint4", svd_rank=4),
            "k": made(floats(7, 96), "int5"),
            "v": made(floats(9, 96), "float8_e4m3fn"),
            "rest": dense,
        }
    )
    found["mixed columns"] = composite(
        {"attention": made(weight, "uint3"), "mlp": made(floats(48, 32), "int8")}, axis=1
    )
    return found


def same(found: QuantizedTensor, expected: QuantizedTensor) -> bool:
    return (
        isinstance(found, QuantizedTensor)
        and found.shape == expected.shape
        and found.dtype == expected.dtype
        and found._params.spec == expected._params.spec
        and all(map(torch.equal, citizens.memory_of(found), citizens.memory_of(expected)))
        and torch.equal(found.dequantize(), expected.dequantize())
    )


def test_every_kind_of_weight_survives_one_gathered_buffer():
    """The way of Dynamic VRAM: all tensors of a module into one uint8 buffer and out again."""
    weights = some_weights()
    for name, weight in weights.items():
        bias = floats(weight.shape[0])
        sources = [weight, bias, None]
        size = memory.vram_aligned_size(sources)
        assert size % OFFSET_OF_VRAM_PAGE == 0
        assert size >= sum(tensor.nbytes for tensor in (*citizens.memory_of(weight), bias))
        # A page that was used before, and is longer than this module needs.
        buffer = torch.full((size + 4096,), 0xA5, dtype=torch.uint8)
        mm.cast_to_gathered(sources, buffer)
        found, found_bias, nothing = memory.interpret_gathered_like(
            memory.tensors_to_geometries(sources), buffer
        )
        assert same(found, weight), name
        assert torch.equal(found_bias, bias) and nothing is None, name
        views = citizens.memory_of(found)
        page = buffer.untyped_storage().data_ptr()
        assert all(view.untyped_storage().data_ptr() == page for view in views), name
        buffer.fill_(0)
        assert not any(view.any() for view in views), f"{name} is a copy, not a view of the page"
        assert weight._qdata.any(), name


def test_a_buffer_that_is_too_small_is_refused():
    weight = citizens.composite(citizens.made(floats(48, 96), "uint4"))
    buffer = torch.empty(memory.vram_aligned_size([weight]) - 2048, dtype=torch.uint8)
    with pytest.raises(ValueError, match="too small"):
        memory.interpret_gathered_like([weight], buffer)


def test_every_kind_of_weight_survives_copies():
    for name, weight in some_weights().items():
        blank = torch.empty_like(weight, device="cpu")
        for tensor in citizens.memory_of(blank):
            tensor.zero_()
        blank.copy_(weight, non_blocking=True)
        assert same(blank, weight), name
        assert blank.data_ptr() != weight.data_ptr(), name
        assert same(weight.detach(), weight), name
        clone = weight.clone()
        assert same(clone, weight) and clone.data_ptr() != weight.data_ptr(), name
        assert same(weight.to("cpu"), weight), name
        assert same(weight.to(device="cpu", copy=True), weight), name
        there = weight.to("meta")
        assert there.device.type == "meta" and there.shape == weight.shape, name
        assert there._params.spec == weight._params.spec, name
        assert same(torch.nn.Parameter(weight, requires_grad=False).data, weight), name


def test_a_change_of_dtype_changes_no_bits():
    for name, weight in some_weights().items():
        half = weight.to(torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.dequantize().dtype == torch.bfloat16, name
        assert torch.equal(half.dequantize(), weight.dequantize().to(torch.bfloat16)), name
        assert same(half.to(torch.float32), weight), name


def test_flatten_and_unflatten():
    for name, weight in some_weights().items():
        inner, context = weight.__tensor_flatten__()
        tensors = {attribute: getattr(weight, attribute) for attribute in inner}
        found = QuantizedTensor.__tensor_unflatten__(tensors, context, 0, 0)
        assert same(found, weight), name


def test_tensor_dispatch_equals_the_dequantized_weight():
    """What runs where no kernel is called: training, compile and other packs."""
    x = floats(3, 5, 96)
    for name, weight in some_weights().items():
        if weight.dim() != 2 or weight.shape[1] != 96:
            continue
        expected = torch.nn.functional.linear(x, weight.dequantize())
        with torch.inference_mode():
            assert torch.allclose(torch.nn.functional.linear(x, weight), expected), name
        with torch.no_grad():
            assert torch.allclose(torch.nn.functional.linear(x, weight), expected), name
            assert torch.allclose(x.view(15, 96) @ weight.t(), expected.view(15, -1)), name
        assert torch.equal(weight.t().dequantize(), weight.dequantize().t()), name


@pytest.mark.parametrize("case", citizens.CASES)
def test_every_module_of_a_model_survives_one_gathered_buffer(case):
    patcher = citizens.load(case, compute_dtype="bf16")
    layers = citizens.layers(patcher)
    assert len(layers) > 10
    for name, module in layers.items():
        sources = [module.weight, module.bias]
        buffer = torch.full((memory.vram_aligned_size(sources),), 0xA5, dtype=torch.uint8)
        mm.cast_to_gathered(sources, buffer)
        weight, bias = memory.interpret_gathered_like(memory.tensors_to_geometries(sources), buffer)
        assert same(weight, module.weight), (case, name)
        assert torch.equal(bias, module.bias), (case, name)


@pytest.mark.parametrize("case", ["int8", "uint4_had_svd", citizens.MIXED])
def test_dynamic_vram_leaves_its_page_as_the_file_has_it(case):
    """The host's Dynamic VRAM cast, its page handed in: the only part of it that needs a GPU.

    It would round a patch into its page; the layer carries the patch beside, as
    ``test_citizen_adapters`` has it.
    """
    import comfy.ops
    from comfy.model_patcher import LowVramPatch

    name = "double_blocks.0.img_attn.qkv"
    patcher = citizens.load(case)
    module = citizens.layers(patcher)[name]
    source = module.weight._qdata.clone()
    delta = floats(*module.weight.shape, seed=4) * 0.05
    sources = [module.weight, module.bias]
    page = torch.empty(memory.vram_aligned_size(sources), dtype=torch.uint8)
    mm.cast_to_gathered(sources, page)
    module._prefetch = {
        "resident": False,
        "needs_cast": False,
        "xfer_dest": page,
        "cast_geometry": memory.tensors_to_geometries(sources),
        "signature": 1,
    }
    module.seed_key = name
    patches = {name: [(1.0, ("diff", (delta,)), 1.0, None, None)]}
    module.weight_lowvram_function = LowVramPatch(name, patches)
    wanted = module.weight.data.dequantize() + delta
    assert citizens.error(citizens.floats(patcher)[f"{name}.weight"], wanted) < 1e-5
    for _ in range(2):  # the second time the page is resident
        weight, bias = comfy.ops.resolve_cast_module_with_vbar(
            module, module.weight.dtype, torch.device("cpu"), torch.float32, torch.float32, True
        )
        assert same(weight, module.weight)
        assert torch.equal(bias, module.bias)
        assert torch.equal(page[: source.numel()], weight._qdata)
    assert torch.equal(module.weight._qdata, source)
