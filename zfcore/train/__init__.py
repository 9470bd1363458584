"""A thin trainer: SGD as in the paper, exact resuming; ``python -m zfcore.train`` trains ``zfnet_small``."""

from zfcore.train.command import main
from zfcore.train.trainer import (
    Epoch,
    Settings,
    augment,
    evaluate,
    learning_rate,
    normalise,
    pixel_statistics,
    renormalise_filters,
    train,
)

__all__ = [
    "Epoch",
    "Settings",
    "augment",
    "evaluate",
    "learning_rate",
    "main",
    "normalise",
    "pixel_statistics",
    "renormalise_filters",
    "train",
]
