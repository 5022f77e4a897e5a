"""Trains every method of `examples/` in several ways, and prints the table of docs/methods.md: make methods.

    python -m tests.benchmarks.methods [--only NAME ...] [--seeds N] [--folder FOLDER] [--speed]

With --speed it measures step time and memory instead. Each run leaves a JSON file in the folder, and is not made again
while that is there. It ends with an error if ways differ that must not.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.method_speed import measure_speeds, speed_table
from tests.scripts.zygote import ROOT, Zygote

TARGET = "tests.scripts.examples:run_example"
SINGLE = ("single device", "--strategy auto")
WHOLE = ("tspipe, delay 0, M=1", "--delay 0 --microbatches 1")
FROZEN = [SINGLE, *((f"tspipe, M={m}", f"--microbatches {m}") for m in (2, 4, 8))]
MOVING = [
    SINGLE,
    ("tspipe, delay 0, M=2", "--delay 0 --microbatches 2"),
    *((f"tspipe, delay 1, M={m}", f"--delay 1 --microbatches {m}") for m in (2, 4, 8)),
]


@dataclass(frozen=True)
class Method:
    """An example, what to ask of it, and the ways to train it.

    Args:
        name: of the file.
        options: of every run.
        label: what the accuracy comes after in the output.
        ways: names and options.
        equal: whether accuracy and loss must be the same in all ways, to the last digit that is printed.
        rows: how many of them a batch norm in training normalizes together; None for the whole batch.
        double: whether all of it is in float64, where no script says so.
    """

    name: str
    options: str
    label: str
    ways: list[tuple[str, str]]
    equal: bool = False
    rows: int | None = None
    double: bool = False


METHODS = [
    Method("distill_digits", "--epochs 16", "student", FROZEN),
    Method("feature_digits", "--epochs 10", "student", FROZEN),
    Method("distill_fashion", "", "distilled", FROZEN),
    Method("distilbert", "--steps 40", "distilled", FROZEN),
    Method("byol_digits", "--epochs 12", "after", MOVING),
    Method("moco_v3", "--epochs 12", "after", MOVING),
    Method("mean_teacher", "--epochs 10", "accuracy", MOVING),
    Method("dino", "--epochs 6", "after", MOVING),
    *(
        Method(name, "--epochs 12", "after", [("single device, batch norms 8 rows at a time", SINGLE[1])], rows=8)
        for name in ("byol_digits", "moco_v3")
    ),
    Method("distill_digits", "--epochs 16 --precision 64-true", "student", FROZEN, equal=True),
    Method("distill_fashion", "", "distilled", [(f"{way}, float64", o) for way, o in FROZEN], equal=True, double=True),
    Method("distill_digits", "--epochs 16 --soft 0", "student", [SINGLE]),
    Method("feature_digits", "--epochs 10 --hint 0 --attention 0", "student", [SINGLE]),
    Method("mean_teacher", "--epochs 10 --weight 0", "accuracy", [SINGLE]),
    Method("feature_digits", "--epochs 10 --precision 64-true", "student", FROZEN),
    *(
        Method("moco_v3", f"--epochs 12 --momentum {m}", "after", [SINGLE, WHOLE, *MOVING[1:3]])
        for m in ("0.9", "0.99", "0.996")
    ),
]


def runs(methods: list[Method], seeds: int) -> Iterator[tuple[Method, str, list[str], int]]:
    for method in methods:
        for way, options in method.ways:
            for seed in range(seeds):
                yield method, way, [*method.options.split(), *options.split(), "--seed", str(seed)], seed


def file_of(folder: Path, method: Method, options: list[str]) -> Path:
    changes = [*([] if method.rows is None else ["rows", str(method.rows)]), *["double"] * method.double]
    return folder / f"{'_'.join([method.name, *options, *changes]).replace('--', '').replace(' ', '_')}.json"


def run(zygote: Zygote, folder: Path, method: Method, options: list[str]) -> dict[str, object]:
    """Train once, in a folder of its own."""
    out, start = folder / "output", time.monotonic()
    out.mkdir(exist_ok=True, parents=True)
    arguments = {"name": method.name, "options": options, "rows": method.rows, "double": method.double}
    ranks = 1 if "auto" in options else 2
    codes = zygote.run(TARGET, ranks, out, deadline=900, **arguments)
    text = (out / "0.txt").read_text()
    if codes != [0] * ranks:  # None: it had to be killed
        raise SystemExit(f"{method.name} {options} failed:\n{text}")
    found = re.search(rf"{method.label} (\d\.\d+)", text)
    assert found, text
    command = " ".join(["python", f"examples/{method.name}.py", *options])
    loss = re.search(r"loss (-?\d+\.\d+)", text)
    result = {"accuracy": float(found[1]), "seconds": time.monotonic() - start, "command": command}
    return result if loss is None else result | {"loss": loss[1]}


def train(zygote: Zygote, folder: Path, methods: list[Method], seeds: int) -> None:
    """Make every run whose file is not there."""
    todo = list(runs(methods, seeds))
    for number, (method, way, arguments, seed) in enumerate(todo, 1):
        file = file_of(folder, method, arguments)
        if not file.exists():
            print(f"{number} of {len(todo)}: {method.name}, {way}, seed {seed}", file=sys.stderr, flush=True)
            file.write_text(json.dumps(run(zygote, folder, method, arguments)))


def differing(folder: Path, methods: list[Method], seeds: int) -> list[str]:
    """The runs of a method whose ways must be equal that are not as its first way is at that seed."""
    found = []
    for method in methods:
        first: dict[int, tuple[object, object]] = {}
        for _, way, options, seed in runs([method] if method.equal else [], seeds):
            file = file_of(folder, method, options)
            if file.exists():
                result = json.loads(file.read_text())
                mine = result["accuracy"], result["loss"]
                if first.setdefault(seed, mine) != mine:
                    found.append(f"{method.name} {method.options}, {way}, seed {seed}: {mine}, not {first[seed]}")
    return found


def table(folder: Path, methods: list[Method], seeds: int) -> str:
    """A row for each way of each method that was run with all seeds."""
    lines = [f"| method | way | mean of {seeds} seeds | least to most |", "|---|---|---|---|"]
    for method in methods:
        for way, _ in method.ways:
            files = [file_of(folder, method, options) for m, w, options, _ in runs([method], seeds) if w == way]
            if all(file.exists() for file in files):
                found = [json.loads(file.read_text())["accuracy"] for file in files]
                spread = f"{min(found):.3f} to {max(found):.3f}"
                command = f"{method.name} {method.options}".strip()
                lines.append(f"| `{command}` | {way} | {statistics.mean(found):.3f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=sorted({method.name for method in METHODS}))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/methods")
    parser.add_argument("--speed", action="store_true", help="measure step time and memory; the machine must be quiet")
    options = parser.parse_args()
    wanted = [method for method in METHODS if method.name in options.only]
    examples = {method.name: method.options for method in reversed(METHODS)}  # those of the first row
    zygote = Zygote()
    try:
        if options.speed:
            measure_speeds(zygote, options.folder, {method.name: examples[method.name] for method in wanted})
        else:
            train(zygote, options.folder, wanted, options.seeds)
    finally:
        zygote.close()
    if options.speed:
        print(speed_table(options.folder, {method.name: examples[method.name] for method in METHODS}))
        return
    print(table(options.folder, METHODS, options.seeds))
    if wrong := differing(options.folder, METHODS, options.seeds):
        raise SystemExit("\n".join(["", *wrong]))


if __name__ == "__main__":
    main()
