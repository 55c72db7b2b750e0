"""Where the hub does not answer, its client is not left to try again and again."""

from __future__ import annotations

import pytest
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
