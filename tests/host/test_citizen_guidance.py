"""What users put onto a MODEL: ControlNet, block patches, guidance nodes, merges, hooks, previews.

Each on a low-bit MODEL gives what it gives on the float MODEL of the same weights, and it does
something there: a patch that is ignored, or meets other weights, fails.
"""

from __future__ import annotations

import citizens
import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.model_management as mm
import comfy.ops
import comfy.sample
import comfy.utils
import folder_paths
import latent_preview
import nodes
import pytest
import tiny_unet
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from comfy.multigpu import GPUOptionsGroup
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_attention_multiply import UNetCrossAttentionMultiply
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_hooks import CreateHookKeyframe, CreateHookLoraModelOnly
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_model_merging import ModelMergeBlocks, ModelMergeSimple
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNeg
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from safetensors.torch import save_file

CPU = torch.device("cpu")
EXACT = 2e-5
"""In float32 only the order of sums differs, and that by the free memory at that moment."""


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode, as the server runs every node."""
    with torch.inference_mode():
        yield


class Pair:
    """A low-bit MODEL and the float one of its weights, and what they sample untouched."""

    def __init__(self, fmt: str):
        self.ours, self.floats = tiny_unet.ours(fmt), tiny_unet.floats(fmt)
        self.plain: dict[tuple, torch.Tensor] = {}

    def check(self, change=lambda patcher: patcher, effect: float = 0.01, **sampling) -> None:
        """A change does the same to both, and does something."""
        found = tiny_unet.sample(change(self.ours), **sampling)
        wanted = tiny_unet.sample(change(self.floats), **sampling)
        plain = {
            name: value
            for name, value in sampling.items()
            if name in ("batch", "cfg", "steps", "latent")
        }
        key = tuple(sorted((k, v) for k, v in plain.items() if k != "latent"))
        if key not in self.plain:
            self.plain[key] = tiny_unet.sample(self.floats, **plain)
        assert found.isfinite().all()
        assert citizens.error(found, wanted) < EXACT
        assert citizens.error(self.plain[key], wanted) > effect


@pytest.fixture(scope="module")
def pairs():
    """Pairs by format; made once."""
    made: dict[str, Pair] = {}

    def get(fmt: str = "uint4") -> Pair:
        if fmt not in made:
            made[fmt] = Pair(fmt)
        return made[fmt]

    return get


# ------------------------------------------------------------------------------------ ControlNet


@pytest.fixture(scope="module")
def control_net():
    """The host's own ControlNet in float, of the small UNet's widths."""
    config = {k: v for k, v in tiny_unet.UNET.items() if k != "out_channels"}
    config |= {"dtype": torch.float32, "device": CPU, "operations": comfy.ops.manual_cast}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, **config).requires_grad_(False)
    generator = torch.Generator().manual_seed(17)
    for value in net.state_dict().values():
        fan = value[0].numel() if value.dim() > 1 else 25
        value.copy_(torch.randn(value.shape, generator=generator) * fan**-0.5)
    return comfy.controlnet.ControlNet(net, load_device=mm.get_torch_device())


@pytest.mark.parametrize("fmt", tiny_unet.FORMATS)
def test_control_net(pairs, control_net, fmt):
    hint = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(3))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        tiny_unet.conditioning(1), tiny_unet.conditioning(2), control_net, hint, 0.8, 0.0, 1.0
    )
    pairs(fmt).check(positive=positive, negative=negative)


def test_control_net_for_a_part_of_the_steps(pairs, control_net):
    hint = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(4))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        tiny_unet.conditioning(1), tiny_unet.conditioning(2), control_net, hint, 1.0, 0.5, 1.0
    )
    pairs().check(positive=positive, negative=negative, steps=3)


@pytest.fixture(scope="module")
def control_lora():
    """A ControlNet as the host stores it beside a model: the difference from its first half."""
    config = {k: v for k, v in tiny_unet.UNET.items() if k != "out_channels"}
    config |= {"dtype": torch.float32, "device": CPU, "operations": comfy.ops.manual_cast}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, **config)
    shared, generator = tiny_unet.float_weights(), torch.Generator().manual_seed(19)
    weights = {"lora_controlnet": torch.zeros(())}
    for name, value in net.state_dict().items():
        fan = value[0].numel() if value.dim() > 1 else 25
        if name not in shared:
            weights[name] = torch.randn(value.shape, generator=generator) * fan**-0.5
        elif value.dim() > 1 and not name.startswith("time_embed"):
            rows, columns = len(value), value[0].numel()
            layer = name.removesuffix(".weight")
            weights[f"{layer}.up"] = torch.randn(rows, 2, generator=generator) * 0.3
            weights[f"{layer}.down"] = torch.randn(2, columns, generator=generator) * columns**-0.5
    return comfy.controlnet.ControlLora(weights)


@pytest.mark.parametrize("fmt", ["uint4", "uint4_svd"])
def test_control_lora(pairs, control_lora, fmt):
    """The host makes this ControlNet of the model's own weights."""
    hint = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(5))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        tiny_unet.conditioning(1), tiny_unet.conditioning(2), control_lora, hint, 0.8, 0.0, 1.0
    )
    pairs(fmt).check(positive=positive, negative=negative)


