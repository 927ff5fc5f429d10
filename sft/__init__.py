"""Supervised fine-tuning: mixture of datasets, packed training."""
