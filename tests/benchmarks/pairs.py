"""The pairs of networks that are trained for real: what they are, what they see, and what they learn from it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer, resnet18, resnet50  # type: ignore[import-untyped]
from typing_extensions import override

from lightning_tspipe import TeacherStudentModule
from lightning_tspipe.schedule import LossOver

IMAGE_SIZE, NUM_CLASSES = 64, 100
NUM_TOKENS, VOCABULARY = 64, 8192


def flat(network: ResNet, head: bool = True) -> nn.Sequential:
    """The network as a sequence of stem, residual blocks and head."""
    stem = [network.conv1, network.bn1, network.relu, network.maxpool]
    blocks = [*network.layer1, *network.layer2, *network.layer3, *network.layer4]
    return nn.Sequential(*stem, *blocks, network.avgpool, nn.Flatten(), *[network.fc] * head)


class Patches(nn.Module):
    """The beginning of a vision transformer."""

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.conv, self.token, self.position = network.conv_proj, network.class_token, network.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        """Tokens of images, the class first."""
        patches = self.conv(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.position


class First(nn.Module):
    """Of all tokens the first."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Its features."""
        return tokens[:, 0]


def vit(width: int, head: bool = True) -> nn.Sequential:
    """A vision transformer of 12 blocks, for patches of 8 pixels."""
    network = VisionTransformer(IMAGE_SIZE, 8, 12, width // 64, width, 4 * width, num_classes=NUM_CLASSES)
    tail = [network.encoder.ln, First(), *[network.heads] * head]
    return nn.Sequential(Patches(network), *network.encoder.layers, *tail)


class Words(nn.Module):
    """The beginning of BERT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(NUM_TOKENS, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features of tokens."""
        return self.norm(self.words(tokens) + self.places.weight)


class Attention(nn.Module):
    """The first half of a block of BERT.

    Args:
        width: of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Features of tokens."""
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class Mlp(nn.Module):
    """The second half.

    Args:
        width: of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Features of tokens."""
        return self.norm(x + self.mlp(x))


def bert(num_layers: int, width: int = 512) -> nn.Sequential:
    """As BERT-small, which classifies by its first token; in half blocks, since whole ones would not balance."""
    halves = [make(width) for _ in range(num_layers) for make in (Attention, Mlp)]
    return nn.Sequential(Words(width), *halves, First(), nn.Linear(width, NUM_CLASSES))


def head(features: int, hidden: int, out: int) -> nn.Sequential:
    """A projector or predictor."""
    return nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class Distillation(TeacherStudentModule):
    """The student learns from the labels and from a frozen teacher; its loss is a mean over samples.

    Args:
        teacher, student: the networks.
    """

    def __init__(self, teacher: nn.Sequential, student: nn.Sequential) -> None:
        super().__init__(loss_over="microbatch")  # so a backward may begin before the last forward, which keeps less
        self.teacher, self.student = teacher, student

    @override
    def loss(self, student_out: Tensor, teacher_out: Tensor, target: Tensor) -> Tensor:
        distance = nn.functional.kl_div(
            student_out.log_softmax(-1), teacher_out.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return distance + nn.functional.cross_entropy(student_out, target)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9)


class TwoViews(TeacherStudentModule):
    """An encoder learns from its own average on another view; the teacher has no predictor, the student's last layer.

    Args:
        encoder: with its projector.
        width: of what that gives.
        loss_over: what the loss sees at a time.
    """

    student: nn.Sequential

    def __init__(self, encoder: nn.Sequential, width: int, loss_over: LossOver = "batch") -> None:
        super().__init__(momentum=0.996, loss_over=loss_over)
        self.teacher = copy.deepcopy(encoder)
        self.student = nn.Sequential(*encoder, head(width, 512, width))

    @override
    def ema_source(self) -> nn.Module:
        return self.student[:-1]

    @override
    def student_input(self, batch: Any) -> list[Tensor]:
        return [batch[0], batch[0].flip(-1)]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-4)


class BYOL(TwoViews):
    """Each view's prediction is to be like the teacher's projection of the other."""

    @override
    def loss(self, student_out: list[Tensor], teacher_out: list[Tensor], target: Tensor) -> Tensor:
        similar = nn.functional.cosine_similarity
        return 2 - (similar(student_out[0], teacher_out[1]) + similar(student_out[1], teacher_out[0])).mean()


class MoCo(TwoViews):
    """Each view's prediction is to be liker to the teacher's projection of the other than to those of other images.

    Of all other images of the batch, also where it sees a microbatch of predictions.

    Args:
        encoder: with its projector.
        width: of what that gives.
    """

    def __init__(self, encoder: nn.Sequential, width: int) -> None:
        super().__init__(encoder, width, "student_microbatch")

    @override
    def loss(
        self, student_out: list[Tensor], teacher_out: list[Tensor], target: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        losses = []
        for pair in zip(student_out, reversed(teacher_out), strict=True):
            queries, keys = (nn.functional.normalize(each, dim=1) for each in pair)
            labels = torch.arange(len(keys), device=keys.device)[rows]
            losses.append(nn.functional.cross_entropy(queries @ keys.T / 0.2, labels))
        return losses[0] + losses[1]


def images(count: int) -> Tensor:
    """Of one image's memory."""
    return torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE).expand(count, -1, -1, -1)


def tokens(count: int) -> Tensor:
    """Of one text's memory."""
    return torch.randint(VOCABULARY, (1, NUM_TOKENS)).expand(count, -1)


@dataclass(frozen=True)
class Pair:
    """What is trained.

    Attributes:
        make: The module.
        inputs: So many samples.
        batch_size: Samples per step of the whole job.
        num_microbatches: Of a batch; too small ones make the operations themselves slower.
        of_teacher: Its own number of microbatches, if that is another one; with fewer its operations are faster.
        schedule: The order of the pipeline's work.
    """

    make: Callable[[], TeacherStudentModule]
    inputs: Callable[[int], Tensor] = images
    batch_size: int = 64
    num_microbatches: int = 2
    of_teacher: int | Literal["auto"] = "auto"
    schedule: str = "auto"


PAIRS = {
    "resnet50 to resnet18": Pair(
        lambda: Distillation(flat(resnet50(num_classes=NUM_CLASSES)), flat(resnet18(num_classes=NUM_CLASSES))),
        num_microbatches=3,
        of_teacher=1,
        schedule="1f1b",
    ),
    "ViT-S/8 to resnet18": Pair(
        lambda: Distillation(vit(384), flat(resnet18(num_classes=NUM_CLASSES))),
        num_microbatches=4,
        of_teacher=4,
        schedule="1f1b",
    ),
    "BYOL resnet18": Pair(
        lambda: BYOL(nn.Sequential(*flat(resnet18(), head=False), head(512, 512, 128)), 128), batch_size=32
    ),
    "MoCo-v3 ViT-Ti/8": Pair(
        lambda: MoCo(nn.Sequential(*vit(192, head=False), head(192, 512, 128)), 128),
        batch_size=16,
        num_microbatches=3,
        of_teacher=1,
        schedule="1f1b",
    ),
    "BERT-small (4 layers) to 3 layers": Pair(
        lambda: Distillation(bert(4), bert(3)), tokens, 32, num_microbatches=4, of_teacher=2, schedule="1f1b"
    ),
}
