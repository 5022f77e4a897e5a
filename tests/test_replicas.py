"""Data-parallel replicas of a pipeline equal the twin at the global batch, on every rank; several machines; ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.aggregation import CatMetric

from lightning_tspipe import TSPipeStrategy
from lightning_tspipe.board import FailureBoard
from lightning_tspipe.topology import Topology
from tests.multiproc import TWIN, Fit, result_of, run_fits
from tests.ports import free_port
from tests.scripts.small import Small, loader, trainer, weights
from tests.scripts.zygote import ROOT, Zygote
from tests.subprocesses import python_path
from tests.test_checkpoint import assert_same

if __name__ != "__main__":  # as a script, which torchrun starts, it needs none of them, and starts sooner
    from lightly.loss import DINOLoss, NTXentLoss
    from lightly.models.modules.heads import DINOProjectionHead

pytestmark = pytest.mark.timeout(90)

ROWS, BATCH = 48, 12  # of the whole: each of two replicas gets batches of 6
Ranks = list[dict[str, Any]]


class Share(DistributedSampler[Any]):
    """Row r, r + replicas, ...: the sampler that Lightning puts in shuffles, so that there is no such twin."""

    def __init__(self, rows: int, replicas: int, stages: int) -> None:
        super().__init__(range(rows), replicas, 0, shuffle=False)  # type: ignore[arg-type]
        self.stages = stages

    def __iter__(self) -> Any:
        self.rank = dist.get_rank() // self.stages if self.num_replicas > 1 else 0
        return super().__iter__()


def batches(replicas: int, stages: int = 1) -> DataLoader[Any]:
    """The loader of one replica."""
    data = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    share = Share(ROWS, replicas, stages)
    return DataLoader(TensorDataset(data, data.sum(1)), BATCH // replicas, sampler=share)


class Exact(Small):
    """In float64, with one frozen parameter and one that only some batches use."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))
        self.double()
        self.student[0].bias.requires_grad_(False)

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = (student_out - teacher_out).square().mean() + 0.1 * (student_out.sum(1) - target).square().mean()
        return loss * self.scale if self.trainer.global_step % 2 else loss

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return torch.optim.AdamW([{"params": trained}, {"params": [self.scale], "lr": 0.1}], lr=0.01, eps=1e-3)


class Contrastive(Exact):
    """Every row of the global batch is compared with every other one."""

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        x, y = (self.all_gather(out, sync_grads=True).reshape(-1, 2) for out in (student_out, teacher_out))
        return -(x @ y.T).log_softmax(1).diagonal().mean()


class Foreign(Exact):
    """Losses and heads of lightly as they are: they gather, and reduce, over the world of `torch.distributed`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.student.append(DINOProjectionHead(2, 4, 3, 6))  # its weight_norm keeps a weight with its graph
        self.teacher.append(DINOProjectionHead(2, 4, 3, 6))
        self.contrast, self.center = NTXentLoss(gather_distributed=True), DINOLoss(6)
        self.contrast.memory_bank.bank_ptr.zero_()  # lightly leaves it as it found the memory
        self.double()

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        apart = [student_out, student_out.flip(1)], [teacher_out, teacher_out.flip(1)]
        loss = self.contrast(student_out, teacher_out) + self.center(apart[1], apart[0])
        if dist.is_initialized():
            seen = [torch.empty(1) for _ in range(dist.get_world_size())]
            dist.all_gather(seen, torch.full((1,), float(dist.get_rank())))
            dist.barrier()
            assert seen == list(range(self.trainer.strategy._topology.replicas)), seen
        return loss

    def on_before_backward(self, loss: Any) -> None:
        assert not dist.is_initialized() or dist.get_world_size() == self.trainer.world_size


class Normed(Exact):
    """Batch norms in both networks; the teacher's are in train mode."""

    def __init__(self, **options: Any) -> None:
        super().__init__(momentum=0.9, teacher_delay=1, **options)
        for network in (self.student, self.teacher):
            network.insert(1, nn.BatchNorm1d(8).double())
            network.insert(3, nn.BatchNorm1d(8, momentum=None, affine=False).double())
            network.insert(4, nn.BatchNorm1d(8, track_running_stats=False).double())


def fits(make: Any, shapes: list[tuple[int, int, int]], **options: Any) -> tuple[dict[str, Any], list[Ranks]]:
    """What the twin at the global batch saw, and then for each (replicas, stages, microbatches) what each rank saw."""
    runs = [Fit(make, lambda: batches(1), TWIN, **options)]
    for replicas, stages, microbatches in shapes:
        load = lambda replicas=replicas, stages=stages: batches(replicas, stages)  # noqa: E731
        runs.append(Fit(make, load, replicas * stages, microbatches, strategy={"stages": stages}, **options))
    (twin,), *found = run_fits(runs, timeout=80)
    return twin, found


