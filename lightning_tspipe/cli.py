"""The command `lightning-tspipe`: LightningCLI for every `TeacherStudentModule` that the current folder can import."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec

from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback

from lightning_tspipe.commands import PipelineTrainer, plan_costs
from lightning_tspipe.memory import without_memory
from lightning_tspipe.module import TeacherStudentModule


class PipelineCLI(LightningCLI):
    """LightningCLI with the subcommands `plan` and `trace`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, and arguments of their methods that the config gives by other names."""
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in ("plan", "trace")}

    def before_plan(self) -> None:
        """A look leaves no files."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, SaveConfigCallback)]

    before_trace = before_plan

    def instantiate_classes(self) -> None:
        """As in LightningCLI; for a dry plan, networks that the module makes have no memory."""
        asked = self.config.get(self.subcommand or "", {})
        with without_memory() if self.subcommand == "plan" and asked.get("tflops") is not None else nullcontext():
            super().instantiate_classes()


def main(args: ArgsType = None) -> None:
    """Run ``fit``, ``validate``, ``test``, ``predict``, ``plan`` or ``trace`` as command line and config file say.

    Args:
        args: as in LightningCLI; None takes those of the command line.

    Raises:
        SystemExit: jsonargparse is not installed.
    """
    if find_spec("jsonargparse") is None:
        raise SystemExit("lightning-tspipe needs jsonargparse. Install it: pip install 'lightning-tspipe[cli]'")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # a console script has its own folder there
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["plan"] and not any(map(_is_config, given)):
        _plan_costs(given[1:])
        return
    PipelineCLI(TeacherStudentModule, trainer_class=PipelineTrainer, subclass_mode_model=True, args=args)


def _is_config(argument: str) -> bool:
    """Whether it says that a run is described, not costs."""
    return argument.partition("=")[0] in ("-c", "--config", "--model")


def _plan_costs(args: list[str]) -> None:
    from jsonargparse import auto_cli

    try:
        auto_cli(plan_costs, args=args, as_positional=False)
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
