"""How long a step of each method takes, and how much memory: one process, DDP and the pipeline over two.

Every example runs as its own script does, but for a callback that notes when each step ends, and a last step.
"""

from __future__ import annotations

import json
import runpy
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_tspipe import tree
from tests.benchmarks.fit import Record, peak_bytes
from tests.scripts.zygote import ROOT, Zygote

WAYS = {"single device": ("auto", 1), "DDP": ("ddp", 2), "tspipe": ("tspipe", 2)}
WARM_UP, STEPS = 14, 34  # the pipeline is planned again after ten batches


class Counted(Record):
    """Notes the rows of a batch, too; 0 on ranks that have none."""

    rows = 0

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        leaves = tree.flatten(batch)[0] if trainer.is_global_zero else []
        self.rows = max([len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim], default=0)

    @override
    def more(self) -> dict[str, Any]:
        return {"rows": self.rows}


def timed_example(rank: int, out: Path, name: str, options: list[str]) -> None:
    """What every rank runs."""

    class Timed(L.Trainer):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given | {"callbacks": [*given.get("callbacks", []), Counted(out)], "max_steps": STEPS})

    torch.set_num_threads(1)
    sys.argv, L.Trainer = [name, *options], Timed  # type: ignore[misc]
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")


def idle_example(rank: int, out: Path, name: str) -> None:
    """The memory of a process that has imported what the example imports, and does nothing."""
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="idle")
    (out / "0.json").write_text(json.dumps({"peak_bytes": peak_bytes()}))


def measure_speeds(zygote: Zygote, folder: Path, examples: dict[str, str]) -> None:
    """Make every measurement whose file is not there.

    Args:
        zygote: forks the processes.
        folder: of the files.
        examples: options of each script.
    """
    out = folder / "output"
    out.mkdir(exist_ok=True, parents=True)

    def run(target: str, ranks: int, **arguments: Any) -> list[dict[str, Any]]:
        codes = zygote.run(f"tests.benchmarks.method_speed:{target}", ranks, out, deadline=300, **arguments)
        if codes != [0] * ranks:  # None: it had to be killed
            raise SystemExit(f"{arguments} failed:\n{(out / '0.txt').read_text()}")
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]

    for name, options in examples.items():
        for way, (strategy, ranks) in WAYS.items():
            file = file_of(folder, name, way)
            if not file.exists():
                print(f"{name}, {way}", file=sys.stderr, flush=True)
                [idle] = run("idle_example", 1, name=name)
                found = run("timed_example", ranks, name=name, options=[*options.split(), "--strategy", strategy])
                step = max(statistics.median(b - a for a, b in pairwise(one["ends"][WARM_UP:])) for one in found)
                rows = found[0]["rows"] * (ranks if way == "DDP" else 1)
                peaks = [one["peak_bytes"] - idle["peak_bytes"] for one in found]
                file.write_text(json.dumps({"step": step, "rows": rows, "peaks": peaks}))


def file_of(folder: Path, name: str, way: str) -> Path:
    return folder / f"speed_{name}_{way.replace(' ', '_')}.json"


def speed_table(folder: Path, examples: dict[str, str]) -> str:
    """A row for each way of each example that was measured."""
    lines = ["| method | way | step ms | samples of a step | samples per s | peak MiB of each process |"]
    lines.append("|---|---|---|---|---|---|")
    for name in examples:
        for way in WAYS:
            if (file := file_of(folder, name, way)).exists():
                found = json.loads(file.read_text())
                peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in found["peaks"])
                speed = found["rows"] / found["step"]
                lines.append(
                    f"| `{name}` | {way} | {1e3 * found['step']:.1f} | {found['rows']} | {speed:.0f} | {peaks} |"
                )
    return "\n".join(lines)
