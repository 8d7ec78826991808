"""The progress of long work, on the page and in the terminal."""

from __future__ import annotations

import sys

import comfy.model_management
import comfy.utils

__all__ = ["NodeProgress"]


class NodeProgress:
    """Told before each layer: moves the node's bar, shows the layer's name, heeds interrupts.

    Args:
        node_id: Of the node on the page; None where there is no page.
    """

    def __init__(self, node_id: str | None) -> None:
        self._node_id = node_id
        self._bar: comfy.utils.ProgressBar | None = None

    def __call__(self, done: int, total: int, name: str) -> None:
        """A layer begins.

        Raises:
            InterruptProcessingException: The user interrupted the run.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)
        # A program that runs nodes without ComfyUI's server has no page.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is not None and self._node_id is not None:
            text = f"{done} of {total} layers: {name}" if name else f"{total} layers done"
            server.send_progress_text(text, self._node_id)
