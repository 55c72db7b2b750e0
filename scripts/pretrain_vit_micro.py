"""Pretrains `vit_micro`, the small backbone that ships with the package, on printed glyphs that are not digits.

    pip install matplotlib
    python scripts/pretrain_vit_micro.py --out s2a_cli/weights/vit_micro.safetensors

matplotlib is needed by this script alone, for the fonts inside its wheel: DejaVu, STIX and Computer Modern.

The task is to tell some 200 letters and symbols apart. The images share the look of scikit-learn's handwritten digits,
on which the backbone is meant to be fine-tuned, not their content: a glyph is thickened or thinned, bent, and counted
down from 32x32 to 8x8 pixels of 17 grey levels, as those digits were.

No digit, nor a glyph that is drawn like one, is among the classes, so that fine-tuning on digits is a true transfer:
- a character with a numeric value of any kind (superscripts, fractions, circled digits) is no candidate;
- `LOOKALIKES` names the letters that a hand draws like a digit;
- a candidate whose 8x8 image, averaged over font faces, correlates by more than `DIGIT_LIMIT` with 0 to 9 or with a
  look-alike is left out, and so are their twins in other alphabets. Digits are rendered for this comparison only.
A candidate that looks like a class already taken (A in Greek, c beside C) is left out as well, by `TWIN_LIMIT`.

The weights are stored in fp16, without the pretraining head. The same seed, machine and number of threads
(`OMP_NUM_THREADS`) give the same weights.
"""

from __future__ import annotations

import argparse
import math
import time
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from torch import Tensor, nn

from s2a_cli.records import atomic_write

VERSION = "1"
CONF = Path(__file__).resolve().parent.parent / "conf" / "backbone" / "vit_micro.yaml"

CANVAS, GLYPH = 40, 30  # pixels: a rendered image, and the longer side of the glyph in it
FULL, SMALL = 32, 8  # pixels: an augmented image, before and after it is counted down
DIGIT_LIMIT, TWIN_LIMIT = 0.80, 0.85

FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
ASCII_FACES = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10", "cmmi10")  # other code points are misplaced in these
HELD_OUT_FACE = "STIXGeneral"  # never trained on
MIN_FACES = 4  # a class that fewer faces have is left out

LOOKALIKES = "OQDIlSZzBGbgqyaƧƺơςЧьξ&§¶¤´∞∅∕⊕↑↓↺"
CANDIDATES = (  # first and last code point
    *((0x41, 0x5A), (0x61, 0x7A), (0x180, 0x1BF)),  # Latin, extended Latin
    *((0x391, 0x3A9), (0x3B1, 0x3C9), (0x402, 0x45F)),  # Greek, Cyrillic
    *((0x23, 0x26), (0x2A, 0x2B), (0x3C, 0x40), (0xA2, 0xA7), (0xB1, 0xB6)),  # signs
    *((0x2190, 0x21BF), (0x2200, 0x2235), (0x2282, 0x22A5)),  # arrows, mathematical operators
)


# ---- glyphs ----------------------------------------------------------------------------------------------------------


def candidates() -> list[str]:
    characters = [chr(code) for first, last in CANDIDATES for code in range(first, last + 1)]
    return [c for c in characters if unicodedata.category(c) != "Cn" and unicodedata.numeric(c, None) is None]


class Face:
    """A font face that renders one character, size-normalised by its ink."""

    def __init__(self, name: str):
        path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
        self.name = name
        self.font = ImageFont.truetype(path, size=96)
        self.codes = set(FT2Font(str(path)).get_charmap())
        if name in ASCII_FACES:
            self.codes &= {*range(0x41, 0x5B), *range(0x61, 0x7B)}

    def __contains__(self, character: str) -> bool:
        return ord(character) in self.codes

    def render(self, character: str) -> np.ndarray:
        """uint8 [CANVAS, CANVAS], white on black."""
        left, top, right, bottom = self.font.getbbox(character)
        image = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=self.font)
        scale = GLYPH / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        canvas = Image.new("L", (CANVAS, CANVAS))
        corner = (CANVAS - width) // 2, (CANVAS - height) // 2
        canvas.paste(image.resize((width, height), Image.Resampling.BOX), corner)
        return np.asarray(canvas)


def signature(images: np.ndarray) -> np.ndarray:
    """Mean of the images [n, CANVAS, CANVAS] of one character as 8x8 pixels, centred, of unit length: float64 [64]."""
    margin = (CANVAS - FULL) // 2
    cell = FULL // SMALL
    full = images.mean(0)[margin : margin + FULL, margin : margin + FULL]
    small = full.reshape(SMALL, cell, SMALL, cell).mean((1, 3)).ravel()
    small = small - small.mean()
    return small / np.linalg.norm(small)


def glyphs(limit: int | None = None) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """The classes (one character each, at most `limit`) and the renders of each in every face that has it.

    Returns the classes, images uint8 [n, CANVAS, CANVAS], labels int64 [n] and whether the face is held out, bool [n].
    """
    faces = [Face(name) for name in (*FACES, *ASCII_FACES)]

    def renders(character: str) -> list[np.ndarray]:
        return [face.render(character) for face in faces if character in face]

    forbidden = [signature(np.stack([f.render(c) for f in faces[: len(FACES)]])) for c in "0123456789"]
    forbidden += [signature(np.stack(renders(c))) for c in LOOKALIKES]
    classes, signatures, images, labels, held_out = "", [], [], [], []
    for character in candidates():
        if len(classes) == limit:
            break
        rendered = renders(character)
        if len(rendered) < MIN_FACES:
            continue
        mark = signature(np.stack(rendered))
        if max(mark @ other for other in forbidden) > DIGIT_LIMIT:
            continue
        if max((mark @ other for other in signatures), default=0) > TWIN_LIMIT:
            continue
        images += rendered
        labels += [len(classes)] * len(rendered)
        held_out += [face.name == HELD_OUT_FACE for face in faces if character in face]
        signatures.append(mark)
        classes += character
    return classes, np.stack(images), np.array(labels), np.array(held_out)


