"""What kernels are compiled for without a device: targets, their limits, and their instructions.

A target is told by name ("sm_90", "gfx942"); `matrix` are patterns of the opcodes that multiply
matrices, by what they multiply, as they stand in a disassembly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CDNA", "CUDA", "EVERY", "RDNA", "TARGETS", "Target", "cuda_from"]


@dataclass(frozen=True)
class Target:
    """One architecture.

    Attributes:
        name: As in `configs.Machine.architecture`.
        backend: Triton's: "cuda" or "hip".
        warp: Threads of a warp.
        shared: Bytes of shared memory that a block may have.
        matrix: ``{"int8", "half" or "fp8": pattern of opcodes}``.
        group: As `matrix`, of the instructions for whole groups of warps, which large blocks have
            to use; where there are none, empty.
    """

    name: str
    backend: str
    warp: int
    shared: int
    matrix: Mapping[str, str] = field(hash=False)
    group: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def architecture(self) -> int | str:
        """As Triton's ``GPUTarget`` wants it."""
        return int(self.name[3:]) if self.backend == "cuda" else self.name


_KB = 1 << 10
_SM_7 = {"half": r"HMMA\S*"}
_SM_8 = {"int8": r"IMMA\S*", "half": r"HMMA\S*"}
_ADA = {**_SM_8, "fp8": r"QMMA\S*"}
_HOPPER = {"int8": r"IG?MMA\S*", "half": r"HG?MMA\S*", "fp8": r"QG?MMA\S*"}
_HOPPER_GROUP = {"int8": r"IGMMA\S*", "half": r"HGMMA\S*", "fp8": r"QGMMA\S*"}
_BLACKWELL = {
    # Older versions of Triton have the old instruction for integers there.
    "int8": r"(?:UTCIMMA|IMMA)\S*",
    "half": r"(?:UTCHMMA|HMMA)\S*",
    "fp8": r"(?:UTCQMMA|QMMA)\S*",
}
_CDNA = {"int8": r"v_mfma_i32\S*", "half": r"v_mfma_f32\S*", "fp8": r"v_mfma_f32\S*"}
_RDNA = {"int8": r"v_wmma_i32\S*", "half": r"v_wmma_f32\S*", "fp8": r"v_wmma_f32\S*"}

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_75", "cuda", 32, 64 * _KB, _SM_7),
        Target("sm_80", "cuda", 32, 163 * _KB, _SM_8),
        Target("sm_86", "cuda", 32, 99 * _KB, _SM_8),
        Target("sm_89", "cuda", 32, 99 * _KB, _ADA),
        Target("sm_90", "cuda", 32, 227 * _KB, _HOPPER, _HOPPER_GROUP),
        Target("sm_100", "cuda", 32, 227 * _KB, _BLACKWELL),
        Target("sm_120", "cuda", 32, 99 * _KB, _ADA),
        Target("gfx90a", "hip", 64, 64 * _KB, _CDNA),
        Target("gfx942", "hip", 64, 64 * _KB, _CDNA),
        Target("gfx1100", "hip", 32, 64 * _KB, _RDNA),
        Target("gfx1201", "hip", 32, 64 * _KB, _RDNA),
    )
}

CUDA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
CDNA = ("gfx90a", "gfx942")
RDNA = ("gfx1100", "gfx1201")
EVERY = CUDA + CDNA + RDNA


def cuda_from(capability: int) -> tuple[str, ...]:
    """NVIDIA's targets from a compute capability on, given as 80 for 8.0."""
    return tuple(name for name in CUDA if int(name[3:]) >= capability)
