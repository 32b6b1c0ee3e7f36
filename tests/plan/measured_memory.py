"""What the system tells of this process's memory."""

import pathlib
import re


def status(name: str) -> int:
    """Bytes that /proc tells of this process."""
    line = re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024
