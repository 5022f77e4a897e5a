"""Puts the results of a run into docs/performance.md, its tables, and a picture beside it."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tests.benchmarks.results import Run


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def emulated(runs: list[Run]) -> str:
    """Utilization: a row per problem, a column per contender that ran any of them; then the best of each."""
    problems = list(dict.fromkeys(run["problem"] for run in runs))
    contenders = list(dict.fromkeys(run["contender"] for run in runs))
    found = {(run["problem"], run["contender"]): f"{run['utilization']:.3f}" for run in runs}
    rows = [[problem, *(found.get((problem, name), "") for name in contenders)] for problem in problems]
    return f"{table(['problem', *contenders], rows)}\n\n{best(runs)}"


def best(runs: list[Run]) -> str:
    """What each has at the best of the numbers of microbatches that it ran, by stages and costs; we in any order.

    An exact teacher is another problem, and so is an exchange before the optimizer step: none of the rivals has them.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        stages, _, *others = run["problem"].split()
        if {"exact", "clipping", "scaler"} & set(others):
            continue
        groups.setdefault(" ".join([stages, *(word for word in others if word.startswith("t="))]), []).append(run)
    rows = []
    for name, group in groups.items():
        tops: dict[str, Run] = {}
        for run in group:
            if run["contender"] not in tops or run["utilization"] > tops[run["contender"]]["utilization"]:
                tops[run["contender"]] = run
        ranked = sorted(tops.values(), key=lambda run: -run["utilization"])
        rows += [[name, run["contender"], run["problem"].split()[1], f"{run['utilization']:.3f}"]
                 for run in ranked if len(ranked) > 1]  # fmt: skip
    return table(["stages", "contender, the best first", "its best M", "utilization"], rows)


def scaling(runs: list[Run]) -> str:
    """Predicted beside measured; then utilization on paper, a row per P and M, the best of all rivals in one column."""
    both = [run for run in runs if run["measured_s"]]
    checks = [
        [run["problem"], run["contender"], f"{run['step_s']:.3f}", f"{run['measured_s']:.3f}",
         f"{run['step_s'] / run['measured_s']:.3f}"]
        for run in both
    ]  # fmt: skip
    paper: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        if not run["measured_s"]:
            paper.setdefault((run["num_stages"], run["num_microbatches"]), []).append(run)
    names = list(dict.fromkeys(r["contender"] for group in paper.values() for r in group if _is_ours(r)))
    rows = []
    for (stages, count), group in paper.items():
        found = {run["contender"]: f"{run['utilization']:.3f}" for run in group}
        ours, rival = (max((r for r in group if _is_ours(r) is mine), key=lambda r: r["utilization"])
                       for mine in (True, False))  # fmt: skip
        speed_ups = [f"{run['speed_up']:.2f}" for run in (ours, rival)]
        rows.append([str(stages), str(count), *(found.get(name, "") for name in names),
                     f"{rival['utilization']:.3f} ({rival['contender']})", *speed_ups])  # fmt: skip
    header = ["P", "M", *names, "best rival", "our speed-up over serial", "the rival's"]
    compared = table(["problem", "contender", "s per step on paper", "measured", "ratio"], checks)
    return f"{compared}\n\n{table(header, rows)}" if checks else table(header, rows)


def _is_ours(run: Run) -> bool:
    return bool(run["contender"].startswith("tspipe"))


def over_ddp(run: Run, runs: Iterable[Run]) -> tuple[float, float]:
    """Throughput and peak memory over those of DDP on the same pair; its leanest rank against our fullest."""
    ddp = next(other for other in runs if other["pair"] == run["pair"] and other["contender"] == "DDP")
    return run["samples_per_s"] / ddp["samples_per_s"], max(run["peak_mib"]) / min(ddp["peak_mib"])


def overhead(runs: list[Run]) -> str:
    """Microseconds per action and per microbatch."""
    rows = [
        [run["problem"], run["contender"], f"{run['us_per_action']:.0f}", f"{run['us_per_microbatch']:.0f}"]
        for run in runs
    ]
    return table(["problem", "contender", "us per action", "us per microbatch"], rows)


def real(runs: list[Run]) -> str:
    """Throughput and memory, and both over DDP's."""
    rows = []
    for run in runs:
        throughput, memory = over_ddp(run, runs)
        peak = " and ".join(f"{peak:.0f}" for peak in run["peak_mib"])
        cells = (f"{run['samples_per_s']:.1f}", f"{throughput:.2f}", peak, f"{memory:.2f}")
        rows.append([run["pair"], run["contender"], *cells])
    return table(["pair", "contender", "samples per s", "over DDP's", "peak MiB", "over DDP's"], rows)


def goals(found: list[Run]) -> str:
    """Every goal and whether it was met."""
    return table(
        ["goal", "bound", "measured", "verdict"],
        [
            [goal["figure"], f"{goal['sign']} {goal['bound']}", f"{goal['measured']:.3f}", _verdict(goal)]
            for goal in found
        ],
    )


def _verdict(goal: Run) -> str:
    return "met" if goal["met"] else "MISSED"


TABLES = {"emulated": emulated, "scaling": scaling, "overhead": overhead, "real": real, "goals": goals}


def fill(page: str, results: dict[str, Any]) -> str:
    """The page with the tables of what was measured between their marks; others stay as they are."""
    for name, make in TABLES.items():
        if name in results:
            begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            body = f"{begin}\n\n{make(results[name])}\n\n{end}"
            page, count = re.subn(rf"{begin}.*?{end}", lambda _, body=body: body, page, flags=re.DOTALL)
            if count != 1:
                raise ValueError(f"the page has {count} places for {name}")
    return page


COLORS = (
    "#1b6e3c",
    "#6fae5c",
    "#7aa6d1",
    "#4779ad",
    "#c9b27c",
    "#a8894a",
    "#b98bbd",
    "#d0806f",
    "#a34b3c",
    "#d9a78b",
    "#8d6b94",
    "#5f9ea0",
    "#999999",
    "#666666",
)
ROW, LEFT, SCALE = 17, 400, 560  # pixels: of a bar, of the names, of a utilization of 1


def picture(runs: list[Run], path: Path) -> None:
    """Bars of utilization, by problem."""
    contenders = list(dict.fromkeys(run["contender"] for run in runs))
    groups = [[run for run in runs if run["problem"] == name] for name in dict.fromkeys(run["problem"] for run in runs)]
    image = Image.new("RGB", (LEFT + SCALE + 60, ROW * (len(runs) + len(groups) + 1)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    top = ROW // 2
    for group in groups:
        draw.text((8, top), group[0]["problem"], "black", font)
        for run in group:
            end = LEFT + SCALE * run["utilization"]
            draw.rectangle((LEFT, top + 2, end, top + ROW - 2), COLORS[contenders.index(run["contender"])])
            draw.text((170, top), run["contender"], "black", font)
            draw.text((end + 4, top), f"{run['utilization']:.3f}", "black", font)
            top += ROW
        top += ROW
    image.save(path)


def main(source: str, folder: str) -> None:
    """Fill ``performance.md`` in a folder from a file of results."""
    results = json.loads(Path(source).read_text())
    page = Path(folder, "performance.md")
    page.write_text(fill(page.read_text(), results))
    if "emulated" in results:
        picture(results["emulated"], Path(folder, "performance.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
