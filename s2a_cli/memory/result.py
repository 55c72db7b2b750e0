"""Holds what a training step costs, measured or predicted: the "memory" block of result.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Device memory of one training step in the steady state, in MiB (2^20 bytes).

    A predicted figure always says so in `kind`, and is never to be shown as a measured one.
    """

    kind: str  # "predicted" | "measured-cuda"
    peak_mib: float  # most bytes allocated at any moment of a step: the headline
    static_mib: float  # between steps: weights, buffers and optimiser state; gradients and images are not there
    kept_mib: float  # after the forward pass less static: what waits for the backward pass, images and loss included
    reserved_mib: float | None = None  # what the allocator took from the device; predicted by a simulation of it
    full_finetune_peak_mib: float | None = None  # the same composition under full fine-tuning
    full_finetune_kind: str | None = None

    def against(self, full_finetune: Memory) -> Memory:
        """Returns the same figures beside those of full fine-tuning."""
        return replace(self, full_finetune_peak_mib=full_finetune.peak_mib, full_finetune_kind=full_finetune.kind)

    def as_dict(self) -> dict[str, str | float | None]:
        """Returns the "memory" block of result.json, with MiB rounded to two digits."""
        return {key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(self).items()}
