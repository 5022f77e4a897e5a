"""The import rules and house rules of the library, held by reading its files; nothing of it is imported here.

Every rule is also shown a small source that breaks it.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "lightning_tspipe"
FOLDER = Path(__file__).parent.parent / PACKAGE

# From bottom to top: a module imports only from modules that stand before it here.
ORDER = (
    # stdlib only
    *("errors", "topology", "table", "schedule", "clock", "simulate"),
    *("greedy", "plain", "holes", "ahead", "floor", "orders", "placement", "journal", "rivals", "perfetto"),
    "picture",  # and Pillow, where it draws
    # what a network and its schedule are
    *("tree", "arguments", "taps", "batchnorm", "recording", "selective", "memory", "steps", "trace", "balance"),
    *("layers", "partition", "teacher", "plan", "prospects", "_nodes", "split", "reach"),
    # one rank at work
    *("stage", "data", "board", "edge", "channel", "comm", "replicas", "logrelay", "hooks", "scope", "lossside"),
    *("checkpoint", "stopwatch", "beside", "runtime", "replan", "measure", "placing", "counting", "randomness"),
    # what meets Lightning
    *("_lightning", "_loaders", "_metrics", "whole", "launching", "module", "example", "processes", "feed"),
    *(
        "training",
        "evaluating",
        "arranging",
        "fitting",
        "files",
        "sharded",
        "saving",
        "refuse",
        "reporting",
        "strategy",
        "monitor",
        "tracing",
        "dryplan",
        "commands",
        "cli",
        "__init__",
    ),
)
STDLIB_ONLY = {*ORDER[: ORDER.index("picture")]}
KNOW_LIGHTNING = {
    *(
        "_lightning",
        "_loaders",
        "launching",
        "module",
        "example",
        "processes",
        "training",
        "evaluating",
        "arranging",
        "fitting",
    ),
    *(
        "files",
        "saving",
        "refuse",
        "reporting",
        "strategy",
        "monitor",
        "tracing",
        "dryplan",
        "commands",
        "cli",
        "__init__",
    ),
}
LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}

COMMUNICATES = re.compile(r"send|recv|broadcast|reduce|gather|scatter|all_to_all|barrier|P2POp")
# What Lightning asks of every strategy, outside the pipeline.
STRATEGY_MAY = {"all_gather", "all_reduce", "barrier", "broadcast", "broadcast_object_list", "reduce"}

MAX_LINES = 400


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    module: str
    text: str

    @property
    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text))

    def at(self, node: ast.AST | None, message: str) -> str:
        """The message with the place that it is about; None means the whole file."""
        return f"{PACKAGE}/{self.module}.py:{getattr(node, 'lineno', 1)}: {message}"


def imported(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every import of a file, wherever it stands, as (node, dotted name); what a `from` names is part of the name."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [PACKAGE] if node.level else []
            start = ".".join(package + ([node.module] if node.module else []))
            yield from ((node, f"{start}.{alias.name}") for alias in node.names)


def own_imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every import from the package itself, as (node, module); a name of no module is one of __init__."""
    for node, name in imported(source):
        root, *rest = name.split(".")
        if root == PACKAGE:
            is_module = len(rest) > 1 or (rest and rest[0] in ORDER)
            yield node, rest[0] if is_module else "__init__"


