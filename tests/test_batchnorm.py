"""Deferred batch norm: normalized per microbatch, running statistics of the whole batch."""

import copy

import pytest
import torch
from torch import nn

from lightning_tspipe.batchnorm import TOO_FEW, DeferredBatchNorm, too_few_values


@pytest.mark.parametrize("sizes", [[6], [3, 3], [2, 2, 2], [4, 1, 1]])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_are_those_of_the_whole_batch(sizes: list[int], momentum: float | None) -> None:
    """For every cut, after two batches, the buffers are those of a plain batch norm that saw the whole batches."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3, momentum=momentum).double()
    deferred = copy.deepcopy(plain)
    handle = DeferredBatchNorm([deferred])
    for batch in range(2):
        inputs = torch.randn(6, 3, 4, 5, dtype=torch.float64) * 3 + batch
        plain(inputs)
        handle.slot = (batch, 0)
        for part in inputs.split(sizes):
            reference = nn.functional.batch_norm(part, None, None, plain.weight, plain.bias, True, 0.0, plain.eps)
            assert torch.equal(deferred(part), reference)
        handle.commit(batch)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(deferred.named_buffers())[name], buffer, rtol=1e-12, atol=1e-12)


def test_views_are_committed_one_after_another() -> None:
    """Two views of a batch move the statistics twice, in the order of the views, however their work interleaves."""
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(3).double()
    deferred = copy.deepcopy(plain)
    handle = DeferredBatchNorm([nn.Sequential(deferred)])
    views = torch.randn(2, 4, 3, dtype=torch.float64)
    for view in views:
        plain(view)
    for rows in (slice(0, 2), slice(2, 4)):
        for view in (1, 0):
            handle.slot = (0, view)
            deferred(views[view][rows])
    handle.commit(0)
    assert deferred.num_batches_tracked == 2
    torch.testing.assert_close(deferred.running_mean, plain.running_mean, rtol=1e-12, atol=1e-12)


def test_discard_eval_and_restore() -> None:
    """A batch that is dropped leaves no trace, evaluation is untouched, and `restore` gives the plain module back."""
    norm = nn.BatchNorm1d(3)
    handle = DeferredBatchNorm([norm])
    norm(torch.randn(4, 3))
    handle.discard(0)
    handle.commit(0)
    assert norm.num_batches_tracked == 0
    norm.eval()
    x = torch.randn(4, 3)
    assert torch.equal(norm(x), copy.deepcopy(nn.BatchNorm1d(3).eval())(x))
    handle.restore()
    norm.train()
    norm(x)
    assert norm.num_batches_tracked == 1


def test_only_what_torch_says_of_one_value_is_explained() -> None:
    layers = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=TOO_FEW) as raised:
        layers(torch.ones(1, 2))
    known = too_few_values(raised.value, "the student", {"5": layers})
    assert str(known).startswith("The batch norm '5.1.0' of the student got a microbatch with one value per channel")
    assert too_few_values(ValueError("expected 2D or 3D input"), "the student", {"5": layers}) is None
    assert too_few_values(None, "the student", {}) is None
