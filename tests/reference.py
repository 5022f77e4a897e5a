"""Teacher-student training as plain sequential torch, written from the definition and without the library.

The rule: n counts optimizer steps; after step n the student is theta_n and the teacher's version n is
``xi_n = m_n xi_{n-1} + (1 - m_n) theta_n``; step n uses version ``max(0, n - 1 - delay)``, with delay 0 before step
`delay_from_step`. All versions are kept in a list, so that nothing about the rule is implied by an order of updates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Named = dict[str, Tensor]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Rule:
    """How the teacher follows, and how a batch is trained on.

    Args:
        microbatches: a batch of n rows becomes parts of ``n // M + (i < n % M)`` rows.
        teacher_microbatches: parts of the teacher, if there are others: several of these together, or parts of them.
        momentum: None for a frozen teacher.
        delay: updates that the teacher is late.
        delay_from_step: steps before this one use delay 0.
        teacher_train: whether the teacher is in train mode.
        loss_over: whether the loss sees the batch, or is the mean over the microbatches, of the student alone or not.
        accumulate: batches per optimizer step.
        max_steps: optimizer steps after which training ends, -1 for no bound.
        validate_every: batches between validations; 0 validates at the end of an epoch.
    """

    microbatches: int = 1
    momentum: float | Callable[[int], float] | None = None
    delay: int = 0
    delay_from_step: int = 1
    teacher_train: bool = False
    loss_over: Literal["batch", "microbatch", "student_microbatch"] = "batch"
    accumulate: int = 1
    max_steps: int = -1
    validate_every: int = 0
    teacher_microbatches: int | None = None


@dataclass
class Trace:
    """What happened: losses and teacher versions per batch, gradients per step, validations, final states."""

    losses: list[Tensor] = field(default_factory=list)
    grads: list[Named] = field(default_factory=list)
    validations: list[Tensor] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    epoch_starts: list[int] = field(default_factory=list)
    student: Named = field(default_factory=dict)
    teacher: Named = field(default_factory=dict)
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)


@dataclass
class Pair:
    """The two networks, what the teacher follows, and how they are used."""

    student: nn.Module
    teacher: nn.Module
    loss: Callable[..., Tensor]
    source: Callable[[nn.Module], nn.Module] = lambda student: student
    validate: Callable[[nn.Module, nn.Module, Any], Tensor] | None = None


def version_of(step: int, delay: int, delay_from_step: int) -> int:
    """The teacher's version that an optimizer step uses, counted from 1."""
    late = delay if step >= delay_from_step else 0
    return max(0, step - 1 - late)


def train(
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    epochs: Iterable[Sequence[tuple[Any, Any, Any]]],
    rule: Rule,
    scheduler: Any = None,
    validation: Sequence[Any] = (),
) -> Trace:
    """Train.

    Args:
        pair: the networks; both are changed.
        optimizer: of the student's parameters.
        epochs: for each epoch its batches, as (student's input, teacher's input, target); a list means views.
        rule: see `Rule`.
        scheduler: a learning rate scheduler that moves after every optimizer step.
        validation: batches of the validation after every epoch; its value is the mean over rows.
    """
    trace = Trace()
    student, teacher = pair.student, pair.teacher
    source = dict(pair.source(student).named_parameters())
    versions: list[Named] = [_parameters(teacher)]
    step, over = 1, False
    optimizer.zero_grad()
    for batches in epochs:
        trace.epoch_starts.append(len(trace.losses))
        for position, (student_in, teacher_in, target) in enumerate(batches):
            student.train()
            teacher.train(rule.teacher_train)
            number = 0 if rule.momentum is None else version_of(step, rule.delay, rule.delay_from_step)
            _assign(teacher, versions[number])
            loss = _backward(pair, student_in, teacher_in, target, rule)
            trace.losses.append(loss)
            trace.used.append(number)
            if (position + 1) % rule.accumulate == 0 or position + 1 == len(batches):
                trace.grads.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
                if rule.momentum is not None:
                    m = rule.momentum(step) if callable(rule.momentum) else rule.momentum
                    old = versions[-1]
                    versions.append({name: m * old[name] + (1 - m) * source[name].detach() for name in old})
                step += 1
            over = step > rule.max_steps != -1
            number = 0 if rule.momentum is None else version_of(step, rule.delay, rule.delay_from_step)
            _assign(teacher, versions[number])
            due = position + 1 == len(batches) if not rule.validate_every else not (position + 1) % rule.validate_every
            if pair.validate is not None and due:
                trace.validations.append(_validation(pair, validation))
            if over:
                break
        if over:
            break
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    trace.student, trace.teacher = _tensors(student), _tensors(teacher)
    trace.optimizer = {names[id(p)]: copy.deepcopy(state) for p, state in optimizer.state.items()}
    trace.rates = [group["lr"] for group in optimizer.param_groups]
    return trace


