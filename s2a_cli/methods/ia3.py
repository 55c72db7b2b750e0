from __future__ import annotations

from dataclasses import dataclass

from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import TARGET, TARGET_HELP, WORDS, Peft, TunerSettings


@dataclass
class Ia3Settings(TunerSettings):
    target: str = setting("ia3", help=f"ia3: as published; {TARGET_HELP}", rule=TARGET)


class Ia3(Peft):
    """(IA)3 (arXiv 2205.05638): a scale of each channel of q, k and v and of the MLP's hidden state, through peft

    All ones at the start; learning rate of T-Few. In MLPs the input of the last layer is scaled, elsewhere what a layer
    returns. Departure: q, k and v are one layer in most backbones, so that q is scaled as well.
    """

    Settings = Ia3Settings
    tuner = "ia3"
    words = ("ia3", *WORDS)

    def layers_of(self, block, word):
        """Yields the layers of q, k and v and the last one of the MLP for the word `ia3`."""
        yield from super().layers_of(block, "qkv" if word == "ia3" else word)
        if word == "ia3":
            yield from (branch.linears[-1] for branch in block.branches if branch.kind == "mlp" and branch.linears)


STRUCTURE = Ia3
