"""Reward models: train, average, score, best-of-n; the rule-based math reward."""
