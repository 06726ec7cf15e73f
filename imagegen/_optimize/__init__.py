"""imagegen.optimize and imagegen.restore."""

from .report import Left, Replaced, Report
from .walk import optimize, restore

__all__ = ["Left", "Replaced", "Report", "optimize", "restore"]
