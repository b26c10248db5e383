"""Speed: guidance in one call, compiled blocks, attention kernels, CUDA graphs, memory layout."""

from rsaft_fast.speed.apply import apply_speed
from rsaft_fast.speed.settings import SpeedSettings

__all__ = ["SpeedSettings", "apply_speed"]
