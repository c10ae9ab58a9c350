"""A byte-level GPT on the text of Python's own help: train, cut to any rank, perplexity against kept parameters.

python examples/small_gpt.py --method sfw  # or adamw, muon
"""

import argparse
import math
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import GPT2Config, GPT2LMHeadModel

import pliant

CONTEXT = 64  # bytes


def read_text() -> tuple[Tensor, Tensor]:
    """Return the bytes of the topics to train on, and of every tenth topic, to test on."""
    texts = [topics.topics[name].encode() for name in sorted(topics.topics)]
    train = b"\n".join(text for index, text in enumerate(texts) if index % 10)
    return torch.tensor(list(train)), torch.tensor(list(b"\n".join(texts[::10])))


def make_optimizers(model: nn.Module, method: str) -> list[torch.optim.Optimizer]:
    if method == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))]
    if method == "muon":
        matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95))]
    rules = pliant.transformer_rules(model, linear=pliant.rank(k=0.1, radius=20, vertices="sparse"))
    groups = pliant.constrain(model, rules, default=None, pretrained=True)  # radii from these weights
    groups = [group if group["ball"] else group | {"lr": 0.1} for group in groups]  # the others take steps of SGD
    return [pliant.SFW(groups, lr=0.01, rescale=None)]


@torch.no_grad()
def perplexity(model: nn.Module, test: Tensor) -> float:
    ids = test[: len(test) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return math.exp(model(input_ids=ids, labels=ids).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sfw", "adamw", "muon"], default="sfw")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, test = read_text()
    sizes = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 96, "n_layer": 3, "n_head": 4}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))
    optimizers = make_optimizers(model, arguments.method)
    if isinstance(optimizers[0], pliant.SFW):
        pliant.KSchedule(optimizers[0], steps=arguments.steps // 2 + 1)  # the optimizer advances it
    shape = {"total_steps": arguments.steps + 1, "pct_start": 0.02, "cycle_momentum": False}
    schedules = [OneCycleLR(o, [g["lr"] for g in o.param_groups], **shape) for o in optimizers]
    for step in range(arguments.steps):
        ids = train[torch.randint(len(train) - CONTEXT, (16, 1)) + torch.arange(CONTEXT)]
        model.zero_grad()
        (loss := model(input_ids=ids, labels=ids).loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    calibration = [{"input_ids": train[i : i + 64 * CONTEXT].view(64, CONTEXT)} for i in (0, 100_000, 200_000)]
    for ratio in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9):
        small = pliant.compress(model, pliant.LowRank(ratio=ratio), calibration[0], calibration=calibration)
        print(f"{sum(p.numel() for p in small.parameters()):>8,} parameters: perplexity {perplexity(small, test):.2f}")


if __name__ == "__main__":
    main()
