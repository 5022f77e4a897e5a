"""The backward in two parts gives the gradients of the whole one, bit for bit, and each part does its own half only."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lightning_tspipe import _nodes
from lightning_tspipe.split import backward_inputs

Named = dict[str, Tensor]


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


class Scale(torch.autograd.Function):
    """A function in Python, which computes all of its gradients at once."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        Scale.calls += 1
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class Odd(nn.Module):
    """A tied weight, a function in Python, an embedding that is added, a bias used twice, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)
        self.scale, self.places, self.shift = (
            nn.Parameter(torch.rand(6)),
            nn.Embedding(4, 6),
            nn.Parameter(torch.rand(6)),
        )
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu() + self.shift
        y = Scale.apply(y, self.scale) + self.places(torch.arange(len(x)) % 4)
        y = self.frozen(y).tanh() * self.shift
        y = (
            nn.functional.linear(y, self.first.weight)
            + nn.functional.conv1d(y[:, None], self.last.weight[:, None, :1])[:, 0]
        )
        return torch.cat([y, self.last.bias.expand_as(y)])


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "left": lambda x, weight, bias: weight @ x,
    "by rows": lambda x, weight, bias: x @ weight,
    "by columns": lambda x, weight, bias: x @ weight.t(),
    "scaled": lambda x, weight, bias: torch.addmm(bias, x, weight.t(), beta=0.5, alpha=2.0),
    "a whole matrix added": torch.nn.functional.linear,
    "a row added": lambda x, weight, bias: torch.addmm(bias[:1], x, weight.t()),
    "a computed weight": lambda x, weight, bias: torch.addmm(bias, x, (weight * weight[0]).t()),
    "a weight of the bias": lambda x, weight, bias: torch.addmm(bias, x, (weight * bias[0]).t()),
    "a frozen weight": lambda x, weight, bias: torch.addmm(bias, x, weight.t().detach()),
    "a frozen bias": lambda x, weight, bias: torch.addmm(bias.detach(), x, weight.t()),
    "a weight of the input": lambda x, weight, bias: torch.addmm(bias, x @ weight.t(), x.t()),
}


class Product(nn.Module):
    """A matrix product of another form than a linear layer's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.weight, self.bias = name, nn.Parameter(torch.rand(5, 5)), nn.Parameter(torch.rand(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return PRODUCTS[self.name](x, self.weight, self.bias).tanh()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (4, 6)),
    "odd": (Odd, (5, 6)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), (2, 3, 32, 32)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, 2, 1, 2, 2), nn.ConvTranspose1d(6, 4, 3, bias=False)),
        (2, 4, 9),
    ),
    "vit": (vit, (2, 3, 32, 32)),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5), (2, 3, 32, 32)),
    "convnext": (
        lambda: torchvision.models.ConvNeXt([torchvision.models.convnext.CNBlockConfig(16, None, 2)], num_classes=5),
        (2, 3, 32, 32),
    ),
    **{name: (partial(Product, name), (5, 5)) for name in PRODUCTS},
    "lstm": (lambda: nn.LSTM(6, 5, batch_first=True), (3, 4, 6)),
}


