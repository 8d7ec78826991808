"""Other packages' layers, each in a process of its own: no ComfyUI, its own defaults.

``python peers.py DEVICE THREADS`` answers lines of JSON on stdin with lines of JSON on stdout:

| question                                                | answer                                 |
|---------------------------------------------------------|----------------------------------------|
| {"make": [peer, settings], "shape": [M, N, K], "dtype"} | {"made": number} or {"absent": reason} |
| {"sample": number}                                      | {"seconds": s}, or {"failed": reason}  |
| {"facts": number}                                       | {"facts": {...}}                       |
| {"drop": true}                                          | {"dropped": true}                      |

A :class:`Peers` asks the first of the known interpreters that has the package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from machine import ORACLE
from timing import Local, release

SPREAD = 0.02
MODULES = {
    "sdnq": "sdnq",
    "torchao": "torchao",
    "gemlite": "gemlite",
    "nunchaku": "nunchaku",
    "scaled_mm": "torch",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class AbsentError(Exception):
    """A side that this machine cannot have; the message says why."""


# ---------------------------------------------------------------------------- inside the worker


def _linear(n: int, k: int, dtype: torch.dtype, device: str) -> torch.nn.Linear:
    layer = torch.nn.Linear(k, n, device=device, dtype=dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_(0, SPREAD)
        layer.bias.zero_()
    return layer.requires_grad_(False)


def make_sdnq(settings: dict, n: int, k: int, dtype: torch.dtype, device: str):
    """The package's own layer, by its own function, as it is set up by default."""
    from sdnq import SDNQConfig
    from sdnq.quantizer import sdnq_quantize_layer

    config = SDNQConfig(add_skip_keys=False, **settings)
    layer, _ = sdnq_quantize_layer(_linear(n, k, dtype, device), config, torch_dtype=dtype)
    return layer


def make_torchao(settings: dict, n: int, k: int, dtype: torch.dtype, device: str):
    """A quantized Linear, compiled on a GPU as its documentation asks."""
    from torchao import quantization as q

    configs = {
        "int8wo": lambda: q.Int8WeightOnlyConfig(),
        "int8dq": lambda: q.Int8DynamicActivationInt8WeightConfig(),
        "fp8row": lambda: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow()),
        "int4wo": lambda: q.Int4WeightOnlyConfig(group_size=64),
    }
    if device == "cpu" and settings["kind"] == "int4wo":
        raise AbsentError("torchao's int4 weight-only layers are for GPUs")
    model = torch.nn.Sequential(_linear(n, k, dtype, device))
    q.quantize_(model, configs[settings["kind"]]())
    return torch.compile(model, dynamic=False) if device == "cuda" else model


