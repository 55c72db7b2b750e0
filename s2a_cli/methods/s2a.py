from __future__ import annotations

from dataclasses import dataclass, field

from s2a_cli.common.errors import UserError
from s2a_cli.methods.base import Method
from s2a_cli.methods.bias import tune_biases
from s2a_cli.methods.prompt import add_prompts
from s2a_cli.methods.side import SideConfig, add_side


@dataclass
class PromptConfig:
    rank: int = 8  # of A [positions, rank] and B [rank, channels]


class S2A(Method):
    """S2A (arXiv 2503.08154): bias + low-rank prompt + lite side branch; each part can be switched off or tuned"""

    @dataclass
    class Config(Method.BlocksConfig):
        bias: bool = True  # false: without
        prompt: PromptConfig | None = field(default_factory=PromptConfig)  # null: without
        side: SideConfig | None = field(default_factory=SideConfig)  # null: without
        # of the adapted blocks; each but the last learns by the side branch's vote at its end: no gradient leaves it
        segments: int = 1

    def attach(self, backbone):
        config = self.config
        if not (config.bias or config.prompt or config.side):
            raise UserError(
                "method=s2a with bias, prompt and side all switched off trains only the head: that is method=linear"
            )
        blocks = backbone.adapted_blocks(config.blocks)
        if config.segments > len(blocks):
            raise UserError(
                f"method.segments={config.segments}: accepted are 1 to {len(blocks)}, the number of adapted blocks"
            )
        if config.segments > 1 and not config.side:
            raise UserError(
                f"method.segments={config.segments} needs the side branch, whose votes train the segments:"
                " method.side=null is set"
            )
        if config.segments > 1 and not (config.bias or config.prompt):
            raise UserError(
                f"method.segments={config.segments} trains bias or prompt in segments: both are switched off"
            )
        borders = [blocks[len(blocks) * end // config.segments - 1] for end in range(1, config.segments)]
        if config.bias:
            tune_biases(backbone, config.blocks)
        if config.prompt:
            add_prompts(backbone, config.blocks, config.prompt.rank)
        if config.side:
            add_side(backbone, config.side, peers=config.bias or config.prompt is not None, borders=borders)


METHOD = S2A
