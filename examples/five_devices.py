"""One training, five devices: train once on digits, cut to five budgets, export each for ONNX Runtime.

python examples/five_devices.py --epochs 40 --out devices
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import pliant
from pliant.experiments.data import ImageData

BUDGETS = {"server": 0.8, "laptop": 0.6, "tablet": 0.4, "phone": 0.3, "watch": 0.2}  # share of the MACs


def train(data: ImageData, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = pliant.build_model("resnet8", num_classes=data.num_classes, image_shape=data.image_shape)
    loader = pliant.Loader(data, "train", batch_size=128, shuffle=True)
    rules = [("fc.*", None), ("*.weight", pliant.rank(k=0.05, radius=3))]
    optimizer = pliant.SFW(pliant.constrain(model, rules, default=None), lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    images, labels = next(iter(pliant.Loader(data, "test", len(data.test))))
    return (model.eval()(images).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("devices"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # images of 8×8 are too small for several threads
    data = pliant.load_data("digits")
    model = train(data, arguments.epochs)
    calibration = pliant.Loader(data, "train", batch_size=256)
    example = next(iter(calibration))[0][:1]
    print(f"dense   {sum(p.numel() for p in model.parameters()):>7,} parameters, accuracy {accuracy(model, data):.1%}")
    for device, share in BUDGETS.items():
        small = pliant.compress_to(model, pliant.LowRank(), example, keep_macs=share, calibration=calibration)
        pliant.export(small, arguments.out / device, example, formats=("safetensors", "onnx"))
        parameters = sum(p.numel() for p in small.parameters())
        print(f"{device:<8}{parameters:>7,} parameters, accuracy {accuracy(small, data):.1%}")


if __name__ == "__main__":
    main()
