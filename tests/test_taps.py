"""Features of both networks reach `loss` by name, and the pipeline's numbers are those of the sequential twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule, tree
from lightning_tspipe.module import run_loss
from lightning_tspipe.partition import partition
from lightning_tspipe.taps import TapError, Tapped, run_tapped
from lightning_tspipe.trace import Traced
from tests.multiproc import result_of
from tests.scripts.zygote import Zygote
from tests.test_trace import Around, Quiet, Tied, Twice, rows
from tests.twins import TWIN, Case, Make, Twins, assert_same
from tests.zoo import backward, forward, segments_of

pytestmark = pytest.mark.timeout(120)

# --- what a tap gives, at every cut, in one process


class Record:
    """An object that holds tensors."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.pair = value, (value + 1, {"twice": value * 2})


class Returns(nn.Module):
    """A block with parameters; its result is of the kind that is asked for."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


class Kinds(nn.Module):
    """Blocks that return nestings, one that is called twice, one whose result is changed in place, and the input."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Identity()
        self.pair = Returns(lambda x: (x, None))
        self.named = Returns(lambda x: {"a": x, "b": x.square()})
        self.record = Returns(Record)
        self.twice = Returns(torch.tanh)
        self.act = nn.ReLU(inplace=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pair(self.entry(x))[0] + x
        x = self.named(x)["b"] + x
        x = self.record(x).pair[1]["twice"] + x
        x = self.twice(self.twice(x)) + x
        return self.head(self.act(self.norm(x)) + x)


def loss_of(output: Any) -> Tensor:
    """A number that every tensor has a part in, whether it has a gradient or not."""
    return torch.stack([((x + 0.1 * place) ** 2).mean() for place, x in enumerate(tree.flatten(output)[0])]).sum()


@pytest.mark.parametrize(
    ("make", "taps"),
    [
        (Kinds, ["head", "entry", "pair", "named", "record", "twice", "norm", "act", "twice.inner"]),
        (Around, ["first", "fickle"]),
        (Twice, ["b", "a"]),
        (Tied, ["middle", "first", "last"]),
        (Quiet, ["target", "first"]),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(True), nn.Linear(4, 4)), nn.Tanh()), ["1", "0"]),
    ],
)
def test_every_cut_gives_what_hooks_see(make: Callable[[], nn.Module], taps: Sequence[str]) -> None:
    """Output, features, their order and nesting, and every gradient; the features are used further down, too."""

    def compare() -> None:
        torch.manual_seed(0)
        whole, x = make().double(), rows(3)
        expected = run_tapped(whole, x.clone(), taps)
        loss_of(tuple(expected)).backward()
        assert list(expected.taps) == list(taps)
        most = len(Traced(whole, [x], torch.device("cpu")).names)
        assert most > 1
        for stages in range(2, most + 1):
            network = copy.deepcopy(whole)
            network.zero_grad()
            pieces = segments_of(network, x, stages, taps=taps)
            found, ends = forward(pieces, x.clone())
            assert isinstance(found, Tapped)
            leaves, structure = tree.flatten(found)
            others, expected_structure = tree.flatten(expected)
            assert str(structure) == str(expected_structure)
            assert_same([leaf.detach() for leaf in leaves], [leaf.detach() for leaf in others])
            backward(loss_of(tuple(found)), ends)
            for (name, mine), other in zip(network.named_parameters(), whole.parameters(), strict=True):
                assert_same(mine.grad, other.grad, name)

    result_of(compare)


def test_a_tap_is_noted_only_where_it_is_called() -> None:
    """An auxiliary head that exists in training only does not hinder an evaluation."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x) + self.aux(x) if self.training else self.head(x)

    network = Auxiliary()
    pieces = segments_of(network, torch.rand(2, 4), 2, taps=["aux"])
    x = torch.rand(3, 4)
    found, _ = forward(pieces, x)
    assert torch.equal(found.taps["aux"], network.aux(network.body(x)))
    network.eval()
    found, _ = forward(pieces, x)
    assert torch.equal(found.value, network(x))
    assert found.taps == {}


def test_hidden_states_of_transformers_are_outputs() -> None:
    """They travel without taps, too; the hooks by which transformers collects them are not left behind."""
    transformers = pytest.importorskip("transformers")
    sizes = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "vocab_size": 40}
    config = transformers.DistilBertConfig(**sizes, output_hidden_states=True, dropout=0.0, attention_dropout=0.0)
    network = transformers.DistilBertModel(config)
    words = torch.randint(3, 40, (2, 6))

    def compare() -> None:
        with torch.no_grad():
            found, _ = forward(segments_of(network, words, 2), words)
            expected = network(words)
        assert len(expected.hidden_states) == 3
        assert_same(list(found.hidden_states), list(expected.hidden_states))

    result_of(compare)


# --- the pipeline and the twin


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Block(nn.Module):
    """A residual block whose sum and activation are made in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second, self.skip = (
            conv(inputs, outputs),
            conv(outputs, outputs),
            nn.Conv2d(inputs, outputs, 1),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.act(self.first(x)))
        out += self.skip(x)
        return self.act(out)


