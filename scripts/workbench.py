"""A real ComfyUI server to work with: start, queue prompts over HTTP, follow them, stop.

Imports nothing but the standard library; the demo and the end-to-end tests use it.

    with Server(comfy, base) as server:
        done = server.run(flux_prompt(node("UNETLoader", ...), prefix="image"))
        done.files("save")
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Done", "FailedError", "RefusedError", "Server", "flux_prompt", "link_pack", "node"]

ROOT = Path(__file__).resolve().parent.parent
START_S = 300
Prompt = dict[str, dict]


class RefusedError(Exception):
    """The server did not queue a prompt.

    Attributes:
        errors: ``[(node id, error type, details)]``.
    """

    def __init__(self, answer: dict):
        self.errors = [
            (node_id, error["type"], error["details"])
            for node_id, told in (answer.get("node_errors") or {}).items()
            for error in told["errors"]
        ]
        super().__init__(json.dumps(answer, indent=1))


class FailedError(Exception):
    """A prompt ended with an error or was interrupted.

    Attributes:
        event: "execution_error" or "execution_interrupted".
        node: The node's class.
        message: What the node said.
    """

    def __init__(self, event: str, told: dict):
        self.event = event
        self.node = told.get("node_type", "")
        self.message = told.get("exception_message", "")
        super().__init__(f"{event} in {self.node}: {self.message}")


@dataclass(frozen=True)
class Done:
    """A prompt that ran to its end.

    Attributes:
        outputs: ``{node id: {kind: values}}`` of the output nodes.
        cached: Ids of nodes whose result was still there.
        seconds: From its start to its end, by the server's clock.
        output: The server's output folder.
    """

    outputs: Mapping[str, dict]
    cached: frozenset[str]
    seconds: float
    output: Path

    def files(self, node_id: str) -> list[Path]:
        """What an output node saved."""
        found = []
        for values in self.outputs[node_id].values():
            for item in values:
                if isinstance(item, dict) and item.get("type") == "output":
                    found.append(self.output / item["subfolder"] / item["filename"])
        return found

    def text(self, node_id: str) -> str:
        """What a node showed as text."""
        return "\n".join(self.outputs[node_id]["text"])


@dataclass
class Server:
    """ComfyUI as a process of its own, in a base directory of its own.

    Args:
        comfy: Folder of ComfyUI; nothing is written into it.
        base: Its base directory (models, custom_nodes, output, user).
        arguments: More of ComfyUI's command line.
        python: The interpreter that runs it.
    """

    comfy: Path
    base: Path
    arguments: Sequence[str] = ()
    python: str = sys.executable
    port: int = field(default=0, init=False)
    process: subprocess.Popen | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        return self.base / "server.log"

    def log(self) -> str:
        """All that it has said."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------------------- the process

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: It ended, or is not ready in time; with the end of its log.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        command = [
            *(self.python, "-u", str(self.comfy / "main.py")),
            *("--base-directory", str(self.base)),
            *("--listen", "127.0.0.1", "--port", str(self.port)),
            # its default lies in ComfyUI's own folder
            *("--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"),
            "--disable-auto-launch",
            "--disable-api-nodes",  # no calls to the network
            *self.arguments,
        ]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.base, env=env
            )
        try:
            self._until_ready()
        except BaseException:
            self.stop()
            raise

    def _until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self._alive()
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"the server is not ready after {START_S} s:\n{self.log()[-3000:]}")

    def _alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = self.process.returncode if self.process else "not started"
            raise RuntimeError(f"the server is gone ({code}); it said:\n{self.log()[-3000:]}")

    def stop(self) -> None:
        """End it: asked first, then made to."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    # ---------------------------------------------------------------------------------- requests

    def get(self, path: str) -> dict:
        """The JSON behind a path."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: object) -> dict:
        """Send JSON; the JSON answered, empty where there is none."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else {}

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt; its id.

        Raises:
            RefusedError: Validation found something.
        """
        try:
            return self.post("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise RefusedError(json.loads(error.read())) from None

    def wait(self, prompt_id: str, timeout: float = 300) -> Done:
        """Follow a queued prompt to its end.

        Raises:
            FailedError: A node raised, or it was interrupted.
            TimeoutError: It runs longer than ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return self._read(entry)
            self._alive()
            time.sleep(0.1)
        raise TimeoutError(f"no end after {timeout} s; the server said:\n{self.log()[-3000:]}")

    def _read(self, entry: dict) -> Done:
        events = dict(entry["status"]["messages"])
        for name in ("execution_error", "execution_interrupted"):
            if name in events:
                raise FailedError(name, events[name])
        span = events["execution_success"]["timestamp"] - events["execution_start"]["timestamp"]
        cached = frozenset(events.get("execution_cached", {}).get("nodes", ()))
        return Done(entry["outputs"], cached, span / 1000, self.base / "output")

    def run(self, prompt: Prompt, timeout: float = 300) -> Done:
        """Queue a prompt and follow it to its end."""
        return self.wait(self.queue(prompt), timeout)


def link_pack(base: Path) -> None:
    """Put the pack into a base directory: a link, or a junction on Windows."""
    link = base / "custom_nodes" / "comfyui-lowbit"
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists():
        return
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def node(class_type: str, **inputs: object) -> dict:
    """A node of a prompt; a link is ``[node id, output]``."""
    return {"class_type": class_type, "inputs": inputs}


def flux_prompt(
    loader: dict,
    *,
    prefix: str,
    size: int = 128,
    steps: int = 3,
    seed: int = 7,
    text: str = "a lighthouse in the evening",
    lora: str = "",
) -> Prompt:
    """Load -> text -> KSampler -> decode -> save, as a queued FLUX.1 workflow has it.

    Args:
        loader: The node that gives the MODEL.
        prefix: Of the files: image under "save", latent under "latent".
        size: Of the image.
        steps, seed, text: The sampler's and the encoder's.
        lora: A LoRA to put between.
    """
    model = ["lora", 0] if lora else ["model", 0]
    prompt = {
        "model": loader,
        "clip": node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion"),
        "vae": node("VAELoader", vae_name="taef1"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=text),
        "positive": node("FluxGuidance", conditioning=["text", 0], guidance=3.5),
        "negative": node("ConditioningZeroOut", conditioning=["text", 0]),
        "empty": node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "sampler": node(
            "KSampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
        "latent": node("SaveLatent", samples=["sampler", 0], filename_prefix=f"{prefix}-latent"),
    }
    if lora:
        prompt["lora"] = node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name=lora, strength_model=1.0
        )
    return prompt
