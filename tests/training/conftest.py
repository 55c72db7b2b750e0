"""A finished run that several tests use, and none changes."""

import pytest

from s2a_cli.config.compose import compose
from s2a_cli.training import forecast, trainer

QUICK = ["dataset=digits", "dataset.shots=4", "backbone=vit_micro", "optim.epochs=1", "device=cpu"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder and the record of a short run with auxiliary heads."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "predict", lambda run: None)
        result, _ = trainer.train(compose([*QUICK, "method=s2a", f"run_dir={folder}"]))
    return folder, result
