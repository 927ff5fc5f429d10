"""What a sampling run has done so far: counts for the metrics, and the line of its progress."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from alignment.grading import GradedChunk
from alignment.progress import track
from alignment.verify import Verdict


@dataclass
class Tally:
    """Counts of the chunks that passed by."""

    prompts: int = 0
    too_long: int = 0
    samples: int = 0
    tokens: int = 0
    cut_off: int = 0
    resampled: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)

    def watch(self, chunks: Iterable[GradedChunk], total: int | None, label: str) -> Iterator[GradedChunk]:
        """The chunks, counted, with their progress shown: `total` prompts are expected (None: unknown)."""
        counted = (self._add(chunk) for chunk in chunks)
        yield from track(counted, total, label, lambda chunk: len(chunk.prompts), self.line)

    def line(self) -> str:
        """Samples, speed and pass rate so far."""
        speed = self.tokens / max(time.monotonic() - self.began, 1e-9)
        parts = [f"{self.samples:,} samples", f"{speed:,.0f} tokens/s"]
        judged = self.verdicts.total()
        parts += [f"pass rate {self.verdicts[Verdict.CORRECT] / judged:.1%}"] if judged else []
        return "  ".join(parts)

    def _add(self, chunk: GradedChunk) -> GradedChunk:
        flat = chunk.flat
        self.prompts += len(chunk.prompts)
        self.too_long += sum(samples is None for samples in chunk.samples)
        self.samples += len(flat)
        self.tokens += sum(len(s.token_ids) for s in flat)
        self.resampled += len(flat) if chunk.resampled else 0
        self.cut_off += sum(s.finish_reason == "length" for s in flat)
        self.verdicts.update(s.verdict for s in flat if s.verdict is not None)
        return chunk
