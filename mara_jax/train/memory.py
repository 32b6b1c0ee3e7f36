"""Memory of the process: what the allocator has freed but kept."""

import ctypes
import gc
import sys


def give_back() -> None:
    """Collects garbage and returns freed heap memory to the system, where the C library can (glibc).

    Compiling a large program, and writing a checkpoint, each leave a gigabyte or more of freed pieces that the heap
    keeps and that large arrays, which have pages of their own, never reuse.
    """
    gc.collect()  # traces of programs refer to one another
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries lack it
    if trim is not None:
        trim(0)