def used(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every name that a file imports or reads, as (node, dotted name), import aliases replaced by what they mean."""
    meaning: dict[str, str] = {}
    for node in source.nodes:
        if isinstance(node, ast.Import):
            meaning.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            meaning.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    yield from imported(source)
    for node in source.nodes:
        if isinstance(node, ast.Name | ast.Attribute):
            root, *rest = ast.unparse(node).split(".")
            yield node, ".".join([meaning.get(root, root), *rest])


def known_modules(source: Source) -> Iterator[str]:
    """Each file has its place in ORDER."""
    if source.module not in ORDER:
        yield source.at(None, f"unknown module {source.module!r}: give it its place in ORDER of {Path(__file__).name}")


def downwards(source: Source) -> Iterator[str]:
    """Imports go only downwards."""
    height = {module: index for index, module in enumerate(ORDER)}
    for node, target in own_imports(source):
        if target not in height:
            yield source.at(node, f"imports the unknown module {target!r}: add it to ORDER of {Path(__file__).name}")
        elif height[target] >= height.get(source.module, len(ORDER)):
            yield source.at(node, f"imports {target!r}, which does not stand below it in ORDER")


def stdlib_only(source: Source) -> Iterator[str]:
    """The schedule and its simulation need nothing but Python."""
    if source.module in STDLIB_ONLY:
        for node, name in imported(source):
            root = name.partition(".")[0]
            if root not in sys.stdlib_module_names | {PACKAGE}:
                yield source.at(node, f"imports {root!r}, but holds itself to the standard library")
        for node, target in own_imports(source):
            if target not in STDLIB_ONLY:
                yield source.at(node, f"imports {target!r}, which needs more than the standard library")


def who_knows_lightning(source: Source) -> Iterator[str]:
    """Lightning is known at the top only."""
    for node, name in imported(source):
        if name.partition(".")[0] in LIGHTNING and source.module not in KNOW_LIGHTNING:
            yield source.at(node, f"imports {name!r}; only {', '.join(sorted(KNOW_LIGHTNING))} may know Lightning")


def who_communicates(source: Source) -> Iterator[str]:
    """comm.py is the only file that sends and receives; replicas.py has the collectives of data parallelism."""
    if source.module in ("board", "edge", "channel", "comm", "replicas"):
        return
    allowed = STRATEGY_MAY if source.module in {"strategy", "processes"} else set()
    for node, name in used(source):
        library, _, call = name.rpartition(".")
        of_torch = f"{library}.".startswith("torch.distributed.")
        if of_torch and COMMUNICATES.search(call) and call not in allowed:
            yield source.at(node, f"uses {name}, which is for comm.py")


def short_files(source: Source) -> Iterator[str]:
    """A file holds one concept."""
    lines = len(source.text.splitlines())
    if lines > MAX_LINES:
        yield source.at(None, f"has {lines} lines, more than {MAX_LINES}: split it by concept")


def quiet(source: Source) -> Iterator[str]:
    """No prints, sleeps, argparse, bare excepts, global statements."""
    for node, name in used(source):
        if name in {"print", "builtins.print"}:
            yield source.at(node, "prints; use warnings, logging or an exception")
        elif name == "time.sleep":
            yield source.at(node, "sleeps; wait for an event")
        elif name.partition(".")[0] == "argparse" and isinstance(node, ast.Import | ast.ImportFrom):
            yield source.at(node, "imports argparse; options belong to LightningCLI")
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield source.at(node, "has a bare except; name what it expects")
        elif isinstance(node, ast.Global):
            yield source.at(node, "has a global statement; keep state in an object")


Rule = Callable[[Source], Iterable[str]]
RULES: tuple[Rule, ...] = (
    known_modules,
    downwards,
    stdlib_only,
    who_knows_lightning,
    who_communicates,
    short_files,
    quiet,
)

BAD: tuple[tuple[Rule, str, str], ...] = (
    (known_modules, "helpers", "x = 1"),
    (downwards, "schedule", "from lightning_tspipe.simulate import replay"),
    (downwards, "schedule", "import lightning_tspipe.simulate as simulate"),
    (downwards, "schedule", "from lightning_tspipe import simulate"),
    (downwards, "schedule", "from . import simulate"),
    (downwards, "schedule", "from .simulate import replay"),
    (downwards, "schedule", "def f():\n    from lightning_tspipe.simulate import replay"),
    (downwards, "comm", "if TYPE_CHECKING:\n    from lightning_tspipe.runtime import Runtime"),
    (downwards, "strategy", "from lightning_tspipe import TeacherStudentModule"),
    (downwards, "strategy", "import lightning_tspipe"),
    (downwards, "stage", "from lightning_tspipe.stage import Stage"),
    (downwards, "strategy", "from lightning_tspipe.helpers import x"),
    (stdlib_only, "schedule", "import torch"),
    (stdlib_only, "simulate", "from numpy import array"),
    (stdlib_only, "simulate", "from lightning_tspipe.tree import flatten"),
    (who_knows_lightning, "runtime", "import lightning as L"),
    (who_knows_lightning, "runtime", "from lightning.pytorch.utilities import rank_zero_warn"),
    (who_knows_lightning, "plan", "import pytorch_lightning"),
    (who_communicates, "runtime", "import torch.distributed as dist\ndist.isend(x, 1)"),
    (who_communicates, "runtime", "import torch.distributed as dist\nstart(dist.irecv)"),
    (who_communicates, "runtime", "from torch import distributed\ndistributed.all_reduce(x)"),
    (who_communicates, "runtime", "import torch\ntorch.distributed.broadcast_object_list(x)"),
    (who_communicates, "checkpoint", "from torch.distributed import all_gather_object as collect"),
    (who_communicates, "checkpoint", "from torch.distributed.nn.functional import all_gather"),
    (who_communicates, "strategy", "import torch.distributed as dist\ndist.send(x, 1)"),
    (short_files, "plan", "x = 1\n" * (MAX_LINES + 1)),
    (quiet, "plan", "print('x')"),
    (quiet, "plan", "import time\ntime.sleep(1)"),
    (quiet, "plan", "from time import sleep as rest"),
    (quiet, "cli", "import argparse"),
    (quiet, "cli", "from argparse import ArgumentParser"),
    (quiet, "plan", "try:\n    x = 1\nexcept:\n    x = 2"),
    (quiet, "plan", "def f():\n    global x"),
)

GOOD: tuple[tuple[str, str], ...] = (
    ("simulate", "from lightning_tspipe.schedule import Action"),
    ("comm", "import torch.distributed as dist\ndist.isend(x, 1)"),
    ("strategy", "import torch.distributed as dist\ndist.barrier()\nself.comm.send(x)"),
    ("runtime", "import torch.distributed as dist\nedge.send(x)\nif dist.is_initialized():\n    dist.get_rank()"),
    ("strategy", "import lightning.pytorch as pl\nfrom lightning_tspipe import _lightning, runtime"),
    ("__init__", "from lightning_tspipe.strategy import TSPipeStrategy"),
    (
        "plan",
        "import time\ntime.perf_counter()\ntry:\n    x = 1\nexcept ValueError:\n    x = 2\n" + "\n" * (MAX_LINES - 6),
    ),
)


def test_the_library_keeps_the_rules() -> None:
    sources = [
        Source(path.relative_to(FOLDER).with_suffix("").as_posix(), path.read_text())
        for path in sorted(FOLDER.rglob("*.py"))
    ]
    assert sources
    broken = [message for source in sources for rule in RULES for message in rule(source)]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(("rule", "module", "text"), BAD)
def test_a_rule_sees_what_breaks_it(rule: Rule, module: str, text: str) -> None:
    assert list(rule(Source(module, text)))


@pytest.mark.parametrize(("module", "text"), GOOD)
def test_rules_let_good_code_pass(module: str, text: str) -> None:
    assert [message for rule in RULES for message in rule(Source(module, text))] == []


def test_every_rule_has_a_bad_example() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)


def test_an_unknown_module_is_told_where_to_go() -> None:
    (message,) = known_modules(Source("helpers", ""))
    assert "lightning_tspipe/helpers.py" in message
    assert "ORDER of test_import_rules.py" in message
