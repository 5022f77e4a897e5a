"""Which process runs which stage of which data-parallel replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The stages of one pipeline are neighbours, so that they stay on one machine if they fit there.

    ::

        8 ranks, 4 stages      rank     0 1 2 3   4 5 6 7
                               stage    0 1 2 3   0 1 2 3
                               replica  0 0 0 0   1 1 1 1

    Args:
        rank: this process.
        world_size: number of processes, a multiple of `stages`.
        stages: number of stages.
    """

    rank: int
    world_size: int
    stages: int

    @property
    def stage(self) -> int:
        """The stage of this process."""
        return self.rank % self.stages

    @property
    def replica(self) -> int:
        """The pipeline that this process is a part of."""
        return self.rank // self.stages

    @property
    def replicas(self) -> int:
        """The number of pipelines."""
        return self.world_size // self.stages

    @property
    def is_last(self) -> bool:
        """Whether this process has the last stage, where the loss is."""
        return self.stage == self.stages - 1

    def pipeline(self, replica: int) -> tuple[int, ...]:
        """The ranks of a pipeline, stage by stage."""
        return tuple(range(replica * self.stages, (replica + 1) * self.stages))

    def peers(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a stage, replica by replica."""
        return tuple(range(stage, self.world_size, self.stages))

    def describe(self, rank: int) -> str:
        """A rank by its numbers, for messages."""
        return f"rank {rank} (stage {rank % self.stages})"
