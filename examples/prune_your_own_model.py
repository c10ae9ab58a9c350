"""Prune your own network, any module: pliant finds channels that leave together, verifies them and shows its plan.

python examples/prune_your_own_model.py --steps 300
"""

import argparse

import torch
from torch import Tensor, nn

import pliant


class Denoiser(nn.Module):
    """Two concatenated branches, a depthwise layer, a skip connection, and a kernel that is a free tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.wide = nn.Sequential(nn.Conv2d(24, 16, 1), nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.ReLU())
        self.narrow = nn.Sequential(nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.back = nn.Conv2d(32, 24, 1)
        self.kernel = nn.Parameter(torch.randn(1, 24, 3, 3) / 15)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = y + self.back(torch.cat([self.wide(y), self.narrow(y)], dim=1))
        return x - nn.functional.conv2d(y, self.kernel, padding=1)


def noisy_images(generator: torch.Generator, count: int = 32) -> tuple[Tensor, Tensor]:
    """Return images of one bright rectangle each, with noise and without."""
    clean = torch.zeros(count, 1, 16, 16)
    for image, (x, y, width, height) in zip(clean, torch.randint(1, 9, (count, 4), generator=generator), strict=True):
        image[:, y : y + height, x : x + width] = 1.0
    return clean + 0.5 * torch.randn(clean.shape, generator=generator), clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model, example = Denoiser(), torch.zeros(1, 1, 16, 16)

    # One ball for each set of channels that can only leave together: training makes zero exactly what can be removed.
    structure = pliant.coupled_channels(model, example)
    rules = [("kernel", None), ("*.weight", pliant.filters(k=0.25, radius=5))]
    groups = pliant.constrain(model, rules, default=None, coupled=structure.groups)
    optimizer = pliant.SFW(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.steps)
    for _ in range(arguments.steps):
        noisy, clean = noisy_images(generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(noisy), clean).backward()
        optimizer.step()
        schedule.step()

    model.eval()
    noisy, clean = noisy_images(torch.Generator().manual_seed(1), count=256)
    print(pliant.FilterPruning(ratio=0.5).plan(model, example))
    print(f"\nerror of the noisy images: {nn.functional.mse_loss(noisy, clean):.4f}")
    for ratio in (0.0, 0.3, 0.5):
        small = pliant.compress(model, pliant.FilterPruning(ratio=ratio), example)
        error = nn.functional.mse_loss(small(noisy), clean)
        print(f"{sum(p.numel() for p in small.parameters()):>6,} parameters: {error:.4f}")


if __name__ == "__main__":
    main()
