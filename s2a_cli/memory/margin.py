"""Adds what a run needs on a device beyond its predicted peak, and compares it with the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from s2a_cli.memory.cuda import CUBLAS_MIB
from s2a_cli.memory.result import MIB


@dataclass(frozen=True)
class Margin:
    """What a run needs on a device beyond its predicted peak. Assumed, not measured.

    context: bytes of the CUDA context with its kernels and the handles of cuBLAS and cuDNN, which lie outside of
    PyTorch's allocator. fragmentation: of the peak, for blocks that the allocator can't use, and kernels' own
    temporaries.
    """

    context: int = 600 * MIB
    fragmentation: float = 0.05

    def needed(self, peak_bytes: float) -> float:
        """Returns the bytes of the device that a run with this peak needs, with cuBLAS' workspace of CUBLAS_MIB."""
        return peak_bytes * (1 + self.fragmentation) + CUBLAS_MIB * MIB + self.context

    def __str__(self) -> str:
        share = f"{self.fragmentation:.3g}" if self.fragmentation % 0.01 > 1e-9 else f"{self.fragmentation:.0%}"
        return (
            f"{self.context / MIB:,.0f} MiB for the CUDA context, {CUBLAS_MIB} MiB for cuBLAS, {share} of the peak for"
            " fragmentation"
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
    total, needed = torch.cuda.get_device_properties(device).total_memory / MIB, Margin().needed(peak * MIB) / MIB
    if needed <= total:
        return f"{said}; {device} has {total:,.0f} MiB", None
    hint = f"the same line under `s2a memory ... fit={total / 1024:.1f}GiB` tells what would fit"
    return (
        said,
        f"predicted to need {needed:,.0f} MiB, margin included ({Margin()}); {device} has {total:,.0f} MiB: {hint}",
    )