def sizes_of(rows: int, microbatches: int) -> list[int]:
    """Rows of each microbatch."""
    return [rows // microbatches + (i < rows % microbatches) for i in range(microbatches)]


def _backward(pair: Pair, student_in: Any, teacher_in: Any, target: Any, rule: Rule) -> Tensor:
    with torch.no_grad(), _deferred(pair.teacher):
        teacher_parts = _parts(pair.teacher, teacher_in, rule.microbatches, rule.teacher_microbatches)
    with _deferred(pair.student):
        student_parts = _parts(pair.student, student_in, rule.microbatches)
    several = isinstance(student_in, list), isinstance(teacher_in, list)
    if rule.loss_over == "batch":
        losses = [pair.loss(_join(student_parts, several[0]), _join(teacher_parts, several[1]), target)]
    elif rule.loss_over == "student_microbatch":
        keys, sizes = _join(teacher_parts, several[1]), sizes_of(len(target), rule.microbatches)
        losses = [
            pair.loss(_join([s], several[0]), keys, y, slice(sum(sizes[:i]), sum(sizes[: i + 1])))
            for i, (s, y) in enumerate(zip(student_parts, _cut(target, rule.microbatches), strict=True))
        ]
    else:
        if rule.teacher_microbatches is not None:
            teacher_parts = _again(teacher_parts, rule.microbatches)
        targets = _cut(target, rule.microbatches) if isinstance(target, Tensor) else [None] * rule.microbatches
        losses = [
            pair.loss(_join([s], several[0]), _join([t], several[1]), y)
            for s, t, y in zip(student_parts, teacher_parts, targets, strict=True)
        ]
    loss = torch.stack(losses).mean()
    (loss / rule.accumulate).backward()
    return loss.detach().clone()


def _again(parts: list[list[Any]], microbatches: int) -> list[list[Any]]:
    """The same outputs for each of the student's microbatches."""
    cut: list[list[Any]] = [_slices(_cat(list(column)), microbatches) for column in zip(*parts, strict=True)]
    return [list(row) for row in zip(*cut, strict=True)]


def _slices(output: Any, microbatches: int) -> list[Any]:
    if isinstance(output, Tensor):
        return _cut(output, microbatches)
    items = list(output.items()) if isinstance(output, dict) else list(enumerate(output))
    columns = zip(*(_slices(value, microbatches) for _, value in items), strict=True)
    rows = [{key: value for (key, _), value in zip(items, column, strict=True)} for column in columns]
    return [row if isinstance(output, dict) else type(output)(row.values()) for row in rows]


def _parts(network: nn.Module, value: Any, microbatches: int, pieces: int | None = None) -> list[list[Any]]:
    """For each microbatch the outputs for its views."""
    views = value if isinstance(value, list) else [value]
    outputs: list[list[Any]] = []
    for view in views:
        _set_view(network)
        outputs.append([network(part) for part in _cut(view, microbatches, pieces)])
    return [list(row) for row in zip(*outputs, strict=True)]


def _cut(value: Tensor, microbatches: int, pieces: int | None = None) -> list[Tensor]:
    sizes = sizes_of(len(value), microbatches)
    if pieces is not None and pieces > microbatches:
        sizes = [part for size in sizes for part in sizes_of(size, pieces // microbatches)]
    elif pieces is not None:
        sizes = [sum(group) for group in _groups(sizes, pieces)]
    return list(torch.split(value, sizes))


def _groups(sizes: list[int], count: int) -> list[list[int]]:
    each = len(sizes) // count
    return [sizes[place * each : (place + 1) * each] for place in range(count)]


def _join(parts: list[list[Any]], several: bool) -> Any:
    views = [_cat(list(column)) for column in zip(*parts, strict=True)]
    return views if several else views[0]


def _cat(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):
        return {key: _cat([output[key] for output in outputs]) for key in first}
    return type(first)(_cat(list(column)) for column in zip(*outputs, strict=True))


def _set_view(network: nn.Module) -> None:
    for norm in _norms(network):
        norm.seen.append([])  # type: ignore[union-attr, operator]


def _norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, _NORMS)]


@contextmanager
def _deferred(network: nn.Module) -> Iterator[None]:
    """Within, batch norms note their inputs and their statistics stand; at the end each sees every view once, whole."""
    norms = _norms(network)
    before = [dict(norm.named_buffers()) for norm in norms]
    handles = []
    for norm in norms:
        norm.seen = []  # type: ignore[assignment]
        handles.append(norm.register_forward_pre_hook(_note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for norm, buffers in zip(norms, before, strict=True):
        seen: list[list[Tensor]] = norm.__dict__.pop("seen")
        for name, buffer in buffers.items():
            setattr(norm, name, buffer)
        with torch.no_grad():
            for view in seen:
                norm(torch.cat(view))


def _note(norm: Any, args: tuple[Tensor]) -> None:
    """Note an input, and let the forward that follows write its statistics into copies."""
    norm.seen[-1].append(args[0].detach())
    for name, buffer in list(norm.named_buffers()):
        setattr(norm, name, buffer.clone())


@torch.no_grad()
def _validation(pair: Pair, batches: Sequence[Any]) -> Tensor:
    assert pair.validate is not None
    pair.student.eval()
    pair.teacher.eval()
    values, rows = [], []
    for batch in batches:
        values.append(pair.validate(pair.student, pair.teacher, batch))
        rows.append(len(batch[0]))
    weights = values[0].new_tensor(rows)
    return (torch.stack(values) * weights).sum() / weights.sum()


@torch.no_grad()
def _assign(network: nn.Module, values: Named) -> None:
    for name, parameter in network.named_parameters():
        parameter.copy_(values[name])


def _parameters(network: nn.Module) -> Named:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def _tensors(network: nn.Module) -> Named:
    return _parameters(network) | {name: buffer.clone() for name, buffer in network.named_buffers()}