def make_gemlite(settings: dict, n: int, k: int, dtype: torch.dtype, device: str):
    """A Triton layer of gemlite."""
    if device != "cuda":
        raise AbsentError("gemlite's layers are for GPUs")
    import gemlite.helper as helper

    layer, kind = _linear(n, k, dtype, device), settings["kind"]
    if kind == "A8W8_int8":
        return helper.A8W8_int8_dynamic(device=device, dtype=dtype).from_linear(layer)
    if kind == "A8W8_fp8":
        return helper.A8W8_fp8_dynamic(device=device, dtype=dtype).from_linear(layer)
    codes = torch.randint(0, 16, (n, k), device=device, dtype=torch.uint8)
    scales = torch.rand((n, k // 64), device=device, dtype=dtype) * SPREAD
    zeros = torch.full_like(scales, 8.0)
    maker = helper.A16W4(device=device, dtype=dtype)
    return maker.from_weights(codes, scales, zeros, 4, 64, layer.bias)


def make_nunchaku(settings: dict, n: int, k: int, dtype: torch.dtype, device: str):
    """An SVDQuant layer of nunchaku with random numbers."""
    if device != "cuda":
        raise AbsentError("nunchaku's layers are for GPUs")
    from nunchaku.models.linear import SVDQW4A4Linear

    layer = SVDQW4A4Linear(k, n, torch_dtype=dtype, device=device, **settings)
    for parameter in layer.parameters():
        if parameter.dtype.is_floating_point and parameter.element_size() > 1:
            parameter.data.normal_(0, SPREAD)
        else:
            parameter.data.view(torch.uint8).random_(0, 64)
    return layer


def make_scaled_mm(settings: dict, n: int, k: int, dtype: torch.dtype, device: str):
    """torch's own row-wise FP8 product alone, activations quantized beforehand: the ceiling."""
    if device != "cuda":
        raise AbsentError("measured on GPUs only")
    fp8 = torch.float8_e4m3fn
    weight = torch.randn(n, k, device=device).clamp_(-4, 4).to(fp8)
    scale = torch.full((1, n), SPREAD, device=device)
    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def product(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] not in held:
            held[x.shape[0]] = (x.to(fp8), torch.ones(x.shape[0], 1, device=device))
        codes, rows = held[x.shape[0]]
        return torch._scaled_mm(codes, weight.t(), scale_a=rows, scale_b=scale, out_dtype=dtype)

    return product


MAKE = {
    "sdnq": make_sdnq,
    "torchao": make_torchao,
    "gemlite": make_gemlite,
    "nunchaku": make_nunchaku,
    "scaled_mm": make_scaled_mm,
}


def worker(device: str, threads: int) -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(threads)
    made: list[Local] = []
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = _answer(asked, made, device)
        except AbsentError as error:
            answer = {"absent": str(error)}
        except Exception as error:
            told = (str(error) or repr(error)).splitlines()[0][:300]
            answer = {"failed": f"{type(error).__name__}: {told}"}
        print(f"\x1e{json.dumps(answer)}", flush=True)


def _answer(asked: dict, made: list[Local], device: str) -> dict:
    if "make" in asked:
        name, settings = asked["make"]
        m, n, k = asked["shape"]
        dtype = DTYPES[asked["dtype"]]
        layer = MAKE[name](settings, n, k, dtype, device)
        torch.manual_seed(1)
        x = torch.randn(m, k, device=device, dtype=dtype)
        local = Local(lambda: layer(x), device)
        local.prepare()
        made.append(local)
        return {"made": len(made) - 1}
    if "sample" in asked:
        return {"seconds": made[asked["sample"]].sample()}
    if "facts" in asked:
        return {"facts": made[asked["facts"]].facts()}
    made.clear()
    release()
    return {"dropped": True}


# --------------------------------------------------------------------------- seen from the harness


def interpreters() -> list[str]:
    """This one, and the oracle environments, which hold packages that the host must not see."""
    found = [sys.executable]
    if ORACLE:
        oracle = Path(ORACLE)
        folder = oracle.parent.parent
        further = folder.with_name(f"{folder.name}-others") / oracle.relative_to(folder)
        found += [str(path) for path in (oracle, further) if path.exists()]
    return found


@cache
def _has(python: str, module: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec('{module}') is None)"
    return subprocess.run([python, "-c", code], env=_environment()).returncode == 0


def _environment(python: str = "") -> dict[str, str]:
    """Of a worker: without ComfyUI in an oracle's; nothing reaches a network."""
    drop = {"PYTHONPATH"} if python != sys.executable else set()
    env = {key: value for key, value in os.environ.items() if key not in drop}
    return env | {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}


@dataclass
class Worker:
    """A process and the lines that it has said."""

    process: subprocess.Popen
    said: queue.Queue = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            if line.startswith("\x1e"):
                self.said.put(json.loads(line[1:]))
        self.said.put(None)


@dataclass
class Peers:
    """The workers of one device.

    Attributes:
        device: "cpu" or "cuda".
        threads: Of torch.
        patience: Seconds that an answer may take; a worker that needs longer is ended.
    """

    device: str
    threads: int
    patience: float = 60.0
    _workers: dict[str, Worker] = field(default_factory=dict)

    def contender(
        self, peer: str, settings: dict, shape: tuple[int, int, int], dtype: str
    ) -> Remote:
        """A contender of :mod:`timing`.

        Raises:
            AbsentError: The package is not here, or cannot do this here.
        """
        module = MODULES[peer]
        python = next((found for found in interpreters() if _has(found, module)), None)
        if python is None:
            raise AbsentError(f"{peer} is not installed")
        answer = self.ask(python, {"make": [peer, settings], "shape": list(shape), "dtype": dtype})
        if "made" not in answer:
            raise AbsentError(answer.get("absent") or answer["failed"])
        return Remote(self, python, answer["made"], self._workers[python])

    def drop(self) -> None:
        """Let every worker forget what it made."""
        for python in list(self._workers):
            self.ask(python, {"drop": True})

    def ask(self, python: str, question: dict) -> dict:
        """Put a question to the worker of an interpreter, starting it where needed."""
        worker = self._workers.get(python)
        if worker is None:
            worker = self._workers[python] = self._start(python)
        try:
            worker.process.stdin.write(json.dumps(question) + "\n")
            worker.process.stdin.flush()
            answer = worker.said.get(timeout=self.patience)
        except BrokenPipeError:
            answer = None
        except queue.Empty:
            worker.process.kill()
            answer = {"failed": f"no answer within {self.patience:.0f} s"}
        if answer is None or "no answer" in answer.get("failed", ""):
            del self._workers[python]
            status = worker.process.wait()
            return answer or {"failed": f"the worker ended with status {status}"}
        return answer

    def _start(self, python: str) -> Worker:
        env = _environment(python)
        if self.device == "cpu":  # nothing compiles here unasked, theirs or ours
            env["SDNQ_USE_TORCH_COMPILE"] = "0"
        process = subprocess.Popen(
            [python, __file__, self.device, str(self.threads)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return Worker(process)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.process.stdin.close()
            worker.process.wait()
        self._workers.clear()


@dataclass
class Remote:
    """A layer in a worker, as a contender."""

    peers: Peers
    python: str
    number: int
    worker: Worker

    def _ask(self, what: str) -> dict:
        if self.peers._workers.get(self.python) is not self.worker:
            return {"failed": "its worker was ended by another layer"}
        return self.peers.ask(self.python, {what: self.number})

    def sample(self) -> float:
        answer = self._ask("sample")
        if "seconds" not in answer:
            raise RuntimeError(answer["failed"])
        return answer["seconds"]

    def facts(self) -> dict:
        return self._ask("facts").get("facts", {})


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]))
