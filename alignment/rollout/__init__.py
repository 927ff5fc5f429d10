"""Sampling: a vLLM engine that lives through a job, and a store that survives a kill."""

import warnings

# vLLM 0.31 warns its users of torch functions that it calls itself.
warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
