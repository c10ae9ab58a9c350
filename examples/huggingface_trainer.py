"""Transformers' Trainer with SFW: a small ViT on digits, factorised after training.

python examples/huggingface_trainer.py --epochs 30 --out runs/trainer
"""

import argparse
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

import pliant


class LogBalls(TrainerCallback):
    """Logs the Frank-Wolfe gap, and the largest norm of a weight in units of its ball's radius."""

    def __init__(self, trainer: Trainer, optimizer: pliant.SFW) -> None:
        self.trainer, self.optimizer = trainer, optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.logging_steps == 0:
            balls = [(pliant.NormBall.from_spec(g["ball"]), g) for g in self.optimizer.param_groups if g["ball"]]
            norms = [ball.norm(p).item() / ball.radius for ball, group in balls for p in group["params"]]
            self.trainer.log({"gap": self.optimizer.gap().item(), "largest_norm": max(norms)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", default="runs/trainer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # images of 8×8 are too small for several threads
    torch.manual_seed(0)
    data = pliant.load_data("digits")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))

    rules = pliant.transformer_rules(model, linear=pliant.rank(k=0.25, radius=10, vertices="sparse"))
    groups = pliant.constrain(model, rules, default=None, pretrained=True)
    groups = [group if group["ball"] else group | {"lr": 0.1} for group in groups]
    optimizer = pliant.SFW(groups, lr=0.02, rescale=None)
    (images, labels), (test_images, test_labels) = (next(iter(pliant.Loader(data, s, 2000))) for s in ("train", "test"))
    train = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    settings = TrainingArguments(
        output_dir=arguments.out,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=64,
        logging_steps=50,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    schedule = CosineAnnealingLR(optimizer, T_max=arguments.epochs * (len(train) // 64 + 1))
    trainer = Trainer(model, settings, train_dataset=train, optimizers=(optimizer, schedule))
    trainer.add_callback(LogBalls(trainer, optimizer))
    trainer.train()

    model.eval()
    for ratio in (0.0, 0.5, 0.7, 0.9):
        small = pliant.compress(model, pliant.LowRank(ratio=ratio), {"pixel_values": test_images[:1]})
        accuracy = (small(pixel_values=test_images).logits.argmax(1) == test_labels).float().mean()
        print(f"{sum(p.numel() for p in small.parameters()):>7,} parameters, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
