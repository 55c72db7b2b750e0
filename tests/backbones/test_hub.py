"""Where the hub does not answer, its client is not left to try again and again."""

from __future__ import annotations

import pytest
import timm
from huggingface_hub import constants

from s2a_cli import backbones
from s2a_cli.backbones import hub
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import BackboneConfig


class Session:
    """Counts requests; each fails in the way of `error`."""

    def __init__(self, error: Exception | None):
        self.error, self.asked = error, []

    def head(self, url, timeout):
        self.asked.append((url, timeout))
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, ConnectionError("no route"), TimeoutError("no answer")], ids=str)
def test_the_hub_is_asked_once(error, monkeypatch):
    session = Session(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    with hub.hub() as why:
        assert (error is not None) == constants.HF_HUB_OFFLINE
        assert (f"{constants.ENDPOINT} can't be reached: {type(error).__name__}" == why) == (error is not None)
    assert constants.HF_HUB_OFFLINE is False and session.asked == [(constants.ENDPOINT, hub.PATIENCE)]


def test_weights_are_refused_after_one_request(monkeypatch):
    session = Session(ConnectionError("no route"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    config = BackboneConfig(name="mine", timm="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    with pytest.raises(UserError, match=r"could not be downloaded \(http\S+ can't be reached: ConnectionError\); give"):
        backbones.build(config, 3)
    assert len(session.asked) == 1


def test_a_model_is_made_offline_only_where_the_cache_may_have_its_weights(monkeypatch, tmp_path):
    made = []
    create = timm.create_model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("TIMM_USE_OLD_CACHE", raising=False)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: made.append(kwargs) or create(*args, **kwargs))
    config = BackboneConfig(name="mine", timm="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    with pytest.raises(hub.WeightsMissing, match="HF_HUB_OFFLINE is set"):
        backbones.build(config, 3)
    assert made and not any(kwargs["pretrained"] for kwargs in made)
    (tmp_path / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k").mkdir()
    with pytest.raises(hub.WeightsMissing, match="HF_HUB_OFFLINE is set"):
        backbones.build(config, 3)
    assert made[-1]["pretrained"]
    assert not hub.is_known("timm/other")
    monkeypatch.setenv("TIMM_USE_OLD_CACHE", "1")
    assert hub.is_known("timm/other"), "timm's own cache may have it"