def gradients(network: nn.Module, x: Tensor, backward: Callable[[Tensor, Tensor], None]) -> Named:
    """Of the input and all parameters, after two microbatches."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    for part in (x, x * 0.5):
        output = network(part)
        output = output[0] if isinstance(output, tuple) else output
        backward(output, torch.randn(output.shape, generator=torch.Generator().manual_seed(3)))
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return found | {"x": x.grad}


def prepared(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    network = make()
    return network, copy.deepcopy(network), torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
def test_both_parts_together_are_the_whole_backward(name: str) -> None:
    one, other, x = prepared(name)
    expected = gradients(one, x, lambda output, gradient: output.backward(gradient))

    def in_parts(output: Tensor, gradient: Tensor) -> None:
        leaf = output.detach().requires_grad_()  # stands for what the rank behind receives
        leaf.grad = gradient
        backward_inputs([output], [gradient], leaves_of(output))()

    found = gradients(other, x, in_parts)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", set()), ("vit", set()), ("odd", {"first.weight"}), ("lstm", {"weight_ih_l0", "weight_hh_l0"})],
)
def test_weights_that_cannot_wait_are_told(name: str, expected: set[str]) -> None:
    """Those that cost something: the scales and embeddings of the odd one do not."""
    network, _, x = prepared(name)
    output = network(x.requires_grad_())
    output = output[0] if isinstance(output, tuple) else output
    early = backward_inputs([output], [torch.ones_like(output)], [x]).early
    assert {key for key, p in network.named_parameters() if any(p is one for one in early)} == expected


def leaves_of(output: Tensor) -> list[Tensor]:
    """The input, which is the one leaf that is no parameter."""
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not isinstance(leaf, nn.Parameter):
            return [leaf]
        stack += [child for child, _ in node.next_functions]
    raise AssertionError("no input")


@pytest.mark.parametrize("name", ["linear", "resnet18", "vit"])
def test_matrices_and_filters_wait_for_the_second_part(name: str) -> None:
    network, _, x = prepared(name)
    x.requires_grad_()
    output = network(x)
    rest = backward_inputs([output], [torch.ones_like(output)], [x])
    assert x.grad is not None
    early = {key for key, p in network.named_parameters() if p.grad is not None}
    tokens = ("pos_embedding", "class_token")
    heavy = {key for key, p in network.named_parameters() if p.ndim > 1 and not any(t in key for t in tokens)}
    assert not early & heavy, early & heavy
    biases = {key for key, _ in network.named_parameters() if key.endswith("bias") and key != "conv_proj.bias"}
    assert biases <= early, biases - early
    rest()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", ["linear", "resnet18", "vit"])
def test_weights_that_several_views_use_wait_and_add_up_alike(name: str) -> None:
    one, other, x = prepared(name)
    given = [torch.rand_like(one(x)) for _ in range(3)]
    found = []
    for network, parts in ((one, False), (other, True)):
        network.zero_grad()
        for _ in range(2):  # what is there already is added to as well
            views = [(x * scale).requires_grad_() for scale in (1.0, 0.7, 0.4)]
            outputs = [network(view) for view in views]
            if not parts:
                torch.autograd.backward(outputs, given)
            else:
                rest = backward_inputs(outputs, given, views)
                waits = {key for key, p in network.named_parameters() if p.ndim > 1 and p.grad is None}
                assert len(found) > 2 or any("weight" in key for key in waits)
                rest()
            found.append({key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None})
            found[-1] |= {f"view {number}": view.grad for number, view in enumerate(views) if view.grad is not None}
    for expected, ours in zip(found[:2], found[2:], strict=True):
        assert expected.keys() == ours.keys()
        assert all(torch.equal(value, ours[key]) for key, value in expected.items())


@pytest.mark.parametrize("other", ["without a bias", "scaled"])
def test_views_that_use_a_weight_in_different_ways(other: str) -> None:
    layer, grads = nn.Linear(3, 4), []
    use = {
        "without a bias": lambda x: nn.functional.linear(x, layer.weight),
        "scaled": lambda x: x @ (2 * layer.weight).t(),
    }
    for parts in (False, True):
        layer.zero_grad()
        torch.manual_seed(0)
        views = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]
        outputs = [layer(views[0]), use[other](views[1])]
        given = [torch.randn(5, 4) for _ in outputs]
        if parts:
            backward_inputs(outputs, given, views)()
        else:
            torch.autograd.backward(outputs, given)
        grads.append([*(p.grad for p in layer.parameters()), *(view.grad for view in views)])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))  # type: ignore[arg-type]


def test_a_weight_that_leads_to_itself_does_not_wait() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    output = layer(layer(x).tanh())
    rest = backward_inputs([output], [torch.ones_like(output)], [x])
    assert layer.weight.grad is not None
    assert rest.early == [layer.weight]


def test_a_function_in_python_runs_once() -> None:
    network, _, x = prepared("odd")
    x.requires_grad_()
    Scale.calls = 0
    output = network(x)
    rest = backward_inputs([output], [torch.ones_like(output)], [x])
    rest()
    assert Scale.calls == 1


def test_without_an_input_all_is_put_off() -> None:
    """As on the first stage, whose inputs are data."""
    network, other, x = prepared("resnet18")
    output = network(x)
    rest = backward_inputs([output], [torch.ones_like(output)], [x])
    assert all(p.grad is None for p in network.parameters())
    rest()
    whole = other(x)
    whole.backward(torch.ones_like(whole))
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_only_what_the_weights_need_is_kept() -> None:
    """The first part lets go of the inputs of GELU, the second of a layer's inputs when it has passed the layer."""
    storages: list[StorageWeakRef] = []
    network = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.GELU())))
    for layer in network:
        layer.register_forward_hook(lambda _, __, output: storages.append(StorageWeakRef(output.untyped_storage())))
    seen: list[bool] = []
    network[4].weight.register_post_accumulate_grad_hook(lambda _: seen.extend(s.expired() for s in storages))
    x = torch.randn(3, 4, requires_grad=True)
    output = network(x * 2)
    rest = backward_inputs([output], [torch.ones_like(output)], [x])
    del output
    kept = [False, False, False, True]  # what the last GELU gives is needed by no layer
    assert [s.expired() for s in storages] == [place % 2 == 0 or kept[place // 2] for place in range(8)]
    rest()
    assert seen == [True, False, True, False, True, True, True, True]  # the input of the layer itself has its turn
    assert all(s.expired() for s in storages)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: nn.Conv1d(3, 4, 1)])
