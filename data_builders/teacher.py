"""What a teacher's answers are worth: whole, right, in the query's language; and which of them are trained on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from alignment.chat import THINK_END, THINK_START, render_prompt
from alignment.grading import options_of
from alignment.languages import Detector
from alignment.rollout.sampling import Chunk
from alignment.rollout.store import Completion
from alignment.rows import Row
from alignment.thinking import Fault, Thought
from alignment.verify import Claim, Verdict, Verifier
from data_builders.thinking import check

NOT_RIGHT = {Verdict.WRONG: "wrong answer", Verdict.NO_ANSWER: "no answer in the summary"}  # others by their own name


@dataclass(frozen=True)
class Judged:
    """A teacher's sample: `reason` says why it is not trained on, None where it could be.

    `text` is then what is trained, else what the teacher wrote. `tokens` are those of `text` and its stop token; the
    thinking's and the summary's are without the marks between them, 0 where there is a reason.
    """

    index: int
    text: str
    reason: str | None
    tokens: int
    thinking_tokens: int = 0
    summary_tokens: int = 0


@dataclass(frozen=True)
class Answers:
    """A query, its language (None: in doubt) and its samples; None where it is too long for the teacher."""

    query: Row
    language: str | None
    samples: list[Judged] | None


class Judge:
    """Judges chunks of samples. Each prompt of a chunk holds, as `query`, the row that it was made from."""

    def __init__(
        self,
        verifier: Verifier,
        detector: Detector,
        languages: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        opened: bool,
    ) -> None:
        """
        Args:
            languages: the detector's.
            tokenizer: of the model that is trained: lengths are in its tokens.
            opened: a prompt may end with the mark that opens the thinking, so that the answer has only the other.
        """
        self._verifier, self._detector, self._tokenizer = verifier, detector, tokenizer
        self._languages, self._opened = frozenset(languages), opened
        self.counts = Counter({"opened_by_the_prompt": 0, "language_undetermined": 0})

    def __call__(self, chunk: Chunk) -> list[Answers]:
        queries = [prompt["query"] for prompt in chunk.prompts]
        languages = [self._language(query) for query in queries]
        asked = [
            (query, language, sample)
            for query, language, samples in zip(queries, languages, chunk.samples, strict=True)
            for sample in samples or ()
        ]
        thoughts = [self._whole(sample) for _, _, sample in asked]
        thoughts = self._right([(query, language) for query, language, _ in asked], thoughts)
        thoughts = [self._in(language, thought) for (_, language, _), thought in zip(asked, thoughts, strict=True)]
        judged = iter(self._measured([sample for _, _, sample in asked], thoughts))
        return [
            Answers(query, language, None if samples is None else [next(judged) for _ in samples])
            for query, language, samples in zip(queries, languages, chunk.samples, strict=True)
        ]

    def _language(self, query: Row) -> str | None:
        if query.get("language") is not None:
            return str(query["language"])
        turns = [message["content"] for message in query["prompt"] if message["role"] == "user"]
        return self._detector.identify("\n".join(turns)).language

    def _whole(self, sample: Completion) -> Thought | Fault:
        if sample.finish_reason == "refused":
            return Fault("refused")
        text = sample.text
        if self._opened and THINK_END in text and THINK_START not in text:
            self.counts["opened_by_the_prompt"] += 1
            text = THINK_START + text
        return check(text, cut_off=sample.finish_reason == "length")

    def _right(
        self, asked: Sequence[tuple[Row, str | None]], thoughts: Sequence[Thought | Fault]
    ) -> list[Thought | Fault]:
        """Whether the summaries' answers are the gold ones; all are verified together."""
        claims = [
            Claim(thought.summary, str(query["answer"]), language or "en", options=options_of(query))
            for (query, language), thought in zip(asked, thoughts, strict=True)
            if isinstance(thought, Thought)
        ]
        verdicts = iter(self._verifier.verify_many(claims))
        return [_verified(t, next(verdicts)) if isinstance(t, Thought) else t for t in thoughts]

    def _in(self, language: str | None, thought: Thought | Fault) -> Thought | Fault:
        """Whether the summary is in `language`; where that or the summary's is in doubt, it is taken to be."""
        if isinstance(thought, Fault):
            return thought
        found = self._detector.identify(thought.summary).language if language in self._languages else None
        if found is None:
            self.counts["language_undetermined"] += 1
        return thought if found in (None, language) else Fault(f"summary in {found}")

    def _measured(self, samples: Sequence[Completion], thoughts: Sequence[Thought | Fault]) -> list[Judged]:
        texts = [s.text if isinstance(t, Fault) else written(t) for s, t in zip(samples, thoughts, strict=True)]
        parts = [("", "") if isinstance(t, Fault) else (t.thinking, t.summary) for t in thoughts]
        return [
            Judged(sample.index, text, thought.reason if isinstance(thought, Fault) else None, 1 + whole, *both)
            for sample, text, thought, whole, both in zip(
                samples,
                texts,
                thoughts,
                self._lengths(texts),
                zip(self._lengths([t for t, _ in parts]), self._lengths([s for _, s in parts]), strict=True),
                strict=True,
            )
        ]

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, tokenized together."""
        return (
            [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
        )


def opens(tokenizer: PreTrainedTokenizerBase, prompt: Row) -> bool:
    """Whether the chat template itself opens the thinking, at the end of the prompt."""
    ids = render_prompt(tokenizer, prompt["prompt"], **prompt["chat_template_kwargs"])
    return str(tokenizer.decode(ids)).rstrip().endswith(THINK_START)


def _verified(thought: Thought, verdict: Verdict) -> Thought | Fault:
    return thought if verdict == Verdict.CORRECT else Fault(NOT_RIGHT.get(verdict, verdict.replace("_", " ")))


def written(thought: Thought) -> str:
    """An answer in the form that all rows have."""
    return f"{THINK_START}\n{thought.thinking}\n{THINK_END}\n{thought.summary}"


def choose(samples: Sequence[Judged], keep: Literal["shortest", "first", "all"]) -> list[Judged]:
    """The samples that become rows: of the good ones the one of fewest tokens, the first, or all that differ."""
    good = [sample for sample in samples if sample.reason is None]
    match keep:
        case "shortest":
            return sorted(good, key=lambda sample: (sample.tokens, sample.index))[:1]
        case "first":
            return good[:1]
        case "all":
            different: dict[str, Judged] = {}
            for sample in good:
                different.setdefault(sample.text, sample)
            return list(different.values())