def test_control_lora_beside_a_lora(pairs, control_lora, lora):
    """As on a float model, its weights are those with the LoRA; and after another ControlNet."""
    hint = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(6))
    given = tiny_unet.conditioning(1), tiny_unet.conditioning(2)
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        *given, control_lora, hint, 0.8, 0.0, 1.0
    )

    def put(patcher):
        return nodes.LoraLoaderModelOnly().load_lora_model_only(patcher, lora, 0.7)[0]

    pairs().check(put, positive=positive, negative=negative)


# --------------------------------------------------------------------------------- block patches


def image_prompt(seed: int = 6, tokens: int = 4):
    """IP-Adapter's way: attention to tokens of an image beside that to the text, in every block."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, tokens, tiny_unet.CONTEXT, generator=generator)
    maps = {
        width: [torch.randn(tiny_unet.CONTEXT, width, generator=generator) * 0.1 for _ in "kv"]
        for width in (32, 64, 128)
    }

    def attend(q, k, v, extra_options):
        heads = extra_options["n_heads"]
        key, value = (
            (image.to(q) @ weight.to(q)).repeat(len(q), 1, 1) for weight in maps[q.shape[-1]]
        )
        text = optimized_attention(q, k, v, heads)
        return text + 0.7 * optimized_attention(q, key, value, heads)

    def put(patcher):
        clone = patcher.clone()
        for block, number, depth in (
            *(("input", n, d) for n in (1, 3, 5) for d in range(1)),
            ("middle", 0, 0),
            *(("output", n, d) for n in range(6) for d in range(1)),
        ):
            clone.set_model_attn2_replace(attend, block, number, depth)
        return clone

    return put


def test_image_prompt_by_replaced_attention(pairs):
    for fmt in ("uint4", "uint4_svd"):
        pairs(fmt).check(image_prompt())


def block_patches(patcher):
    """One patch of each kind that a UNet block offers."""
    clone = patcher.clone()
    clone.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k * 1.1, v * 0.9))
    clone.set_model_attn2_patch(lambda q, k, v, extra_options: (q * 0.8, k, v))
    clone.set_model_attn1_output_patch(lambda n, extra_options: n * 1.05)
    clone.set_model_attn2_output_patch(lambda n, extra_options: n * 0.9)
    clone.set_model_input_block_patch(lambda h, transformer_options: h * 1.02)
    clone.set_model_output_block_patch(lambda h, hsp, transformer_options: (h, hsp * 0.9))
    clone.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * 0.97
    )
    return clone


def test_patches_of_every_kind_of_block(pairs):
    pairs().check(block_patches)


def test_replaced_blocks_of_flux():
    """Of a MODEL that the loader made: fused layers of parts of several formats."""

    def replaced(given, extra):
        out = extra["original_block"](given)
        return out | {"img": out["img"] * 1.5}

    def run(patcher, patched: bool):
        clone = patcher.clone()
        if patched:
            clone.set_model_patch_replace(replaced, "dit", "double_block", 0)
            clone.set_model_patch_replace(replaced, "dit", "single_block", 1)
        citizens.on_device(clone)
        given = citizens.inputs()
        found = clone.model.apply_model(
            given["x"],
            given["timestep"],
            c_crossattn=given["context"],
            y=given["y"],
            guidance=given["guidance"],
            transformer_options=clone.model_options["transformer_options"],
        )
        mm.unload_model_and_clones(clone)
        return found

    ours = citizens.load(citizens.MIXED)
    plain = citizens.plain_model(citizens.floats(ours))
    found, wanted = run(ours, True), run(plain, True)
    assert citizens.error(found, wanted) < EXACT
    assert citizens.error(run(plain, False), wanted) > 0.01


# --------------------------------------------------------------------------------- stock nodes

NODES = {
    "FreeU": lambda m: FreeU.execute(m, 1.3, 1.4, 0.9, 0.2),
    "FreeU_V2": lambda m: FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2),
    "PAG": lambda m: PerturbedAttentionGuidance.execute(m, 3.0),
    "SAG": lambda m: SelfAttentionGuidance.execute(m, 0.8, 2.0),
    "RescaleCFG": lambda m: RescaleCFG().patch(m, 0.7),
    "PerpNeg": lambda m: PerpNeg.execute(m, tiny_unet.conditioning(8), 1.0),
    "cross-attention multiply": lambda m: UNetCrossAttentionMultiply.execute(m, 1.2, 0.8, 1, 1.1),
    "downscale": lambda m: PatchModelAddDownscale.execute(
        m, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"
    ),
    "ToMe": lambda m: TomePatchModel.execute(m, 0.5),
}


@pytest.mark.parametrize("name", NODES)
def test_a_stock_node_patches_the_model(pairs, name):
    def put(patcher):
        torch.manual_seed(1)  # ToMe chooses tokens at random
        made = NODES[name](patcher)
        return made[0] if isinstance(made, tuple) else made.args[0]

    pairs().check(put, effect=1e-3)


# --------------------------------------------------------------------- batches, CFG, conditioning


@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_guidance_scale(pairs, cfg):
    found = tiny_unet.sample(pairs().ours, cfg=cfg)
    assert citizens.error(found, tiny_unet.sample(pairs().floats, cfg=cfg)) < EXACT
    assert citizens.error(found, tiny_unet.sample(pairs().floats)) > 0.01


@pytest.mark.parametrize("fmt", tiny_unet.FORMATS)
def test_a_batch_of_pictures(pairs, fmt):
    found = tiny_unet.sample(pairs(fmt).ours, batch=3)
    assert citizens.error(found, tiny_unet.sample(pairs(fmt).floats, batch=3)) < EXACT
    assert citizens.error(found[0], found[1]) > 0.1  # noise of its own for each
    # a picture does not depend on its neighbours
    single = tiny_unet.sample(
        pairs(fmt).ours, latent={"samples": torch.zeros(3, 4, 16, 12), "batch_index": [0, 1, 2]}
    )
    assert citizens.error(single, found) < EXACT


def test_prompts_of_several_lengths_and_areas(pairs):
    """Conditionings that the host cannot put into one batch."""
    long = tiny_unet.conditioning(3, tokens=29)
    (area,) = nodes.ConditioningSetArea().append(tiny_unet.conditioning(4), 64, 48, 32, 16, 0.9)
    (both,) = nodes.ConditioningCombine().combine(long, area)
    pairs().check(positive=both, batch=2)


def test_previews_of_every_step(pairs):
    """The picture that the page shows while sampling, step for step."""

    def previews(patcher):
        shown = []
        comfy.utils.set_progress_bar_global_hook(
            lambda value, total, preview, node_id=None: shown.append((value, total, preview))
        )
        tiny_unet.sample(patcher, steps=3)
        return shown

    method, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    try:
        found, wanted = previews(pairs().ours), previews(pairs().floats)
    finally:
        args.preview_method = method
        comfy.utils.set_progress_bar_global_hook(None)
    assert [(value, total) for value, total, _ in found] == [(1, 3), (2, 3), (3, 3)]
    assert latent_preview.get_previewer(CPU, pairs().ours.model.latent_format) is None
    pictures = [torch.tensor(bytearray(p[1].convert("RGB").tobytes())) for _, _, p in found]
    for picture, (_, _, other) in zip(pictures, wanted, strict=True):
        theirs = torch.tensor(bytearray(other[1].convert("RGB").tobytes()))
        assert (picture.int() - theirs.int()).abs().max() <= 2
    assert not torch.equal(pictures[0], pictures[2])


# ------------------------------------------------------------------------------ merges and hooks

MERGES = {
    "simple": lambda a, b: ModelMergeSimple().merge(a, b, 0.7),
    "blocks": lambda a, b: ModelMergeBlocks().merge(a, b, input=0.9, middle=0.3, out=0.5),
}


@pytest.fixture(scope="module")
def others():
    """A second model of the same kind, quantized and in float."""
    return tiny_unet.ours("uint4", seed=1), tiny_unet.floats("uint4", seed=1)


@pytest.mark.parametrize("how", MERGES)
def test_a_merge_of_two_low_bit_models(pairs, others, how):
    """Linear layers carry the other's share exactly; convolutions too."""
    ours, floats = others
    found = tiny_unet.sample(MERGES[how](pairs().ours, ours)[0], steps=1)
    wanted = tiny_unet.sample(MERGES[how](pairs().floats, floats)[0], steps=1)
    assert citizens.error(found, wanted) < 1e-4
    assert citizens.error(tiny_unet.sample(pairs().floats, steps=1), wanted) > 0.01


