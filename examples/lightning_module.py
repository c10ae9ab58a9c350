"""Lightning with SFW: configure_optimizers, a callback that logs, and a training that stops and continues.

python examples/lightning_module.py --epochs 30 --out runs/lightning
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

import pliant


class Digits(lightning.LightningModule):
    """A small ResNet whose weights become low-rank while it learns."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.network = pliant.build_model("resnet8", num_classes=10, image_shape=(1, 8, 8))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        rules = [("*.fc.*", None), ("*.weight", pliant.rank(k=0.05, radius=3))]
        optimizer = pliant.SFW(pliant.constrain(self, rules, default=None), lr=0.3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class LogGap(lightning.Callback):
    """Logs the Frank-Wolfe gap, and makes the loader shuffle anew in each epoch."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        trainer.train_dataloader.set_epoch(trainer.current_epoch)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any) -> None:
        if trainer.is_last_batch:
            module.log("gap", trainer.optimizers[0].gap(), prog_bar=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    arguments = parser.parse_args()
    lightning.seed_everything(0)
    torch.set_num_threads(1)  # images of 8×8 are too small for several threads
    data = pliant.load_data("digits")
    batches = pliant.Loader(data, "train", batch_size=128, shuffle=True)

    def trainer(epochs: int) -> lightning.Trainer:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return lightning.Trainer(max_epochs=epochs, gradient_clip_val=5.0, callbacks=[LogGap()], **quiet)

    half = arguments.out / "half.ckpt"
    first = trainer(arguments.epochs // 2)
    first.fit(Digits(arguments.epochs), batches)
    first.save_checkpoint(half)
    module, second = Digits(arguments.epochs), trainer(arguments.epochs)
    second.fit(module, batches, ckpt_path=half)  # continues weights, momentum, singular directions, schedule
    print(f"gap {first.callback_metrics['gap']:.2f} half-way, {second.callback_metrics['gap']:.2f} at the end")
    for ratio in (0.0, 0.5, 0.8):
        module.network = pliant.compress(module.network, pliant.LowRank(ratio=ratio), torch.zeros(1, 1, 8, 8))
        second.test(module, pliant.Loader(data, "test", batch_size=512))


if __name__ == "__main__":
    main()
