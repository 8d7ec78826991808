"""Quantizing: the package's own codes and scales where it is deterministic and right."""

from __future__ import annotations

import pytest
import torch
from support import pack
from units import assert_near, normal_form, units

dtypes = pack("quant.dtypes")
weights = pack("quant.weight")
affine = pack("quant.affine")
lowrank = pack("quant.lowrank")
rotation = pack("quant.rotation")
LowBitError = pack("quant.errors").LowBitError


def settings_of(case) -> dict:
    """The case's configuration as arguments of `quantize`."""
    config, facts = case.facts["config"], case.facts
    group_size = config.get("group_size", 0)
    if facts["transposed"] and group_size == 0:
        group_size = -1
    return {
        "fmt": facts["format"],
        "group_size": group_size,
        "use_codebook": config.get("use_codebook", False),
        "hadamard_group_size": config.get("hadamard_group_size", 256)
        if config.get("use_hadamard")
        else 0,
        "svd_rank": config.get("svd_rank", 0),
        "embedding": facts["kind"] == "embedding",
    }


def by_the_same_rules(case) -> bool:
    """Cases in which the package rounds as it says: not its own floats, nor overflowing codes."""
    fmt = dtypes.get_format(case.facts["format"])
    flattened = case.facts["transposed"] and case.facts["kind"].startswith("conv")
    overflows = fmt.kind == "uint" and 9 <= fmt.bits <= 15
    return fmt.kind != "float" and not overflows and not flattened


def test_codes_and_scales_are_the_packages() -> None:
    count = 0
    for case in units("layers"):
        if not by_the_same_rules(case) or case.facts["config"].get("use_svd"):
            continue
        theirs = normal_form(case)
        ours = weights.quantize(case.tensors["original"], **settings_of(case))
        ours.check()
        assert ours.spec == theirs.spec, case.name
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, tensor in theirs.tensors.items():
            mine = ours.tensors[name]
            assert mine.dtype == tensor.dtype and mine.numel() == tensor.numel(), case.name
            if case.facts["hadamard"]:
                continue
            same = mine.reshape(-1).view(torch.uint8) == tensor.reshape(-1).view(torch.uint8)
            assert same.all(), (case.name, name)
        if case.facts["hadamard"]:
            # The sums of the rotation may differ in the last bit, and with them a code.
            limit = theirs.tensors["scale"].abs().max() if "scale" in theirs.tensors else 0.1
            assert (ours.dequantize() - theirs.dequantize()).abs().max() <= 1.01 * limit
        count += 1
    assert count > 150


def test_shapes_and_errors_are_the_packages_for_every_case() -> None:
    for case in units("layers"):
        theirs = normal_form(case)
        if case.facts["transposed"] and case.facts["kind"].startswith("conv"):
            continue
        original = case.tensors["original"]
        ours = weights.quantize(original, **settings_of(case))
        assert ours.spec == theirs.spec, case.name
        shapes = {name: t.shape for name, t in theirs.tensors.items() if name != "codes"}
        if case.facts["codebook"]:
            assert ours.tensors["levels"].numel() == theirs.tensors["levels"].numel()
            del shapes["levels"]
        assert all(ours.tensors[name].shape == shape for name, shape in shapes.items()), case.name
        mine = (ours.dequantize() - original).norm()
        other = (theirs.dequantize() - original).norm()
        # Small layers and random directions: a branch may be a little less lucky.
        assert mine <= other * (1.05 if theirs.spec.rank else 1.01), (case.name, mine, other)


def test_wide_unsigned_integers_keep_their_largest_value() -> None:
    """The package scales 9 to 15 bits to 2^n, a code that does not fit into n bits."""
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    for bits in range(9, 16):
        found = weights.quantize(weight, f"uint{bits}", group_size=-1)
        step = found.tensors["scale"].max()
        assert (found.dequantize() - weight).abs().max() <= 0.51 * step


def test_low_rank_branch_is_torchs_own_method_for_the_seed() -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 64)
    for source in (weight, weight.t().contiguous()):
        torch.manual_seed(5)
        left, values, right = torch.svd_lowrank(source, q=6, niter=3)
        before = torch.get_rng_state()
        up, down, rest = lowrank.find_branch(source, 6, steps=3, dtype=torch.float32, seed=5)
        assert torch.equal(before, torch.get_rng_state())
        assert_near(up @ down, (left * values) @ right.t(), "branch", 1e-5)
        assert_near(rest, source - up @ down, "residual")


