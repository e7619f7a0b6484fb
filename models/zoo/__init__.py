"""Real architectures and small protocol models: `python -m models.zoo NAME --out DIR`."""
