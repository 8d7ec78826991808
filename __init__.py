"""ComfyUI-LowBit: quantized diffusion checkpoints as ordinary ComfyUI models.

ComfyUI imports this file from ``custom_nodes/`` and calls :func:`comfy_entrypoint`.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension that lists the nodes (ComfyUI's V3 entry point)."""
    from .nodes import LowBitExtension

    return LowBitExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
