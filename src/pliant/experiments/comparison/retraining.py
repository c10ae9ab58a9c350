"""The reference that may train again: compressed networks, trained for some more epochs under a schedule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pliant.experiments.baselines.retraining import rates, retrain
from pliant.experiments.comparison.job import Job
from pliant.experiments.data.images import ImageData
from pliant.experiments.data.loader import Loader
from pliant.experiments.training.onednn import sound_convolutions
from pliant.experiments.training.schedules import learning_rate
from pliant.experiments.training.settings import Settings
from pliant.experiments.workbench import Refine


def retraining(job: Job, data: ImageData, settings: Settings) -> Refine:
    """Return a function that trains a compressed network again, with the batches and the settings of its training."""
    lr = settings.lr
    assert lr is not None, "a training that has ended has a learning rate"

    def retrain_network(model: nn.Module, rounds_before: int) -> nn.Module:
        loader = Loader(data, "train", settings.batch_size, shuffle=True, augment=settings.augment, seed=settings.seed)
        steps = len(loader) * settings.epochs
        factor = learning_rate(settings.schedule, settings.warmup, steps)
        original = [lr * factor(step) for step in range(steps)]
        lrs = rates(job.retraining, original, len(loader) * job.retraining_epochs)

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            first = settings.epochs + rounds_before * job.retraining_epochs
            for epoch in range(first, first + job.retraining_epochs):
                loader.set_epoch(epoch)  # an order that the training did not use
                for images, labels in loader:
                    yield images.to(device), labels.to(device)

        device = next(model.parameters()).device
        # Autocast would keep the weights that it cast in the first step until the end, and all steps would use these.
        half = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16", cache_enabled=False)
        with half, sound_convolutions(model):
            retrain(model, batches(), lrs, momentum=settings.momentum, weight_decay=settings.weight_decay)
        return model

    return retrain_network
