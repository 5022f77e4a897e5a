"""How the processes of a strategy start, and how they hear of the end of one of them."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException

from lightning_tspipe._lightning import ProcessLauncher, ScriptLauncher, TunerExit, tear_down
from lightning_tspipe.errors import PipelineError

SIGTERM_CODE, SIGINT_CODE = 143, 130
GRACE_S = 1.0


def make_launcher(strategy: Any, start_method: Any) -> Any:
    """The launchers of Lightning's ddp family."""
    if start_method == "popen":
        return Scripts(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
    launcher = Processes(strategy, start_method=start_method)
    launcher.describe = strategy.describe
    return launcher


class Scripts(ScriptLauncher):  # type: ignore[misc, valid-type]
    """Lightning's, but the strategy hears of an exception first, and processes may end by themselves."""

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the processes and run the function in this one."""
        return super().launch(partial(_tell_first, function), *args, trainer=trainer, **kwargs)

    def kill(self, signum: Any) -> None:
        """Lightning kills the others at the end of Ctrl-C: give each the time to say why it ends."""
        for process in self.procs if signum == signal.SIGKILL else ():
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        super().kill(signum)


class Processes(ProcessLauncher):  # type: ignore[misc, valid-type]
    """Lightning reports an exception of a spawned process in the main process only, and then waits for its result."""

    describe: Callable[[int], str]

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the processes and wait for them."""
        try:
            return super().launch(partial(_run_in_child, function), *args, trainer=trainer, **kwargs)
        except KeyboardInterrupt:  # it may have come to this process alone
            self.kill(signal.SIGINT)
            for process in self.procs:
                process.join(GRACE_S)
            self.kill(signal.SIGKILL)
            raise
        except ProcessExitedException as error:
            if error.exit_code == SIGTERM_CODE:
                raise SIGTERMException(SIGTERM_CODE) from None
            if error.exit_code == SIGINT_CODE:
                raise KeyboardInterrupt from None
            raise PipelineError(f"{self.describe(error.error_index)} died: {error}") from error


def _tell_first(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Before any callback hears of an exception, the strategy does, so that no callback waits for a rank in vain."""
    try:
        return function(*args, **kwargs)
    except TunerExit:  # no failure: the tuner is done
        raise
    except BaseException as exception:
        if isinstance(exception, KeyboardInterrupt):  # another one must not interrupt the end, as in Lightning
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        function.__self__.strategy.on_exception(exception)
        raise


def _run_in_child(function: Any, *args: Any, **kwargs: Any) -> Any:
    # After a fork torch makes its thread pool anew where it is asked for next, and two threads of autograd that ask at
    # once end the process ("Invalid thread pool!"): here there is one thread.
    torch.set_num_threads(torch.get_num_threads())
    trainer = function.__self__
    try:
        return _tell_first(function, *args, **kwargs)
    except KeyboardInterrupt:
        tear_down(trainer)
        raise SystemExit(SIGINT_CODE) from None  # torch takes a KeyboardInterrupt for success
    except BaseException:
        tear_down(trainer)
        raise
