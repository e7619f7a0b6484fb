"""Simulated rollouts: how often a healthy canary is taken back, and how soon a bad one is."""
