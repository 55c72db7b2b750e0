"""s2a: fine-tune pretrained vision backbones in little memory."""

__version__ = "0.1.0"
