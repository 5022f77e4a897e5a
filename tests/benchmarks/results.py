"""The file of results: what a command has measured is not measured again, so that a long one can be cut."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

Run = dict[str, Any]
Figures = dict[str, float]


class Results:
    """What is measured, kept in a file as soon as it is.

    Args:
        path: The file; it may not be there yet.
        full: Whether the command is the long one, which goes on with what the short one has measured.
        again: Parts to forget.
    """

    def __init__(self, path: Path, full: bool = False, again: Iterable[str] = ()) -> None:
        self.path, self.full = path, full
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for part in again:
            self.values.pop(part, None)
            for kept in ("figures", "finished"):
                self.values.get(kept, {}).pop(part, None)

    def runs(self, part: str) -> list[Run]:
        """Those of a part that are there."""
        found: list[Run] = self.values.get(part, [])
        return found

    def has(self, part: str) -> bool:
        """Whether a part is complete, for a command of this length."""
        length = self.values.get("finished", {}).get(part)
        return length == "full" or (length == "quick" and not self.full)

    @property
    def figures(self) -> Figures:
        """Of all parts."""
        return {name: value for part in self.values.get("figures", {}).values() for name, value in part.items()}

    def keep(self, part: str, runs: Sequence[Any]) -> None:
        """Save the runs of a part so far."""
        self.values[part] = [run if isinstance(run, dict) else asdict(run) for run in runs]
        self.write()

    def finish(self, part: str, figures: Figures) -> None:
        """A part is complete."""
        self.values.setdefault("figures", {})[part] = figures
        self.values.setdefault("finished", {})[part] = "full" if self.full else "quick"
        self.write()

    def write(self) -> None:
        """A killed command leaves the old file or the new one."""
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps(self.values, indent=2) + "\n")
        new.replace(self.path)
