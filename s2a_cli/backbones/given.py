"""Makes a backbone of any module: what it takes, its classifier and its blocks are given, or found by a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from timm.data.config import resolve_data_config
from torch import Tensor, nn

from s2a_cli.backbones.backbone import Backbone
from s2a_cli.backbones.branches import is_linear
from s2a_cli.backbones.head import Head
from s2a_cli.backbones.trace import ModuleTrace, Sample, Trace, find_blocks, images_of, trace
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import first_line, nearest
from s2a_cli.data.transforms import ImageConfig

USUAL = 224  # pixels of a side of the images that most models are made for


def of_module(
    model: nn.Module, *, sample: Sample | None = None, head: str | None = None, blocks: Collection[nn.Module] = ()
) -> Backbone:
    """Returns the backbone of a module that returns logits [B, classes].

    sample: what it is called with for one sample; by default an image of the size that the module was made for. head:
    the name of its classifier; by default what timm names, else the last linear layer or convolution that runs. blocks:
    its repeated blocks; by default they are found. Raises UserError for what does not fit the module.
    """
    known = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    sample, seen = (sample, _traced(model, sample)) if sample else _first_fit(model, known)
    if not isinstance(seen.output, Tensor) or seen.output.ndim != 2:
        found = list(seen.output.shape) if isinstance(seen.output, Tensor) else type(seen.output).__name__
        raise UserError(f"{type(model).__name__} returns {found}: expected one logit a class, [B, classes]")
    classes = seen.output.shape[1]
    layers = _named(model, head) if head else _classifiers(model, known, seen)
    if problem := _no_classifier(layers, seen, classes, find_blocks(model, seen, blocks)):
        what = f"head={head}" if head else f"{type(model).__name__} has no classifier"
        raise UserError(f"{what}: {problem}; give it one (of timm: num_classes=), or name it as head=")
    ran = {found.module for found in seen.ran if found.maps}
    if odd := [block for block in blocks if block not in ran]:
        raise UserError(
            f"blocks: a {type(odd[0]).__name__} is none of {type(model).__name__}: expected modules of it that each run"
            " once and map a hidden state of 3 or 4 dimensions to the next"
        )
    return Backbone(model, _image(known, sample), Head(layers, classes), sample=sample, blocks=blocks)


def _image(known: dict, sample: Sample) -> ImageConfig:
    """Returns the images of a model: those that timm knows it was pretrained on, of the size that it takes."""
    size = sample[0].shape[-1] if sample[0].ndim else 1
    found = resolve_data_config(pretrained_cfg=known or {"input_size": (3, size, size)})
    return ImageConfig(
        size,
        tuple(found["mean"]),
        tuple(found["std"]),
        found["interpolation"],
        found["crop_pct"],
    )


def _traced(model: nn.Module, sample: Sample) -> Trace:
    """Returns the record of a forward pass. Raises UserError where the model can't take the sample."""
    try:
        return trace(model, sample)
    except Exception as error:  # models check their input in ways of their own
        shapes = " and ".join(str(["B", *x.shape]).replace("'", "") for x in sample)
        raise UserError(
            f"{type(model).__name__} can't take inputs {shapes} ({first_line(error)}); give what it takes as inputs="
        ) from None


def _first_fit(model: nn.Module, known: dict) -> tuple[Sample, Trace]:
    """Returns the first square image that a model takes, of those that it may be made for, with its trace."""
    sizes = list(dict.fromkeys([*_image_sizes(model), known.get("input_size", (USUAL,))[-1], USUAL]))
    for size in sizes:
        sample = images_of(size)
        try:
            return sample, _traced(model, sample)
        except UserError as error:
            if size == sizes[-1]:
                raise error from None
    raise AssertionError("there is a last size")


def _image_sizes(model: nn.Module) -> Iterator[int]:
    """Yields the sizes in pixels that modules of a model say that images have."""
    for module in model.modules():
        for name in ("img_size", "image_size"):
            size = getattr(module, name, None)
            size = size[-1] if isinstance(size, tuple | list) and size else size
            if isinstance(size, int) and size > 0:
                yield size


def _named(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Returns the classifier of that name. Raises UserError where there is no such layer."""
    layers = {known: module for known, module in model.named_modules() if is_linear(module)}
    if name not in layers:
        raise UserError(f"head={name}: no linear layer or convolution has that name{nearest(name, layers)}")
    return {name: layers[name]}


def _classifiers(model: nn.Module, known: dict, seen: Trace) -> dict[str, nn.Module]:
    """Returns the classifiers that timm names, else the last linear layer or convolution that ran.

    There are none where timm's name is of an nn.Identity, as with num_classes=0, or nothing of the kind ran.
    """
    layers = {found.name: found.module for found in seen.ran if is_linear(found.module)}
    stated = known.get("classifier") or ()
    stated = [stated] if isinstance(stated, str) else stated
    modules = dict(model.named_modules())
    if any(isinstance(modules.get(name), nn.Identity) for name in stated):
        return {}
    return {name: layers[name] for name in [name for name in stated if name in layers] or list(layers)[-1:]}


def _no_classifier(
    layers: dict[str, nn.Module], seen: Trace, classes: int, blocks: Collection[ModuleTrace]
) -> str | None:
    """Returns why these layers are not the classifier of a model that returns so many numbers; None where they are.

    What they return has to be what the model returns, but for means over positions and heads.
    """
    if not layers:
        return "no linear layer runs where it would be"
    last = max(layers, key=seen.order.__getitem__)
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    if any(len(w) != classes or w[0].numel() != w.shape[1] for w in weights):
        return f"{last} does not return the {classes} numbers that the model returns"
    behind = (found for found in seen.ran if found.order > seen.order[last])
    later = next((found for found in behind if list(found.module.parameters(recurse=False))), None)
    if later:
        return f"{later.name} runs behind {last}"
    around = next((block for block in blocks if layers[last] in set(block.module.modules())), None)
    return f"{last} is within {around.name}, a repeated block" if around else None
