from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.common import tensor_files
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, first_line
from s2a_cli.config.rules import PATH
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import Structure
from s2a_cli.methods.parts.head_input import head_width, only_head
from s2a_cli.methods.parts.own_features import mixed
from s2a_cli.methods.parts.thread_local import ThreadLocal

LEAST = 63  # pixels of a side that AlexNet's three poolings take


def alexnet_features() -> nn.Sequential:
    """Returns the convolutions of AlexNet (arXiv 1404.5997), with random weights and the names of torchvision's."""
    layers: list[nn.Module] = []
    for into, out, kernel, stride, pooled in (
        (3, 64, 11, 4, True),
        (64, 192, 5, 1, True),
        (192, 384, 3, 1, False),
        (384, 256, 3, 1, False),
        (256, 256, 3, 1, True),
    ):
        padding = 2 if kernel > 3 else 1
        layers += [nn.Conv2d(into, out, kernel, stride, padding), nn.ReLU(), *([nn.MaxPool2d(3, 2)] * pooled)]
    return nn.Sequential(*layers)


class SideNetwork(nn.Module):
    """f' = sigmoid(a) f + (1 - sigmoid(a)) P g(image) for the feature f that the head reads; a = 0 at the start.

    g: the features of AlexNet, pooled to 6 x 6 positions of 256 channels; P: a projection without bias.
    Source: Side-Tuning (arXiv 1912.13503) as a baseline of VPT (arXiv 2203.12119), src/models/vit_models.py there.
    Departures: g has random weights, or those of a file, and none is downloaded; images of fewer than 63 px are
    enlarged to that.
    """

    _images = ThreadLocal[Tensor | None](None)  # until the head runs

    def __init__(self, width: int):
        super().__init__()
        self.features = alexnet_features()
        self.projection = nn.Linear(256 * 6 * 6, width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < LEAST:
            images = F.interpolate(images, (LEAST, LEAST), mode="bilinear")
        return self.projection(F.adaptive_avg_pool2d(self.features(images), 6).flatten(1))

    def on_model_input(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Notes the images. A pre-hook of the model."""
        self._images = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    def on_head_input(self, head: nn.Module, args: tuple) -> tuple:
        """Blends the side network's feature into what the head reads. A pre-hook of the head.

        Raises UserError where the model was not called before.
        """
        images, self._images = self._images, None
        if images is None:
            raise UserError("method=side_tuning: the side network reads the images: call the model, not its parts")
        weight, side = torch.sigmoid(self.alpha), self(images).view_as(args[0])
        return (mixed(side, args[0], weight).to(args[0].dtype), *args[1:])

    def load(self, path: Path) -> None:
        """Loads torchvision's weights of AlexNet, of which the classifier is left out. Raises UserError."""
        key = f"method.checkpoint={brief(str(path), 200)}"
        if not tensor_files.is_file(path):
            raise UserError(f"{key}: no such file")
        try:
            state = tensor_files.read(path)
        except tensor_files.Unreadable as error:
            raise UserError(f"{key}: can't be read as tensors: {error}") from None
        try:
            self.features.load_state_dict(
                {name.removeprefix("features."): t for name, t in state.items() if name.startswith("features.")}
            )
        except (AttributeError, RuntimeError) as error:
            raise UserError(f"{key}: is no AlexNet of torchvision: {first_line(error)}") from None


@dataclass
class SideTuningSettings:
    checkpoint: str | None = setting(
        None, help="a file of torchvision's AlexNet, where the side network begins; null: random weights", rule=PATH
    )


class SideTuning(Structure):
    """Side-Tuning (arXiv 1912.13503): an AlexNet beside the backbone, their features blended by a learned weight"""

    Settings = SideTuningSettings
    adapts = False
    starts_pretrained = False

    def attach(self, backbone, beside=()):
        """Adds the side network, which reads the images and changes what the head reads."""
        head = only_head(self.name, backbone)
        network = SideNetwork(head_width(backbone))
        if self.settings.checkpoint and not next(backbone.model.parameters()).is_meta:
            network.load(Path(self.settings.checkpoint).expanduser())
        backbone.model.register_forward_pre_hook(network.on_model_input, with_kwargs=True)
        head.register_forward_pre_hook(network.on_head_input)
        backbone.add("side_tuning", network)
        return Attachment(
            backbone,
            adapts=False,
            unmergeable="a side network stands beside the backbone: no weight of the backbone can hold it",
        )


STRUCTURE = SideTuning
