"""Look at preference pairs with the weights that OT-DPO gives their tokens under a model.

    alignment inspect pairs pairs.jsonl --model runs/sft/model --count 3 --reg 0.1

The weights depend on the model, so those of a training run move; `dpo.train` writes a few pairs as it leaves them into
`token_weights.jsonl`, which the report shows.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment import heat, job, models
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.heat import Side, WeighedPair
from alignment.inspect_rows import text_pieces
from alignment.rows import read_rows, write_rows
from dpo.config import TransportConfig
from dpo.data import tokenize_pairs
from dpo.ot import PairError
from dpo.weights import TokenWeights, token_weights

Weigh = Callable[[Sequence[dict[str, Any]]], tuple[Tensor, TokenWeights]]

FILE = "token_weights.jsonl"
EXAMPLES = 6
DIGITS = 4


def inspect_pairs(
    rows: str, source: ModelConfig, transport: TransportConfig, count: int, max_length: int
) -> list[WeighedPair]:
    """The first `count` pairs of `rows` with their weights under the model.

    Raises:
        UserError: rows or a model that cannot be read, or a pair that has no weights, by its id.
    """
    tokenizer = models.load_tokenizer(source)
    pairs, _ = tokenize_pairs(islice(read_rows(rows, "preference"), count), tokenizer, max_length)
    model = models.load_model(source, tokenizer, seed=0).eval()
    return [_weigh(pair, model, tokenizer, transport) for pair in pairs]


def _weigh(
    pair: Mapping[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, transport: TransportConfig
) -> WeighedPair:
    sides = [pair["chosen_ids"], pair["rejected_ids"]]
    width = max(map(len, sides))
    mask_2S = torch.arange(width) < torch.tensor([[len(ids)] for ids in sides])
    hidden_2SD = torch.zeros(2, width, model.config.get_text_config().hidden_size)
    for side, ids in enumerate(sides):
        hidden_2SD[side, : len(ids)] = _states(model, pair["prompt_ids"], ids)
    try:
        weights = token_weights("ot_dpo", mask_2S, hidden_2SD, transport)
    except PairError as error:
        raise UserError(f"row {pair['id']}: {error.reason}") from None
    return next(weighed([pair], mask_2S, weights, tokenizer))


@torch.no_grad()
def _states(model: PreTrainedModel, prompt_ids: list[int], ids: list[int]) -> Tensor:
    """[len(ids), D] last-layer states that predict these tokens."""
    decoder: Any = model.base_model
    states = decoder(input_ids=torch.tensor([[*prompt_ids, *ids]]), use_cache=False).last_hidden_state
    return states[0, len(prompt_ids) - 1 : -1].float()


def weighed(
    pairs: Iterable[Mapping[str, Any]], mask_NS: Tensor, weights: TokenWeights, tokenizer: PreTrainedTokenizerBase
) -> Iterator[WeighedPair]:
    """Tokenized pairs beside their weights, as one batch has them."""
    mask_c, mask_r = mask_NS.chunk(2)
    for place, pair in enumerate(pairs):
        chosen = _side(tokenizer, pair["chosen_ids"], weights.chosen[place][mask_c[place]].tolist())
        rejected = _side(tokenizer, pair["rejected_ids"], weights.rejected[place][mask_r[place]].tolist())
        stats = {"tau": float(min(len(pair["chosen_ids"]), len(pair["rejected_ids"])))}
        of_pairs = {name: value for name, value in weights.stats.items() if isinstance(value, Tensor)}
        stats |= {name: round(float(of_pairs[name][place]), DIGITS) for name in ("mass", "spread") if name in of_pairs}
        prompt = str(tokenizer.decode(pair["prompt_ids"], skip_special_tokens=True)).strip()
        yield WeighedPair(str(pair.get("id", place)), prompt, chosen, rejected, stats)


def _side(tokenizer: PreTrainedTokenizerBase, ids: list[int], weights: list[float]) -> Side:
    side = Side([], [], [])
    start = 0
    for text, size in text_pieces(tokenizer, ids):
        side.texts.append(text)
        side.sizes.append(size)
        side.weights.append(round(sum(weights[start : start + size]) / size, DIGITS))
        start += size
    return side


def examples(weigh: Weigh, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> list[WeighedPair]:
    """A few of the tokenized pairs, from all of the set; `weigh` gives the mask and the weights of a batch of them."""
    some = [pairs[row] for row in range(0, len(pairs), max(1, len(pairs) // EXAMPLES))][:EXAMPLES]
    batches = [some[start : start + batch_size] for start in range(0, len(some), batch_size)]
    return [pair for batch in batches for pair in weighed(batch, *weigh(batch), tokenizer)]


def write(folder: Path, pairs: Iterable[WeighedPair]) -> None:
    write_rows(folder / FILE, map(asdict, pairs))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="alignment inspect pairs", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("rows", help="a file, a folder or a hub id of rows with `prompt`, `chosen` and `rejected`")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the policy: a model folder or a hub id")
    parser.add_argument("--count", type=int, default=3, help="pairs to show, 3 by default")
    parser.add_argument("--max-length", type=int, default=4096, help="longer pairs are left out")
    for name, field in TransportConfig.model_fields.items():
        options: dict[str, Any] = {"default": field.default, "help": f"{field.description} (default: {field.default})"}
        choices = get_args(field.annotation)
        options |= {"choices": choices} if choices else {"type": float}
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    given = vars(parser.parse_args(argv))

    def command() -> None:
        transport = _transport({name: given[name] for name in TransportConfig.model_fields})
        source = ModelConfig(path=given["model"])
        pairs = inspect_pairs(given["rows"], source, transport, given["count"], given["max_length"])
        heat.show(pairs, Console())

    return job.guarded(command)


def _transport(values: Mapping[str, Any]) -> TransportConfig:
    try:
        return TransportConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = "".join(f"--{str(part).replace('_', '-')}: " for part in first["loc"])
        raise UserError(f"{name}{first['msg'].removeprefix('Value error, ')}") from None


if __name__ == "__main__":
    raise SystemExit(main())
