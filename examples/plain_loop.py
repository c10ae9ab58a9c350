"""Your own loop: one SFW for the whole network, with warm-up, clipping, accumulation, bf16 and checkpointing.

python examples/plain_loop.py --epochs 30 --compile
"""

import argparse

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import pliant

ACCUMULATE = 2  # batches per step


class Checkpointed(nn.Module):
    """Recomputes a block's activations in the backward pass instead of keeping them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="compile the network and the step")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # images of 8×8 are too small for several threads
    torch.manual_seed(0)
    data = pliant.load_data("digits")
    loader = pliant.Loader(data, "train", batch_size=64, shuffle=True)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.GELU(), Checkpointed(nn.Linear(256, 256)), nn.GELU(), nn.Linear(256, 10)
    )

    # Every parameter is in a parameter group; groups without a ball take the steps of SGD.
    rules = [("5.*", None), ("*.weight", pliant.rank(k=0.05, radius=2))]
    optimizer = pliant.SFW(pliant.constrain(model, rules, default=None), lr=0.2, momentum=0.9)
    steps = arguments.epochs * (len(loader) // ACCUMULATE)
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=max(1, steps // 20))
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    schedule = lr_scheduler.ChainedScheduler([warmup, cosine])
    network, step = (
        (torch.compile(model), torch.compile(optimizer.step)) if arguments.compile else (model, optimizer.step)
    )

    for epoch in range(arguments.epochs):
        loader.set_epoch(epoch)
        for index, (images, labels) in enumerate(loader, 1):
            with torch.autocast("cpu", dtype=torch.bfloat16):  # the weights stay float32
                loss = nn.functional.cross_entropy(network(images), labels)
            (loss / ACCUMULATE).backward()
            if index % ACCUMULATE == 0:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
                step()
                optimizer.zero_grad()
                schedule.step()
        if epoch % 10 == 9 or epoch + 1 == arguments.epochs:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, Frank-Wolfe gap {optimizer.gap().item():.2f}")

    images, labels = next(iter(pliant.Loader(data, "test", len(data.test))))
    for ratio in (0.0, 0.5, 0.7, 0.9):
        small = pliant.compress(model, pliant.LowRank(ratio=ratio), images[:1]).eval()
        accuracy = (small(images).argmax(1) == labels).float().mean()
        print(f"{sum(p.numel() for p in small.parameters()):>7,} parameters, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
