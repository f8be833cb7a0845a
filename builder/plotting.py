"""Plots go to files: matplotlib is imported when one is drawn, and looks for no screen."""

from __future__ import annotations

from types import ModuleType


def pyplot() -> ModuleType:
    """matplotlib's pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as module

    return module