def assert_equal(ranks: Ranks, twin: dict[str, Any]) -> None:
    """Parameters, buffers and gradients of every rank, and the mean of the replicas' losses."""
    for rank, seen in enumerate(ranks):
        assert seen["steps"] == twin["steps"]
        assert set(seen["whole"]) == set(twin["whole"])
        for name, value in twin["whole"].items():
            torch.testing.assert_close(seen["whole"][name], value, rtol=1e-12, atol=1e-12, msg=f"{rank}: {name}")
        for grads, expected in zip(seen["grads"], twin["grads"], strict=True):
            assert grads
            for name, grad in grads.items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-12, msg=f"{rank}: {name}")
    losses = torch.tensor([[float(loss) for loss in seen["losses"]] for seen in ranks], dtype=torch.float64)
    expected = torch.tensor([float(loss) for loss in twin["losses"]], dtype=torch.float64)
    torch.testing.assert_close(losses.mean(0), expected, rtol=1e-12, atol=1e-12)


SHAPES = [(2, 1, 2), (2, 2, 2), (3, 1, 1)]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Exact, {}),
        (lambda: Exact(momentum=0.9, teacher_delay=1), {"accumulate_grad_batches": 3}),
        (lambda: Exact(momentum=0.7, teacher_delay=0), {"gradient_clip_val": 0.05}),
        (lambda: Exact(loss_over="microbatch"), {"max_epochs": 2}),
        (Contrastive, {}),
    ],
    ids=["frozen", "late, accumulated", "exact, clipped", "microbatch", "contrastive"],
)
def test_replicas_equal_the_twin_at_the_global_batch(make: Any, options: dict[str, Any]) -> None:
    shapes = SHAPES if make is Exact else SHAPES[1:2]
    twin, found = fits(make, shapes, trainer=options)
    for ranks in found:
        assert_equal(ranks, twin)
    assert not torch.equal(twin["grads"][0]["student.0.weight"], twin["grads"][1]["student.0.weight"])


def test_a_third_party_loss_is_used_unchanged() -> None:
    """What it takes for the world are the replicas, though only the last rank of each pipeline runs it."""
    twin, found = fits(Foreign, [(1, 2, 2), (2, 2, 2), (2, 1, 1)], trainer={"max_epochs": 2})
    for ranks in found:
        assert_equal(ranks, twin)
    assert twin["whole"]["center.center"].any()
    ((seen, *_),) = run_fits([Fit(partial(Foreign, loss_over="microbatch"), lambda: batches(1, 2), 2, 3)])
    assert seen["steps"] == twin["steps"] // 2


