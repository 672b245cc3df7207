"""A checkpoint's files: its config, its tokenizer exactly as published, its weights with none missing, its LoRA adapter.

Safetensors only, and never any code from the checkpoint. Knows nothing of packs, prompts or scores.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from .attention import ATTENTION

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..settings import RerankSettings

# Without one of these, transformers makes up an empty tokenizer in silence.
_VOCABULARIES = ("sentencepiece.bpe.model", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")

# While it loads, transformers replaces methods of its classes for the whole process; two loads at once leave one replaced, and
# weights that are in the file are then reported missing.
_one_load_at_a_time = threading.Lock()

_ADAPTER_PREFIX = "base_model.model."

# What transformers and peft raise of files that do not fit: more kinds than they write down.
_UNFIT = (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, ArithmeticError, SafetensorError)

logger = logging.getLogger("bge_rerank_plugins")


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint's files are, and how to reach them.

    Attributes:
        model: Hub id or local directory.
        peft_path: Hub id or local directory of a LoRA adapter, or None.
        revision, cache_dir, local_files_only, token, show_progress: As in `RerankSettings`.
    """

    model: str
    peft_path: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    token: str | None = None
    show_progress: bool = False

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

    def _hub(self, *, revision: bool = True) -> dict[str, Any]:
        """Options of every look at the hub; the revision is the model's, and no adapter's."""
        options: dict[str, Any] = {
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "token": self.token,
        }
        return options | ({"revision": self.revision} if revision and self.revision else {})

    def file(self, name: str) -> Path | None:
        """Local path of one file of the checkpoint, downloaded if need be; None if the checkpoint has no such file."""
        found = cached_file(
            self.model,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **self._hub(),
        )
        return None if found is None else Path(found)

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
        try:
            config: dict[str, Any]
            config, _ = PreTrainedConfig.get_config_dict(self.model, **self._hub())
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
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.model, trust_remote_code=False, **self._hub())
        except Exception as error:  # what the hub's checked dataclasses raise has no common type
            raise ValueError(f"model={self.model!r}: its config.json cannot be used: {error}") from error
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
            config = PeftConfig.from_pretrained(self.peft_path, **self._hub(revision=False))
        except _UNFIT as error:
            raise ValueError(f"peft_path={self.peft_path!r}: no LoRA adapter can be read there: {error}") from error
        if config.is_prompt_learning:
            raise ValueError(
                f"peft_path={self.peft_path!r}: peft_type={config.peft_type.value!r} cannot be merged, as LoRA can"
            )
        return dict(config.to_dict())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer as published, with its truncation and padding switched off once, before anyone shares it.

        tokenizer.json is taken as it stands: the classes that transformers 5 picks by model type rebuild parts of the
        pipeline themselves, and the model cards' scores were made with the file's.

        Raises:
            ValueError: There is none, it cannot be loaded, is no fast one, or its files disagree.
            ImportError: It is SentencePiece's, and what reads that is not installed.
        """
        kind: Any = PreTrainedTokenizerFast if self.file("tokenizer.json") is not None else self._reads_vocabulary()
        try:
            tokenizer = kind.from_pretrained(self.model, trust_remote_code=False, **self._hub())
        except Exception as error:  # what the Rust tokenizer raises has no type of its own
            raise ValueError(f"model={self.model!r}: its tokenizer cannot be loaded: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"model={self.model!r}: its tokenizer is no fast tokenizer; add a tokenizer.json")
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._check_agreement(tokenizer.init_kwargs, backend)
        backend.no_truncation()
        backend.no_padding()
        return tokenizer

    def _reads_vocabulary(self) -> Any:
        """The class of transformers that makes a tokenizer of a vocabulary."""
        vocabulary = next((name for name in _VOCABULARIES if self.file(name) is not None), None)
        if vocabulary is None:
            raise ValueError(f"model={self.model!r}: it has no tokenizer.json, nor any of {', '.join(_VOCABULARIES)}")
        if vocabulary.endswith(".model") and not all(
            map(_is_installed, ("sentencepiece", "google", "google.protobuf"))
        ):
            raise ImportError(
                f"model={self.model!r}: it has no tokenizer.json, and reading its {vocabulary} needs two packages more: "
                "pip install sentencepiece protobuf"
            )
        # transformers 5 takes another than is named for some models, which makes other tokens of the same file.
        return self.tokenizer_class or AutoTokenizer

    @property
    def tokenizer_class(self) -> type | None:
        """The class of transformers that tokenizer_config.json names, or None if that has no such one."""
        kind = getattr(transformers, str(self.tokenizer_config.get("tokenizer_class")).removesuffix("Fast"), None)
        return kind if isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase) else None

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json as it stands; empty without one."""
        file = self.file("tokenizer_config.json")
        return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))

    def _check_agreement(self, said: dict[str, Any], backend: Tokenizer) -> None:
        """Raises ValueError for a tokenizer_config.json that contradicts tokenizer.json: each is believed by somebody."""
        for option, part, name in (
            ("do_lower_case", backend.normalizer, "lowercase"),
            ("add_prefix_space", backend.pre_tokenizer, "add_prefix_space"),
        ):
            is_so = getattr(part, name, None)
            if option in said and is_so is not None and said[option] != is_so:
                raise ValueError(
                    f"model={self.model!r}: {option}={said[option]} in tokenizer_config.json, and {is_so} in tokenizer.json"
                )

    def load(
        self,
        auto_class: Any,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        attention: str = ATTENTION,
        may_lack: tuple[str, ...] = (),
    ) -> PreTrainedModel:
        """The model with every weight from the files, its adapter merged, in evaluation mode.

        Args:
            auto_class: The transformers class whose `from_pretrained` loads it.
            config: What to build.
            dtype: Precision of the weights; those that will be int8 come in float32, for who knows which of them to round.
            device: Where they go.
            attention: transformers' name of the attention.
            may_lack: Beginnings of the names of weights that may be new, since they are about to be trained.

        Raises:
            ValueError: No safetensors, weights of other shapes than the config's, or such as neither the checkpoint nor its
                adapter holds; a LoRA adapter beside them.
        """
        # transformers would load that adapter unasked, and report the weights that it lacks, not those that the model lacks.
        if self.file("adapter_config.json") is not None:
            raise ValueError(
                f"model={self.model!r}: a LoRA adapter (adapter_config.json) lies beside the weights; "
                "move it to a directory of its own, and give that as peft_path to have it merged"
            )
        try:
            with alone_and_quiet(self.show_progress):
                model, report = auto_class.from_pretrained(
                    self.model,
                    config=config,
                    dtype=torch.float32 if dtype == torch.int8 else dtype,
                    attn_implementation=attention,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # reported, and refused below by name
                    output_loading_info=True,
                    **self._hub(),
                )
        except _UNFIT as error:
            local = Path(self.model)  # at a hub nothing is fetched to explain an error
            pickled = (local / "pytorch_model.bin").is_file() and not any(local.glob("*.safetensors"))
            why = (
                "its pytorch_model.bin is a pickle, which is never opened; save it as safetensors" if pickled else error
            )
            raise ValueError(f"model={self.model!r}: its weights cannot be loaded: {why}") from error
        for name, has, needs in sorted(report["mismatched_keys"]):
            raise ValueError(
                f"model={self.model!r}: {name} has the shape {tuple(has)}, and by config.json it has {tuple(needs)}"
            )
        missing = {name for name in report["missing_keys"] if not name.startswith(may_lack)} - self._adapter_keys()
        if missing:
            raise ValueError(
                f"model={self.model!r}: the checkpoint lacks {_listed(missing)}; "
                "scores from newly initialised weights would be random"
            )
        if self.peft_path is not None:
            model = self._merge_adapter(model, self.peft_path)
        return model.eval().requires_grad_(False).to(device)  # type: ignore[no-any-return]

    def _merge_adapter(self, model: PreTrainedModel, peft_path: str) -> Any:
        from peft import PeftModel
        from peft.utils import get_peft_model_state_dict

        names = self._adapter_names()
        try:
            with alone_and_quiet(self.show_progress):
                adapted = PeftModel.from_pretrained(model, peft_path, **self._hub(revision=False))
                if any(part in name for name in names for part in ("lm_head", "embed_tokens")):
                    _untie(model)
                expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
                # What the adapter has beyond that may belong to layers that are not loaded.
                if absent := expected - names:
                    raise ValueError(f"it lacks {_listed(absent)}; it has such as {min(names, default='none')}")
                return adapted.merge_and_unload()
        except _UNFIT as error:
            raise ValueError(f"peft_path={peft_path!r}: does not fit model={self.model!r}: {error}") from error

    def _adapter_keys(self) -> set[str]:
        """Names of the model's weights that the adapter brings whole, such as a newly trained classifier."""
        return {name.removeprefix(_ADAPTER_PREFIX) for name in self._adapter_names()}

    def _adapter_names(self) -> set[str]:
        """Names of the weights in the adapter's file."""
        if self.peft_path is None:
            return set()
        from peft.utils import load_peft_weights

        return set(load_peft_weights(self.peft_path, device="cpu", **self._hub(revision=False)))


