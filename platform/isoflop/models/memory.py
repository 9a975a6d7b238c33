"""Memory of devices: what is free, how much there is, and giving it back."""

from __future__ import annotations

import gc
from pathlib import Path

import torch


def memory_of(device: str) -> tuple[float, float]:
    """Free and total bytes of an accelerator, or of this host as far as its control group lets it be used."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + unused), float(total)
    found = {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in _lines("/proc/meminfo") if "kB" in line}
    nothing_known = float("inf")
    host_free, host_total = found.get("MemAvailable", nothing_known), found.get("MemTotal", nothing_known)
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        # files that were read count as used, though they make room where somebody needs it: weights, above all
        stat = dict(line.split() for line in _lines("/sys/fs/cgroup/memory.stat"))
        files = float(stat.get("active_file", 0)) + float(stat.get("inactive_file", 0))
        own_free = float(limit[0]) - float(used[0]) + files
        return min(host_free, own_free), min(host_total, float(limit[0]))
    return host_free, host_total


def release(device: str) -> None:
    """Give memory of objects that nothing refers to any more back to the device, and to others like it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # another system has no such file: nothing is known, and nothing is short
        return []
