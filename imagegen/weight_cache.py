"""The transformed weights that the CPU convolutions keep between calls.

A 3x3 weight in Winograd's form is four times as large, and nine times for `upsample_conv2d`, 25/9 for small images: 0.9
GB for the decoder of Stable Diffusion, 8 GB for its UNet. Each is kept until its weight changes, within a limit of half
the machine's memory. What does not fit is transformed again at every call, which costs up to a tenth of the
convolution. A model that is gone leaves its weights behind until others need the room: `clear()` frees them.
"""

from . import _library


def size():
    """Bytes kept."""
    return _library._C.weight_cache_bytes() if _library._C else 0


def misses():
    """How many times a weight had to be transformed. A number that grows by call says the limit is too small."""
    return _library._C.weight_cache_misses() if _library._C else 0


def limit():
    """The most bytes to keep."""
    return _library._C.weight_cache_limit() if _library._C else 0


def set_limit(size):
    """Keep at most `size` bytes from now on; 0 keeps nothing."""
    _library.set_cache_limit("weight_cache", size)


def clear():
    """Free everything kept."""
    if _library._C:
        _library._C.clear_weight_cache()