def _untie(model: Any) -> None:
    """Gives the output words of a model with an adapter weights of their own, so that what is merged into one side stays there.

    After peft has seen that they are tied: some adapters are for both sides, and then bring their part for each.
    """
    words, output = _without_adapter(model.get_input_embeddings()), _without_adapter(model.get_output_embeddings())
    weight = getattr(output, "weight", None)  # a head for each layer has none
    if weight is not None and weight is words.weight:
        output.weight = torch.nn.Parameter(weight.detach().clone())
        model.config.tie_word_embeddings = False


def _without_adapter(layer: Any) -> Any:
    """The layer that peft has wrapped, in one wrapping or several."""
    for name in ("base_layer", "original_module", "token_adapter"):
        if hasattr(layer, name):
            return _without_adapter(getattr(layer, name))
    return layer


def _listed(names: Collection[str], most: int = 4) -> str:
    """The first of these names, in their order, and how many more there are."""
    first, more = sorted(names)[:most], len(names) - most
    return ", ".join(first) + (f", and {more} more" if more > 0 else "")


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def forget_fork() -> None:
    """In a forked copy of the process: drops the lock, which a thread that is not there may hold."""
    global _one_load_at_a_time
    _one_load_at_a_time = threading.Lock()


@contextmanager
def alone_and_quiet(show_progress: bool) -> Iterator[None]:
    """One load at a time, and meanwhile nothing on standard error from transformers, the hub or peft, process-wide.

    What transformers would report, weights that are missing, is an error here.
    """
    with _one_load_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        bars = transformers_logging.is_progress_bar_enabled() and not show_progress
        verbosity = transformers_logging.get_verbosity()
        if bars:
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        transformers_logging.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
