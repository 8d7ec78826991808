"""Fair times of a few contenders: in turn, from cold caches, medians with their spread.

A contender is measured once in every round, so that what slows the machine for a while slows all.
On CUDA a call is captured as a graph where that is possible: the time between two events around its
replay is that of the device alone, and ``eager`` what a plain call costs the caller, launches
included. Before every call a buffer larger than the L2 cache is written.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

__all__ = ["Contender", "Local", "compete", "peak_bytes", "release"]

ROUND_S = 0.008  # what one contender may take of a round on a GPU
CALLS = (3, 30)  # at least and at most in it
CPU_CALLS = 2


class Contender(Protocol):
    """Something to be timed."""

    def sample(self) -> float:
        """Seconds of one call: the median of a few."""

    def facts(self) -> dict:
        """What else was seen: ``first_s``, ``eager_us`` ..."""


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Device memory that a call needs at its worst, result included; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


@dataclass
class Local:
    """A call in this process.

    Attributes:
        call: What is timed.
        device: "cpu" or "cuda".
        graph: Whether to try a CUDA graph.
    """

    call: Callable[[], object]
    device: str
    graph: bool = True
    _told: dict = field(default_factory=dict, init=False)
    _run: Callable[[], object] | None = field(default=None, init=False)
    _count: int = field(default=CPU_CALLS, init=False)

    @torch.inference_mode()
    def prepare(self) -> None:
        """First calls, which compile; the graph; how many calls fit a round."""
        start = time.perf_counter()
        self.call()
        self._sync()
        self._told["first_s"] = time.perf_counter() - start
        self._run = self.call
        if self.device != "cuda":
            return
        for _ in range(2):
            self.call()
        self._sync()
        start, count = time.perf_counter(), 10
        for _ in range(count):
            self.call()
        self._sync()
        eager = (time.perf_counter() - start) / count
        self._told["eager_us"] = eager * 1e6
        if self.graph:
            self._capture()
        self._count = round(min(max(ROUND_S / max(eager, 1e-6), CALLS[0]), CALLS[1]))

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._kept = self.call()
            graph.replay()
            self._sync()
        except RuntimeError as error:
            self._told["no_graph"] = str(error).splitlines()[0][:200]
            torch.cuda.synchronize()
            return
        self._graph, self._run = graph, graph.replay

    def _sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def sample(self) -> float:
        if self._run is None:
            self.prepare()
        if self.device != "cuda":
            seconds = []
            for _ in range(self._count):
                start = time.perf_counter()
                self._run()
                seconds.append(time.perf_counter() - start)
            return min(seconds)
        flush = _flush_buffer()
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(self._count)
        ]
        for before, after in pairs:
            flush.zero_()
            before.record()
            self._run()
            after.record()
        torch.cuda.synchronize()
        return statistics.median(before.elapsed_time(after) for before, after in pairs) / 1e3

    def facts(self) -> dict:
        return dict(self._told)


_flush: list[torch.Tensor] = []


def _flush_buffer() -> torch.Tensor:
    if not _flush:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        _flush.append(torch.empty(max(4 * size, 64 << 20), dtype=torch.uint8, device="cuda"))
    return _flush[0]


def compete(
    contenders: Mapping[str, Contender], rounds: int, baseline: str
) -> dict[str, dict[str, object]]:
    """Time all in turn.

    Args:
        contenders: By name; ``baseline`` among them.
        rounds: How often each is measured.
        baseline: Ratios are its time over another's of the same round: above 1 is faster.

    Returns:
        ``{name: {"us", "best_us", "worst_us", "ratio", "ratio_low", "ratio_high", ...}}``; one that
        fails has ``{"failed": reason}``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):  # the first one warms up
        for name, contender in contenders.items():
            if name in failed:
                continue
            try:
                taken = contender.sample()
            except Exception as error:  # a peer's own failure is a result, not our end
                if name == baseline:
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                continue
            if number:
                seconds[name].append(taken)
    found: dict[str, dict[str, object]] = {}
    for name, contender in contenders.items():
        if name in failed:
            found[name] = {"failed": failed[name]}
            continue
        times = seconds[name]
        ratios = [base / own for base, own in zip(seconds[baseline], times, strict=True)]
        found[name] = {
            "us": statistics.median(times) * 1e6,
            "best_us": min(times) * 1e6,
            "worst_us": max(times) * 1e6,
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            **contender.facts(),
        }
    return found


def release() -> None:
    """Give back what finished contenders held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
