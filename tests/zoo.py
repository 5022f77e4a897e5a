"""Known networks in small, and what it takes to show that one of them is cut without a change of any number.

``python -m tests.zoo`` (``make models``) tries all of them at P=2, 3 and 4 and prints the table of docs/models.md.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck

from lightning_tspipe import split, tree
from lightning_tspipe.arguments import run_network
from lightning_tspipe.partition import partition
from lightning_tspipe.trace import Segment, Traced

CLASSES = 3
DOUBLE = torch.float64
Ends = list[tuple[list[Tensor], list[Tensor]]]  # of each stage, what goes in and what comes out


@dataclass(frozen=True)
class Kind:
    """One family of networks.

    Args:
        name: as its library calls it.
        build: makes a small one.
        size: height and width of the images; None for token ids with a mask.
        extra: the library that it needs, if torchvision does not have it.
        steps: how many are compared.
        rows: of the first batch; each later one has one less.
    """

    name: str
    build: Callable[[], nn.Module]
    size: int | None = 32
    extra: str | None = None
    steps: int = 2
    rows: int = 3

    def inputs(self, rows: int) -> Any:
        """What an input hook would return for a batch."""
        if self.size is not None:
            return torch.rand(rows, 3, self.size, self.size, dtype=DOUBLE)
        mask = torch.ones(rows, 6, dtype=torch.long)
        mask[0, 4:] = 0
        return {"input_ids": torch.randint(3, 40, (rows, 6)), "attention_mask": mask}


def kinds() -> Iterator[Kind]:
    """All families."""
    yield from _torchvision()
    yield from _timm()
    yield from _transformers()


def _torchvision() -> Iterator[Kind]:
    resnet = partial(tv.ResNet, num_classes=CLASSES)
    yield Kind("resnet", partial(resnet, BasicBlock, [1, 1, 1, 1]))
    yield Kind("resnext", partial(resnet, Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4))
    yield Kind("wide_resnet", partial(resnet, Bottleneck, [1, 1, 1, 1], width_per_group=80))
    yield Kind("vgg", _vgg)
    yield Kind("alexnet", _alexnet, 64)
    yield Kind("squeezenet", partial(_sized, "squeezenet1_1"))
    yield Kind("densenet", partial(tv.DenseNet, 8, (2, 2, 2), 16, num_classes=CLASSES))
    yield Kind("googlenet", partial(_sized, "googlenet", init_weights=False), 64, steps=1)
    yield Kind("inception", partial(_sized, "inception_v3", init_weights=False), 299, steps=1, rows=2)
    yield Kind("mobilenet_v2", partial(_sized, "mobilenet_v2", width_mult=0.25))
    yield Kind("mobilenet_v3", partial(_sized, "mobilenet_v3_small"))
    yield Kind("mnasnet", partial(_sized, "mnasnet0_5"))
    yield Kind("shufflenet_v2", partial(_sized, "shufflenet_v2_x0_5"))
    mb, fused = partial(MBConvConfig, kernel=3), partial(FusedMBConvConfig, kernel=3)
    settings = [mb(1, stride=1, input_channels=8, out_channels=8, num_layers=2),
                mb(4, stride=2, input_channels=8, out_channels=16, num_layers=2)]  # fmt: skip
    yield Kind("efficientnet", partial(tv.EfficientNet, settings, 0.2, num_classes=CLASSES))
    settings = [fused(1, stride=1, input_channels=8, out_channels=8, num_layers=2),
                mb(4, stride=2, input_channels=8, out_channels=16, num_layers=2)]  # fmt: skip
    yield Kind("efficientnet_v2", partial(tv.EfficientNet, settings, 0.2, num_classes=CLASSES, last_channel=32))
    yield Kind("regnet", lambda: tv.RegNet(BlockParams.from_init_params(4, 24, 24.5, 2.5, 8, se_ratio=0.25), CLASSES))
    settings = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    yield Kind("convnext", partial(tv.ConvNeXt, settings, 0.2, num_classes=CLASSES))
    swin = partial(tv.SwinTransformer, [4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=CLASSES)
    yield Kind("swin", swin)
    v2 = {"block": tv.swin_transformer.SwinTransformerBlockV2, "downsample_layer": tv.swin_transformer.PatchMergingV2}
    yield Kind("swin_v2", partial(swin, **v2))
    yield Kind("vit", partial(tv.VisionTransformer, 32, 8, 3, 2, 16, 32, dropout=0.1, num_classes=CLASSES))
    yield Kind("maxvit", partial(tv.MaxVit, (32, 32), 8, 4, [8, 16], [1, 1], 8, 0.2, num_classes=CLASSES))
    mobile = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    yield Kind("fcn", partial(_segmenter, "fcn"))
    yield Kind("deeplab", partial(tv.segmentation.deeplabv3_mobilenet_v3_large, aux_loss=True, **mobile), steps=1)
    yield Kind("lraspp", partial(tv.segmentation.lraspp_mobilenet_v3_large, **mobile))


def _vgg() -> nn.Module:
    network = tv.VGG(tv.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True), CLASSES)  # type: ignore[list-item]
    network.classifier = nn.Sequential(nn.Linear(16 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, CLASSES))
    return network


def _alexnet() -> nn.Module:
    network = tv.AlexNet(CLASSES)
    network.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 36, 32), nn.ReLU(True), nn.Linear(32, CLASSES))
    return network


def _sized(name: str, **options: Any) -> nn.Module:
    return tv.get_model(name, weights=None, num_classes=CLASSES, **options)


def _segmenter(name: str) -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone = IntermediateLayerGetter(tv.ResNet(BasicBlock, [1, 1, 1, 1]), {"layer4": "out", "layer3": "aux"})
    return FCN(backbone, FCNHead(512, CLASSES), FCNHead(256, CLASSES))


def _timm() -> Iterator[Kind]:
    def make(name: str, **options: Any) -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    yield Kind("timm resnet", partial(make, "test_resnet"), 32, "timm")
    yield Kind("timm vit", partial(make, "test_vit", img_size=32), 32, "timm")
    yield Kind("timm convnext", partial(make, "test_convnext"), 32, "timm")
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    yield Kind("timm eva", partial(make, "eva02_tiny_patch14_224", drop_path_rate=0.1, **small), 32, "timm")


def _transformers() -> Iterator[Kind]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 40}
    gpt = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
    distil = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32}
    image = {"image_size": 32, "patch_size": 8}

    def make(model: str, config: str, **options: Any) -> nn.Module:
        import transformers

        network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return network

    yield Kind(
        "BERT", partial(make, "BertForSequenceClassification", "BertConfig", **sizes, **ids), None, "transformers"
    )
    yield Kind(
        "BERT, tied embeddings", partial(make, "BertForMaskedLM", "BertConfig", **sizes, **ids), None, "transformers"
    )
    yield Kind(
        "DistilBERT", partial(make, "DistilBertModel", "DistilBertConfig", **distil, **ids), None, "transformers"
    )
    yield Kind("RoBERTa", partial(make, "RobertaModel", "RobertaConfig", **sizes, **ids), None, "transformers")
    yield Kind("ViT", partial(make, "ViTForImageClassification", "ViTConfig", **sizes, **image), 32, "transformers")
    yield Kind(
        "GPT-2, tied embeddings", partial(make, "GPT2LMHeadModel", "GPT2Config", **gpt, **ids), None, "transformers"
    )
    yield Kind("Llama", partial(make, "LlamaForCausalLM", "LlamaConfig", **sizes, **ids), None, "transformers")


def segments_of(
    network: nn.Module, example: Any, stages: int, sizes: Sequence[int] | None = None, taps: Sequence[str] = ()
) -> list[nn.Module]:
    """The stages of a network, as `partition` cuts it."""
    balance: Any = "auto" if sizes is None else {"student": sizes}
    other = nn.Sequential(*[nn.Linear(1, 1) for _ in range(stages)])
    parts = partition(network, other, stages, balance, examples=lambda name: [example], taps={"student": taps})
    stages_of: list[nn.Module] = []
    for stage in range(stages):
        (run,) = parts.runs("student", stage)
        assert isinstance(run.module, Segment)
        stages_of.append(run.module)
    return stages_of


def forward(stages: Sequence[nn.Module], value: Any) -> tuple[Any, Ends]:
    """Run the stages as processes would, which have no memory in common; the output, and each stage's ends."""
    ends = []
    for index, stage in enumerate(stages):
        leaves, structure = tree.flatten(value)
        if index:
            leaves = [leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        value = stage(tree.unflatten(leaves, structure))
        ends.append((leaves, tree.flatten(value)[0]))
    return value, ends


def backward(loss: Tensor, ends: Ends) -> None:
    """The backward of `forward`, stage after stage."""
    loss.backward()
    for (_, outputs), (inputs, _) in zip(ends[-2::-1], ends[:0:-1], strict=True):
        torch.autograd.backward(*_sent_back(outputs, inputs))


def backward_in_parts(loss: Tensor, ends: Ends) -> None:
    """The same, but all stages compute the gradients of their inputs before any computes those of its weights."""
    rests = [split.backward_inputs([loss], [torch.ones_like(loss)], ends[-1][0])]
    for (own, outputs), (inputs, _) in zip(ends[-2::-1], ends[:0:-1], strict=True):
        rests.append(split.backward_inputs(*_sent_back(outputs, inputs), own))
    for rest in rests:
        rest()


def _sent_back(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of a stage's outputs those that the next stage has a gradient for, and the gradients."""
    pairs = [(out, x.grad) for out, x in zip(outputs, inputs, strict=True) if out.requires_grad]
    return [out for out, grad in pairs if grad is not None], [grad for _, grad in pairs if grad is not None]


def check_split(network: nn.Module, inputs: Callable[[int], Any], stages: int, rows: int = 3) -> list[str]:
    """The parameters whose gradients a backward in parts does not give bit for bit, of a network in stages."""
    torch.manual_seed(0)
    batch = inputs(rows)
    pieces = segments_of(network.train(), batch, stages)
    found: list[list[Tensor | None]] = []
    for way in (backward, backward_in_parts):
        network.zero_grad()
        torch.manual_seed(1)
        output, ends = forward(pieces, copy.deepcopy(batch))
        way(loss_of(output), ends)
        found.append([parameter.grad for parameter in network.parameters()])
    assert any(gradient is not None for gradient in found[0])
    return [
        name
        for (name, _), one, other in zip(network.named_parameters(), *found, strict=True)
        if not (one is other is None or (one is not None and other is not None and torch.equal(one, other)))
    ]


def loss_of(output: Any) -> Tensor:
    """A number that every floating point value of an output has a part in."""
    leaves = [leaf for leaf in tree.flatten(output)[0] if leaf.is_floating_point() and leaf.requires_grad]
    parts = [((leaf + 0.1 * place) ** 2).mean() for place, leaf in enumerate(leaves)]
    return torch.stack(parts).sum()


def check(network: nn.Module, inputs: Callable[[int], Any], stages: int, steps: int = 2, rows: int = 3) -> float:
    """Train a network in stages and the same one uncut, then evaluate both.

    Returns:
        The largest difference of any output, gradient, parameter and buffer, relative to its size.
    """
    torch.manual_seed(0)
    whole = copy.deepcopy(network)
    batches = [inputs(rows - step) for step in range(steps)]  # the last one is short
    pieces = segments_of(network, batches[0], stages)
    worst = 0.0

    def compare(name: str, found: Any, expected: Any) -> None:
        nonlocal worst
        found, same = tree.flatten(found)
        expected, structure = tree.flatten(expected)
        assert str(same) == str(structure), f"{name}: another structure"
        for a, b in zip(found, expected, strict=True):
            scale = max(1.0, b.double().abs().max().item()) if b.numel() else 1.0
            gap = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
            assert math.isfinite(gap), name
            worst = max(worst, gap / scale)

    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (network, whole)]
    for step, batch in enumerate(batches):
        network.train()
        whole.train()
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(step)
        output, ends = forward(pieces, copy.deepcopy(batch))
        torch.manual_seed(step)
        expected = run_network(whole, copy.deepcopy(batch))
        compare("output", output, expected)
        backward(loss_of(output), ends)
        loss_of(expected).backward()
        for (name, mine), other in zip(network.named_parameters(), whole.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None), name
            compare(name, mine.grad, other.grad)
        for optimizer in optimizers:
            optimizer.step()
        compare("state", dict(network.state_dict()), dict(whole.state_dict()))
    network.eval()
    whole.eval()
    with torch.no_grad():
        compare("evaluation", forward(pieces, batches[-1])[0], run_network(whole, batches[-1]))
    return worst


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print("| network | library | layers | P=2 | P=3 | P=4 |\n|---|---|---|---|---|---|")
    for kind in kinds():
        cells = []
        for stages in (2, 3, 4):
            network = kind.build().to(DOUBLE)
            gap = check(network, kind.inputs, stages, kind.steps, kind.rows)
            cells.append(f"{gap:.0e}" if gap else "0")
        count = len(Traced(network, [kind.inputs(kind.rows)], torch.device("cpu")).names)
        print("|", " | ".join([kind.name, kind.extra or "torchvision", str(count), *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
