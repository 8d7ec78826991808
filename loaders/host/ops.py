"""The operations class that ComfyUI builds a low-bit model from.

A subclass of the host's own mixed-precision operations: whatever is not a composite weight of this
pack (plain tensors, ComfyUI's own quantized formats) is left to the host. A composite weight is one
``QuantizedTensor`` in ``weight``; no module registers anything else, because the host pins every
other parameter in VRAM.

``Linear`` hands the layout's plain tensors to a kernel by itself: dispatch through the tensor
subclass costs tens of microseconds a call. Convolutions and embeddings take the same weights, and
dequantize them in their forward. Patches (LoRAs and others) are carried beside all of them, see
``patches``.
"""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ...kernels.reference import dequantize_rows
from ..layouts.composite import BESIDE, FORMAT, LAYOUT, held_by, marker, part_tensors
from ..layouts.dispatch import kernels_of, linear
from .carried import Patched, float32
from .patches import AWAITED, Patchable, baked_state

__all__ = ["make_ops"]

QUANT_ALGOS.setdefault(
    FORMAT,
    {
        "storage_t": torch.uint8,
        "parameters": {"weight"},
        "comfy_tensor_layout": LAYOUT,
        "quantize_input": False,
    },
)


def _composite(weight) -> bool:
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT


# ------------------------------------------------------------------------------- the operations


