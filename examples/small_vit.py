"""A small ViT: trained towards few heads and neurons or low rank, cut to any size, next to AdamW and Muon.

python examples/small_vit.py --data_dir FOLDER --epochs 3  # folder of CIFAR-10's parquet files; without it, digits
"""

import argparse

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import ViTConfig, ViTForImageClassification

import pliant


def make_optimizers(model: nn.Module, method: str, example: Tensor, steps: int) -> list[torch.optim.Optimizer]:
    if method == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)]
    if method == "muon":
        matrices = [p for name, p in model.named_parameters() if ".layer" in name and p.ndim == 2]
        rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        muon = torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, lr=2e-3)]
    coupled = pliant.coupled_channels(model, example).groups if method == "sfw-parts" else ()
    if method == "sfw-parts":
        few = pliant.filters(k=0.5, radius=5, vertices="sparse")  # heads and neurons, each with all that leaves with it
        rules = pliant.transformer_rules(model, heads=few, neurons=few, coupled=coupled)
    else:
        rules = pliant.transformer_rules(model, linear=pliant.rank(k=0.25, radius=10, vertices="sparse"))
    groups = pliant.constrain(model, rules, default=None, pretrained=True, coupled=coupled)
    lr, other = (0.01, 0.03) if coupled else (0.02, 0.1)  # without a ball: steps of SGD
    lr *= min(1.0, 421 / steps)  # a longer training replaces the weights as often, not more often
    return [pliant.SFW([g if g["ball"] else g | {"lr": other} for g in groups], lr=lr, rescale=None)]


@torch.no_grad()
def accuracy(model: nn.Module, loader: pliant.Loader) -> float:
    right = sum(int((model(images).logits.argmax(1) == labels).sum()) for images, labels in loader)
    return right / sum(len(labels) for _, labels in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="folder of CIFAR-10's parquet files; without it, digits")
    parser.add_argument("--method", choices=["sfw-parts", "sfw-rank", "adamw", "muon"], default="sfw-parts")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = pliant.load_data("cifar10" if arguments.data_dir else "digits", arguments.data_dir)
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 384}
    channels, side, _ = data.image_shape
    sizes |= {"image_size": side, "patch_size": side // 4, "num_channels": channels}
    model = ViTForImageClassification(ViTConfig(num_labels=10, **sizes))
    loader = pliant.Loader(data, "train", batch_size=64, shuffle=True, augment=bool(arguments.data_dir))
    example = next(iter(loader))[0][:2]
    optimizers = make_optimizers(model, arguments.method, example, steps := arguments.epochs * len(loader) + 1)
    schedules = [OneCycleLR(o, [g["lr"] for g in o.param_groups], steps, cycle_momentum=False) for o in optimizers]
    for epoch in range(arguments.epochs):
        loader.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            model.zero_grad()
            nn.functional.cross_entropy(model(images).logits, labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
        print(f"epoch {epoch + 1}: validation {accuracy(model.eval(), pliant.Loader(data, 'val', 512)):.1%}")

    test, calibration = pliant.Loader(data, "test", 512), pliant.Loader(data, "train", 256, limit=2048)
    for compressor in (pliant.LowRank(), pliant.HeadPruning(), pliant.FilterPruning()):
        analysis = compressor.analyse(model, example, calibration)
        for ratio in (0.0, 0.3, 0.5, 0.7, 0.8):
            plan = compressor.at(ratio).plan(model, example, analysis=analysis)
            small = compressor.apply(model, plan, analysis=analysis)
            print(f"{plan.compressor:<13}{plan.params_after:>9,} parameters, accuracy {accuracy(small, test):.1%}")


if __name__ == "__main__":
    main()
