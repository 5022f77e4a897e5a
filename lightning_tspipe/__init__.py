"""Teacher-student training as a bubble-free pipeline for PyTorch Lightning; importing it registers "tspipe"."""

from lightning_tspipe.errors import PipelineError
from lightning_tspipe.module import TeacherStudentModule
from lightning_tspipe.monitor import PipelineMonitor
from lightning_tspipe.strategy import TSPipeStrategy
from lightning_tspipe.teacher import cosine_momentum
from lightning_tspipe.tracing import PipelineTrace

__all__ = [
    "PipelineError",
    "PipelineMonitor",
    "PipelineTrace",
    "TSPipeStrategy",
    "TeacherStudentModule",
    "cosine_momentum",
]
__version__ = "0.1.0"
