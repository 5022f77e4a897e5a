"""Optimizers, schedulers, accumulation and clipping act as in the sequential twin; hooks fire once and in order."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tests.scripts.small import Small, loader
from tests.scripts.zygote import Zygote
from tests.twins import ON_RANK_0, TWIN, Case, Make, Twins, case, state

pytestmark = pytest.mark.timeout(120)
CASES: dict[str, Case] = {}
PIPELINES = {1: 2, 2: 2}


@pytest.fixture(scope="module")
def twins(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(zygote, tmp_path_factory.mktemp("optimization"), "tests.test_optimization", PIPELINES)


class LARS(torch.optim.Optimizer):
    """Layer-wise rates from the norms of a parameter and its gradient, biases excluded; as in MoCo-v3.

    Source: Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021,
    https://arxiv.org/abs/2104.02057, and You et al., https://arxiv.org/abs/1708.03888.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight, change = torch.norm(p), torch.norm(update)
                    both = (weight > 0) & (change > 0)
                    update = update * torch.where(both, group["trust"] * weight / change, torch.ones_like(weight))
                mean = self.state[p].setdefault("mu", torch.zeros_like(p))
                mean.mul_(group["momentum"]).add_(update)
                p.add_(mean, alpha=-group["lr"])
        return loss


class Model(Small):
    """A late momentum teacher in float64; `configure` makes what `configure_optimizers` returns."""

    def __init__(self, configure: Any = None, frozen: int | None = None) -> None:
        super().__init__(momentum=0.9, teacher_delay=1)
        self.configure = configure
        self.double()
        if frozen is not None:
            self.student[frozen].requires_grad_(False)

    def student_input(self, batch: Any) -> Any:
        return batch[0].double()

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = (student_out - teacher_out).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.student(batch[0].double()) - 1).square().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.student(batch[0].double())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.1) if self.configure is None else self.configure(self)


class Seen(Callback):
    """Losses, rates and the length of accumulation, batch after batch."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.events.append((float(outputs["loss"]), trainer.global_step, trainer.accumulate_grad_batches, rates))


def whole_state(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """The optimizer's state by name; rank 0 has all of it after a fit."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in trainer.optimizers[0].state.items()}


def fit(make: Make, module: Any, **options: Any) -> dict[str, Any]:
    """A fit with validations, and what it left."""
    seen = Seen()
    run = make(callbacks=[*options.pop("callbacks", []), seen], **({"max_epochs": 2} | options))
    run.fit(module, loader(36), loader(8))
    groups = [{key: value for key, value in g.items() if key != "params"} for g in run.optimizers[0].param_groups]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    members = [[names[id(p)] for p in group["params"]] for group in run.optimizers[0].param_groups]
    optimizer = ON_RANK_0 if run.global_rank else whole_state(run, module)
    return {"events": seen.events, "groups": groups, "members": members, "optimizer": optimizer, **state(run, module)}


# --- accumulation


@case(CASES)
def accumulation(make: Make) -> Any:
    return [
        fit(make, Model(), accumulate_grad_batches=2),
        fit(make, Model(), accumulate_grad_batches=4, limit_train_batches=7),
        fit(make, Model(), callbacks=[GradientAccumulationScheduler({0: 1, 1: 3, 3: 2})], max_epochs=4),
    ]


def test_accumulation(twins: Twins) -> None:
    by_two, by_four, changing = twins.same("accumulation")
    assert (by_two["step"], by_four["step"], changing["step"]) == (2 * 5, 2 * 2, 9 + 3 + 3 + 5)
    assert [event[2] for event in changing["events"]] == [1] * 9 + [3] * 18 + [2] * 9


# --- optimizers


def first_layer_alone(module: Any) -> Any:
    """Groups of which each falls on one stage."""
    groups = [
        {"params": module.student[2].parameters(), "lr": 0.02},
        {"params": module.student[0].parameters()},
        {"params": [module.student[1].bias], "weight_decay": 0.0},
        {"params": [module.student[1].weight]},
    ]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def lars(module: Any) -> Any:
    decay = [p for p in module.student.parameters() if p.ndim > 1]
    rest = [p for p in module.student.parameters() if p.ndim <= 1]
    return LARS([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.5)


def trained(module: Any) -> Any:
    return torch.optim.Adam([p for p in module.student.parameters() if p.requires_grad], lr=0.01)


@case(CASES)
def optimizers(make: Make) -> Any:
    makers = {
        "groups": Model(first_layer_alone),
        "lars": Model(lars),
        "adamw": Model(lambda module: torch.optim.AdamW(module.student.parameters(), lr=0.01, amsgrad=True)),
        "rmsprop": Model(lambda module: torch.optim.RMSprop(module.student.parameters(), momentum=0.5)),
        "first frozen": Model(trained, frozen=0),
        "last frozen": Model(trained, frozen=2),
    }
    return {name: fit(make, module) for name, module in makers.items()}


def test_optimizers(twins: Twins) -> None:
    found = twins.same("optimizers")
    first = {name: one["weights"]["student.1.weight"] for name, one in found.items()}
    assert len({float(value.sum()) for value in first.values()}) == len(first), "they do not differ"
    assert [len(names) for names in found["groups"]["members"]] == [2, 2, 1, 1]


# --- schedulers


def scheduled(make_scheduler: Any, **config: Any) -> Any:
    def configure(module: Any) -> Any:
        groups = [{"params": module.student[0].parameters()}, {"params": module.student[1:].parameters(), "lr": 0.05}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make_scheduler(optimizer), **config}}

    return configure


