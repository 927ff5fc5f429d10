"""Serve a model folder to other machines' jobs, with what they ask of a server.

    python -m alignment.rollout.serve MODEL [--reloadable] [--host 0.0.0.0 --port 8000 and vLLM's other options]

It is `vllm serve` with SeededDraw, which draws each sample from its seed, with the model's own log-probabilities and
without the model folder's own sampling defaults. `--reloadable` lets jobs replace the weights: whoever reaches the port
can, so keep it inside the cluster. A key in VLLM_API_KEY is asked of every request but /health.
"""

import os
import sys
from collections.abc import Sequence

from alignment.config import EngineConfig
from alignment.rollout.seeds import PROCESSOR

USAGE = "usage: python -m alignment.rollout.serve MODEL [--reloadable] [options of vllm serve]"
RELOADABLE = "--reloadable"
OPTIONS = (
    f"--logits-processors={PROCESSOR}",
    "--logprobs-mode=raw_logprobs",
    "--generation-config=vllm",
    f"--max-num-seqs={EngineConfig().max_num_seqs}",
    "--disable-uvicorn-access-log",
)
# As the engine has it on a CPU: prompts in small blocks, nothing compiled.
CPU_OPTIONS = ("--enforce-eager", "--block-size=32")
RELOADING = "--worker-extension-cls=alignment.rollout.reload.FolderWeights"
GUARDED = "--middleware=alignment.rollout.guard.KeyEverywhere"


def arguments(model: str, given: Sequence[str], on_cpu: bool) -> list[str]:
    """vLLM's options; of those named twice the last one counts, so `given` wins."""
    reloading = [RELOADING] if RELOADABLE in given else []
    guarded = [GUARDED] if os.environ.get("VLLM_API_KEY") else []
    rest = [option for option in given if option != RELOADABLE]
    return ["--model", model, *OPTIONS, *(CPU_OPTIONS if on_cpu else ()), *reloading, *guarded, *rest]


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Off in what a process starts that has sampled itself: on a CPU vLLM would then bind no cores.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if RELOADABLE in given:
        os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # /collective_rpc and /reset_prefix_cache
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else vLLM compiles its sampler: 15 s, to no gain
    # vLLM's own command: the package for CPUs installs a `vllm` script that does not start.
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    sys.argv = ["vllm serve", *arguments(given[0], given[1:], on_cpu)]
    serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
