from __future__ import annotations

from s2a_cli.methods.base import FAMILIES
from s2a_cli.methods.loha import LohaSettings
from s2a_cli.methods.peft import Peft


class Lokr(Peft):
    """LoKr (KronA, arXiv 2212.10650): the Kronecker product of two small matrices, through peft

    At every layer and convolution of the blocks, depthwise ones too, rank and alpha 8 (peft's defaults, as LyCORIS has
    them, arXiv 2309.14859); zero at the start. Learning rate: peft's in its comparison of image models.
    """

    Settings = LohaSettings
    tuner = "lokr"
    families = tuple(FAMILIES)


STRUCTURE = Lokr
