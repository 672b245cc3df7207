"""A checkpoint's weights, with none missing and its LoRA adapter merged. Safetensors only. Knows nothing of families."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .attention import ATTENTION
from .checkpoint import UNFIT, Checkpoint

_ADAPTER_PREFIX = "base_model.model."

# While it loads, transformers replaces methods of its classes for the whole process; two loads at once leave one replaced, and
# weights that are in the file are then reported missing.
_one_load_at_a_time = threading.Lock()


def load_model(
    checkpoint: Checkpoint,
    auto_class: Any,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str = ATTENTION,
    may_lack: tuple[str, ...] = (),
    check_unused: Callable[[Collection[str]], None] = lambda names: None,
) -> PreTrainedModel:
    """The model with every weight from the files, its adapter merged, in evaluation mode.

    Args:
        checkpoint: Where the files are.
        auto_class: The transformers class whose `from_pretrained` loads it.
        config: What to build.
        dtype: Precision of the weights; those that will be int8 come in float32, for who knows which of them to round.
        device: Where they go.
        attention: transformers' name of the attention.
        may_lack: Beginnings of the names of weights that may be new, since they are about to be trained.
        check_unused: Raises ValueError if weights of these names, for which the model has no place, should not be in the files.

    Raises:
        ValueError: No safetensors, weights of other shapes than the config's, or such as neither the checkpoint nor its
            adapter holds; a LoRA adapter beside them.
    """
    # transformers would load that adapter unasked, and report the weights that it lacks, not those that the model lacks.
    if checkpoint.file("adapter_config.json") is not None:
        raise ValueError(
            f"model={checkpoint.model!r}: a LoRA adapter (adapter_config.json) lies beside the weights; "
            "move it to a directory of its own, and give that as peft_path to have it merged"
        )
    try:
        with alone_and_quiet(checkpoint.show_progress):
            model, report = auto_class.from_pretrained(
                checkpoint.model,
                config=config,
                dtype=torch.float32 if dtype == torch.int8 else dtype,
                attn_implementation=attention,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported, and refused below by name
                output_loading_info=True,
                # It looks once more for that adapter, and there knows nothing of the options that follow.
                adapter_kwargs={"cache_dir": checkpoint.cache_dir, "local_files_only": checkpoint.local_files_only},
                **checkpoint.hub_options(),
            )
    except UNFIT as error:
        local = Path(checkpoint.model)  # at a hub nothing is fetched to explain an error
        pickled = (local / "pytorch_model.bin").is_file() and not any(local.glob("*.safetensors"))
        why = "its pytorch_model.bin is a pickle, which is never opened; save it as safetensors" if pickled else error
        raise ValueError(f"model={checkpoint.model!r}: its weights cannot be loaded: {why}") from error
    for name, has, needs in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"model={checkpoint.model!r}: {name} has the shape {tuple(has)}, and by config.json it has {tuple(needs)}"
        )
    check_unused(report["unexpected_keys"])
    missing = {name for name in report["missing_keys"] if not name.startswith(may_lack)} - _adapter_keys(checkpoint)
    if missing:
        raise ValueError(
            f"model={checkpoint.model!r}: the checkpoint lacks {_listed(missing)}; "
            "scores from newly initialised weights would be random"
        )
    if checkpoint.peft_path is not None:
        model = _merge_adapter(checkpoint, model, checkpoint.peft_path)
    return model.eval().requires_grad_(False).to(device)  # type: ignore[no-any-return]


def _merge_adapter(checkpoint: Checkpoint, model: PreTrainedModel, peft_path: str) -> Any:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    names = _adapter_names(checkpoint)
    if _is_above(checkpoint, model, names):
        return model
    try:
        with alone_and_quiet(checkpoint.show_progress):
            adapted = PeftModel.from_pretrained(model, checkpoint.adapter_folder)
            untie_words(model, names)
            expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
            # What the adapter has beyond that may belong to layers that are not loaded.
            if absent := expected - names:
                raise ValueError(f"it lacks {_listed(absent)}; it has such as {min(names, default='none')}")
    except UNFIT as error:
        raise ValueError(f"peft_path={peft_path!r}: does not fit model={checkpoint.model!r}: {error}") from error
    try:
        with alone_and_quiet(checkpoint.show_progress):
            return adapted.merge_and_unload()
    except UNFIT as error:
        kind = adapted.active_peft_config.peft_type.value
        raise ValueError(
            f"peft_path={peft_path!r}: peft cannot merge peft_type={kind!r} into model={checkpoint.model!r}: {error}"
        ) from error


def _is_above(checkpoint: Checkpoint, model: PreTrainedModel, names: Collection[str]) -> bool:
    """Whether an adapter is for layers alone that the checkpoint has, and that are not loaded."""
    there = range(model.config.num_hidden_layers, checkpoint.config.get("num_hidden_layers", 0))
    layers = [re.search(r"\.layers\.(\d+)\.", name) for name in names]
    return bool(layers) and all(found is not None and int(found[1]) in there for found in layers)


def _adapter_keys(checkpoint: Checkpoint) -> set[str]:
    """Names of the model's weights that the adapter brings whole, such as a newly trained classifier."""
    return {name.removeprefix(_ADAPTER_PREFIX) for name in _adapter_names(checkpoint)}


def _adapter_names(checkpoint: Checkpoint) -> set[str]:
    """Names of the weights in the adapter's file."""
    if checkpoint.peft_path is None:
        return set()
    from peft.utils import load_peft_weights

    return set(load_peft_weights(checkpoint.adapter_folder, device="cpu"))


def untie_words(model: Any, names: Collection[str]) -> None:
    """Gives the output words of a model weights of their own, so that what is merged into one side stays there.

    After peft has seen that they are tied: some adapters are for both sides, and then bring their part for each.

    Args:
        model: The model inside the adapter.
        names: Names of the adapter's weights; without any on words, nothing is done.
    """
    if not any(part in name for name in names for part in ("lm_head", "embed_tokens")):
        return
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
        for of_peft in ("Found missing adapter keys", "Model has `tie_word_emb", "Setting `save_embedding_layers`"):
            warnings.filterwarnings("ignore", of_peft)
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
