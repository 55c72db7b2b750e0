"""Describes what a run was made with: versions and machine."""

from __future__ import annotations

import platform
from typing import Any

from s2a_cli import __version__


def environment(device: str) -> dict[str, Any]:
    """Returns versions and machine, as far as they bear on a run's figures."""
    import timm
    import torch

    from s2a_cli.activations import kernels

    cuda = device.startswith("cuda")
    return {
        "s2a": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.available() if cuda else "plain",  # what makes the codes
    }
