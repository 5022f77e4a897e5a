"""Python runs this first where it is on PYTHONPATH: hides packages that importing Lightning would import, but not need.

Without them, which torchmetrics and others look for, a script starts in less than two thirds of the time.
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import sys
from typing import Any

HIDDEN = {"matplotlib", "scipy", "torchvision", "transformers"}


class Hide(importlib.abc.MetaPathFinder):
    """Finds no hidden package, as if none were installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Nothing, so that others are asked, or the error of a missing package."""
        if fullname.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {fullname!r}, which tests hide", name=fullname)


def distribution(name: str, found: Any = importlib.metadata.distribution) -> Any:
    """As in `importlib.metadata`, but hidden packages are not installed."""
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)


sys.meta_path.insert(0, Hide())
importlib.metadata.distribution = distribution
