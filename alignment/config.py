"""Typed, strict configuration: defaults < YAML file < `section.key=value` on the command line.

Unknown, duplicate, misspelt and wrongly typed keys are errors that name their place. Nothing here imports torch.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from alignment.errors import UserError, did_you_mean

C = TypeVar("C", bound="Config")
Place = tuple[str, ...]


class Config(BaseModel):
    """Base of every section: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    def as_yaml(self) -> str:
        """The text of a config file that gives this again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class JobConfig(Config):
    """What every job has: where its output goes, and the seed that its randomness derives from."""

    output_dir: Path
    seed: int = 0


def load_config(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read `path`, apply `overrides` (`section.key=value`, the value read as YAML) and validate.

    Raises:
        UserError: naming the file and line, or the override, and the nearest valid key.
    """
    values, lines = read_yaml(path)
    sources = {place: f"{path}:{line}" for place, line in lines.items()}
    for override in overrides:
        place, value = parse_override(override)
        _assign(values, place, value, override)
        sources[place] = f"override {override!r}"
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        # A misspelt key that is required is both unknown and missing: the first says more.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(_explain(cls, first, sources, path)) from None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping in a YAML file and the line of each of its keys. Duplicate keys are errors."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such config file{hint}") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({error})") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Place, int] = {}
        if node is not None:
            _collect_lines(node, (), lines, path)
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    return values, lines


def _collect_lines(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*place, str(index))] = item.start_mark.line + 1
            _collect_lines(item, (*place, str(index)), lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*place, str(key.value))
        line = key.start_mark.line + 1
        if here in lines:
            raise UserError(f"{path}:{line}: duplicate key {'.'.join(here)!r}, first given on line {lines[here]}")
        lines[here] = line
        _collect_lines(value, here, lines, path)


def parse_override(override: str) -> tuple[Place, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected section.key=value")
    try:
        return tuple(key.split(".")), yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None


def _assign(values: dict[str, Any], place: Place, value: Any, override: str) -> None:
    target: Any = values
    for depth, name in enumerate(place[:-1]):
        target = _descend(target, name, override, ".".join(place[: depth + 1]))
    last = place[-1]
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    else:
        target[last] = value


def _descend(target: Any, name: str, override: str, dotted: str) -> Any:
    child = target[_index(target, name, override)] if isinstance(target, list) else target.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise UserError(f"override {override!r}: {dotted!r} is a {type(child).__name__}, not a section")
    return child


def _index(target: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(target):
        raise UserError(f"override {override!r}: expected an index below {len(target)}, found {name!r}")
    return int(name)


def _explain(cls: type[BaseModel], error: ErrorDetails, sources: dict[Place, str], path: Path) -> str:
    place = tuple(str(part) for part in error["loc"])
    above = (sources[place[:n]] for n in range(len(place), 0, -1) if place[:n] in sources)
    below = (source for key, source in sources.items() if key[: len(place)] == place)
    where = next(chain(above, below), str(path))
    dotted = ".".join(place)
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key {dotted!r}{did_you_mean(place[-1], _fields_at(cls, place[:-1]))}"
        case "missing":
            return f"{where}: missing key {dotted!r}{_expected(cls, place)}"
        case _:
            message = error["msg"].removeprefix("Value error, ")
            value = f", found {error['input']!r}" if not isinstance(error["input"], dict | BaseModel) else ""
            return f"{where}: {dotted + ': ' if dotted else ''}{message[0].lower() + message[1:]}{value}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, list, tuple, dict):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []


def _models_at(cls: type[BaseModel], place: Place) -> list[type[BaseModel]]:
    models = [cls]
    for name in place:
        found = [
            m for model in models if name in model.model_fields for m in _models_in(model.model_fields[name].annotation)
        ]
        models = found or models
    return models


def _fields_at(cls: type[BaseModel], place: Place) -> set[str]:
    return {name for model in _models_at(cls, place) for name in model.model_fields}


def _expected(cls: type[BaseModel], place: Place) -> str:
    for model in _models_at(cls, place[:-1]):
        field = model.model_fields.get(place[-1])
        if field is not None:
            kind = getattr(field.annotation, "__name__", str(field.annotation))
            return f" (expected: {field.description or kind})"
    return ""


class ModelConfig(Config):
    """Where a model comes from: a folder or hub id (`path`), or fresh weights (`preset` and `tokenizer`)."""

    path: str | None = Field(None, description="a model folder or a hub id")
    preset: str | None = Field(None, description="a name in configs/models, for fresh random weights")
    tokenizer: str | None = Field(None, description="a tokenizer folder or hub id; default: the one of `path`")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="float32 or bfloat16: computed in and saved")
    kernels: Literal["auto", "torch"] = Field("auto", description="auto: fused where this machine can; torch: none")
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.preset is None):
            raise ValueError("give one of 'path' and 'preset'")
        if self.preset is not None and self.tokenizer is None:
            raise ValueError("a preset has no tokenizer of its own: give 'tokenizer'")
        return self


