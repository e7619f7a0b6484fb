"""Model versions, pins and the artifact cache."""