def one_cycle(module: Any) -> Any:
    """Asks for the number of steps, for which Lightning makes the loader before training begins."""
    steps = module.trainer.estimated_stepping_batches
    return scheduled(lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps), interval="step")(
        module
    )


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.99)


@case(CASES)
def schedulers(make: Make) -> Any:
    schedulers = torch.optim.lr_scheduler
    cosine = scheduled(lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 10), interval="step", frequency=2)
    makers: list[Any] = [
        (scheduled(lambda optimizer: schedulers.ExponentialLR(optimizer, 0.5)), {}),
        (cosine, {"accumulate_grad_batches": 2}),
        (one_cycle, {}),
        (scheduled(plateau, monitor="val"), {}),
        (scheduled(plateau, monitor="loss_epoch"), {}),
        (scheduled(plateau, monitor="loss_step", interval="step", frequency=3), {}),
        (scheduled(plateau, monitor="val", strict=False), {"limit_val_batches": 0}),
    ]
    found = []
    for configure, flags in makers:
        folder = make.folder / str(len(found))  # type: ignore[attr-defined]
        flags |= {"logger": CSVLogger(folder, "", "csv"), "log_every_n_steps": 1}
        monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
        found.append(fit(make, Model(configure), callbacks=[monitor], max_epochs=3, **flags))
        found[-1]["rates"] = monitor.lrs
    return found


def test_schedulers(twins: Twins) -> None:
    found = twins.same("schedulers")
    for one, count in zip(found, [3, 5, 27, 3, 3, 9, 1], strict=True):
        rates = [event[3][0] for event in one["events"]]
        assert len(set(rates)) > 1 or count == 1
        assert "lr-SGD/pg1" in one["metrics"]
        assert one["rates"]


# --- clipping: more of it is in test_precision.py


class ByHand(Model):
    """Clips by torch's own functions."""

    def __init__(self, rule: str, **options: Any) -> None:
        super().__init__(**options)
        self.rule, self.norms = rule, list[float]()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.rule == "value":
            clip_grad_value_(self.student.parameters(), 1e-3)
        elif self.rule == "total":
            self.norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
            )
            self.clip_gradients(optimizer, 0.5 * self.norms[-1], "norm")
        elif self.rule == "layers":
            self.norms += [float(clip_grad_norm_(layer.parameters(), 0.01)) for layer in self.student]
        else:
            self.norms.append(float(clip_grad_norm_(self.parameters(), 0.02, float(self.rule))))


@case(CASES)
def clipping(make: Make) -> Any:
    found: dict[str, Any] = {"free": fit(make, Model())}
    for rule in ("2", "inf", "1", "layers", "total", "value"):
        module = ByHand(rule)
        found[rule] = {**fit(make, module), "norms": module.norms}
    module = ByHand("2", configure=trained, frozen=2)
    found["frozen"] = {**fit(make, module, accumulate_grad_batches=2), "norms": module.norms}
    return found


def test_clipping_by_hand(twins: Twins) -> None:
    found = twins.same("clipping")
    sums = {name: float(one["weights"]["student.0.weight"].sum()) for name, one in found.items()}
    assert len(set(sums.values())) == len(sums), "a rule changed nothing"


# --- hooks

MORE_HOOKS = {"setup", "teardown", "prepare_data", "configure_model", "configure_callbacks", "configure_optimizers",
              "optimizer_step", "lr_scheduler_step", "configure_gradient_clipping", "transfer_batch_to_device",
              "validation_step", "test_step", "predict_step", "state_dict"}  # fmt: skip
# of rank 0, and in training a batch ahead
TRANSFER = {"on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"}


