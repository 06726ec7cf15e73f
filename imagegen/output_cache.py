"""The memory of large CPU outputs that are gone, kept for the next ones.

torch returns a large tensor's memory to the system, and the next tensor pays for fresh pages: up to 20 ms for 33 MB,
where normalising those takes 3 ms. Outputs of this package's CPU operators from 1 MB on go to memory that is kept
instead, within a limit of a sixteenth of the machine's memory, and never more, with what is in use, than was in use at
once before; so does the workspace of weight gradients. For outputs it needs torch 2.11. Such a tensor cannot be resized
to more than its memory holds; all else about it is as always.
"""

from . import _library


def size():
    """Bytes kept and not in use."""
    return _library._C.output_cache_bytes() if _library._C else 0


def limit():
    """The most bytes to keep."""
    return _library._C.output_cache_limit() if _library._C else 0


def set_limit(size):
    """Keep at most `size` bytes from now on; with 0 nothing, and outputs stay in torch's own memory."""
    _library.set_cache_limit("output_cache", size)


def clear():
    """Free everything kept."""
    if _library._C:
        _library._C.clear_output_cache()
