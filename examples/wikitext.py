"""DistilBERT at the size of its paper, on WikiText, for configs/full/distilbert.yaml.

A BERT of 12 layers teaches one of 6, which begins with every other of these. The losses are the paper's: soft targets,
masked words, and the direction of the last hidden states. BERT and its tokenizer are downloaded.
Method: Sanh et al., "DistilBERT", 2019, https://arxiv.org/abs/1910.01108.
"""

import copy
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from lightning_tspipe import TeacherStudentModule

UNMASKED = -100  # the label that the collator gives to words that are not asked for


class DistilBERT(TeacherStudentModule):
    """Args: name of the teacher at Hugging Face, or None for random weights of `width` and `layers`."""

    def __init__(self, name: str | None = "bert-base-uncased", width: int = 768, layers: int = 12, lr: float = 5e-4):
        super().__init__()  # momentum=None: the teacher is frozen
        self.save_hyperparameters()
        config = BertConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width)
        teacher = BertForMaskedLM.from_pretrained(name) if name else BertForMaskedLM(config)
        words = teacher.cls.predictions.decoder  # untied, else the embeddings would travel with each microbatch
        words.weight = nn.Parameter(words.weight.detach().clone())
        self.teacher, self.student = teacher, copy.deepcopy(teacher)
        self.student.requires_grad_(True)
        self.student.bert.encoder.layer = self.student.bert.encoder.layer[::2]
        self.student_taps = (f"bert.encoder.layer.{len(self.student.bert.encoder.layer) - 1}",)
        self.teacher_taps = (f"bert.encoder.layer.{len(teacher.bert.encoder.layer) - 1}",)

    def loss(self, student_out, teacher_out, target, student_taps, teacher_taps):
        heat, asked = 2.0, target != UNMASKED
        ours, theirs = student_out.logits[asked], teacher_out.logits[asked]
        soft = F.kl_div(F.log_softmax(ours / heat, 1), F.softmax(theirs / heat, 1), reduction="batchmean")
        masked = F.cross_entropy(ours, target[asked])
        (state,), (goal,) = student_taps.values(), teacher_taps.values()
        direction = 1 - F.cosine_similarity(state, goal, dim=-1).mean()
        self.log_dict({"soft": soft, "masked": masked, "direction": direction})
        return 5 * heat**2 * soft + 2 * masked + direction

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), self.hparams.lr, weight_decay=0.01)


class WikiText(L.LightningDataModule):
    """Passages of the file `wiki.train.tokens` of WikiText-103, of equally many tokens, with 15 % of them masked."""

    def __init__(self, folder: str, name: str = "bert-base-uncased", length: int = 512, rows: int = 256):
        super().__init__()
        self.folder, self.name, self.length, self.rows = folder, name, length, rows

    def setup(self, stage=None):
        self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        lines = (Path(self.folder) / "wiki.train.tokens").read_text().splitlines()
        found = self.tokenizer([line for line in lines if line.strip()], add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([token for line in found for token in line])
        self.passages = tokens.unfold(0, self.length, self.length)

    def masked(self, passages):
        batch = DataCollatorForLanguageModeling(self.tokenizer)(passages)
        return {"input_ids": batch["input_ids"]}, batch["labels"]

    def train_dataloader(self):
        return DataLoader(self.passages, self.rows, shuffle=True, drop_last=True, collate_fn=self.masked)
