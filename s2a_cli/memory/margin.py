"""Adds what a run needs on a device beyond what PyTorch's allocator takes, and compares it with the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from s2a_cli.memory.allocator import is_expandable
from s2a_cli.memory.cuda import CUBLAS_MIB, ROW_SUMS_MIB
from s2a_cli.memory.result import MIB

if TYPE_CHECKING:
    from s2a_cli.memory.breakdown import Profile


@dataclass(frozen=True)
class Margin:
    """What a run needs on a device beyond what the simulated allocator takes, by what was measured on an H200.

    context: bytes of the CUDA context with its kernels and the handles of cuBLAS and cuDNN, which lie outside of
    PyTorch's allocator: 715 to 793 MiB there. fragmentation: of what the allocator takes, for kernels' own temporaries
    and for what they scatter. expandable_segments: the allocator's setting; by default the environment's.
    """

    context: int = 800 * MIB
    fragmentation: float = 0.05
    expandable_segments: bool = field(default_factory=is_expandable)

    def needed(self, profile: Profile) -> float:
        """Returns the bytes of the device that a run with this profile needs."""
        return self.around(profile.reserved_bytes(self.expandable_segments))

    def around(self, taken: float) -> float:
        """Returns them for the bytes that the allocator takes, with cuBLAS' workspaces and the sums of rows."""
        return taken * (1 + self.fragmentation) + (CUBLAS_MIB + ROW_SUMS_MIB) * MIB + self.context

    def __str__(self) -> str:
        share = f"{self.fragmentation:.3g}" if self.fragmentation % 0.01 > 1e-9 else f"{self.fragmentation:.0%}"
        segments = ", in expandable segments," if self.expandable_segments else ""
        workspaces = CUBLAS_MIB + ROW_SUMS_MIB
        return (
            f"{self.context / MIB:,.0f} MiB for the CUDA context, {workspaces} MiB for cuBLAS and sums of rows, {share}"
            f" of what the allocator takes{segments} for kernels' temporaries"
        )


def outlook(memory: dict[str, Any], device: torch.device) -> tuple[str, str | None]:
    """Returns a line about the predicted memory of a run that begins, and a warning where its device has less.

    memory: the "memory" block of the run's record.
    """
    peak, full = memory["peak_mib"], memory.get("full_finetune_peak_mib")
    said = f"memory: predicted peak {peak:,.0f} MiB" + (
        f", full fine-tuning {full:,.0f} MiB ({full / peak:.1f}x)" if full else ""
    )
    if device.type != "cuda":
        return said, None
    taken = memory.get("reserved_mib") or peak
    total, needed = torch.cuda.get_device_properties(device).total_memory / MIB, Margin().around(taken * MIB) / MIB
    if needed <= total:
        return f"{said}; {device} has {total:,.0f} MiB", None
    hint = f"the same line under `s2a memory ... fit={total / 1024:.1f}GiB` tells what would fit"
    return (
        said,
        f"predicted to need {needed:,.0f} MiB, margin included ({Margin()}); {device} has {total:,.0f} MiB: {hint}",
    )
