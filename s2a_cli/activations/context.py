"""What the handler of an operator sees of the forward pass that it is called in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from s2a_cli.activations.quant.calibration import Calibration
    from s2a_cli.config.schema import QuantConfig


class OpContext(NamedTuple):
    """config: the settings where the call is made, those of its block. site: the name of the call, see sites.py."""

    config: QuantConfig
    calibration: Calibration
    site: str