@pytest.fixture
def lora(tmp_path):
    """A LoRA of attention and a convolution, by the host's node's name for it."""
    generator = torch.Generator().manual_seed(12)
    tensors = {}
    for name, shape in (
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k", (128, 96)),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", (32, 32)),
        ("diffusion_model.output_blocks.5.0.in_layers.2", (32, 64, 3, 3)),
    ):
        rows, *rest = shape
        ones = [1] * (len(rest) - 1)
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, *rest, generator=generator) * 0.3
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 4, *ones, generator=generator) * 0.3
    save_file(tensors, tmp_path / "hook.safetensors")
    known = folder_paths.folder_names_and_paths["loras"]
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    folder_paths.filename_list_cache.clear()
    yield "hook.safetensors"
    folder_paths.folder_names_and_paths["loras"] = known
    known[0].remove(str(tmp_path))
    folder_paths.filename_list_cache.clear()


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.0, 1.5), (1.0, 0.0)])
def test_a_hook_on_one_prompt_by_schedule(pairs, lora, strengths):
    """A LoRA that only the positive prompt has, with a strength for each half of the steps."""
    (hooks,) = CreateHookLoraModelOnly().create_hook_model_only(lora, 0.8)
    frames = None
    for start, strength in zip((0.0, 0.5), strengths, strict=True):
        (frames,) = CreateHookKeyframe().create_hook_keyframe(strength, start, frames)
    hooks = hooks.clone()
    hooks.set_keyframes_on_hooks(frames)
    positive = comfy.hooks.set_hooks_for_conditioning(tiny_unet.conditioning(1), hooks)
    pairs().check(positive=positive, steps=3)
    # nothing of it stays
    again = tiny_unet.sample(pairs().ours)
    assert torch.equal(again, tiny_unet.sample(pairs().ours))
    assert citizens.error(again, tiny_unet.sample(pairs().floats)) < EXACT


