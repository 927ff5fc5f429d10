"""Sampling: a vLLM engine that lives through a job, and a store that survives a kill."""
