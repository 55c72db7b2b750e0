"""Where Triton can't build a kernel: what is said, and for how long it is believed."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from s2a_cli.activations import kernels


@pytest.fixture
def triton(monkeypatch):
    """Stands in for the launchers; `fails` are raised by one probe after the other."""
    launch = types.SimpleNamespace(fails=[], probes=0, **{name: name for name in kernels.OPERATORS})

    def probe():
        launch.probes += 1
        if launch.fails:
            raise launch.fails.pop(0)

    launch.probe = probe
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="9.9"))
    monkeypatch.setitem(sys.modules, "s2a_cli.activations.kernels.launch", launch)
    monkeypatch.setattr(kernels, "launch", launch, raising=False)
    monkeypatch.setattr(kernels, "_known", None)
    monkeypatch.setattr(kernels, "_warned", False)
    return launch


def asked(times: int) -> tuple[list[str], list[str]]:
    """What runs, each time that it is asked for, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [kernels._launchers()[0] for _ in range(times)]
    return found, [str(warning.message) for warning in caught]


def test_kernels_are_built_once(triton):
    assert asked(3) == (["triton 9.9"] * 3, []) and triton.probes == 1


def test_a_failure_is_said_once_with_its_reason(triton):
    triton.fails = [RuntimeError("no C compiler\nfound in PATH")]
    found, said = asked(3)
    assert found == ["plain (Triton: RuntimeError)"] * 3 and triton.probes == 1
    assert said == [
        "codes are made by plain PyTorch, several times slower: Triton can't build its kernels (RuntimeError: no C"
        " compiler)"
    ]


def test_a_failure_that_passes_is_not_remembered(triton):
    triton.fails = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
    found, said = asked(4)
    assert found == ["plain (Triton: OutOfMemoryError)", "plain (Triton: RuntimeError)", "triton 9.9", "triton 9.9"]
    assert len(said) == 1 and triton.probes == 3
