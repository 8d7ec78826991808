"""Sets of layers that SGLang's validated ModelOpt checkpoints keep in 16 bits, by name.

A file whose layers in 16 bits are just such a set was left so on purpose, for its quality, whatever
its ``ignore`` list says. Layers outside of blocks may be kept beside those of a set.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FALLBACKS", "fallback_set"]

_FLUX1 = frozenset(
    (
        *(
            f"transformer_blocks.*.{layer}"
            for layer in (
                "norm1.linear",
                "norm1_context.linear",
                "ff.net.0.proj",
                "ff.net.2",
                "ff_context.net.0.proj",
                "ff_context.net.2",
            )
        ),
        "single_transformer_blocks.*.norm.linear",
    )
)

#: ``{name: modules, numbers of blocks as *}``
FALLBACKS: dict[str, frozenset[str]] = {
    "FLUX.1 in FP8": _FLUX1,
    "FLUX.1 in NVFP4": _FLUX1 | {"single_transformer_blocks.*.proj_mlp"},
    "FLUX.2 in FP8": frozenset(
        (
            *(f"time_guidance_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
            "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.linear",
            "single_stream_modulation.linear",
            "x_embedder",
            "context_embedder",
            "norm_out.linear",
        )
    ),
    "Qwen-Image in FP8": frozenset(
        (
            "img_in",
            "txt_in",
            "norm_out.linear",
            "proj_out",
            "transformer_blocks.*.img_mod.1",
            "transformer_blocks.*.txt_mod.1",
            "transformer_blocks.*.img_mlp.net.2",
        )
    ),
}


def fallback_set(kept: Iterable[str]) -> str | None:
    """The set that layers kept in 16 bits are; None where they are another choice.

    Args:
        kept: Their modules, numbers of blocks as ``*``.
    """
    kept = set(kept)
    for name, modules in FALLBACKS.items():
        if modules <= kept and all("*" not in module for module in kept - modules):
            return name
    return None