# ---- augmentation ----------------------------------------------------------------------------------------------------


def stroke(images: Tensor, amount: Tensor) -> Tensor:
    """Thinner strokes for amounts in [-1, 0], thicker for [0, 2], in steps of one pixel a side with blends between."""
    thin = -F.max_pool2d(-images, 3, 1, 1)
    thick = F.max_pool2d(images, 3, 1, 1)
    thicker = F.max_pool2d(thick, 3, 1, 1)
    out = images + (-amount).clamp(0, 1) * (thin - images)
    out = out + amount.clamp(0, 1) * (thick - images)
    return out + (amount - 1).clamp(0, 1) * (thicker - thick)


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random affine map and an elastic field: [B, 1, CANVAS, CANVAS] -> [B, 1, FULL, FULL]."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, shear = uniform(-0.35, 0.35), uniform(-0.35, 0.35)
    width, height = uniform(-0.35, 0.25).exp(), uniform(-0.15, 0.15).exp()
    size = FULL / CANVAS * 1.05
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([size / width * cos, size / width * (shear * cos - sin), uniform(-0.1, 0.1)], 1)]
    rows += [torch.stack([size / height * sin, size / height * (shear * sin + cos), uniform(-0.1, 0.1)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [n, 1, FULL, FULL], align_corners=False)
    bend = torch.randn(n, 2, 4, 4, generator=generator) * uniform(0, 0.12, 1, 1, 1)
    bend = F.interpolate(bend, size=(FULL, FULL), mode="bicubic", align_corners=False)
    return F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [B, CANVAS, CANVAS] -> [B, 1, SMALL, SMALL] in [0, 1], in steps of 1/16 as the target's images."""
    n = len(images)
    images = images[:, None].float() / 255
    images = stroke(images, -0.5 + 2.0 * torch.rand(n, 1, 1, 1, generator=generator))
    images = warp(images, generator)
    gain = 2 + 6 * torch.rand(n, 1, 1, 1, generator=generator)  # from blurred to nearly black and white
    images = ((images - 0.4) * gain + 0.5).clamp(0, 1)
    images = F.avg_pool2d(images, FULL // SMALL)
    noise = 0.05 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(n, 1, SMALL, SMALL, generator=generator)
    contrast = 0.7 + 0.3 * torch.rand(n, 1, 1, 1, generator=generator)
    return ((images * contrast + noise).clamp(0, 1) * 16).round() / 16


def present(small: Tensor, conf: DictConfig) -> Tensor:
    """What the backbone is given at fine-tuning: [B, 1, SMALL, SMALL] -> [B, 3, image_size, image_size], normalised."""
    size = (conf.image_size, conf.image_size)
    images = F.interpolate(small, size=size, mode=conf.interpolation, align_corners=False).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (conf.mean, conf.std))
    return (images - mean) / std


# ---- training --------------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, conf: DictConfig, generator: torch.Generator) -> float:
    """Top-1 in percent, over four augmented views of each image: clean renders do not look like the training data."""
    model.eval()
    right = 0
    for _ in range(4):
        for batch, target in zip(images.split(500), labels.split(500), strict=True):
            right += (model(present(augment(batch, generator), conf)).argmax(1) == target).sum().item()
    model.train()
    return 100 * right / (4 * len(labels))


def pretrain(args: argparse.Namespace, conf: DictConfig) -> tuple[nn.Module, str, float]:
    """Returns the trained model, its classes and its accuracy on the held-out face in percent."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    classes, *arrays = glyphs(args.classes)
    images, labels, held_out = (torch.from_numpy(array) for array in arrays)
    test_images, test_labels = images[held_out], labels[held_out]
    images, labels = images[~held_out], labels[~held_out]
    model = timm.create_model(conf.timm, pretrained=False, num_classes=len(classes), **conf.kwargs)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(classes)} classes, {len(images)} renders, {size / 1e6:.2f} M parameters with the head", flush=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.98))
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps))),
    )
    start, shown, running = time.monotonic(), time.monotonic(), 0.0
    for step in range(1, args.steps + 1):
        pick = torch.randint(len(images), (args.batch_size,), generator=generator)
        logits = model(present(augment(images[pick], generator), conf))
        loss = F.cross_entropy(logits, labels[pick], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        now = time.monotonic()
        if now - shown > 10 or step == args.steps:
            shown, rate = now, step / (now - start)
            left = (args.steps - step) / rate
            speed = f"{rate * args.batch_size:.0f} images/s, {left:.0f} s left"
            print(f"step {step}/{args.steps}, loss {running:.3f}, {speed}", flush=True)
    return model, classes, accuracy(model, test_images, test_labels, conf, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--classes", type=int, help="only the first CLASSES classes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    conf = OmegaConf.load(CONF)
    model, classes, held_out = pretrain(args, conf)
    print(f"top-1 on {HELD_OUT_FACE}, never trained on: {held_out:.1f} %")
    model.reset_classifier(0)
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "script": f"pretrain_vit_micro.py, version {VERSION}",
        "data": f"{len(classes)} printed letters and symbols, no digits: {classes}",
        "training": f"{args.steps} steps of {args.batch_size} images, seed {args.seed}",
        "held_out_top1": f"{held_out:.2f} % on {HELD_OUT_FACE}",
    }
    atomic_write(args.out, save(tensors, metadata))
    print(f"wrote {args.out}, {args.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
