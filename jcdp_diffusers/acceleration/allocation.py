"""Memory that a network frees and asks for again at its next layer, kept at hand."""

import ctypes


# Of glibc's malloc.h: from which size on a block is mapped by itself (32 MiB is the most it takes), and how much
# memory at the end of the heap may lie unused before it is given back.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_LARGEST_TRIM_THRESHOLD = 2**31 - 1


def keep_freed_memory() -> bool:
    """
    Tell glibc to keep this process's freed memory instead of handing it back to the system.

    A convolutional network on a CPU allocates and frees every layer's output at every step. By default glibc returns
    such blocks to the system at once, which has to clear each page again when the next layer asks for it. Commands
    call this once; a library that is imported leaves its process alone.

    Returns:
        `bool`: False where there is no glibc, and nothing changes.
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None)
    if allocator is None:
        return False
    taken = [
        allocator(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        allocator(_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD),
    ]
    return all(taken)