class _CompositeWeight(Patchable):
    """Loading, saving and patching of a module whose weight may be a composite."""

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = f"{prefix}weight"
        weight = state_dict.get(key)
        if not _composite(weight):
            return super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        del state_dict[key]
        state_dict.pop(f"{prefix}comfy_quant", None)
        expected = self._weight_shape()
        if expected is not None and tuple(weight.shape) != expected:
            error_msgs.append(f"{key} is {tuple(weight.shape)}, the model has {expected}")
            return None
        self.quant_format, self.layout_type = FORMAT, LAYOUT
        self.weight = _parameter(weight)
        torch.nn.Module._load_from_state_dict(
            self,
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if key in missing_keys:
            missing_keys.remove(key)
        return None

    def _weight_shape(self) -> tuple[int, ...] | None:
        weight = getattr(self, "weight", None)
        return None if weight is None else tuple(weight.shape)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        sd = destination if destination is not None else {}
        weight = getattr(self, "weight", None)
        patched = self.patched if self.carries else None
        if not _composite(weight):
            super().state_dict(*args, destination=sd, prefix=prefix, keep_vars=keep_vars)
            if isinstance(patched, Patched):
                sd.update(baked_state(self, patched, f"{prefix}weight")[0])
            return sd
        pieces = weight.state_dict(f"{prefix}weight")
        if isinstance(patched, Patched):
            pieces, weight = baked_state(self, patched, f"{prefix}weight")
        sd.update(pieces)
        if getattr(self, "bias", None) is not None:
            sd[f"{prefix}bias"] = self.bias
        sd[f"{prefix}comfy_quant"] = marker(weight._params.spec)
        return sd

    # ModelMerge asks a module for every name in its state dict.

    @property
    def comfy_quant(self) -> torch.Tensor:
        """Marker of the layer."""
        if _composite(self.weight):
            return marker(self.weight._params.spec)
        return _attribute(super().state_dict(), "comfy_quant")

    @property
    def weight_scale(self) -> torch.Tensor:
        """Scale of a layer in one of the host's own formats."""
        return _attribute(super().state_dict(), "weight_scale")

    # The host asks a module for convert_weight and set_weight and patches plain tensors by itself
    # where it has none; so these exist just where the weight is a composite.

    @property
    def convert_weight(self):
        """Turns the weight into the float one that patches are calculated on."""
        return self._converted if self.carries else super().convert_weight

    @property
    def set_weight(self):
        """Takes a patched float weight."""
        return self._set if self.carries else super().set_weight

    def _converted(self, weight, inplace=False, **kwargs):
        """The host calculates in the dtype that it casts to before."""
        if not isinstance(weight, QuantizedTensor):
            return weight
        return float32(weight, self).to(weight.dtype)

    def _set(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Keep the packed weight: a MODEL's callback tells what to carry beside it.

        A weight of another shape is held in float. Without a callback, and for one that is asked
        for, the patched weight is rounded anew in the layer's own format.
        """
        if return_weight:
            return self.rounded(weight, seed)
        if self.managed and inplace_update:
            return None  # hooks: the callback for them follows, and the copy is put back later
        if tuple(weight.shape) != tuple(self.weight.shape):
            plain = weight.to(self.weight.dtype)
            self.weight = torch.nn.Parameter(plain, requires_grad=False)
        elif self.managed:
            self._parameters["weight"] = _parameter(self.weight.to(weight.device))
            self.resident = AWAITED
        else:
            self.weight = _parameter(self.rounded(weight, seed))
        return None

    def rounded(self, weight: torch.Tensor, seed: int | None = None) -> QuantizedTensor:
        """A float weight in the layer's own format.

        An unchanged weight keeps its codes: the host also sends weights round this way without a
        patch, and rounding them again would drift.
        """
        old = self.weight.detach().to(weight.device)
        if torch.equal(weight, float32(old, self).to(weight.dtype)):
            return old
        smooth = getattr(self, "pre_quant_scale", None)
        if smooth is not None:
            weight = weight / smooth.to(weight)
        return old.requantize_from_float(
            weight, scale="recalculate", stochastic_rounding=seed, inplace_ops=True
        ).to(self.weight.dtype)

    def _apply(self, fn, recurse=True):
        weight = getattr(self, "weight", None)
        if not _composite(weight):
            return super()._apply(fn, recurse)
        self._parameters["weight"] = None  # torch would copy it once more
        try:
            return super()._apply(fn, recurse)
        finally:
            moved = fn(weight)
            if moved.is_inference() and not torch.is_inference_mode_enabled():
                moved = moved.clone()
            self._parameters["weight"] = _parameter(moved)
            self.release()


for _name in BESIDE:
    setattr(
        _CompositeWeight,
        f"weight_{_name}",
        property(
            lambda self, name=f"weight_{_name}": _attribute(self.weight.state_dict("weight"), name),
            doc=f"Entry weight_{_name} of a composite in state dicts.",
        ),
    )


def _parameter(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight itself as a Parameter that requires no gradient.

    ``torch.nn.Parameter`` makes one of a detached weight, and detaching a ``QuantizedTensor``
    copies everything that lies beside its codes.
    """
    weight._is_param = True
    return weight


def _attribute(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """An entry of a state dict as an attribute: absent ones are AttributeErrors."""
    if name not in state:
        raise AttributeError(name)
    return state[name]


def _dequantized(weight, inplace=False, **kwargs):
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


class _CompositeConv(_CompositeWeight):
    """A convolution: the host's cast gives the composite, this dequantizes it."""

    def takes_product(self, offset):
        return self.groups == 1 and (offset is None or offset[0] == 0)

    def _conv_forward(self, input, weight, bias, *args, **kwargs):
        def run(x, plain, plain_bias=None):
            return super(_CompositeConv, self)._conv_forward(x, plain, plain_bias, *args, **kwargs)

        patched = self.patched
        if patched is None:
            return run(input, _dequantized(weight), bias)
        if patched.reshapes:
            whole = patched.whole(self, weight, input.device)
            return run(input, whole.to(input.dtype), bias)
        return patched.conv(self, weight, input, run(input, _dequantized(weight), bias), run)


def make_ops(compute_dtype: torch.dtype, matmul: str = "dequantize", backend: str = "auto"):
    """An operations class for one model.

    Args:
        compute_dtype: Dtype of activations.
        matmul: One of ``MATMUL_MODES``; layers that cannot run it dequantize.
        backend: "auto" or the backend that the user forces.
    """
    base = comfy.ops.mixed_precision_ops({}, compute_dtype)

    class LowBitOps(base):
        """ComfyUI's operations over composite low-bit weights."""

        class Linear(_CompositeWeight, base.Linear):
            """Linear over ``[N, K]`` composite weights."""

            asked = (matmul, backend)  # what reports tell the kernels for

            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                super().__init__(in_features, out_features, bias, device, dtype)
                self._keep_float32 = dtype == torch.float32 != compute_dtype

            def _weight_shape(self):
                return self._orig_shape

            def _load_from_state_dict(self, state_dict, prefix, *args):
                plain = state_dict.get(f"{prefix}weight")
                super()._load_from_state_dict(state_dict, prefix, *args)
                if _composite(getattr(self, "weight", None)):
                    self._kernels = {}
                    self._choose(comfy.model_management.get_torch_device(), compute_dtype)
                if self._keep_float32 and type(plain) is torch.Tensor and plain.is_floating_point():
                    # The host would cast a layer that its model asked for in float32.
                    self.weight = torch.nn.Parameter(plain.float(), requires_grad=False)

            @property
            def carries(self):
                # The host's own formats too: it would round them anew.
                return isinstance(getattr(self, "weight", None), QuantizedTensor)

            def forward(self, input, *args, **kwargs):
                patched = self.patched
                if not _composite(getattr(self, "weight", None)) or isinstance(
                    input, QuantizedTensor
                ):
                    return self._as_the_host(patched, input, *args, **kwargs)
                comfy.ops.run_every_op()
                # By its length: torch.compile takes every list of a class of its own for true.
                dense = len(self.weight_function) > 0 or input.requires_grad
                if dense:
                    weight, bias, stream = comfy.ops.cast_bias_weight(
                        self, input, offloadable=True, compute_dtype=input.dtype
                    )
                else:
                    weight, bias, stream = comfy.ops.cast_bias_weight(
                        self,
                        dtype=self.weight.dtype,
                        device=input.device,
                        bias_dtype=input.dtype,
                        offloadable=True,
                        compute_dtype=input.dtype,
                        want_requant=True,
                    )
                if patched is not None and patched.reshapes:
                    whole = patched.whole(self, weight, input.device).to(input.dtype)
                    y = torch.nn.functional.linear(input, whole, bias)
                else:
                    if dense:
                        y = torch.nn.functional.linear(input, _dequantized(weight), bias)
                    else:
                        y = self._multiply(input, weight, bias)
                    if patched is not None:
                        y = patched.linear(self, weight, input, y)
                comfy.ops.uncast_bias_weight(self, weight, bias, stream)
                return y

            def _as_the_host(self, patched, input, *args, **kwargs):
                if patched is None or not self.carries:
                    return super().forward(input, *args, **kwargs)
                x = _dequantized(input)
                weight = self.weight.to(x.device)
                if patched.reshapes:
                    whole = patched.whole(self, weight, x.device).to(x.dtype)
                    bias = self.bias if self.bias is None else self.bias.to(x)
                    return torch.nn.functional.linear(x, whole, bias)
                return patched.linear(self, weight, x, super().forward(input, *args, **kwargs))

            def _multiply(self, input, weight, bias):
                if not isinstance(weight, QuantizedTensor):
                    return torch.nn.functional.linear(input, weight.to(input.dtype), bias)
                kernels = self._kernels.get((input.device, input.dtype))
                if kernels is None:
                    kernels = self._choose(input.device, input.dtype)
                return linear(input, held_by(weight), weight._params.spec, bias, kernels)

            @torch.compiler.disable
            def _choose(self, device, dtype):
                """Ask the registry, which torch.compile cannot trace, and remember its answer."""
                spec = self.weight._params.spec
                self._kernels[device, dtype] = kernels_of(spec, matmul, backend, device, dtype)
                return self._kernels[device, dtype]

        class Conv1d(_CompositeConv, base.Conv1d):
            """Conv1d over ``[O, C, k]`` composite weights."""

        class Conv2d(_CompositeConv, base.Conv2d):
            """Conv2d over ``[O, C, kh, kw]`` composite weights."""

        class Conv3d(_CompositeConv, base.Conv3d):
            """Conv3d over ``[O, C, kd, kh, kw]`` composite weights."""

        class Embedding(_CompositeWeight, base.Embedding):
            """Embedding over ``[V, E]`` composite weights; only the looked-up rows are decoded."""

            def _weight_shape(self):
                return (self.num_embeddings, self.embedding_dim)

            def takes_product(self, offset):
                return offset is None

            def forward_comfy_cast_weights(self, input, out_dtype=None):
                if not _composite(self.weight):
                    return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
                dtype = out_dtype or self.weight.dtype
                weight, bias, stream = comfy.ops.cast_bias_weight(
                    self,
                    device=input.device,
                    dtype=self.weight.dtype,
                    offloadable=True,
                    want_requant=True,
                )
                spec = self.weight._params.spec
                if isinstance(weight, QuantizedTensor) and len(spec.parts) == 1:
                    held = part_tensors(held_by(weight), spec, 0)
                    y = dequantize_rows(held, spec.parts[0].weight, input, dtype)
                else:
                    y = torch.nn.functional.embedding(input, _dequantized(weight)).to(dtype)
                patched = self.patched
                if patched is not None:
                    y = patched.embedding(self, weight, input, y)
                comfy.ops.uncast_bias_weight(self, weight, bias, stream)
                return y

    return LowBitOps
