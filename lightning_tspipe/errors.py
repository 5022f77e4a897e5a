"""What a rank raises when the pipeline as a whole has failed."""

from __future__ import annotations


class PipelineError(RuntimeError):
    """Another rank failed or died; the text names its rank and stage and carries its traceback where there is one."""
