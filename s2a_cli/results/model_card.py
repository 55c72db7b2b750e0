"""The card that goes with an exported model: what it is, what it was trained on, how good it is, how to use it."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from s2a_cli import __version__
from s2a_cli.common.text import brief, listed, printable
from s2a_cli.results.evaluation import wilson
from s2a_cli.results.record import NOT_IDENTITY, Result

SHOWN = 200  # class names


def text(result: Result, description: dict[str, Any], use: str, difference: float, photos: int) -> str:
    """Returns the card in Markdown.

    description: of the model, as it lies beside it. use: lines of Python that load it. difference: the largest of its
    logits from the run's, relative to the largest, on so many photos.
    """
    data, images, license = result["data"], description["preprocessing"], description["license"]
    several = "an image may have several classes: the sigmoid of a logit is the probability of its class"
    probable = several if data["multi_label"] else "their softmax is the probability of each class"
    of_a_file, config = license == "other", _handed_on(result["config"])
    front = {"license": license or "unknown", "tags": ["image-classification", "s2a"], "library_name": "timm"}
    of_weights = f"`{printable(description['weights'])}`{', from a file of the user' if of_a_file else ''}"
    unknown = "look it up before you hand this model on"
    licence = f"that timm states for them: {license or f'none; {unknown}'}"
    if of_a_file:
        licence = f"of the file's origin, which is not known here; {unknown}"
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {printable(data['name'])}: {config['backbone']['name']}, method {config['method']['name']}\n",
        f"- **Classes** ({len(data['classes'])}): {listed(data['classes'], SHOWN)}",
        f"- **Data**: {printable(data['name'])}, revision {data['revision']}; {data['train']:,} images to train,"
        f" {data['val']:,} to validate, {data['test']:,} to test",
        *_accuracy(result),
        *_memory(result),
        f"- **Backbone**: timm's `{config['backbone']['timm']}`, weights {of_weights}; licence {licence}",
        f"- **Images**: {images['decode']}; shorter side resized to {images['resize_shorter_side']} px, the longer one"
        f" to `{images['resize_longer_side']}` px ({images['interpolation']}, antialiased, {images['resample']});"
        f" centre crop of {images['center_crop']} px from `{images['crop_left']}` and `{images['crop_top']}`"
        f" ({images['rounding']}); values of RGB from 0 to 1, less {images['mean']}, divided by {images['std']};"
        f" float32 [batch, 3, {images['center_crop']}, {images['center_crop']}]",
        f"- **Output**: logits [batch, classes]; {probable}",
        f"- **Checked**: loaded again, its logits on {photos} photos differ from the run's in fp32 by at most"
        f" {difference:.1e} of the largest",
        f"- **Made by** s2a {__version__}, run {result['id']}\n",
        f"```python\n{use}\n```\n",
        f"## Config\n\n```yaml\n{yaml.safe_dump(config, sort_keys=False)}```",
    ]
    return "\n".join(lines) + "\n"


def _handed_on(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config without the settings that say where it ran and where its files lay."""
    kept = copy.deepcopy(config)
    for key in NOT_IDENTITY:
        group, _, name = key.rpartition(".")
        (kept[group] if group else kept).pop(name, None)
    return kept


def _accuracy(result: Result) -> list[str]:
    names = {"test_top1": "test top-1", "test_top5": "test top-5", "test_balanced": "test balanced accuracy"}
    names |= {"test_map": "test mAP", "val_top1": "validation top-1", "val_map": "validation mAP"}
    found: dict[str, Any] = {key: value for key, value in result["accuracy"].items() if value is not None}
    said = [f"{name} {found[key]:.2f} %" for key, name in names.items() if key in found]
    if "test_top1" in found and (count := result["data"]["test"]):
        low, high = wilson(round(found["test_top1"] * count / 100), count)
        said[0] += f" (95 % interval {low:.2f} to {high:.2f} %, Wilson)"
    return [f"- **Accuracy**: {', '.join(said) or 'not tested'}"]


def _memory(result: Result) -> list[str]:
    memory = result["memory"]
    if not memory:
        return []
    full = memory["full_finetune_peak_mib"]
    return [
        f"- **Memory** of a training step, {brief(memory['kind'])}: peak {memory['peak_mib']:,.0f} MiB (full"
        f" fine-tuning, {memory['full_finetune_kind']}: {full:,.0f} MiB)"
    ]
