"""`finetune`: one training run, from the settings to a model that `Scorer` loads."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .data import Corpus, Example, Groups, evaluation_groups, read_both, read_examples, split_held_out
from .plot import plot_training
from .settings import TRAINING_ARGUMENTS, FinetuneSettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger("bge_rerank_plugins")

SETTINGS_FILE = "finetune.json"
PLOT_FILE = "training.png"

LEARNING_RATES = {True: 2e-4, False: 6e-5}
"""Peak learning rate with LoRA, and without: those of the published examples."""

EVALUATIONS = 10
"""How often MRR is measured on the way, where the user does not say."""

_MAY_CHANGE = {"resume", "output_dir", "show_progress", "save_total_limit", "cache_dir", "local_files_only", "token"}
"""Options that a run may be resumed with another value of; its folder may have been moved, or be spelt otherwise."""


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a training run.

    Attributes:
        output_dir: Where the model is.
        is_adapter: Whether that is a LoRA adapter, for `peft_path`, or a whole model.
        loss: The last loss that was logged.
        mrr: MRR on the held-out lines at the end; None without held-out lines.
    """

    output_dir: str
    is_adapter: bool
    loss: float
    mrr: float | None


def finetune(settings: FinetuneSettings) -> FinetuneResult:
    """Trains a reranker on lines of queries, positives and negatives.

    Everything is checked before anything is written. In `settings.output_dir` then stand the model or its adapter,
    `training.jsonl` (loss, learning rate and MRR by step), `training.png` where matplotlib is installed, `finetune.json` (the
    settings), and the checkpoints to resume from.

    Args:
        settings: What to train, on what, and how.

    Returns:
        Where the model is, the last loss and the held-out MRR.

    Raises:
        InputErrors: Lines of the data that cannot be used, all of them.
        ValueError: Settings that do not fit the model, or each other; an `output_dir` that is not empty; a loss that is not a
            number any more.
        ImportError: Something of the extra `finetune` is not installed.
    """
    training, held_out, corpus = _read(settings)
    groups = Groups(
        training,
        settings.train_group_size,
        settings.seed,
        scored=settings.knowledge_distillation,
        held_out=held_out,
    )
    folder = Path(settings.output_dir)
    _check_folder(folder, settings)
    _check_extra()

    import transformers

    from .batches import Collator
    from .models import trainee_of
    from .trainer import Progress, RankingTrainer, check_loss, newest_checkpoint, state_of, write_log

    transformers.set_seed(settings.seed)
    trainee = trainee_of(settings)
    if not trainee.has_prompt and (prompts := sum(example.prompt is not None for example in training)):
        logger.warning("%d lines have a prompt, which %r does not use: it is a cross-encoder", prompts, settings.model)
    # Lengths and prompts that leave no room are found here, not after minutes.
    encoder = trainee.encoder()
    for example in (*training, *held_out):
        _check_prompt(example, encoder)
    collator = Collator(encoder, settings.teacher_temperature)
    collator([groups[0]])
    learning_rate = settings.learning_rate or LEARNING_RATES[trainee.uses_lora]
    arguments = _training_arguments(settings, len(groups), learning_rate, evaluated=bool(held_out))
    # From here on things are written.
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    trainer = RankingTrainer(
        trainee,
        arguments,
        groups,
        evaluation_groups(held_out, Corpus(corpus), settings.train_group_size, settings.seed),
        collator,
        settings.train_group_size,
        settings.self_distillation,
    )
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress(settings.show_progress))
    newest = newest_checkpoint(folder) if settings.resume else None
    if newest is not None and (state := state_of(newest)).global_step >= state.max_steps:
        trainee.restore(newest)  # Trainer would go one step beyond
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    check_loss(loss, trainer.state.global_step, learning_rate)

    metrics = trainer.evaluate() if held_out else {}
    history = trainer.state.log_history
    if trainer.is_world_process_zero():
        is_adapter = trainee.uses_lora and not trainee.must_merge
        trainee.export(folder)
        write_log(history, folder / "training.jsonl")
        plot_training(history, folder / PLOT_FILE)
    else:
        is_adapter = trainee.uses_lora
    return FinetuneResult(str(folder), is_adapter, loss, metrics.get("eval_mrr"))


def _read(settings: FinetuneSettings) -> tuple[list[Example], list[Example], list[Example]]:
    """Lines to train on, lines to measure on, and all of them, whose passages may stand in for negatives."""
    if settings.eval_data is not None:
        examples, held_out = read_both(settings.data, settings.eval_data, scored=settings.knowledge_distillation)
        return examples, held_out, examples + held_out
    examples = read_examples(settings.data, scored=settings.knowledge_distillation)
    training, held_out = split_held_out(examples, settings.held_out, settings.max_held_out, settings.seed)
    if settings.held_out and not held_out:
        why = "every query has too many of them" if len(examples) > 1 else "there is only one"
        logger.warning("no lines are held out, so that no MRR is measured: %s; give eval_data", why)
    return training, held_out, examples


def _check_folder(folder: Path, settings: FinetuneSettings) -> None:
    """Raises ValueError unless the run can begin, or go on, in this folder."""
    if not is_first_process():
        return
    if folder.is_file():
        raise ValueError(f"output_dir={settings.output_dir!r}: that is a file")
    there = folder / SETTINGS_FILE
    if not settings.resume or not there.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            cure = "take another" if settings.resume else "take another, or resume what was begun there"
            raise ValueError(f"output_dir={settings.output_dir!r}: not empty; {cure}")
        return
    try:
        before = dict(json.loads(there.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{there}: not the settings of a run that can be resumed: {error}") from error
    now = json.loads(settings.model_dump_json())
    changed = [name for name in now if name not in _MAY_CHANGE and now[name] != before.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(f"{name}={now[name]!r}: the run that is to be resumed had {name}={before.get(name)!r}")


def _check_prompt(example: Example, encoder: Callable[[str | None], object]) -> None:
    """Raises ValueError for a prompt that leaves no room for text, with the line's place if it is the line's own."""
    try:
        encoder(example.prompt)
    except ValueError as error:
        raise ValueError(f"{example.place}: {error}" if example.prompt else str(error)) from error


def _check_extra() -> None:
    for module in ("accelerate", "peft"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f'fine-tuning needs {module}: pip install "bge-rerank-plugins[finetune]"')


def is_first_process() -> bool:
    """Whether this is the process that writes, of those that torchrun or accelerate have started."""
    return int(os.environ.get("RANK", "0")) == 0


def _training_arguments(
    settings: FinetuneSettings, groups: int, learning_rate: float, *, evaluated: bool
) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    accelerated = torch.accelerator.is_available() and not settings.use_cpu
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes
    steps = settings.max_steps or math.ceil(groups / at_once * settings.num_train_epochs)
    return TrainingArguments(
        **{name: getattr(settings, name) for name in TRAINING_ARGUMENTS},
        use_cpu=not accelerated,
        max_steps=settings.max_steps or -1,
        learning_rate=learning_rate,
        warmup_steps=settings.warmup_ratio,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=settings.eval_steps or math.ceil(steps / EVALUATIONS),
        save_strategy="steps",
        remove_unused_columns=False,
        dataloader_pin_memory=accelerated,
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # which would log 0
    )
