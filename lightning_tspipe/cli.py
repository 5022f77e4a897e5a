"""The command `lightning-tspipe`: LightningCLI for every `TeacherStudentModule` that the current folder can import."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from lightning.pytorch.cli import ArgsType, LightningCLI

from lightning_tspipe.module import TeacherStudentModule


def main(args: ArgsType = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` as command line and config file say.

    Args:
        args: as in LightningCLI; None takes those of the command line.

    Raises:
        SystemExit: jsonargparse is not installed.
    """
    if find_spec("jsonargparse") is None:
        raise SystemExit("lightning-tspipe needs jsonargparse. Install it: pip install 'lightning-tspipe[cli]'")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # a console script has its own folder there
    LightningCLI(TeacherStudentModule, subclass_mode_model=True, args=args)


if __name__ == "__main__":
    main()
