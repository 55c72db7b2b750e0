"""Numbers of trained parameters on ViT-B/16, against what the sources of the structures say."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from s2a_cli import backbones
from s2a_cli.config.schema import BackboneConfig
from s2a_cli.methods import STRUCTURES

VIT_B = BackboneConfig(name="vit_b", timm="vit_base_patch16_224.orig_in21k", pretrained=False)


@pytest.mark.parametrize("method", [name for name, kind in STRUCTURES.items() if kind.published])
def test_as_many_parameters_train_as_published(method):
    """Within 2 %, or half a unit of the last digit that is published; unless the difference is explained."""
    kind = STRUCTURES[method]
    if kind.needs:
        pytest.importorskip(kind.needs, reason=f"method={method} needs {kind.needs}, which is not installed")
    published, made = kind.published, backbones.build(VIT_B, 100, meta=True)
    kind(OmegaConf.merge(OmegaConf.structured(kind.Settings()), published.settings)).attach(made)
    found, stated = made.count()["trainable"] / 1e6, published.millions
    half_a_digit = 0.5 * 10 ** -len(f"{stated}".partition(".")[2])
    close = abs(found - stated) <= max(0.02 * stated, half_a_digit)
    assert close != bool(published.difference), f"{found:.4f} million are trained, {stated} published"