class Net(nn.Module):
    """A small residual network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(1, width)
        self.layer1, self.layer2, self.layer3 = Block(width, width), Block(width, 2 * width), Block(2 * width, width)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.layer1(self.stem(x)))
        return self.fc(self.layer3(self.layer2(x)).mean((2, 3)))


class Features(TeacherStudentModule):
    """Notes what `loss` gets, and the gradients of this rank."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        torch.manual_seed(0)
        self.student, self.teacher = Net(2).double(), Net(4).double()
        self.given: list[Any] = []
        self.grads: list[dict[str, Tensor]] = []

    def note(self, *what: Any) -> None:
        self.given.append(tree.map_tensors(what, lambda leaf: leaf.detach().clone()))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        views = self.student_input(batch)
        for view in views if isinstance(views, list) else [views]:
            gap = self.student(view) - self.teacher(view)
            self.log("gap", gap.square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2)


class FitNets(Features):
    """The hint loss; the regressor belongs to neither network. https://arxiv.org/abs/1412.6550"""

    student_taps, teacher_taps = ("layer2",), ["layer2"]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.regressor = nn.Conv2d(4, 8, 1).double()

    def loss(self, student_out: Any, teacher_out: Any, target: Any, student_taps: Any, teacher_taps: Any) -> Any:
        self.note(student_out, teacher_out, student_taps, teacher_taps)
        hint = F.mse_loss(self.regressor(student_taps["layer2"]), teacher_taps["layer2"])
        return hint + F.cross_entropy(student_out, target)


class HintAlone(FitNets):
    """The first part of FitNets: layers after the hint have no gradient, and weight decay leaves them alone."""

    student_taps = teacher_taps = ("layer1",)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.regressor = nn.Conv2d(2, 4, 1).double()

    def loss(self, student_out: Any, teacher_out: Any, target: Any, student_taps: Any, teacher_taps: Any) -> Any:
        self.note(student_out, teacher_out, student_taps, teacher_taps)
        return F.mse_loss(self.regressor(student_taps["layer1"]), teacher_taps["layer1"])


def attention(features: Tensor) -> Tensor:
    return F.normalize(features.square().mean(1).flatten(1))


class AttentionTransfer(Features):
    """Maps of several places. https://arxiv.org/abs/1612.03928"""

    student_taps = teacher_taps = ("layer1", "layer2.act", "layer3")

    def loss(self, student_out: Any, teacher_out: Any, target: Any, student_taps: Any, teacher_taps: Any) -> Any:
        self.note(student_out, teacher_out, student_taps, teacher_taps)
        pairs = [(student_taps[name], teacher_taps[name]) for name in self.student_taps]
        return sum((attention(s) - attention(t)).square().mean() for s, t in pairs) + F.cross_entropy(
            student_out, target
        )


