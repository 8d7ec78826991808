"""Smoothing, second scales and the arithmetic of activations in a weight's normal form."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import pack
from torch import Tensor
from w4a4 import SHIFT, activations, layer, normal_form, relative

faithful = pack("kernels.faithful")
reference = pack("kernels.reference")
spec_of = pack("kernels.spec")
weights = pack("quant.weight")
LowBitError = pack("quant.errors").LowBitError

KINDS = ("int4", "uint4", "nvfp4")


def form(kind: str, rows: int = 24, columns: int = 128, **more: object):
    """A layer and its weight; nvfp4 has a second scale for each row if asked for `by_row`."""
    made = layer(kind, rows, columns, **more)
    return made, normal_form(made)


# ----------------------------------------------------------------------------------- dequantize


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_weights_are_the_formula(kind: str) -> None:
    for seed, (rows, columns, rank) in enumerate(((24, 128, 16), (7, 192, 3), (40, 64, 0))):
        made, weight = form(kind, rows, columns, rank=rank, seed=seed, by_row=seed == 1)
        weight.check()
        assert relative(weight.dequantize(), made.dense) < 1e-6
        raw = reference.dequantize(weight.tensors, weight.spec, branch=False, unsmooth=False)
        assert relative(raw, made.residual) < 1e-6
        outside = reference.dequantize(weight.tensors, weight.spec, branch=False)
        assert relative(outside, made.residual / made.smooth.double()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_are_done_some_rows_at_a_time(kind: str) -> None:
    made, weight = form(kind, 2100, 256, seed=4, by_row=True)
    assert weight.spec.numel > reference._CHUNK_CPU
    assert relative(weight.dequantize(), made.dense) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(kind: str) -> None:
    made, weight = form(kind, 50, 128, seed=5, by_row=True)
    index = torch.randint(0, 50, (3, 11))
    found = reference.dequantize_rows(weight.tensors, weight.spec, index)
    assert relative(found, made.dense[index]) < 1e-6


def test_multiplied_smoothing_and_rotation() -> None:
    """W = (codes * smooth + up @ down) turned back: the branch stands outside of the smoothing."""
    torch.manual_seed(6)
    weight = weights.quantize(torch.randn(16, 128), "int8", svd_rank=4, hadamard_group_size=64)
    assert weight.spec.hadamard == 64
    smooth = 0.5 + torch.rand(128)
    parts = [
        reference.dequantize(weight.tensors, weight.spec, branch=False, unrotate=False),
        weight.tensors["svd_up"] @ weight.tensors["svd_down"],
    ]
    for smoothing, factor in (("multiply", smooth), ("divide", 1 / smooth)):
        spec = dataclasses.replace(weight.spec, smoothing=smoothing)
        tensors = weight.tensors | {"smooth": smooth}
        found = reference.dequantize(tensors, spec)
        turned = reference.hadamard(parts[0] * factor + parts[1], 64, spec.hadamard_basis)
        assert relative(found, turned) < 1e-6
        x = torch.randn(3, 128)
        y = reference.linear_dequantize(x, tensors, spec)
        rows = torch.randn(40, 128)
        near = reference.linear_int8(rows, tensors, spec)
        assert relative(y, x @ turned.T) < 1e-5 and relative(near, rows @ turned.T) < 0.02


# --------------------------------------------------------------------------------------- checks

BROKEN = [
    ("int4", lambda t, s: ({**t, "smooth": t["smooth"][:-1]}, s), "smooth has the wrong size"),
    ("int4", lambda t, s: (_without(t, "smooth"), s), "no smooth"),
    ("int4", lambda t, s: ({**t, "smooth": t["smooth"].int()}, s), "smooth has the wrong dtype"),
    ("int4", lambda t, s: (t, _changed(s, smoothing="add")), "smoothing that is not known"),
    ("nvfp4", lambda t, s: (_without(t, "scale_2"), s), "no scale_2"),
    ("nvfp4", lambda t, s: ({**t, "scale_2": t["scale_2"].half()}, s), "scale_2 has the wrong"),
    ("nvfp4", lambda t, s: ({**t, "scale_2": t["scale_2"].view(1)}, s), "scale_2 does not fit"),
    ("uint4", lambda t, s: (_without(t, "shift_bias"), s), "no shift_bias"),
    ("uint4", lambda t, s: ({**t, "shift_bias": t["shift_bias"][1:]}, s), "shift_bias has"),
    ("int4", lambda t, s: (t, _rounding(s, static=True)), "no input_scale"),
    ("int4", lambda t, s: ({**t, "input_scale": torch.ones(2)}, _rounding(s, static=True)),
     "input_scale has the wrong size"),
    ("int4", lambda t, s: (t, _rounding(s, offset=True)), "no input_offset"),
    ("int4", lambda t, s: (t, _rounding(s, group=48)), "groups of the activations"),
    ("int4", lambda t, s: (t, _rounding(s, format="int5")), "rounded in a way that is not known"),
    ("int4", lambda t, s: (t, _rounding(s, scale="float16")), "rounded in a way that is not"),
]  # fmt: skip


def _without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


def _changed(spec, **fields: object):
    return dataclasses.replace(spec, **fields)


def _rounding(spec, **fields: object):
    return _changed(spec, activation=_changed(spec.activation, **fields))


@pytest.mark.parametrize(("kind", "broken", "words"), BROKEN, ids=[row[2] for row in BROKEN])
def test_what_does_not_fit_is_named(kind: str, broken, words: str) -> None:
    _, weight = form(kind)
    weight.check()
    tensors, spec = broken(weight.tensors, weight.spec)
    with pytest.raises(LowBitError, match=words):
        weights.QuantizedWeight(spec, tensors).check()


# ----------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_row", [False, True], ids=["one second scale", "by row"])
def test_rows_keep_every_value(kind: str, by_row: bool) -> None:
    made, weight = form(kind, 21, 128, seed=7, by_row=by_row)
    whole = weight.dequantize()
    x = activations(made, 9, seed=7, dtype=torch.float32)
    product = faithful.linear_faithful(x, weight.tensors, weight.spec)
    parts = []
    for start, length in ((0, 8), (8, 1), (9, 12)):
        part = weights.take_rows(weight, start, length)
        part.check()
        rows = slice(start, start + length)
        assert torch.allclose(part.dequantize(), whole[rows], atol=1e-6)
        y = faithful.linear_faithful(x, part.tensors, part.spec)
        assert torch.allclose(y, product[:, rows], atol=1e-5)
        for name in spec_of.SHARED:
            assert part.tensors.get(name) is weight.tensors.get(name)
        parts.append(part)
    joined = weights.concat_rows(parts)
    joined.check()
    assert joined.spec == weight.spec
    assert torch.allclose(joined.dequantize(), whole, atol=1e-6)
    y = faithful.linear_faithful(x, joined.tensors, joined.spec)
    assert torch.allclose(y, product, atol=1e-5)
    if kind == "nvfp4":
        assert joined.tensors["scale_2"].shape == ((21 if by_row else 1), 1, 1)
    swapped = weights.swap_halves(weights.take_rows(weight, 0, 20))
    assert torch.allclose(swapped.dequantize(), whole[:20].roll(10, 0), atol=1e-6)


def test_different_second_scales_become_those_of_rows() -> None:
    parts = [form("nvfp4", rows, 64, rank=0, seed=8 + rows)[1] for rows in (5, 3)]
    parts[1] = dataclasses.replace(
        parts[1], tensors=parts[1].tensors | {"smooth": parts[0].tensors["smooth"]}
    )
    joined = weights.concat_rows(parts)
    joined.check()
    assert joined.tensors["scale_2"].shape == (8, 1, 1)
    expected = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(joined.dequantize(), expected)


def test_byte_scales_are_compared_and_joined() -> None:
    """One scale of one byte for a whole part, equal or not."""
    _, weight = form("nvfp4", 6, 64, rank=0, seed=9)
    scale = weight.tensors["scale"][:1]
    first = dataclasses.replace(weight, tensors=weight.tensors | {"scale": scale})
    second = dataclasses.replace(
        first, tensors=first.tensors | {"scale": (scale.float() / 2).to(scale.dtype)}
    )
    assert weights.concat_rows([first, first]).tensors["scale"].shape == (1, 4, 1)
    joined = weights.concat_rows([first, second])
    assert joined.tensors["scale"].shape == (12, 4, 1)
    expected = torch.cat([first.dequantize(), second.dequantize()])
    assert torch.equal(joined.dequantize(), expected)


def test_what_rows_share_must_be_equal_to_be_joined() -> None:
    _, one = form("uint4", seed=10)
    for name, changed in (
        ("smooth", lambda t: t * 2),
        ("svd_down", lambda t: t * 2),
        ("smooth", lambda t: t.to(torch.float16)),
    ):
        tensors = one.tensors | {name: changed(one.tensors[name])}
        assert weights.concat_rows([one, dataclasses.replace(one, tensors=tensors)]) is None
    copies = {name: tensor.clone() for name, tensor in one.tensors.items()}
    assert weights.concat_rows([one, dataclasses.replace(one, tensors=copies)]) is not None
    for fields in (
        {"smoothing": "multiply"},
        {"activation": None},
        {"activation": _changed(one.spec.activation, shift=0.1)},
    ):
        other = dataclasses.replace(one, spec=_changed(one.spec, **fields))
        assert weights.concat_rows([one, other]) is None
    static = [
        dataclasses.replace(
            one, spec=_rounding(one.spec, static=True, group=-1),
            tensors=one.tensors | {"input_scale": torch.tensor([value])},
        )
        for value in (0.5, 0.5, 0.25)
    ]  # fmt: skip
    assert weights.concat_rows(static[:2]).tensors["input_scale"].shape == (1,)
    assert weights.concat_rows(static[1:]) is None


# ----------------------------------------------------------------------------- rounding anew


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_weight_stays_as_it_is(kind: str) -> None:
    for seed in range(4):
        _, weight = form(kind, 24, 192, seed=seed, rank=0, by_row=seed == 1)
        changed = torch.randn(24, 192) * 10.0 ** (seed - 2)
        once = weights.requantize_like(changed, weight.spec, weight.tensors)
        weights.QuantizedWeight(weight.spec, once).check()
        again = weights.requantize_like(reference.dequantize(once, weight.spec), weight.spec, once)
        for name, tensor in weight.tensors.items():
            assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape, name
            if name != "codes":  # of which two say zero
                assert torch.allclose(again[name].float(), once[name].float(), atol=1e-6), name
        values = (reference.dequantize(each, weight.spec) for each in (once, again))
        assert torch.allclose(*values, rtol=1e-6, atol=0), seed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1e-4, 0.7, 900.0])
def test_changed_weights_are_rounded_as_well_as_ever(kind: str, factor: float) -> None:
    """Scales of one byte follow by their second level, however far the weight moves."""
    made, weight = form(kind, 24, 192, seed=11, rank=0)
    changed = factor * torch.randn(24, 192) / made.smooth.float()
    again = weights.requantize_like(changed, weight.spec, weight.tensors)
    after = reference.dequantize(again, weight.spec)
    assert torch.isfinite(after).all()
    assert relative(after, changed) < 0.14
    smoothed = (after - changed) * made.smooth.float()
    assert relative(smoothed + changed, changed) < 0.3  # rounded where it is smooth


@pytest.mark.parametrize("kind", KINDS)
def test_the_shift_follows_the_new_codes(kind: str) -> None:
    made, weight = form(kind, 24, 128, seed=12, rank=8)
    changed = weight.dequantize() + 0.02 * torch.randn(24, 128)
    again = weights.requantize_like(changed, weight.spec, weight.tensors)
    for name in ("svd_up", "svd_down", "smooth"):
        assert torch.equal(again[name], weight.tensors[name])
    if made.unsigned:
        residual = reference.dequantize(again, weight.spec, branch=False)
        assert torch.allclose(again["shift_bias"], SHIFT * residual.sum(1), atol=1e-6)
        assert not torch.allclose(again["shift_bias"], weight.tensors["shift_bias"], atol=1e-4)
    x = activations(made, 32, seed=12, dtype=torch.float32)
    found = faithful.linear_faithful(x, again, weight.spec, made.bias)
    assert relative(found, x @ changed.T + made.bias) < 0.16


def test_scales_that_are_powers_of_two_stay_so() -> None:
    torch.manual_seed(13)
    spec = dataclasses.replace(
        weights.quantize(torch.randn(8, 64), "float4_e2m1fn", group_size=32).spec,
        activation=spec_of.ActivationSpec("float4_e2m1fn", 32, "float8_e8m0fnu"),
    )
    fresh = weights.quantize(
        torch.randn(8, 64), "float4_e2m1fn", group_size=32, scale_dtype=torch.float8_e8m0fnu
    )
    weights.QuantizedWeight(spec, fresh.tensors).check()
    changed = torch.randn(8, 64) * 5
    again = weights.requantize_like(changed, spec, fresh.tensors)
    scale = again["scale"]
    assert scale.dtype == torch.float8_e8m0fnu
    wide = scale.float()
    assert (torch.log2(wide) % 1 == 0).all()
    largest = changed.view(8, 2, 32).abs().amax(-1, keepdim=True)
    assert (largest <= 6 * wide).all() and (largest > 3 * wide).all()
    after = reference.dequantize(again, spec)
    assert relative(after, changed) < 0.15
    same = weights.requantize_like(after, spec, again)
    assert torch.equal(reference.dequantize(same, spec), after)
