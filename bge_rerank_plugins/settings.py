"""Every user-facing option of a reranker, defined and documented once.

`Scorer` takes these as keyword arguments, both adapters inherit them as fields, and the command line makes its flags from them.
Knows nothing of torch, of frameworks or of model files: what can be checked without them is checked here, the rest at load.
"""

import os
import re
from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from .texts import check_text

Dtype: TypeAlias = Literal["auto", "fast", "float32", "bfloat16", "float16", "int8"]

EMBEDDED = ("embedded", "embedded-decoder", "embedded-layerwise")
"""Names of the demo models, also where directories are called so."""

DEVICE_KINDS = ("cpu", "cuda", "mps", "xpu", "npu", "hpu")


class _Hidden(str):
    """A text that nobody sees unless they ask for it."""

    def __repr__(self) -> str:
        return "'***'"


class Settings(BaseModel):
    """What all settings here have in common: True is no number, and a `token` is in no error."""

    @model_validator(mode="before")
    @classmethod
    def _token_is_hidden(cls, values: Any) -> Any:
        """Errors print all that was given, when it is another option that is missing."""
        token = values.get("token") if isinstance(values, dict) else None
        return values | {"token": _Hidden(token)} if isinstance(token, str) else values

    @field_validator("*", mode="before")
    @classmethod
    def _truth_value_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        name = str(info.field_name)
        annotation = cls.model_fields[name].annotation
        kinds = {*get_args(annotation)} or {annotation}
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:  # in Python it is an int
            raise ValueError(f"{name}={value}: expected a {'whole ' if int in kinds else ''}number")
        return value


class RerankSettings(Settings):
    """The options of a reranker.

    Raises:
        pydantic.ValidationError: A `ValueError` that names the option, the value and what is allowed.
    """

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    model: str = Field(
        description="Hub id, such as BAAI/bge-reranker-v2-m3, or local directory of the checkpoint; "
        "'embedded' is the small demo model of the extra 'demo', 'embedded-decoder' and 'embedded-layerwise' are tiny LLM "
        "rerankers.",
        min_length=1,
    )
    device: str | list[str] | None = Field(
        default=None,
        description="Where to run: 'cpu', 'cuda', 'cuda:1', 'mps', ..., or a list for one replica on each. "
        "By default the one best device of the machine.",
    )
    dtype: Dtype = Field(
        default="auto",
        description="Precision of the weights. 'auto': float32 on a CPU, bfloat16 on a GPU that has it. "
        "'fast': the fastest one that keeps the ranking. 'int8': rounded to 8 bits, on CPUs without bfloat16 faster than "
        "float32, at the cost of neighbours that change places.",
    )
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="Longest query-passage pair in tokens; passages are cut to fit. "
        "By default 1024, or what the checkpoint's positions allow if that is less.",
    )
    query_max_length: int | None = Field(
        default=None,
        ge=1,
        description="Longest query in tokens; longer ones are cut. By default 3/4 of max_length.",
    )
    prompt: str | None = Field(
        default=None,
        description="Question that the LLM rerankers answer with 'Yes'; by default the model card's. "
        "Cross-encoders have none.",
    )
    cutoff_layer: int | None = Field(
        default=None,
        ge=1,
        description="Layer whose score is returned, layerwise checkpoints only; by default the last.",
    )
    query_instruction: str | None = Field(
        default=None,
        description="Text put before every query. By default none, and 'A: ' for the LLM rerankers, as they were trained.",
    )
    passage_instruction: str | None = Field(
        default=None,
        description="Text put before every passage. By default none, and 'B: ' for the LLM rerankers, as they were trained.",
    )
    normalize: bool = Field(
        default=False, description="Map scores into 0..1 with the sigmoid function; by default they are raw logits."
    )
    long_passages: Literal["truncate", "split"] = Field(
        default="truncate",
        description="What becomes of passages longer than max_length. 'truncate': they are cut. 'split': they are scored in "
        "overlapping windows, and the best window's score is theirs (MaxP, Dai & Callan 2019).",
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens that are computed at once; less needs less memory. By default chosen for the device.",
    )
    max_queued_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens that wait to be scored, over all callers; by default no bound. Where nothing waits, a call "
        "of any size is let in.",
    )
    when_full: Literal["wait", "error"] = Field(
        default="wait", description="What a call does that meets max_queued_tokens: wait for room, or fail at once."
    )
    peft_path: str | None = Field(
        default=None, description="LoRA adapter (hub id or local directory), merged into the model when it is loaded."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of the model on the hub; looked up once at load."
    )
    cache_dir: str | None = Field(default=None, description="Directory of the hub's download cache.")
    local_files_only: bool = Field(default=False, description="Never download; use only files that are already here.")
    token: str | None = Field(
        default=None,
        repr=False,
        exclude=True,
        description="Access token for the hub; kept out of everything that is printed or dumped.",
    )
    show_progress: bool = Field(default=False, description="Show a progress bar on standard error while scoring.")

    @field_validator("*", mode="before")
    @classmethod
    def _text_is_unicode(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str):
            check_text(value, str(info.field_name))
        return value

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str | list[str] | None) -> str | list[str] | None:
        if isinstance(device, list) and not device:
            raise ValueError("device=[]: name at least one device, or None for the best one")
        for name in [device] if isinstance(device, str) else device or []:
            if not re.fullmatch(rf"({'|'.join(DEVICE_KINDS)})(:\d+)?", name):
                raise ValueError(
                    f"device={name!r}: not one of {', '.join(DEVICE_KINDS)}, with or without an index (cuda:1)"
                )
        return device

    @field_validator("model", "peft_path", "cache_dir", mode="before")
    @classmethod
    def _path_is_text_in_full(cls, value: object) -> object:
        path = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(path, str) or path in EMBEDDED:
            return path
        path = os.path.expanduser(path)
        # A relative one would be another one after a change of directory, and the model is loaded later.
        return os.path.abspath(path) if os.path.isdir(path) else path

    @field_validator("max_length", "query_max_length")
    @classmethod
    def _query_fits_in_pair(cls, value: int | None, info: ValidationInfo) -> int | None:
        # Per field, since a check of the whole model would let an assignment that fails stand.
        lengths = info.data | {info.field_name: value}
        query, pair = lengths.get("query_max_length"), lengths.get("max_length")
        if query is not None and pair is not None and query > pair:
            raise ValueError(f"query_max_length={query}: longer than the whole pair, max_length={pair}")
        return value
