"""Whose memory a tensor has, and who gives it values, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_tspipe.files import AtomicCheckpointIO
from lightning_tspipe.memory import (
    EMPTY,
    LENT,
    OWN,
    RELEASED,
    lend,
    materialize,
    release,
    state_of,
    swap,
    without_memory,
    without_values,
)


class Mixed(nn.Module):
    """Has tied weights, running statistics, tensors of its own, and a mask that is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.last.weight = self.middle.weight
        self.shift, self.scale = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(2))
        self.register_buffer("mask", torch.arange(8.0) + 1, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.shift)
        nn.init.ones_(self.scale)


class TestBuilding:
    """`without_memory` and `lend`."""

    def test_parameters_have_no_memory_and_buffers_do(self) -> None:
        with without_memory():
            model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), Mixed())
        assert all(p.is_meta and state_of(p) == EMPTY for p in model.parameters())
        assert not any(buffer.is_meta for buffer in model.buffers())
        assert model[2].last.weight is model[2].middle.weight
        assert not nn.Linear(2, 2).weight.is_meta

    def test_what_replaces_a_parameter_keeps_its_values(self) -> None:
        weights = nn.Linear(2, 2).state_dict()
        with without_memory():
            model = nn.Linear(2, 2)
            model.load_state_dict(weights, assign=True)
            other = nn.Linear(2, 2)
            other.weight = model.weight  # tied to it
            other.register_parameter("also", model.weight)
        assert state_of(model.weight) == OWN
        assert other.weight is other.also is model.weight
        assert torch.equal(model.weight, weights["weight"])

    def test_a_state_dict_lends_its_memory(self) -> None:
        weights = Mixed().state_dict()
        with without_memory():
            model = Mixed()
            model.shift.note = "user's"  # type: ignore[attr-defined]
            model.load_state_dict(weights)
            nn.init.zeros_(model.head.bias)
        assert state_of(model.first.weight) == LENT
        assert model.first.weight.data_ptr() == weights["first.weight"].data_ptr()
        assert model.last.weight is model.middle.weight
        assert model.last.weight.data_ptr() == weights["last.weight"].data_ptr()
        assert model.shift.note == "user's"  # type: ignore[attr-defined]
        assert not model.head.bias.any()

    def test_two_networks_do_not_share_what_they_load(self) -> None:
        weights = nn.Linear(2, 2).state_dict()
        with without_memory():
            one, other = nn.Linear(2, 2), nn.Linear(2, 2)
            one.load_state_dict(weights)
            other.load_state_dict(weights)
        with torch.no_grad():
            one.weight.zero_()
        assert other.weight.any()

    def test_other_types_and_shapes(self) -> None:
        double, wide = nn.Linear(2, 2).double().state_dict(), nn.Linear(3, 2).state_dict()
        with without_memory():
            model = nn.Linear(2, 2)
            model.load_state_dict(double)
            with pytest.raises(RuntimeError, match="size mismatch"):
                model.load_state_dict(wide)
        assert model.weight.dtype == torch.float32
        assert not model.weight.is_meta

    def test_another_ranks_tensors_stay_released(self) -> None:
        model = nn.Linear(2, 2)
        release(model.weight)
        with lend():
            model.load_state_dict(nn.Linear(2, 2).state_dict())
        assert state_of(model.weight) == RELEASED
        with lend(model.parameters()):  # a checkpoint for a module that a failed run has left behind
            model.load_state_dict(nn.Linear(2, 2).state_dict())
        assert state_of(model.weight) == LENT
        swap(model.weight, torch.ones(2, 2))
        assert state_of(model.weight) == OWN

    def test_a_local_checkpoint_is_not_read_before_it_is_used(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(3), "b": 2}, tmp_path / "new.ckpt")
        torch.save({"a": torch.ones(3)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
        new, old = (AtomicCheckpointIO().load_checkpoint(tmp_path / f"{name}.ckpt") for name in ("new", "old"))
        assert new["a"].untyped_storage().data_ptr() % 4096 != 0  # within the mapped file
        maps = Path("/proc/self/maps").read_text()
        assert str(tmp_path / "new.ckpt") in maps
        assert str(tmp_path / "old.ckpt") not in maps
        assert torch.equal(old["a"], new["a"])


class TestMaking:
    """`materialize`."""

    def test_the_generator_stays_and_what_was_loaded_stays(self) -> None:
        with torch.device("meta"):
            model = Mixed()
        scale = nn.Parameter(torch.full((2,), 3.0))
        model.scale = scale
        before = torch.get_rng_state()
        materialize(model, lambda name: True, 1, {})
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(model.scale, torch.full((2,), 3.0))
        assert torch.equal(model.norm.running_mean, torch.zeros(8))
        assert torch.equal(model.norm.running_var, torch.ones(8))
        assert model.shift.std() > 0

    def test_a_rank_makes_its_own_only(self) -> None:
        with without_memory():
            one, other = Mixed(), Mixed()
        materialize(one, lambda name: name in ("shift", "head.weight"), 1, {})
        materialize(other, lambda name: True, 1, {})
        assert {name for name, t in one.named_parameters() if not t.is_meta} == {"shift", "head.weight"}
        assert torch.equal(one.shift, other.shift)
        assert torch.equal(one.head.weight, other.head.weight)

    def test_attention_is_made_under_torchs_private_name(self) -> None:
        assert callable(nn.MultiheadAttention._reset_parameters)
        with without_memory():
            model = nn.MultiheadAttention(4, 2)
        materialize(model, lambda name: True, 1, {})
        assert model.in_proj_weight.std() > 0
        assert not model.out_proj.bias.any()

    def test_what_nobody_can_make_is_named(self) -> None:
        class Token(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.token, self.linear = nn.Parameter(torch.zeros(2)), nn.Linear(2, 2)

        with without_memory():
            model = nn.Sequential(Token())
        assert list(without_values(model)) == ["0.token"]
        assert list(without_values(model, {id(model[0].token)})) == []
