"""Makes backbones of timm's models: their blocks, the layout of their hidden states, their head and their images."""

from s2a_cli.backbones.backbone import ADDED, Backbone, Block
from s2a_cli.backbones.build import build, lacks_variance
from s2a_cli.backbones.head import Head
from s2a_cli.backbones.hidden import Hidden

__all__ = ["ADDED", "Backbone", "Block", "Head", "Hidden", "build", "lacks_variance"]
