"""What README and docs/ say is so: links, code, tables and names."""

from __future__ import annotations

import ast
import datetime
import doctest
import importlib.metadata
import inspect
import os
import re
import runpy
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from packaging.requirements import Requirement

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.cli import main
from lightning_tspipe.teacher import teacher_version
from tests.benchmarks.__main__ import options_of
from tests.multiproc import result_of
from tests.scripts.zygote import Zygote
from tests.test_bad_input import REFUSED

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def table(text: str, name: str) -> list[list[str]]:
    """The cells of the body of the table after ``<!-- name -->``, code marks taken off."""
    _, found, rest = text.partition(f"<!-- {name} -->")
    assert found, name
    lines = rest.strip().split("\n\n")[0].splitlines()
    assert set(lines[1]) <= set("|- "), lines[1]
    return [[cell.strip().strip("`").strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(
        r"\]\(([^)]+)\)", re.sub(r"```.*?```|`[^`\n]+`(?!\])", "", page.read_text(), flags=re.DOTALL)
    ):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pages
def test_sessions_print_what_the_page_says(page: Path) -> None:
    assert doctest.testfile(str(page), module_relative=False).failed == 0


@pages
def test_code_runs(page: Path) -> None:
    """Every block that is no session, each by itself; scripts only up to ``__main__``."""
    for code in blocks(page.read_text(), "python"):
        if not code.startswith(">>>"):
            exec(compile(code, str(page), "exec"), {"__name__": "page"})


@pages
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = " ".join(re.findall(r"`+[^`]+`+", page.read_text()))
    named = set(re.findall(r"\bmake (\w+)", code))
    assert named <= targets
    for path in re.findall(r"`((?:lightning_tspipe|tests|examples|docs)/[\w./]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


@pages
def test_benchmark_commands_are_understood(page: Path) -> None:
    text = page.read_text()
    for pattern in (r"python -m tests\.benchmarks ([^`\n]*)", r'make bench(?:-full)? ARGS="([^"]*)"'):
        for arguments in re.findall(pattern, text):
            options_of(shlex.split(arguments))  # ends the process where it understands nothing


@pages
def test_named_tests_exist(page: Path) -> None:
    defined = {
        name for file in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert set(re.findall(r"`(test_\w+)`", page.read_text())) - {"test_step"} <= defined


# --- the README's scripts


def quick_start() -> str:
    (code,) = (code for code in blocks(README, "python") if "__main__" in code)
    return code


def plain_script(folder: Path) -> str:
    """The script that the README's diff begins with: the diff, taken back."""
    (folder / "distill.py").write_text(quick_start())
    (diff,) = blocks(README, "diff")
    changed = [line[0] for line in diff.splitlines() if line.startswith(("+", "-"))][2:]
    assert (changed.count("-"), changed.count("+")) == (9, 6), "the README says how many"
    (folder / "diff").write_text(diff.replace("--- plain.py", "--- distill.py"))
    subprocess.run(["git", "apply", "--reverse", "-p0", "--unidiff-zero", "diff"], cwd=folder, check=True)
    return (folder / "distill.py").read_text()


def run_script(rank: int, out: Path, file: str) -> None:
    """What every rank runs."""
    runpy.run_path(file, run_name="__main__")


@pytest.mark.timeout(100)
def test_the_quick_start_prints_the_same_numbers_in_one_process_and_as_plain_lightning(
    zygote: Zygote, tmp_path: Path
) -> None:
    code, plain = quick_start(), plain_script(tmp_path)
    assert 'strategy="tspipe", devices=2' in code
    assert "tspipe" not in plain
    scripts = {
        "tspipe": (2, code),
        "auto": (1, code.replace('strategy="tspipe", devices=2', 'strategy="auto", devices=1')),
        "plain": (1, plain),
    }
    printed: dict[str, dict[str, float]] = {}
    for name, (ranks, script) in scripts.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "script.py").write_text(script.replace("L.Trainer(", f"L.Trainer(default_root_dir={str(folder)!r}, "))
        codes = zygote.run("tests.test_docs:run_script", ranks, folder, file=str(folder / "script.py"))
        text = (folder / "0.txt").read_text()
        assert codes == [0] * ranks, text
        printed[name] = ast.literal_eval(re.findall(r"^\{.*\}$", text, re.MULTILINE)[-1])
    assert set(printed["tspipe"]) == {"loss", "accuracy"}
    assert printed["tspipe"] == printed["auto"] == printed["plain"]


def test_the_first_block_has_the_two_commands() -> None:
    block = re.split(r"^```\w*$", README, flags=re.MULTILINE)[1]
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == ["make demo", "make test"]


def test_the_command_line_takes_the_yaml(tmp_path: Path) -> None:
    (text,) = blocks(README, "yaml")
    (tmp_path / "config.yaml").write_text(text)

    def configured() -> dict[str, Any]:
        arguments = ["--config", str(tmp_path / "config.yaml"), "--trainer.accelerator", "cpu"]
        cli = LightningCLI(BoringModel, run=False, args=arguments)
        strategy = cli.trainer.strategy
        assert isinstance(strategy, TSPipeStrategy)
        return {
            "microbatches": strategy._microbatches,
            "balance": strategy._balance,
            "timeout": strategy._timeout.seconds,
        }

    expected = {"microbatches": 4, "balance": {"student": [2, 3], "teacher": [3, 2]}, "timeout": 600}
    assert result_of(configured) == expected


# --- tables

STRATEGY = (ROOT / "docs/strategy.md").read_text()
LIGHTNING = (ROOT / "docs/lightning.md").read_text()


@pytest.mark.parametrize("documented", [TeacherStudentModule, TSPipeStrategy])
def test_arguments_are_those_of_the_code(documented: type) -> None:
    signature = inspect.signature(documented)
    rows = {
        name: eval(default, vars(datetime)) for name, default, _ in table(STRATEGY, f"table: {documented.__name__}")
    }
    assert rows == {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    assert list(rows) == [name for name in signature.parameters if name in rows]


def test_hooks_are_those_of_the_code() -> None:
    for row in table(STRATEGY, "hooks: TeacherStudentModule"):
        name, _, arguments = row[0].rstrip(")").partition("(")
        if name == "loss":  # the user writes it
            continue
        parameters = list(inspect.signature(getattr(TeacherStudentModule, name)).parameters)[1:]
        assert parameters == [argument.strip() for argument in arguments.split(",") if argument], name


def test_the_versions_are_those_of_the_rule() -> None:
    text = (ROOT / "docs/numerics.md").read_text()
    start = text.index("<!-- table: teacher_version(step, delay, delay_from_step) -->")
    lines = text[start:].split("\n\n")[1].splitlines()
    steps = [int(cell) for cell in lines[0].strip("|").split("|")[1:]]
    for line in lines[2:]:
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        delay, *rest = map(int, re.findall(r"\d+", label))
        assert [int(cell) for cell in cells] == [teacher_version(step, delay, *rest) for step in steps], label


def test_every_argument_of_the_trainer_has_a_row() -> None:
    rows = [argument for argument, _, _ in table(LIGHTNING, "table: Trainer")]
    assert rows == list(inspect.signature(L.Trainer).parameters)


def test_every_callback_has_a_row() -> None:
    rows = {callback: meaning for callback, meaning, _ in table(LIGHTNING, "table: callbacks")}
    assert list(rows) == callbacks.__all__
    refused = {callback for callback, meaning in rows.items() if "refused" in meaning}
    assert refused == {*REFUSED, "BaseFinetuning", "BatchSizeFinder"} & rows.keys()


@pytest.mark.parametrize("name", ["Trainer", "callbacks", "tools", "checkpoints", "loops", "ends"])
def test_the_tests_in_the_tables_exist(name: str) -> None:
    for feature, meaning, test in table(LIGHTNING, f"table: {name}"):
        assert meaning, feature
        if test == "not tested":
            continue
        file, *parts = test.split("::")
        nodes: Any = ast.parse((ROOT / file).read_text())
        for part in parts:
            (nodes,) = (node for node in nodes.body if getattr(node, "name", None) == part)
        assert parts[-1].startswith("test_"), test


def test_the_page_of_the_command_line_works(tmp_path: Path) -> None:
    text = (ROOT / "docs/cli.md").read_text()
    (code,), (config,) = blocks(text, "python"), blocks(text, "yaml")
    (tmp_path / "distill.py").write_text(code)
    (tmp_path / "config.yaml").write_text(config)

    def trained() -> Any:
        os.chdir(tmp_path)
        main(["fit", "--config", "config.yaml", "--trainer.devices", "1"])
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        return torch.load(checkpoint, weights_only=True)

    checkpoint = result_of(trained)
    assert checkpoint["global_step"] == 16
    assert checkpoint["state_dict"]["student.0.weight"].shape == (64, 64)


def texts() -> Iterator[str]:
    """Every string of the package, with … in the place of what is filled in."""
    for file in (ROOT / "lightning_tspipe").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value.replace("{0}", "…").replace("{}", "…")


def test_errors_are_those_of_the_code() -> None:
    found = list(texts())
    section = STRATEGY.split("<!-- table: errors -->")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `+ ?(.+?) ?`+ \|", section, re.MULTILINE)
    assert len(messages) > 40
    for row in messages:
        message = row
        if message.startswith("the callback "):  # its name is filled in
            assert message.split()[-1] in found
            message = "the callback …"
        pattern = ".*".join(re.escape(piece.strip()) for piece in message.split("…"))
        assert any(re.search(pattern, text, re.DOTALL) for text in found), row


def test_dependencies_are_those_of_the_project() -> None:
    page = (ROOT / "docs/dependencies.md").read_text()
    rows = re.findall(r"^\| ([\w-]+(?:\[\w+\])? [<>=].*?) \|", page, re.MULTILINE)
    declared = [line.split(";")[0].strip() for line in importlib.metadata.requires("lightning_tspipe") or []]
    expected = {Requirement(line) for line in declared if not line.startswith("lightning-tspipe")}
    assert {Requirement(row) for row in rows} == expected
