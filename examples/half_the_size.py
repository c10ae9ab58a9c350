"""Half the size of a network that is trained already: calibration images in place of training.

python examples/half_the_size.py --epochs 15
"""

import argparse

import torch
from torch import nn

import pliant


def trained(data, epochs: int) -> nn.Module:
    """Stands for the network that you have: a plain convolutional one, trained by plain SGD."""
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for epoch in range(epochs):
        loader = pliant.Loader(data, "train", batch_size=64, shuffle=True, seed=epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # images of 8×8 are too small for several threads
    data = pliant.load_data("digits")
    model = trained(data, arguments.epochs)
    images, labels = next(iter(pliant.Loader(data, "test", batch_size=10_000)))

    @torch.no_grad()
    def accuracy(network: nn.Module) -> float:
        return (network(images).argmax(dim=1) == labels).float().mean().item()

    calibration = pliant.Loader(data, "train", batch_size=128, limit=1024)  # their labels are not used
    example = images[:2]
    print(f"dense: {sum(p.numel() for p in model.parameters()):,} parameters, {accuracy(model):.1%}")
    for keep in (0.5, 0.3, 0.1):
        plain = pliant.compress_to(model, pliant.FilterPruning(), example, keep_params=keep)
        small = pliant.compress_to(model, pliant.FilterPruning(), example, keep_params=keep, calibration=calibration)
        print(f"{keep:.0%} of the parameters: {accuracy(small):.1%}, by norms of filters {accuracy(plain):.1%}")


if __name__ == "__main__":
    main()
