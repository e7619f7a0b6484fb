"""Version 2's network. The only module here that imports torch."""

from __future__ import annotations

import torch
from torch import nn

from models.digits.data import CLASSES


class Classifier(nn.Module):  # type: ignore[misc]
    """Two 3×3 convolutions, a hidden layer, ten classes: about 69,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(64 * 16, 48),
            nn.ReLU(),
            nn.Linear(48, CLASSES),
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Scores [n, 10] of images [n, 64]."""
        scores: torch.Tensor = self.layers(x)
        return scores

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images float32 [n, 64] in [0, 1] to probabilities [n, 10], under the contract's name."""
        return {"probabilities": torch.softmax(self.logits(x), dim=1)}