# -------------------------------------------------------------------------- compile, many devices


@pytest.mark.slow
def test_sampling_a_compiled_model_compiles_once():
    """The second step, and a second run, recompile nothing."""
    patcher = tiny_unet.ours()
    patcher.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda _, *given, **more: attention_pytorch(*given, **more)
    )
    patcher.cached_patcher_init = (lambda disable_dynamic=True: patcher, ())
    eager = tiny_unet.sample(patcher, steps=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    clone = patcher.clone()
    set_torch_compile_wrapper(
        model=clone, backend="aot_eager", options={"guard_filter_fn": skip_torch_compile_dict}
    )
    found = tiny_unet.sample(clone, steps=3)
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    assert graphs > 0 and citizens.error(found, eager) < EXACT
    first = dict(torch._dynamo.utils.counters["graph_break"])
    tiny_unet.sample(clone, steps=2, seed=6)
    assert stats["unique_graphs"] == graphs
    assert dict(torch._dynamo.utils.counters["graph_break"]) == first == {}
    torch._dynamo.reset()


def test_the_work_is_split_between_devices(pairs):
    """As MultiGPU CFG Split does it, with a second name of the CPU for the second device."""
    patcher = tiny_unet.ours()
    patcher.cached_patcher_init = (tiny_unet.ours, ())
    model = patcher.clone()
    other = model.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    assert other.model is not model.model
    other.is_multigpu_base_clone = True
    model.set_additional_models("multigpu", [other])
    model.match_multigpu_clones()
    GPUOptionsGroup().register(model)
    passes = []
    for each in (model, other):
        each.model.diffusion_model.register_forward_pre_hook(
            lambda *_, each=each: passes.append(each)
        )
    found = tiny_unet.sample(model)
    assert {id(each) for each in passes} == {id(model), id(other)}
    assert citizens.error(found, tiny_unet.sample(pairs().floats)) < EXACT