def test_the_first_gradient_is_not_copied(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    places: set[int] = set()

    def noted(*args: Any) -> Callable[[], list[Tensor]]:
        def compute() -> list[Tensor]:
            found = half()
            places.update(gradient.data_ptr() for gradient in found)
            return found

        half = weights_half(*args)
        return compute

    weights_half = _nodes.weights_half
    monkeypatch.setattr(_nodes, "weights_half", noted)
    layer = make()
    x = torch.randn(3, 3, requires_grad=True)
    output = layer(x * 2)
    backward_inputs([output], [torch.ones_like(output)], [x])()
    assert layer.weight.grad.data_ptr() in places  # type: ignore[union-attr]


def test_a_checkpoint_of_the_user() -> None:
    """It runs again for each backward, and unpacks once in each."""
    one, other, x = prepared("linear")
    expected = gradients(one, x, lambda output, gradient: output.backward(gradient))
    x = x.clone().requires_grad_()
    for part in (x, x * 0.5):
        output = checkpoint(other, part, use_reentrant=False)
        given = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        backward_inputs([output], [given], [x])()
    assert torch.equal(x.grad, expected["x"])  # type: ignore[arg-type]
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter.grad, expected[name])  # type: ignore[arg-type]


def test_autocast() -> None:
    """The weights that are multiplied are casts of the parameters."""
    one, other, x = prepared("vit")
    found = []
    for network in (one, other):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = network(x)
        if network is one:
            output.backward(torch.ones_like(output))
        else:
            backward_inputs([output], [torch.ones_like(output)], [x])()
        found.append([x.grad, *(p.grad for p in network.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_what_hooks_have_packed_is_let_go() -> None:
    """When the last layer of the second part begins, nothing of the others is kept any more."""
    kept: list[weakref.ref[Any]] = []

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # else a node that saves its own output would never be freed
            kept.append(weakref.ref(self))

    network = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())))
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        output = network(x * 2)
    alive: dict[int, int] = {}
    for place in (0, 10):
        network[place].weight.register_post_accumulate_grad_hook(
            lambda _, place=place: alive.update({place: sum(box() is not None for box in kept)})
        )
    rest = backward_inputs([output], [torch.ones_like(output)], [x])
    del output
    rest()
    assert alive[10] > 10
    assert alive[0] == 0


def test_several_outputs_and_inputs() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(3, 4), nn.Linear(3, 4)
    x, y = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    outputs = [one(x) + two(y), two(y).tanh(), one(x.detach())]
    given = [torch.randn(2, 4) for _ in outputs]
    backward_inputs(outputs, given, [x, y])()
    found = [x.grad, y.grad, *(p.grad for p in (*one.parameters(), *two.parameters()))]
    x.grad = y.grad = None
    one.zero_grad()
    two.zero_grad()
    torch.autograd.backward([one(x) + two(y), two(y).tanh(), one(x.detach())], given)
    expected = [x.grad, y.grad, *(p.grad for p in (*one.parameters(), *two.parameters()))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
