"""How fast a run is, what it waits for, and how much memory it takes: for its lines of metrics."""

from __future__ import annotations

import os
import sys
import time

import torch

from avtrain import ranks


class Span:
    """Time and clips since the last line of metrics."""

    def __init__(self) -> None:
        self._began, self._waited_s, self._clips = time.monotonic(), 0.0, 0

    def took(self, waited_s: float, clips: int) -> None:
        """A batch came."""
        self._waited_s, self._clips = self._waited_s + waited_s, self._clips + clips

    def figures(self, device: torch.device, mfu_of_clip_per_s: float | None) -> dict[str, float]:
        """Clips a second of all processes, and of one where there are several; the share of time spent waiting for
        data, and memory, of the process that has most of it; MFU where it is known. All processes call this."""
        elapsed_s = time.monotonic() - self._began
        own = self._clips / elapsed_s
        waiting_share, memory_gib = ranks.largest_of_each(self._waited_s / elapsed_s, _memory_gib(device))
        found = {"clips_per_s": own * ranks.ranks(), "waiting_share": waiting_share, "memory_gib": memory_gib}
        if ranks.ranks() > 1:
            found["clips_per_s_process"] = own
        return found if mfu_of_clip_per_s is None else found | {"mfu": own * mfu_of_clip_per_s}


def _memory_gib(device: torch.device) -> float:
    """Of a GPU the most that its tensors took so far; else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        with open("/proc/self/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        import resource

        # The most so far; in bytes on macOS, elsewhere in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