def test_residual_makes_up_for_rounded_factors() -> None:
    torch.manual_seed(2)
    weight = torch.randn(32, 128) + torch.randn(32, 1) @ torch.randn(1, 128) * 3
    found = weights.quantize(weight, "int16", svd_rank=4, svd_dtype=torch.bfloat16)
    assert found.tensors["svd_up"].dtype == torch.bfloat16
    assert found.tensors["svd_down"].shape == (4, 128)
    assert_near(found.dequantize(), weight, "int16", 1e-4)
    plain = weights.quantize(weight, "int4")
    branch = weights.quantize(weight, "int4", svd_rank=4)
    assert (branch.dequantize() - weight).norm() < 0.6 * (plain.dequantize() - weight).norm()


@pytest.mark.parametrize(
    ("channels", "wanted", "groups"),
    [
        *((96, 32, 3), (96, 30, 2), (120, 32, 2), (100, 30, 2), (90, 45, 2), (3072, 1024, 3)),
        *((64, 64, 1), (64, 100, 1), (64, 0, 1), (64, -1, 1), (97, 8, 1)),
    ],
)
def test_group_counts(channels: int, wanted: int, groups: int) -> None:
    assert affine.group_count(channels, wanted) == groups


@pytest.mark.parametrize(
    ("channels", "wanted", "block"),
    [(256, 256, 256), (96, 256, 32), (3072, 256, 256), (45, 256, 0), (6, 256, 0), (160, 128, 32)],
)
def test_rotation_blocks(channels: int, wanted: int, block: int) -> None:
    assert rotation.block_size(channels, wanted) == block


def test_groups_without_spread_are_exact() -> None:
    weight = torch.zeros(8, 64)
    weight[1] = 0.37
    for name in ("uint4", "int4", "float4_e2m1fn", "float8_e4m3fn", "uint8"):
        found = weights.quantize(weight, name, group_size=16).dequantize()
        assert torch.equal(found[0], weight[0]) and torch.allclose(found[1], weight[1]), name


def test_narrow_inputs_are_quantized_in_float32() -> None:
    torch.manual_seed(3)
    weight = torch.randn(16, 64).to(torch.bfloat16)
    narrow, wide = (weights.quantize(w, "uint4") for w in (weight, weight.float()))
    assert torch.equal(narrow.tensors["scale"], wide.tensors["scale"])
    assert torch.equal(narrow.tensors["codes"], wide.tensors["codes"])


def test_stochastic_quantization_repeats_for_a_seed() -> None:
    torch.manual_seed(4)
    weight = torch.randn(16, 64)
    one, two, other, nearest = (
        weights.quantize(weight, "int4", seed=seed, stochastic=on).tensors["codes"]
        for seed, on in ((1, True), (1, True), (2, True), (1, False))
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other) and not torch.equal(one, nearest)


@pytest.mark.parametrize(
    ("weight", "settings", "said"),
    [
        (torch.zeros(4), {"fmt": "int8"}, "2 to 5 dimensions"),
        (torch.zeros(0, 4), {"fmt": "int8"}, "2 to 5 dimensions"),
        (torch.zeros(4, 4, dtype=torch.int32), {"fmt": "int8"}, "a float weight"),
        (torch.full((4, 4), float("nan")), {"fmt": "int8"}, "finite"),
        (torch.full((4, 4), float("inf")), {"fmt": "uint4"}, "finite"),
        (torch.zeros(4, 4), {"fmt": "int8", "use_codebook": True}, "codebook"),
        (torch.zeros(4, 4), {"fmt": "uint9", "use_codebook": True}, "codebook"),
        (torch.zeros(4, 4), {"fmt": "float8_e8m0fnu"}, "sign"),
        (torch.zeros(4, 4), {"fmt": "int99"}, "not known"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight, settings: dict, said: str) -> None:
    with pytest.raises(LowBitError) as caught:
        weights.quantize(weight, **settings)
    assert said in str(caught.value)


def test_check_names_the_tensor_that_does_not_fit() -> None:
    good = weights.quantize(torch.randn(16, 64), "uint4", group_size=16, svd_rank=2)
    good.check()
    broken = {
        "codes": [good.tensors["codes"][:-1], good.tensors["codes"].to(torch.int16)],
        "scale": [None, good.tensors["scale"][:, :2], good.tensors["scale"][0]],
        "zero_point": [None, good.tensors["zero_point"].to(torch.int32)],
        "svd_up": [None, good.tensors["svd_up"].t()],
        "svd_down": [good.tensors["svd_down"][:, 1:]],
    }
    for name, replacements in broken.items():
        for replacement in replacements:
            tensors = {**good.tensors, name: replacement}
            if replacement is None:
                del tensors[name]
            with pytest.raises(LowBitError, match=name):
                weights.QuantizedWeight(good.spec, tensors).check()
    learnt = weights.quantize(torch.randn(16, 64), "uint4", use_codebook=True)
    levels = learnt.tensors["levels"][..., :15]
    with pytest.raises(LowBitError, match="levels"):
        weights.QuantizedWeight(learnt.spec, {**learnt.tensors, "levels": levels}).check()
