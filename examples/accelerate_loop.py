"""Accelerate with SFW: gradient accumulation, clipping, bf16, a tracker and a checkpoint; one process or many.

accelerate launch examples/accelerate_loop.py --epochs 30 --out runs/accelerate
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pliant
from pliant.experiments.data import ImageData


def tensors(data: ImageData, split: str) -> TensorDataset:
    return TensorDataset(*next(iter(pliant.Loader(data, split, batch_size=10_000))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--tracker", help="tensorboard, wandb, mlflow or trackio")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # images of 8×8 are too small for several threads
    torch.manual_seed(0)
    accelerator = Accelerator(
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        log_with=arguments.tracker,
        project_dir=arguments.out,
        cpu=True,
    )
    wandb = {"mode": os.environ.get("WANDB_MODE", "offline")}  # "online" asks for a login
    accelerator.init_trackers("digits", config={"epochs": arguments.epochs}, init_kwargs={"wandb": wandb})
    data = pliant.load_data("digits")
    model = pliant.build_model("resnet8", num_classes=data.num_classes, image_shape=data.image_shape)
    rules = [("fc.*", None), ("*.weight", pliant.filters(k=0.1, radius=3))]
    sfw = pliant.SFW(pliant.constrain(model, rules, default=None), lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sfw, T_max=arguments.epochs)
    network, optimizer, loader = accelerator.prepare(model, sfw, DataLoader(tensors(data, "train"), 64, shuffle=True))

    for epoch in range(arguments.epochs):
        network.train()
        for images, labels in loader:
            with accelerator.accumulate(network):
                loss = nn.functional.cross_entropy(network(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), max_norm=5.0)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        accelerator.log({"loss": loss.item(), "gap": sfw.gap().item()}, step=epoch)
    accelerator.save_state(arguments.out / "checkpoint")  # accelerator.load_state continues from it
    accelerator.end_training()

    model = accelerator.unwrap_model(network, keep_fp32_wrapper=False).eval()
    images, labels = tensors(data, "test").tensors
    for ratio in (0.0, 0.5, 0.7):
        small = pliant.compress(model, pliant.FilterPruning(ratio=ratio), images[:1])
        small = pliant.reestimate_batchnorm(small, pliant.Loader(data, "train", batch_size=256))
        accuracy = (small.eval()(images).argmax(1) == labels).float().mean()
        accelerator.print(f"{sum(p.numel() for p in small.parameters()):>7,} parameters, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
