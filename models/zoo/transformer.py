"""A transformer encoder with random weights, exported by `torch.export`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Final

import torch
from torch import nn

from models.zoo.sizes import MAX_TOKENS, VOCABULARY, WIDTH

_LAYERS: Final = 6
_HEADS: Final = 8
_SEED: Final = 13


class Encoder(nn.Module):  # type: ignore[misc]
    """Token ids to one embedding a sequence: embeddings, six pre-norm layers, mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(MAX_TOKENS, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, _HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ids int64 [n, t], 0 ≤ id < 8192, t ≤ 512, to embeddings float32 [n, 256]."""
        hidden = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return {"embedding": self.layers(hidden).mean(dim=1)}


def write(directory: Path) -> Path:
    """Export the encoder with variable batch and length; put a sample beside it."""
    import numpy as np

    torch.manual_seed(_SEED)
    model = Encoder().eval()
    sample = torch.randint(0, VOCABULARY, (2, 16))
    shapes = (
        {0: torch.export.Dim("rows", max=4096), 1: torch.export.Dim("length", max=MAX_TOKENS)},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (sample,), dynamic_shapes=shapes)
    path = directory / "model.pt2"
    torch.export.save(program, path)
    np.savez(directory / "sample.npz", tokens=sample.numpy())
    return path
