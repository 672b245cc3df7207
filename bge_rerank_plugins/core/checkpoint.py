"""A checkpoint's files: where they are, its config, and those of its tokenizer and of its LoRA adapter.

Never any code from the checkpoint. Knows nothing of packs, prompts or scores.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from .hub import commit_of, model_file

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..settings import RerankSettings

UNFIT = (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, ArithmeticError, SafetensorError)
"""What transformers and peft raise of files that do not fit: more kinds than they write down."""

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

logger = logging.getLogger("bge_rerank_plugins")


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint's files are, and how to reach them.

    Attributes:
        model: Hub id or local directory.
        peft_path: Hub id or local directory of a LoRA adapter, or None.
        found_by: The file that the hub is asked for first.
        revision, cache_dir, local_files_only, token, show_progress: As in `RerankSettings`.
    """

    model: str
    peft_path: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    token: str | None = None
    show_progress: bool = False
    found_by: str = "config.json"

    @classmethod
    def from_settings(cls, settings: RerankSettings) -> Self:
        """The checkpoint that the settings name; "embedded" and its like are the demo models.

        Raises:
            ValueError: `peft_path` with "embedded", which is an adapter itself; a base model that is not the one it was made for.
            FileNotFoundError: The base model of "embedded" is not on this machine.
        """
        from ..models import EMBEDDED_LLMS, embedded_adapter, embedded_base, embedded_llm

        model, peft_path = settings.model, settings.peft_path
        if model in EMBEDDED_LLMS:
            model = str(embedded_llm(model))
        if model == "embedded":
            if peft_path is not None:
                raise ValueError(
                    f"peft_path={peft_path!r}: the model 'embedded' is itself an adapter on its base model"
                )
            model, peft_path = str(embedded_base(settings.cache_dir)), str(embedded_adapter())
        return cls(
            model=model,
            peft_path=peft_path,
            revision=settings.revision,
            cache_dir=settings.cache_dir,
            local_files_only=settings.local_files_only,
            token=settings.token,
            show_progress=settings.show_progress,
        )

    def hub_options(self) -> dict[str, Any]:
        """Options of transformers' looks at the hub."""
        options: dict[str, Any] = {
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "token": self.token,
        }
        revision = self.commit or self.revision
        return options | ({"revision": revision} if revision else {})

    @cached_property
    def first_file(self) -> Path | None:
        """The file that the hub is asked for first, or None of a directory, and where the hub and its cache have none.

        Raises:
            ValueError: There is no such model, or the hub fails.
        """
        return None if Path(self.model).is_dir() else model_file(self, self.found_by)

    @property
    def commit(self) -> str | None:
        """The commit that the revision stood for when the first file was looked up.

        So all files are of the same one also when the revision moves meanwhile, and those that are known are not asked for
        again: what is of a commit does not change. None where there is no first file.
        """
        return None if self.first_file is None else commit_of(self.first_file)

    def file(self, name: str) -> Path | None:
        """Local path of one file of the checkpoint, downloaded if need be; None if the checkpoint has no such file.

        Raises:
            ValueError: As `first_file`.
        """
        return model_file(replace(self, revision=self.commit or self.revision), name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands.

        Raises:
            ValueError: There is no such checkpoint, or its config.json cannot be read.
        """
        local = Path(self.model)
        if not local.exists() and (local.is_absolute() or self.model.startswith((".", "~"))):
            raise ValueError(f"model={self.model!r}: no such directory")
        if local.exists() and not (local / "config.json").is_file():
            if (local / "adapter_config.json").is_file():
                raise ValueError(
                    f"model={self.model!r}: a LoRA adapter, not a checkpoint; "
                    "give it as peft_path, and the model that it was trained on as model"
                )
            raise ValueError(f"model={self.model!r}: not a checkpoint directory, it has no config.json")
        if local.exists() and self.revision is not None:
            logger.warning("revision=%r is not looked at: model=%r is a local directory", self.revision, self.model)
        if not local.exists() and self.first_file is None:
            raise ValueError(
                f"model={self.model!r}: its config.json cannot be read: the hub has none, "
                "or cannot be asked and its cache has none"
            )
        try:
            config: dict[str, Any]
            config, _ = PreTrainedConfig.get_config_dict(self.model, **self.hub_options())
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"model={self.model!r}: its config.json cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"model={self.model!r}: its config.json is no object")
        return config

    def transformers_config(self) -> PreTrainedConfig:
        """The config as the class of transformers that it is for.

        Raises:
            ValueError: It does not say for which, or not what that needs.
        """
        if "model_type" not in self.config:
            raise ValueError(f"model={self.model!r}: its config.json names no model_type")
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.model, trust_remote_code=False, **self.hub_options()
            )
        except Exception as error:  # what the hub's checked dataclasses raise has no common type
            raise ValueError(f"model={self.model!r}: its config.json cannot be used: {error}") from error
        if (layers := getattr(config, "num_hidden_layers", 1)) < 1:
            raise ValueError(f"model={self.model!r}: num_hidden_layers={layers} in its config.json, not 1 or more")
        config.return_dict = True  # what comes back is looked at by name
        return config

    def check_causal(self) -> None:
        """Raises ValueError for a language model whose states would depend on what follows, or on the texts beside them."""
        if self.config.get("is_causal") is False or self.config.get("use_bidirectional_attention"):
            raise ValueError(
                f"model={self.model!r}: a language model that looks at what follows is not supported "
                "(is_causal, use_bidirectional_attention): its score is read at the end"
            )
        for name in ("rope_parameters", "rope_scaling"):
            rope = self.config.get(name) or {}
            if not isinstance(rope, dict):
                raise ValueError(f"model={self.model!r}: {name}={rope!r} in its config.json: expected an object")
            if "longrope" in (rope.get("rope_type"), rope.get("type")):
                raise ValueError(
                    f"model={self.model!r}: rope_type='longrope' is not supported: scores would not stand alone"
                )

    @cached_property
    def adapter_config(self) -> dict[str, Any] | None:
        """adapter_config.json of the LoRA adapter, or None without one.

        Raises:
            ValueError: There is no such adapter, or it is none that can be merged.
            ImportError: peft is not installed.
        """
        if self.peft_path is None:
            return None
        try:
            from peft import PeftConfig
        except ImportError as error:
            raise ImportError('peft_path needs peft: pip install "bge-rerank-plugins[peft]"') from error
        try:
            config = PeftConfig.from_pretrained(self.adapter_folder)
        except UNFIT as error:
            raise ValueError(f"peft_path={self.peft_path!r}: no LoRA adapter can be read there: {error}") from error
        if config.is_prompt_learning:
            raise ValueError(
                f"peft_path={self.peft_path!r}: peft_type={config.peft_type.value!r} cannot be merged, as LoRA can"
            )
        if getattr(config, "layer_replication", None):
            raise ValueError(
                f"peft_path={self.peft_path!r}: layer_replication={config.layer_replication} cannot be merged: "
                "layers would share their weights and not what is added to them"
            )
        return dict(config.to_dict())

    @cached_property
    def adapter_folder(self) -> str:
        """Where the LoRA adapter's files are on this machine: peft would ask the hub for them also where it may not.

        Raises:
            OSError: There is no such adapter.
        """
        # The revision of the settings is the model's.
        adapter = replace(self, model=str(self.peft_path), revision=None, found_by="adapter_config.json")
        if Path(adapter.model).is_dir():
            return adapter.model
        config = adapter.first_file
        if config is None or not any(map(adapter.file, ADAPTER_WEIGHTS)):
            raise FileNotFoundError(f"the hub and its cache have no adapter_config.json, or no {ADAPTER_WEIGHTS[0]}")
        return str(config.parent)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json as it stands; empty without one."""
        file = self.file("tokenizer_config.json")
        return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))


class SharedCheckpoint:
    """The checkpoint of an engine's workers: the first one looks up which commit is meant, for all of them.

    Args:
        settings: What names it.
    """

    def __init__(self, settings: RerankSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._found: Checkpoint | None = None

    def found(self) -> Checkpoint:
        """The checkpoint, of a commit that does not change any more, and its adapter.

        Raises:
            ValueError: As `Checkpoint.config` and `Checkpoint.adapter_config`.
        """
        with self._lock:
            if self._found is None:
                checkpoint = Checkpoint.from_settings(self._settings)
                _ = checkpoint.config, checkpoint.adapter_config
                self._found = checkpoint
            return self._found