class Crops(Features):
    """Views of two sizes; taps of the student alone, which instances choose."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.student_taps = ["layer1.skip", "fc"]

    def student_input(self, batch: Any) -> Any:
        return [batch[0], batch[0][:, :, 2:6, 2:6].contiguous()]

    def loss(self, student_out: Any, teacher_out: Any, target: Any, student_taps: Any, teacher_taps: Any) -> Any:
        self.note(student_out, teacher_out, student_taps, teacher_taps)
        assert teacher_taps == {}
        skip, small = (taps["layer1.skip"].mean((2, 3)) for taps in student_taps)
        gap = sum((out - t).square().mean() for out, t in zip(student_out, teacher_out, strict=True))
        return gap + (skip - small).square().mean() + student_taps[1]["fc"].square().mean()


class Momentum(Features):
    """A momentum teacher of a part of the student, with taps in both."""

    teacher_taps = ("layer1", "layer3")

    @property
    def student_taps(self) -> list[str]:  # type: ignore[override]
        return [f"0.{name}" for name in self.teacher_taps]

    def __init__(self, **options: Any) -> None:
        super().__init__(momentum=0.8, teacher_delay=1, **options)
        encoder = Net(3).double()
        self.student, self.teacher = nn.Sequential(encoder, nn.Linear(3, 3).double()), copy.deepcopy(encoder)

    def ema_source(self) -> nn.Module:
        return self.student[0]  # type: ignore[index]

    def loss(self, student_out: Any, teacher_out: Any, target: Any, student_taps: Any, teacher_taps: Any) -> Any:
        self.note(student_out, teacher_out, student_taps, teacher_taps)
        gaps = [(student_taps[f"0.{name}"] - teacher_taps[name]).square().mean() for name in self.teacher_taps]
        return sum(gaps) + (student_out - teacher_out).square().mean()


class Cosine(Features):
    """Hidden states of transformers, as in DistilBERT. https://arxiv.org/abs/1910.01108"""

    student_taps = ("transformer.layer.0", "transformer.layer.1")
    teacher_taps = ("encoder.layer.1", "encoder.layer.3")

    def __init__(self, **options: Any) -> None:
        from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

        super().__init__(**options)
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
        self.teacher = BertModel(BertConfig(vocab_size=40, **sizes, **none)).double()
        distil = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "dropout": 0.0, "attention_dropout": 0.0}
        self.student = DistilBertModel(DistilBertConfig(vocab_size=40, **distil)).double()

    def student_input(self, batch: Any) -> Any:
        return {"input_ids": batch[2], "attention_mask": batch[3]}

    def target(self, batch: Any) -> Any:
        return batch[3]

    def loss(self, student_out: Any, teacher_out: Any, target: Any, student_taps: Any, teacher_taps: Any) -> Any:
        self.note(student_taps, teacher_taps)
        mask, total = target.bool(), student_out.last_hidden_state.square().mean()
        for mine, other in zip(student_taps.values(), teacher_taps.values(), strict=True):
            a, b = mine[mask], other[mask]
            total = total + F.cosine_embedding_loss(a, b, a.new_ones(len(a)))
        return total


BATCH = 4


def loader(rows: int) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 1, 8, 8, dtype=torch.float64, generator=random)
    labels, words = torch.arange(rows) % 3, torch.randint(3, 40, (rows, 6), generator=random)
    mask = torch.ones(rows, 6, dtype=torch.long)
    mask[:, 5] = 0  # as many words in every row, so that the mean over microbatches is that over the batch
    return DataLoader(TensorDataset(images, labels, words, mask), BATCH)


PIPELINES = {1: 2, 2: 2, 3: 2}  # stages and microbatches
METHODS = {
    "FitNets, batch": (FitNets, "auto", 7),  # the last batch is short
    "FitNets, microbatch": (FitNets, "zb", 8),
    "HintAlone, batch": (HintAlone, "afab-split", 8),
    "HintAlone, microbatch": (HintAlone, "1f1b", 8),
    "AttentionTransfer, batch": (AttentionTransfer, "afab-split", 7),
    "AttentionTransfer, microbatch": (AttentionTransfer, "1f1b", 8),
    "Crops, batch": (Crops, "auto", 8),
    "Momentum, microbatch": (Momentum, "zb", 8),
    "Cosine, batch": (Cosine, "auto", 8),
    "Cosine, microbatch": (Cosine, "zb", 8),
}


TEACHER = {"FitNets, microbatch": 4, "Cosine, batch": 4, "Cosine, microbatch": 1}  # microbatches, where they are others


def fit(make: Make, name: str) -> dict[str, Any]:
    """What a training did on this rank."""
    kind, schedule, rows = METHODS[name]
    module = kind(loss_over=name.split(", ")[1])
    run = make(schedule=schedule, teacher=TEACHER.get(name, "auto"))
    run.fit(module, loader(rows), None if kind is Cosine else loader(rows))
    return {
        "given": module.given,
        "grads": module.grads,
        "gap": run.callback_metrics.get("gap"),
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()}
        | {f"teacher.{name}": tensor.clone() for name, tensor in module.teacher.named_parameters()},
    }