def test_batch_norms_over_replicas() -> None:
    """Outputs, gradients and running statistics; with two microbatches, those of one pipeline with two."""
    options: dict[str, Any] = {"trainer": {"sync_batchnorm": True, "max_epochs": 2}}
    twin, (one, two) = fits(Normed, [(2, 1, 1), (2, 2, 1)], **options)
    assert_equal(one, twin)
    assert_equal(two, twin)
    runs = [Fit(Normed, lambda n=n: batches(n, 2), 2 * n, 2, strategy={"stages": 2}, **options) for n in (1, 2)]
    single, double = run_fits(runs, timeout=60)
    for seen in double:
        for name, value in single[0]["whole"].items():
            torch.testing.assert_close(seen["whole"][name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert not torch.allclose(single[0]["whole"]["student.0.weight"], twin["whole"]["student.0.weight"])


def test_without_sync_batchnorm_each_replica_has_its_own_statistics() -> None:
    """And the first one's running statistics are everyone's in the end."""
    options: dict[str, Any] = {"trainer": {"max_epochs": 1}}
    twin, (ranks,) = fits(Normed, [(2, 2, 1)], **options)
    for seen in ranks:
        for name, value in ranks[0]["whole"].items():
            assert torch.equal(seen["whole"][name], value), name
    assert not torch.allclose(ranks[0]["whole"]["student.1.running_var"], twin["whole"]["student.1.running_var"])


class Logged(Exact):
    """Logs by `sync_dist` and by metrics, in `loss` and in a validation."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.rows = MeanMetric(), CatMetric()
        self.seen = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()})

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = super().loss(student_out, teacher_out, target)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("synced", loss, sync_dist=True, on_step=True, on_epoch=True)
        self.log("most", loss, sync_dist=True, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self.student(batch[0]).sum(1)
        self.log("val", out.mean(), sync_dist=True)
        self.seen.update(out)
        self.log_dict(self.seen)
        self.rows.update(out)

    def on_validation_epoch_end(self) -> None:
        self.log("rows", float(len(self.rows.compute())))
        self.rows.reset()


def test_logged_values_are_joined_over_replicas() -> None:
    """Those of the twin, on every rank; so callbacks decide alike."""
    stop = lambda: [EarlyStopping("val", patience=0, mode="max")]  # noqa: E731
    runs = []
    for replicas, stages in ((1, TWIN), (2, 2), (2, 1)):
        load = lambda replicas=replicas, stages=stages: batches(replicas, stages)  # noqa: E731
        options = {"max_epochs": 6, "callbacks": stop()}
        runs.append(Fit(Logged, load, replicas * stages, 1, load, {"stages": stages}, options))
    (twin,), *found = run_fits(runs, timeout=80)
    assert twin["steps"] < 6 * ROWS // BATCH, "nothing stopped early"
    assert twin["metrics"]["rows"] == ROWS
    expected = {name: float(value) for name, value in twin["metrics"].items() if name not in ("most", "synced")}
    assert {"mean", "synced_epoch", "synced_step", "val", "sum", "rows"} <= expected.keys()
    for seen in (seen for ranks in found for seen in ranks):
        assert seen["steps"] == twin["steps"]
        values = {name: float(seen["metrics"][name]) for name in expected}
        assert values == pytest.approx(expected, rel=1e-6)
        assert float(seen["metrics"]["most"]) >= float(twin["metrics"]["most"]) - 1e-6


class Counts(Small):
    """Notes which rows each replica saw."""

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        self.log("rows", (2.0**target).sum(), on_step=False, on_epoch=True, reduce_fx="sum")
        return super().loss(student_out, teacher_out, target)


def test_the_sampler_that_lightning_puts_in_counts_replicas() -> None:
    """Each replica sees half of the rows, and all of its ranks the same half."""
    (ranks,) = run_fits([Fit(Counts, lambda: loader(16, 4), 4, 2, strategy={"stages": 2})])
    rows = [int(seen["metrics"]["rows"]) for seen in ranks]
    assert rows[0] == rows[1]
    assert rows[2] == rows[3]
    assert rows[0] + rows[2] == 2**16 - 1
    assert rows[0].bit_count() == 8


def train(folder: Path, epochs: int, resume: Path | None = None) -> dict[str, Any]:
    """Two replicas of two stages; the last checkpoint."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    strategy = TSPipeStrategy(stages=2, microbatches=2, start_method="fork")
    run = trainer(4, strategy, max_epochs=epochs, callbacks=[keep], enable_checkpointing=True)
    run.fit(Exact(momentum=0.9), batches(2, 2), ckpt_path=resume)
    return dict(torch.load(folder / f"epoch={epochs - 1}.ckpt", weights_only=True))


def test_replicas_resume(tmp_path: Path) -> None:
    """Bit by bit, weights and optimizer."""

    def trainings() -> Any:
        train(tmp_path / "first", 1)
        return train(tmp_path / "whole", 2), train(tmp_path / "rest", 2, tmp_path / "first/epoch=0.ckpt")

    whole, resumed = result_of(trainings)
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert_same(resumed, whole, part)


# --- who is who


def test_the_stages_of_a_pipeline_are_neighbours() -> None:
    places = [Topology(rank, 8, 4) for rank in range(8)]
    assert [place.stage for place in places] == [0, 1, 2, 3] * 2
    assert [place.replica for place in places] == [0] * 4 + [1] * 4
    assert places[5].pipeline(1) == (4, 5, 6, 7)
    assert places[5].peers(1) == (1, 5)
    assert places[5].describe(6) == "rank 6 (stage 2)"
    assert [place.is_last for place in places] == [False, False, False, True] * 2


def torchrun(folder: Path, node: int, port: int) -> subprocess.Popen[str]:
    command = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *command, "--master-port", str(port),
         str(ROOT / "tests/test_replicas.py"), str(folder), "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path()},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def spanning(rank: int, out: Path, nodes: int = 1, devices: int = 2, slurm: bool = False) -> None:
    """One process of a training with two stages on so many machines."""
    if slurm:
        for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)
        os.environ.update(
            SLURM_JOB_ID="7", SLURM_JOB_NAME="train", SLURM_NTASKS=str(nodes * devices), SLURM_NODELIST="127.0.0.1",
            SLURM_NTASKS_PER_NODE=str(devices), SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % devices),
            SLURM_NODEID=str(rank // devices), SLURM_NNODES=str(nodes),
        )  # fmt: skip
    torch.set_num_threads(1)
    module = Exact(momentum=0.9, teacher_delay=1)
    fit = trainer(devices, TSPipeStrategy(stages=2, microbatches=2), num_nodes=nodes)
    fit.fit(module, batches(fit.world_size // 2, 2))
    seen = {"rank": fit.global_rank, "node": fit.node_rank, "environment": type(fit.strategy.cluster_environment)}
    seen["environment"] = seen["environment"].__name__  # type: ignore[attr-defined]
    torch.save({"weights": weights(module), **seen}, out / f"{fit.global_rank}.pt")


@pytest.fixture(scope="module")
def twin() -> dict[str, Tensor]:
    """The weights of the twin at the global batch."""
    make = lambda: Exact(momentum=0.9, teacher_delay=1)  # noqa: E731
    ((seen,),) = run_fits([Fit(make, lambda: batches(1), TWIN)])
    return dict(seen["whole"])


def check_spanning(folder: Path, ranks: int, nodes: list[int], environment: str, twin: dict[str, Tensor]) -> None:
    for rank in range(ranks):
        found = torch.load(folder / f"{rank}.pt", weights_only=True)
        assert (found["rank"], found["node"], found["environment"]) == (rank, nodes[rank], environment)
        for name, value in found["weights"].items():
            torch.testing.assert_close(value, twin[name], rtol=1e-12, atol=1e-12, msg=name)


def test_two_machines_under_torchrun(tmp_path: Path, twin: dict[str, Tensor]) -> None:
    """Two agents, as on two machines, with a pipeline on each."""
    port = free_port()
    agents = [torchrun(tmp_path, node, port) for node in range(2)]
    try:
        texts = [agent.communicate(timeout=75)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.poll() is None and os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(texts)
    check_spanning(tmp_path, 4, [0, 0, 1, 1], "TorchElasticEnvironment", twin)


@pytest.mark.parametrize(("nodes", "devices"), [(1, 2), (2, 1), (2, 2)])
def test_slurm(zygote: Zygote, tmp_path: Path, nodes: int, devices: int, twin: dict[str, Tensor]) -> None:
    """Ranks as SLURM's variables say; with one device per machine the pipeline spans both."""
    arguments = {"nodes": nodes, "devices": devices, "slurm": True}
    codes = zygote.run("tests.test_replicas:spanning", nodes * devices, tmp_path, **arguments)
    assert codes == [0] * nodes * devices, (tmp_path / "0.txt").read_text()
    check_spanning(tmp_path, nodes * devices, [r // devices for r in range(4)], "SLURMEnvironment", twin)


# --- ends


@pytest.mark.parametrize("victim", [0, 3])
def test_sigterm_to_one_rank_ends_every_replica_in_good_order(zygote: Zygote, tmp_path: Path, victim: int) -> None:
    arguments = {"victims": [victim], "number": signal.SIGTERM, "delay": 0.1, "devices": 4, "stages": 2}
    codes = zygote.run("tests.scripts.train:run", 4, tmp_path, deadline=30, **arguments)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(4)]
    assert codes == [143] * 4, texts
    assert not any("PipelineError" in text for text in texts), texts


@pytest.mark.parametrize(("stages", "victim"), [(2, 2), (1, 3)])
def test_kill_9_ends_every_replica_and_names_the_dead(zygote: Zygote, tmp_path: Path, stages: int, victim: int) -> None:
    arguments = {"victims": [victim], "number": signal.SIGKILL, "delay": 0.1, "devices": 4, "stages": stages}
    codes = zygote.run("tests.scripts.train:run", 4, tmp_path, deadline=30, **arguments)
    struck = float((tmp_path / f"{victim}.struck").read_text())
    ends = json.loads((tmp_path / "ends.json").read_text())
    for rank in range(4):
        text = (tmp_path / f"{rank}.txt").read_text()
        if rank != victim:
            assert codes[rank] not in (0, None), text
            assert ends[rank] - struck < 10
            name = f"rank {victim} (stage {victim % stages})" if stages > 1 else "another rank"
            assert f"{name} died" in text


def test_who_comes_late_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0, which has the board, may have ended since, because of the same rank."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    board = FailureBoard(Topology(0, 2, 1))
    late = FailureBoard(Topology(1, 2, 1), board.port)
    del board
    assert "another rank died without a word" in str(late.explain(None))
    assert "rank 0 (stage 0) died without a word" in str(late.explain(0))


if __name__ == "__main__":
    spanning(0, Path(sys.argv[1]), nodes=int(sys.argv[2]))
