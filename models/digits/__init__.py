"""Handwritten digits: two versions of one contract, trained in seconds."""
