"""What training costs in device memory: measured on CUDA, predicted everywhere else."""

from s2a_cli.memory.breakdown import Part, Profile
from s2a_cli.memory.device import is_idle, refusal
from s2a_cli.memory.margin import Margin, outlook
from s2a_cli.memory.measure import CudaMeter, meter
from s2a_cli.memory.predict import observe, predict, profile, saved_bytes, track
from s2a_cli.memory.result import Memory
from s2a_cli.memory.snapshot import snapshot
from s2a_cli.memory.tracker import Tracker

__all__ = [
    "CudaMeter",
    "Margin",
    "Memory",
    "Part",
    "Profile",
    "Tracker",
    "is_idle",
    "meter",
    "observe",
    "outlook",
    "predict",
    "profile",
    "refusal",
    "saved_bytes",
    "snapshot",
    "track",
]
