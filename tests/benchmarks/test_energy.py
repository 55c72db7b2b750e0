"""The energy of a CPU, read as Linux shows it."""

from __future__ import annotations

import energy
import pytest


def package(root, number, energy_uj, most=2**32):
    zone = root / f"intel-rapl:{number}"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{most}\n")


def test_the_joules_of_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "SECONDS", 0.0)
    package(tmp_path, 0, 1_000_000)
    package(tmp_path, 1, 2**32 - 500_000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # the cores of a package, which it counts too

    def step():
        package(tmp_path, 0, 4_000_000)
        package(tmp_path, 1, 1_500_000)  # behind its greatest value a counter begins anew

    assert energy.Packages(tmp_path).joules(step) == pytest.approx(3.0 + 2.0, abs=1e-4)


def test_machines_that_do_not_tell(tmp_path):
    ran = []
    assert energy.Packages(tmp_path).joules(lambda: ran.append(1)) is None
    package(tmp_path, 0, "no number")
    assert energy.Packages(tmp_path).joules(lambda: ran.append(1)) is None and not ran
