from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from s2a_cli.backbones import Block
from s2a_cli.config.schema import BELOW_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.base import Published
from s2a_cli.methods.vpt_shallow import Prompts, VPTSettings, VPTShallow


class BlockPrompts(Prompts):
    """Prompts of one block; what has become of them at its output is dropped."""

    def __init__(self, block: Block, tokens: int, inputs: int, dropout: float):
        super().__init__(block.input, tokens, inputs, dropout)
        self.input, self.output = block.input, block.output

    def on_block_input(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self.input.replaced((args, kwargs), self(self.input.of((args, kwargs))))

    def on_block_output(self, block: nn.Module, args: tuple, output: Any) -> Any:
        return self.output.replaced(output, self.output.of(output)[:, : -len(self.prompts)])


@dataclass
class VPTDeepSettings(VPTSettings):
    dropout: float = setting(0.1, help="share of a prompt's numbers that are dropped in training", rule=BELOW_1)


class VPTDeep(VPTShallow):
    """VPT-deep (arXiv 2203.12119): new learned prompt tokens at the input of every block

    Source and departures: as of VPT-shallow. What the previous block made of its prompts is dropped, as there. The
    dropout of 0.1 is that of the published VTAB-1k runs (demo.ipynb; OSU-MLB's default).
    """

    Settings = VPTDeepSettings
    published = Published(
        0.4608, "OSU-MLB/ViT_PEFT_Vision (arXiv 2409.16434), tune_output/default_vtab, vpt_deep with vpt_num=50"
    )

    def attach(self, backbone, beside=()):
        (blocks, inputs), settings = self.fitting(backbone), self.settings
        prompts = [BlockPrompts(block, settings.tokens, inputs, settings.dropout) for block in blocks]
        for block, one in zip(blocks, prompts):
            block.module.register_forward_pre_hook(one.on_block_input, with_kwargs=True)
            block.module.register_forward_hook(one.on_block_output, prepend=True)  # before all that reads it
        backbone.add(self.name, nn.ModuleList(prompts))
        return self.attached(backbone)


STRUCTURE = VPTDeep
