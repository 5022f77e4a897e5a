"""Packages that importing Lightning would import, but that a process does not need, can be hidden meanwhile."""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import sys
from typing import Any

LARGE = {"matplotlib", "scipy", "transformers"}  # torchmetrics looks for them, and does without


class Hide(importlib.abc.MetaPathFinder):
    """Finds no hidden package, as if none were installed.

    Args:
        hidden: names of packages.
    """

    def __init__(self, hidden: set[str]) -> None:
        self._hidden, self._distribution = hidden, importlib.metadata.distribution
        sys.meta_path.insert(0, self)
        importlib.metadata.distribution = self._found

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Nothing, so that others are asked, or the error of a missing package."""
        if fullname.partition(".")[0] in self._hidden:
            raise ModuleNotFoundError(f"No module named {fullname!r}, which tests hide", name=fullname)

    def _found(self, distribution_name: str) -> importlib.metadata.Distribution:
        if distribution_name in self._hidden:
            raise importlib.metadata.PackageNotFoundError(distribution_name)
        return self._distribution(distribution_name)

    def end(self) -> None:
        """From now on they can be imported."""
        self._hidden = set()  # others may have taken the function below
        sys.meta_path.remove(self)
        importlib.metadata.distribution = self._distribution
