"""What the CPU of this machine is, for the log and a model card."""

import os
from pathlib import Path


def processor() -> str:
    """Its name as Linux has it, and how many cores this process may use."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"
