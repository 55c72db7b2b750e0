"""Tells the handler of an operator about the forward pass that it is called in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from s2a_cli.activations.quant.calibration import Calibration
    from s2a_cli.config.schema import QuantConfig


class OpContext(NamedTuple):
    """Holds the settings, the calibration and the name of one call of an operator."""

    config: QuantConfig  # the settings of the block that calls
    calibration: Calibration  # of the run
    site: str  # the name of the call, see sites.py

    def bits(self, family: str) -> int:
        """Returns the bit-width of a family such as "norm".

        Raises ValueError where it has none, so that its handlers should be off.
        """
        found = getattr(self.config, family)
        if found is None:
            raise ValueError(f"quant.{family} has no bit-width, so nothing of this family is quantized")
        return found