CASES: dict[str, Case] = {name: partial(fit, name=name) for name in METHODS}


@pytest.fixture(scope="module")
def twins(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    pytest.importorskip("transformers")
    return Twins(zygote, tmp_path_factory.mktemp("taps"), "tests.test_taps", PIPELINES)


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_is_the_twin(twins: Twins, name: str) -> None:
    """What `loss` gets, every gradient, weight and validation, on every rank."""
    (twin,) = twins.ranks(name, TWIN)
    assert len(twin["given"]) == len(twin["grads"]) == 2
    for stages in PIPELINES:
        ranks = twins.ranks(name, stages)
        for rank in ranks:
            assert_same(rank["weights"], twin["weights"], f"{name}, P={stages}: ")
            assert_same(rank["gap"], twin["gap"])
            for step, grads in enumerate(rank["grads"]):
                for parameter, grad in grads.items():
                    assert_same(grad, twin["grads"][step][parameter], f"{name}, P={stages}, {parameter}: ")
        for step, grads in enumerate(twin["grads"]):
            assert set(grads) == set().union(*(rank["grads"][step] for rank in ranks))
        assert not any(rank["given"] for rank in ranks[:-1])
        given = ranks[-1]["given"]
        if name.endswith("microbatch"):
            given = [tree.merge(given[i : i + 2], [2, 2]) for i in range(0, len(given), 2)]
        assert_same(given, twin["given"], f"{name}, P={stages}: ")


# --- what cannot be tapped; tests/test_bad_input.py has what is refused by every rank of a pipeline


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ("layer2", r"is the string 'layer2'\. Give a sequence of names: \('layer2',\)"),
        ("", "is the string ''"),
        (["layer4"], r"names 'layer4', which is no submodule of this Net\. Near it are .*'layer2'"),
        (["layer2.acts"], "'layer2.act'"),
        (["zzz"], "Near it are 'stem', 'layer1', 'layer2', 'layer3', 'pool', 'fc'"),
        ([""], "no submodule"),
        (3, "is 3. Give a sequence of names"),
        ([nn.Identity()], "Give a sequence of names"),
    ],
)
def test_names_are_checked(taps: Any, message: str) -> None:
    """By every rank, and by the twin, before anything runs."""
    module = FitNets()
    module.teacher_taps = taps
    with pytest.raises(MisconfigurationException, match=f"`teacher_taps` of `FitNets` .*{message}"):
        module.check_networks()


def test_a_loss_has_to_take_the_taps() -> None:
    class Forgets(Features):
        student_taps = ("fc",)

        def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
            return student_out.sum()

    with pytest.raises(
        MisconfigurationException, match=r"its `loss` does not take what comes with it .*student_taps, teacher_taps\)`"
    ):
        Forgets().check_networks()
    Forgets.student_taps = ()  # type: ignore[assignment]
    Forgets().check_networks()


def test_the_twin_says_that_a_tap_is_never_called() -> None:
    module = FitNets()
    module.student.extra = nn.ModuleList([module.student.fc])
    module.student_taps = ["layer2", "extra"]  # type: ignore[assignment]
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    student, teacher = run_tapped(module.student, x, module.student_taps), run_tapped(module.teacher, x, ["layer2"])
    with pytest.raises(MisconfigurationException, match="The tap 'extra' of Net was never called"):
        run_loss(module, student, teacher, torch.tensor([0, 1]))
    assert not any(child._forward_hooks for child in module.modules()), "a hook has stayed"


def test_a_tap_is_not_seen_within_a_layer_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 2))
    taps = {"teacher": ["1.linear1"]}
    with pytest.raises(TapError, match=r"'1\.linear1' of Sequential is inside of '1'"):
        partition(linears(), network, 2, examples=lambda name: [torch.rand(2, 3, 4)], taps=taps)
    assert run_tapped(network, torch.rand(2, 3, 4), ["1.linear1"]).taps["1.linear1"].shape == (2, 3, 16)


def linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_rows_are_joined_only_where_they_are_the_batch() -> None:
    """A feature of another first dimension, such as a position bias, would else be another one than the twin's."""
    with pytest.raises(ValueError, match=r"of shape \(1, 4\) for 2 row\(s\), or a tapped submodule did"):
        tree.merge([Tapped(torch.ones(2, 4), {"bias": torch.ones(1, 4)})] * 2, [2, 2])
