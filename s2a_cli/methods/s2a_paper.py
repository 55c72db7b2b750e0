from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

from torch import nn

from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.bias import Bias
from s2a_cli.methods.parts.ladder import HEADS, Ladder
from s2a_cli.methods.prompt import Prompt, PromptSettings


@dataclass
class LadderSettings:
    pooled: int = setting(8, help="adjacent channels that are averaged to one (CAP)", rule=AT_LEAST_1)
    grid: int = setting(
        7,
        help="hidden states are averaged to at most grid x grid positions, class and register tokens apart",
        rule=AT_LEAST_1,
    )


class S2APaper(Structure):
    """S2A as its paper has it (arXiv 2503.08154): bias + low-rank prompt + side branch in a ladder, one loss

    The paper has no public code; only its abstracts and reviews of it could be read.
    Stated by them:
    - bias vectors, a low-rank prompt and a lite side branch are trained, the rest of the backbone is frozen;
    - the prompt is the product of two low-rank matrices, added to the hidden state of every intermediate layer;
    - the side branch runs parallel to the backbone and reads hidden states after down-sampling; the connection is
      channel average pooling, which has no parameters;
    - at most 0.9 % of the parameters are trained; ViT, Swin and ResNet;
    - 4-bit codes of the derivatives of non-parametric operators: `quant=paper`, the default here.
    Reconstructed:
    - shapes and initialisation of the prompt (see prompt.py), rank 8, at the input of every block;
    - 8 adjacent channels are averaged, of all blocks to one width: an eighth of their mean; positions to 7 x 7;
    - the ladder: s_l = s_(l-1) + g_l(CAP(h_l) + s_(l-1)), with hidden states that are detached, and a layer of
      self-attention as g_l (layers without it learned little beyond a linear probe);
    - the branch is added to the feature before the head, not to its logits, because that was the better of the two in
      trials; through a projection that is zero at the start, so that training begins at the pretrained function;
    - one loss, no auxiliary ones: no source speaks of others; the learning rate.
    `method=s2a` is what became of it here: queries that read each hidden state, and a loss for each.
    """

    @dataclass
    class Settings(BlocksSettings):
        prompt: PromptSettings = field(default_factory=PromptSettings)
        side: LadderSettings = field(default_factory=LadderSettings)

    def attach(self, backbone, beside=()):
        settings, blocks = self.settings, backbone.adapted_blocks(self.settings.blocks)
        of_prompt = settings.prompt
        whole = SimpleNamespace(blocks=settings.blocks, rank=of_prompt.rank, lr_scale=of_prompt.lr_scale)
        parts = [Bias(whole).attach(backbone), Prompt(whole).attach(backbone)]
        mean = sum(block.output.channels for block in blocks) / len(blocks)
        width = max(round(mean / settings.side.pooled / HEADS), 1) * HEADS
        heads = cast(list[nn.Linear | nn.Conv2d], list(backbone.head.layers.values()))
        ladder = Ladder([block.output for block in blocks], width, settings.side.grid, heads)
        for index, block in enumerate(blocks):
            block.module.register_forward_hook(functools.partial(ladder.on_block_output, index))
        for index, head in enumerate(heads):
            head.register_forward_pre_hook(functools.partial(ladder.on_head_input, index))
        backbone.add("ladder", ladder)
        unmergeable = "a ladder stands beside the backbone: no weight of the backbone can hold it"
        return Attachment.of([*parts, Attachment(backbone, unmergeable=unmergeable)])


STRUCTURE = S2APaper
