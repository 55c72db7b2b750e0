from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from s2a_cli.config.rules import one_of
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure


class ParallelAdapter(nn.Module):
    """y = conv(x) + A x for a k x k convolution, A [out, in] a 1 x 1 convolution of its stride without bias.

    A ~ N(0, 2 / out), as every convolution of the source is drawn. It merges into the centre of the kernel.
    Source: arXiv 1803.10082, `parallel_adapters` of models.py in srebuffi/residual_adapters.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.adapter = nn.Conv2d(conv.in_channels, conv.out_channels, 1, (conv.stride[0], conv.stride[1]), bias=False)
        self._conv = [conv]  # in a list: it is no part of this module
        nn.init.kaiming_normal_(self.adapter.weight, mode="fan_out")

    def on_output(self, conv: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Adds A x. A hook of the convolution."""
        return output + self.adapter(args[0])

    def merge(self) -> None:
        """Adds A to the centre of the convolution's kernel."""
        weight = self._conv[0].weight
        height, width = weight.shape[2:]
        weight[:, :, height // 2, width // 2] += self.adapter.weight[:, :, 0, 0].to(weight.dtype)


class SeriesAdapter(nn.Module):
    """y = z + A norm(z) for what a convolution returns, z = conv(x); A [out, out] a 1 x 1 convolution without bias.

    `norm` is a BatchNorm of its own, on the statistics of the batch in training. A ~ N(0, 2 / out).
    Source: arXiv 1705.08045; `series_adapters` of models.py in srebuffi/residual_adapters (arXiv 1803.10082).
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.norm = nn.BatchNorm2d(conv.out_channels)
        self.adapter = nn.Conv2d(conv.out_channels, conv.out_channels, 1, bias=False)
        nn.init.kaiming_normal_(self.adapter.weight, mode="fan_out")

    def on_output(self, conv: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Adds A norm(z). A hook of the convolution."""
        return output + self.adapter(self.norm(output))


def adapted(layer: nn.Module) -> nn.Conv2d | None:
    """Returns a layer that is a k x k convolution, no depthwise one, at whose centre a 1 x 1 one reads the same."""
    if not isinstance(layer, nn.Conv2d) or max(layer.kernel_size) == 1 or layer.groups == layer.in_channels > 1:
        return None
    sizes = zip(layer.padding, layer.dilation, layer.kernel_size)
    centred = isinstance(layer.padding, tuple) and all(2 * p == d * (k - 1) for p, d, k in sizes)
    return layer if centred else None


@dataclass
class ResidualAdapterSettings(BlocksSettings):
    position: str = setting(
        "parallel",
        help="parallel | series: the 1 x 1 convolution reads what a convolution reads, or what it returns",
        rule=one_of("parallel", "series"),
    )
    norms: bool = setting(True, help="trains the BatchNorms of the adapted blocks as well, on the batch's statistics")


class ResidualAdapter(Structure):
    """residual adapters (arXiv 1705.08045, 1803.10082): a 1 x 1 convolution at each k x k one, and the BatchNorms

    As published, each domain has its own adapters and its own BatchNorms, weight, bias and statistics. Departures: the
    stem and the normalisations after the last block stay frozen; the source trains by SGD at 0.1 with weight decay for
    each data set, and no learning rate is published for AdamW.
    """

    Settings = ResidualAdapterSettings
    starts_pretrained = False
    families = ("resnet",)

    def attach(self, backbone, beside=()):
        """Adds an adapter at every k x k convolution of the adapted blocks, and unfreezes their BatchNorms."""
        blocks, kind = backbone.adapted_blocks(self.settings.blocks), self.settings.position
        convs = [conv for block in blocks for _, layer in block.layers if (conv := adapted(layer)) is not None]
        if not convs:
            raise self.misfit(backbone, "its blocks have no k x k convolutions but depthwise ones")
        adapters = [ParallelAdapter(conv) if kind == "parallel" else SeriesAdapter(conv) for conv in convs]
        for conv, adapter in zip(convs, adapters):
            conv.register_forward_hook(adapter.on_output)
        if self.settings.norms:
            for block in blocks:
                for module in block.module.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.requires_grad_(True)
        backbone.add("residual_adapter", nn.ModuleList(adapters))
        if kind == "series":
            return Attachment(backbone, unmergeable="a series adapter has a bias that no convolution can hold")
        if any(type(conv) is not nn.Conv2d for conv in convs):
            return Attachment(
                backbone, unmergeable="a convolution of this backbone uses its weight in a way of its own"
            )
        if any(conv.groups > 1 for conv in convs):
            return Attachment(backbone, unmergeable="a parallel adapter mixes groups that the convolution keeps apart")
        merges = [(conv, one.merge) for conv, one in zip(convs, adapters) if isinstance(one, ParallelAdapter)]
        return Attachment(backbone, merges=tuple(merges))


STRUCTURE = ResidualAdapter
