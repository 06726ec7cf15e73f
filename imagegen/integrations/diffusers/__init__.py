"""diffusers: `scheduler`, a drop-in for `pipe.scheduler`, and `AttnProcessor`, for the processor of its attention."""

import importlib

_HOMES = {"AttnProcessor": ".attn_processor", "scheduler": ".table_scheduler"}

__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
