"""Puts the results of a run into docs/performance.md, its tables, and a picture beside it."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def emulated(runs: list[Run]) -> str:
    """Utilization: a row per problem, a column per contender that ran any of them."""
    problems = list(dict.fromkeys(run["problem"] for run in runs))
    contenders = list(dict.fromkeys(run["contender"] for run in runs))
    found = {(run["problem"], run["contender"]): f"{run['utilization']:.3f}" for run in runs}
    rows = [[problem, *(found.get((problem, name), "") for name in contenders)] for problem in problems]
    return table(["problem", *contenders], rows)


def overhead(runs: list[Run]) -> str:
    """Microseconds per action and per microbatch."""
    rows = [
        [run["problem"], run["contender"], f"{run['us_per_action']:.0f}", f"{run['us_per_microbatch']:.0f}"]
        for run in runs
    ]
    return table(["problem", "contender", "us per action", "us per microbatch"], rows)


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


TABLES = {"emulated": emulated, "overhead": overhead, "goals": goals}


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


def picture(runs: list[Run], path: Path) -> None:
    """Bars of utilization, by problem."""
    from matplotlib import pyplot  # only whoever draws needs it

    problems = list(dict.fromkeys(run["problem"] for run in runs))
    contenders = list(dict.fromkeys(run["contender"] for run in runs))
    figure, axes = pyplot.subplots(figsize=(11, 0.5 + 0.22 * len(runs)))
    colors = pyplot.get_cmap("tab10")
    place, ticks = 0.0, []
    for problem in problems:
        mine = [run for run in runs if run["problem"] == problem]
        ticks.append(place + (len(mine) - 1) / 2)
        for run in mine:
            color = colors(contenders.index(run["contender"]) % 10)
            axes.barh(place, run["utilization"], color=color)
            axes.text(run["utilization"] + 0.005, place, f"{run['utilization']:.3f}", va="center", fontsize=7)
            place += 1
        place += 1
    axes.set_yticks(ticks, problems)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("utilization (work of a rank / measured step)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors(number % 10)) for number in range(len(contenders))]
    axes.legend(handles, contenders, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main(source: str, folder: str) -> None:
    """Fill ``performance.md`` in a folder from a file of results."""
    results = json.loads(Path(source).read_text())
    page = Path(folder, "performance.md")
    page.write_text(fill(page.read_text(), results))
    if "emulated" in results:
        picture(results["emulated"], Path(folder, "performance.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
