"""What training costs in device memory: measured on CUDA, predicted everywhere else."""

from s2a_cli.memory.measure import CudaMeter, device_is_idle, meter
from s2a_cli.memory.predict import Tracker, predict, saved_bytes, track
from s2a_cli.memory.result import Memory

__all__ = ["CudaMeter", "Memory", "Tracker", "device_is_idle", "meter", "predict", "saved_bytes", "track"]
