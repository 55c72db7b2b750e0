from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from s2a_cli.backbones import Block
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.bias import Bias
from s2a_cli.methods.prompt import Prompt, PromptSettings
from s2a_cli.methods.side import Side, SideSettings


class S2A(Structure):
    """S2A (arXiv 2503.08154): bias + low-rank prompt + lite side branch; each part can be switched off or tuned"""

    @dataclass
    class Settings(BlocksSettings):
        bias: bool = setting(True, help="false: without")
        prompt: PromptSettings | None = setting(PromptSettings, help="null: without")
        side: SideSettings | None = setting(SideSettings, help="null: without")
        segments: int = setting(
            1,
            help="of the adapted blocks; each but the last learns by the side branch's loss at its end: no gradient"
            " leaves it",
            rule=AT_LEAST_1,
        )

    def attach(self, backbone, beside=()):
        settings, blocks = self.settings, SimpleNamespace(blocks=self.settings.blocks)
        if not (settings.bias or settings.prompt or settings.side):
            raise UserError(
                "method=s2a with bias, prompt and side all switched off trains only the head: that is method=linear"
            )
        ends = self._segment_ends(backbone.adapted_blocks(settings.blocks))
        parts: list[Attachment] = []
        if settings.bias:
            parts.append(Bias(blocks).attach(backbone, parts))
        if settings.prompt:
            of_prompt = settings.prompt
            prompt = SimpleNamespace(blocks=settings.blocks, rank=of_prompt.rank, lr_scale=of_prompt.lr_scale)
            parts.append(Prompt(prompt).attach(backbone, parts))
        if settings.side:
            parts.append(Side(settings.side).attach(backbone, [*beside, *parts], ends))
        return Attachment.of(parts)

    def _segment_ends(self, blocks: Sequence[Block]) -> list[Block]:
        """Returns the last block of each segment but the last. Raises UserError for segments that can't be trained."""
        settings = self.settings
        count = settings.segments
        if count > len(blocks):
            raise UserError(f"method.segments={count}: accepted are 1 to {len(blocks)}, the number of adapted blocks")
        if count > 1 and not settings.side:
            raise UserError(
                f"method.segments={count} needs the side branch, whose losses train the segments: method.side=null is"
                " set"
            )
        if count > 1 and not (settings.bias or settings.prompt):
            raise UserError(f"method.segments={count} trains bias or prompt in segments: both are switched off")
        return [blocks[len(blocks) * end // count - 1] for end in range(1, count)]


STRUCTURE = S2A