class RouterConfig(Config):
    """The losses that keep a mixture-of-experts router balanced; dense models have none."""

    balance: float = Field(0.01, ge=0, description="first coefficient of the load-balance loss; 0 turns it off")
    z: float = Field(0.001, ge=0, description="first coefficient of the z-loss; 0 turns it off")
    decay: Literal["constant", "linear", "cosine"] = "linear"
    final_share: float = Field(0.1, ge=0, le=1, description="share of the coefficients that is left at the last step")
    scope: Literal["micro", "global"] = Field(
        "micro", description="balance each rank's micro-batch, or the whole step over all ranks and micro-batches"
    )


class TrainingConfig(Config):
    """The optimizer's loop: AdamW with warm-up, the same for every trainer."""

    epochs: int = Field(1, ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup_share: float = Field(0.03, ge=0, lt=1, description="share of the steps over which the rate rises from 0")
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    accumulation: int = Field(1, ge=1, description="micro-batches a rank runs in one optimizer step")
    gradient_checkpointing: bool = False
    router: RouterConfig = RouterConfig()
    save_steps: int = Field(200, ge=1, description="steps between two checkpoints")
    log_steps: int = Field(10, ge=1)


class LoRAConfig(Config):
    """Low-rank adapters beside frozen weights (Hu et al. 2021, LoRA, arXiv 2106.09685)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="what an adapter adds is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | None = Field(
        None, min_length=1, description="ends of module names, as q_proj; default: attention, dense and shared experts"
    )
    dora: bool = Field(
        False, description="also train the lengths of the weights' columns (Liu et al. 2024, DoRA, arXiv 2402.09353)"
    )
    merge: bool = Field(True, description="also write the merged model, an ordinary folder")


class SamplingConfig(Config):
    """How answers are drawn from a model."""

    n: int = Field(32, ge=1, description="samples a prompt")
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(256, ge=1, description="tokens of an answer, at most")
    thinking_budget: int | None = Field(
        None, ge=1, description="tokens of an answer after which its thinking is closed by force; default: none"
    )

    @model_validator(mode="after")
    def _budget_leaves_room(self) -> Self:
        if self.thinking_budget is not None and self.thinking_budget >= self.max_tokens:
            raise ValueError(
                f"thinking_budget: {self.thinking_budget} leaves no room for an answer in max_tokens {self.max_tokens}"
            )
        return self


def server_addresses(given: Sequence[str], key: str) -> list[str]:
    """Addresses of servers without a closing `/v1`; `key` is what the config calls them.

    Raises:
        ValueError: one that is no address, or is given twice.
        UserError: one that holds a password.
    """
    addresses = [address.rstrip("/").removesuffix("/v1") for address in given]
    for address in addresses:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"{address!r} is not an address of a server, as http://host:8000")
        if parts.username or parts.password:  # a ValueError would be printed with the address
            raise UserError(f"{key}: an address may hold no password: keys come from the environment")
        if addresses.count(address) > 1:
            raise ValueError(f"{address!r} is given twice")
    return addresses


class RequestsConfig(Config):
    """How servers are asked, and how much of their trouble is borne."""

    concurrency: int = Field(256, ge=1, description="requests under way at once, for each of `endpoints`")
    timeout_seconds: float = Field(600, gt=0, description="of one request")
    tries: int = Field(6, ge=1, description="of one request, over all servers, before the job stops")
    backoff_seconds: float = Field(0.5, gt=0, description="wait before the second try; doubled before each further one")
    health_seconds: float = Field(10, gt=0, description="between two health checks of a server")
    patience_seconds: float = Field(60, ge=0, description="how long no server may answer before the job stops")
    key_variable: str = Field("OPENAI_API_KEY", min_length=1, description="environment variable with the servers' key")


class EngineConfig(Config):
    """The vLLM engine that samples: in this process, or `data_parallel_size`, `endpoints` or `ray_replicas` of them."""

    max_model_len: int = Field(1024, ge=16, description="tokens of prompt and answer, at most")
    max_num_seqs: int = Field(1024, ge=1, description="samples under way at once")
    kv_cache_gib: float = Field(1.0, gt=0, description="memory of the key-value cache on CPU")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory that vLLM takes")
    tensor_parallel_size: int = Field(1, ge=1, description="devices that share one copy of the model")
    data_parallel_size: int = Field(1, ge=1, description="copies of the model on this machine, on devices of their own")
    chunk_prompts: int = Field(128, ge=1, description="prompts that are sampled and stored together")
    endpoints: list[str] = Field([], description="addresses of `alignment.rollout.serve`, as http://host:8000")
    requests: RequestsConfig = RequestsConfig()
    ray_replicas: int = Field(0, ge=0, description="copies of the model over a Ray cluster; 0: no Ray")
    adapters: dict[str, Path] = Field(
        {}, description="language -> the folder of the adapter that answers prompts in it; others the model alone"
    )
    detect: list[str] = Field(
        ["en", "zh", "id", "ms", "th", "vi", "tl", "pt"],
        description="with adapters: what prompts without a `language` may be in besides theirs, ISO 639-1 codes",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if bool(self.endpoints) + bool(self.ray_replicas) + (self.data_parallel_size > 1) > 1:
            raise ValueError("data_parallel_size, endpoints and ray_replicas exclude each other")
        if self.adapters and (self.endpoints or self.ray_replicas or self.data_parallel_size > 1):
            raise ValueError(
                "adapters are served by the engine of this process, without data_parallel_size, endpoints "
                "and ray_replicas"
            )
        return self

    @field_validator("endpoints")
    @classmethod
    def _addresses(cls, given: list[str]) -> list[str]:
        return server_addresses(given, "engine.endpoints")


class TasksConfig(Config):
    """Tasks of lm-eval, which measure general ability. Those that come with it read the hub: they need the network."""

    names: list[str] = Field(min_length=1, description="tasks, groups or tags: those of lm-eval, or of `folder`")
    folder: Path | None = Field(None, description="a folder of task files (lm-eval's YAML), for rows of this machine")
    limit: int | None = Field(None, ge=1, description="documents of a task, at most its first; default: all")
    fewshot: int | None = Field(None, ge=0, description="worked examples before each question; default: the task's own")
    chat_template: bool = Field(True, description="ask as a user, thinking off; false: the bare text, for a base model")
    batch_size: int = Field(16, ge=1, description="requests of one forward pass")

    @field_validator("names")
    @classmethod
    def _named_once(cls, given: list[str]) -> list[str]:
        if len(set(given)) < len(given):
            raise ValueError("each task once")
        return given
