"""torch.compile as TorchCompileModel applies it: no graph break, the same numbers, no float copies.

PyTorch's attention stands in for the host's CPU default, which reads the system's free memory.
"""

from __future__ import annotations

import gc
import shutil

import citizens
import comfy.model_management as mm
import comfy.patcher_extension
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from support import pack

CPU = torch.device("cpu")
ROUTES = [
    ("uint4_had_svd", "dequantize"),
    (citizens.MIXED, "faithful"),
    pytest.param("uint4_cb", "dequantize", marks=pytest.mark.slow),
    pytest.param("fp8", "fp8", marks=pytest.mark.slow),
]
BIG = {"x": (1, 16, 12, 16), "context": (1, 40, 192)}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, and inference mode as nodes run."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        yield
    torch._dynamo.reset()


def pytorch_attention(_, *args, **kwargs):
    return attention_pytorch(*args, **kwargs)


def run(patcher, later: float = 0.0) -> torch.Tensor:
    """One call of the MODEL as a sampler makes it: through its wrappers; at a later step."""
    generator = torch.Generator().manual_seed(9)
    given = citizens.inputs()
    for name, shape in BIG.items():
        given = given | {name: torch.randn(shape, generator=generator)}
    options = patcher.model_options["transformer_options"].copy()
    options["optimized_attention_override"] = pytorch_attention
    options["wrappers"] = comfy.patcher_extension.copy_nested_dicts(patcher.wrappers)
    return patcher.model.apply_model(
        given["x"],
        given["timestep"] - later,
        c_crossattn=given["context"],
        y=given["y"],
        guidance=given["guidance"],
        transformer_options=options,
    )


def compiled(patcher, backend: str = "aot_eager", **how):
    """What TorchCompileModel does, with the backend of our choice."""
    clone = patcher.clone(disable_dynamic=True)
    set_torch_compile_wrapper(
        model=clone,
        backend=backend,
        options={"guard_filter_fn": skip_torch_compile_dict},
        **how,
    )
    return clone


def explained(patcher):
    """Dynamo's account of the diffusion model."""
    given = citizens.inputs()
    return torch._dynamo.explain(patcher.model.diffusion_model)(
        given["x"],
        given["timestep"],
        context=given["context"],
        y=given["y"],
        guidance=given["guidance"],
        transformer_options={"optimized_attention_override": pytorch_attention},
    )


def float_copies(patcher) -> int:
    """Living float tensors of the shape of a quantized weight."""
    gc.collect()
    shapes = {tuple(module.weight.shape) for module in citizens.layers(patcher).values()}
    plain = {id(p) for p in patcher.model.diffusion_model.parameters()}
    return sum(
        1
        for thing in gc.get_objects()
        if type(thing) is torch.Tensor
        and id(thing) not in plain
        and tuple(thing.shape) in shapes
        and thing.is_floating_point()
        and thing.device == CPU
    )


@pytest.mark.parametrize(("case", "matmul"), ROUTES)
def test_a_compiled_model_is_one_graph_with_the_same_numbers(case, matmul):
    patcher = citizens.load(case, matmul=matmul)
    eager = run(citizens.on_device(patcher))
    second = run(patcher, later=0.25)
    # Where activations are rounded, a last bit before the rounding becomes a whole step after it.
    limit = 1e-5 if matmul == "dequantize" else 0.02
    assert citizens.error(second, eager) > 3 * limit
    before = float_copies(patcher)
    clone = compiled(patcher, fullgraph=True)
    first = run(citizens.on_device(clone))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert citizens.error(first, eager) < 1e-5
    assert citizens.error(run(clone, later=0.25), second) < limit
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert float_copies(patcher) <= before
    mm.unload_model_and_clones(clone)


def test_quantized_weights_add_no_graph_break():
    ours = citizens.load("uint4_svd")
    plain = explained(citizens.plain_model(citizens.floats(ours)))
    torch._dynamo.reset()
    found = explained(ours)
    assert found.graph_break_count == plain.graph_break_count == 0, found.break_reasons
    # Our own kernels are in the graph, not the host's way to a float weight.
    assert found.op_count > plain.op_count
    targets = {str(node.target) for graph in found.graphs for node in graph.graph.nodes}
    assert "linear" in " ".join(targets)
    assert "dequantize" not in targets


def test_the_node_itself_takes_our_model():
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    patcher = citizens.load("uint4")
    (made,) = TorchCompileModel.execute(patcher, "inductor").args
    assert made.model_options["torch_compile_kwargs"]["backend"] == "inductor"
    assert made.model is patcher.model


def test_a_dtype_that_was_not_foreseen_still_compiles():
    """Activations of another dtype ask the registry once more, outside of the graph."""
    ops = pack("loaders.host.ops").make_ops(torch.float32)
    layer = ops.Linear(64, 64)
    weight = citizens.composite(citizens.made(torch.randn(64, 64), "uint4"))
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(64)})
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(x, weight.dequantize().to(torch.bfloat16))
    found = torch.compile(layer, backend="aot_eager")(x)
    assert torch.allclose(found, wanted, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "matmul"), ROUTES)
def test_inductor_gives_the_same_numbers(case, matmul):
    assert shutil.which("g++") or shutil.which("clang++"), "inductor needs a C++ compiler"
    patcher = citizens.load(case, matmul=matmul)
    eager = run(citizens.on_device(patcher))
    clone = compiled(patcher, "inductor", fullgraph=True)
    # Where activations are rounded, a last bit before the rounding becomes a whole step after it.
    limit = 1e-3 if matmul == "dequantize" else 0.02
    assert citizens.error(run(citizens.on_device(clone)), eager) < limit
    mm.unload_model_and_clones(clone)