def noting(kind: type, notes: list[tuple[str, str, str]]) -> Any:
    """A subclass that notes every call of a hook: what was called, and in which stage of the trainer."""
    word = "callback" if issubclass(kind, Callback) else "module"

    def wrap(name: str) -> Any:
        original = getattr(kind, name)

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            trainer = args[0] if word == "callback" and args else getattr(self, "_trainer", None)
            stage = getattr(trainer, "state", None) and trainer.state.stage
            notes.append((word, name, str(stage and stage.value)))
            return original(self, *args, **kwargs)

        return hook

    names = {name for name in dir(kind) if name.startswith("on_") or name in MORE_HOOKS} - {"on_gpu"}
    if word == "module":
        names -= {"state_dict"}
    return type(f"Noting{kind.__name__}", (kind,), {name: wrap(name) for name in names})


@case(CASES)
def hooks(make: Make) -> Any:
    """Accumulation, a validation in mid-epoch, a scheduler per step and a checkpoint per epoch."""
    notes: list[tuple[str, str, str]] = []
    callbacks = [noting(Callback, notes)(), ModelCheckpoint(make.folder / str(len(notes)), save_top_k=-1)]  # type: ignore[attr-defined]
    configure = scheduled(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2), interval="step")
    module = noting(Model, notes)(configure)
    run = make(callbacks=callbacks, accumulate_grad_batches=2, val_check_interval=3, num_sanity_val_steps=1,
               max_epochs=2, enable_checkpointing=True, limit_train_batches=7, gradient_clip_val=1.0)  # fmt: skip
    run.fit(module, loader(), loader(8))
    run.validate(module, loader(8), verbose=False)
    run.test(module, loader(8), verbose=False)
    run.predict(module, loader(8))
    return notes


class Looks(torch.nn.Linear):
    """Notes in each forward of training whether there is a gradient of before."""

    def __init__(self, like: torch.nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        self.notes: list[bool] = []
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.notes.append(self.weight.grad is not None)
        return super().forward(x)


class Counts(torch.optim.SGD):
    """Notes each call of `zero_grad`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls += 1
        super().zero_grad(set_to_none)


class LooksAgain(Callback):
    """Notes before gradients are zeroed how many there are."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.counts.append(sum(p.grad is not None for p in pl_module.parameters()))


@case(CASES)
def gradients(make: Make) -> Any:
    found = []
    for callback, batches in ((None, 1), (None, 2), (LooksAgain(), 1)):
        module = Model()
        module.student = torch.nn.Sequential(*map(Looks, module.student))
        make(callbacks=callback, accumulate_grad_batches=batches).fit(module, loader())
        found.append(([x.notes for x in module.student if x.notes], callback and callback.counts))
    run = make()
    run.fit(Model(lambda module: Counts(module.student.parameters(), lr=0.1)), loader())
    return [*found, run.optimizers[0].calls]


def test_gradients_go_before_the_forwards_unless_a_hook_looks_at_them(twins: Twins) -> None:
    """Else the activations of a step would need memory besides them; there are 8 batches of 2 microbatches."""
    for stages in PIPELINES:
        for free, accumulated, seen, calls in twins.ranks("gradients", stages):
            assert calls == 8, "an optimizer with a `zero_grad` of its own is asked once per step"
            assert all(notes for notes, _ in (free, accumulated, seen)), "no layer ran here"
            for notes in free[0]:
                assert notes[-16:] == [False] * 16
            for notes in accumulated[0]:
                assert notes[-16:] == [False, False, True, True] * 4
            for notes in seen[0]:
                assert notes[-16:] == [False, False] + [True] * 14
            parameters = 2 * len(seen[0])  # that this stage has
            assert seen[1] == [0] + [parameters] * 7


def test_every_hook_fires_once_and_in_order(twins: Twins) -> None:
    (expected,) = twins.ranks("hooks", TWIN)

    def early(note: Any) -> bool:
        return (note[1] in TRANSFER and note[2] == "train") or note[1] == "prepare_data"

    steps = [note[1] for note in expected if note[0] == "module" and note[2] == "train"]
    for name, count in {"on_train_batch_start": 14, "optimizer_step": 8, "on_before_zero_grad": 8,
                        "on_before_backward": 14, "on_after_backward": 14, "on_before_optimizer_step": 8,
                        "configure_gradient_clipping": 8, "lr_scheduler_step": 8}.items():  # fmt: skip
        assert steps.count(name) == count, name
    for stages in PIPELINES:
        for rank, found in enumerate(twins.ranks("hooks", stages)):
            assert [note for note in found if not early(note)] == [note for note in expected if not early(note)]
            transfers = [note for note in found if early(note)]
            assert transfers == ([note for note in expected if early(note)] if rank == 0 else [])
