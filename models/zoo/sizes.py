"""Sizes of the transformer encoder, for those who send it rows and need not import torch."""

from __future__ import annotations

from typing import Final

VOCABULARY: Final = 8192
MAX_TOKENS: Final = 512
WIDTH: Final = 256
