"""s2a: fine-tune pretrained vision backbones in little memory.

The names below are what others may import; docs/library.md has an example of each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from s2a_cli.activations import checkpointed, compress_activations
    from s2a_cli.common.errors import UserError
    from s2a_cli.config.schema import QuantConfig
    from s2a_cli.library.attach import Attached, attach
    from s2a_cli.library.plan import StepPlan, plan
    from s2a_cli.planner.api import predict_memory
    from s2a_cli.training.trained import Trained, load

__all__ = [
    "Attached",
    "QuantConfig",
    "StepPlan",
    "Trained",
    "UserError",
    "attach",
    "checkpointed",
    "compress_activations",
    "load",
    "plan",
    "predict_memory",
]
_HOMES = {
    **dict.fromkeys(("checkpointed", "compress_activations"), "activations"),
    **dict.fromkeys(("Attached", "attach"), "library.attach"),
    **dict.fromkeys(("StepPlan", "plan"), "library.plan"),
    **dict.fromkeys(("Trained", "load"), "training.trained"),
    "QuantConfig": "config.schema",
    "UserError": "common.errors",
    "predict_memory": "planner.api",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports a name when it is first used: torch takes seconds."""
        if name not in _HOMES:
            raise AttributeError(f"module 's2a_cli' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"s2a_cli.{_HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
