"""Without a GPU, Triton's kernels run through its interpreter; that has to be said before anything imports Triton."""

import ctypes
import os


def _has_gpu():
    """Asked of the driver: torch is not imported before `diffmas_ops`, which may import Triton."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")
