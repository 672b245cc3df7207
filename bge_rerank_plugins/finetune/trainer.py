"""transformers' Trainer over groups: our loss, our files, MRR on held-out lines, a progress bar on standard error.

The loop, the optimizer, several devices and checkpoints to resume from are transformers'. Knows nothing of families.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import write_whole
from ..terminal import bar_is_hidden
from .batches import Collator
from .data import Group, Groups
from .losses import ranking_loss
from .trainee import Trainee

LOG_FILE = "training.jsonl"
PAIRS_AT_ONCE = 32
"""Held-out pairs that are scored at once."""


class RankingTrainer(Trainer):
    """Trains a network to rank.

    Args:
        trainee: The network.
        arguments: transformers' own.
        groups: What to train on.
        held_out: What to measure MRR on; may be empty.
        collator: Makes batches.
        group_size: Passages of a training group.
        self_distillation: As in `ranking_loss`.
    """

    def __init__(
        self,
        trainee: Trainee,
        arguments: TrainingArguments,
        groups: Groups,
        held_out: Sequence[Group],
        collator: Collator,
        group_size: int,
        self_distillation: bool,
    ) -> None:
        super().__init__(
            model=trainee,
            args=arguments,
            data_collator=collator,
            train_dataset=groups,
            eval_dataset=held_out or None,
            callbacks=[_Epochs(groups)],
        )
        self._trainee = trainee
        self._held_out = held_out
        self._collator = collator
        self._group_size = group_size
        self._self_distillation = self_distillation

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch of groups, the mean over its groups."""
        batch = dict(inputs)
        teacher = batch.pop("teacher", None)
        scores = model(**batch).unflatten(0, (-1, self._group_size))
        loss = ranking_loss(scores, teacher, self_distillation=self._self_distillation)
        return (loss, scores) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Logs and returns the mean reciprocal rank of the first positive among the held-out lines, for every head."""
        scores = [self._scores(group) for group in self._held_out]
        metrics = {"mrr": mean_reciprocal_rank([row[:, -1].tolist() for row in scores], self._held_out)}
        if len(self._trainee.heads) > 1:
            for head, name in enumerate(self._trainee.heads):
                metrics[f"mrr {name}"] = mean_reciprocal_rank([row[:, head].tolist() for row in scores], self._held_out)
        metrics = {f"{metric_key_prefix}_{name}".replace(" ", "_"): value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _scores(self, group: Group) -> Tensor:
        """Scores of a group's passages. Shape (passages, heads)."""
        model = self._trainee.eval()
        found = []
        with torch.inference_mode(), self.accelerator.autocast():  # of `bf16`, also where nothing is trained any more
            for start in range(0, len(group.passages), PAIRS_AT_ONCE):
                part = Group(group.query, group.passages[start : start + PAIRS_AT_ONCE], prompt=group.prompt)
                found.append(model(**self._prepare_inputs(self._collator([part]))).cpu())
        return torch.cat(found)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._trainee.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._trainee.restore(Path(resume_from_checkpoint))


def mean_reciprocal_rank(scores: Sequence[Sequence[float]], groups: Sequence[Group]) -> float:
    """The mean over groups of 1 / rank of the best positive; negatives with the same score, or none, come before it."""
    total = 0.0
    for row, group in zip(scores, groups, strict=True):
        best = max(row[: group.positives])
        total += 1 / (1 + sum(not score < best for score in row[group.positives :]))
    return total / len(groups)


class _Epochs(TrainerCallback):
    """Tells the data which pass over it begins, in every process and after a resumption."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._groups.epoch = int(state.epoch or 0)


class Progress(TrainerCallback):
    """A bar on standard error with the last loss and MRR, and the log as JSON lines.

    Args:
        shown: Whether there is a bar; None: where standard error is a terminal.
    """

    def __init__(self, shown: bool | None) -> None:
        self._shown = shown
        self._bar: Any = None
        self._last: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the bar where the training starts, or goes on."""
        from tqdm import tqdm

        self._bar = tqdm(
            desc="Training",
            unit="step",
            total=state.max_steps,
            initial=state.global_step,
            disable=bar_is_hidden(self._shown) if state.is_world_process_zero else True,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further; the loss of the last one is logged whatever its number, and that of every one that is saved.

        A run that is resumed sums losses from there on, and is to log what it would have logged.
        """
        self._bar.update(1)
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs the loss where a pass is saved."""
        control.should_log |= control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows loss and MRR, and writes the log as it is so far.

        Raises:
            ValueError: The loss is not a number any more.
        """
        for key, name in (("loss", "loss"), ("eval_mrr", "MRR")):
            if logs and key in logs:
                self._last[name] = f"{logs[key]:.4f}"
        if self._bar is not None:
            self._bar.set_postfix(self._last)
        if state.is_world_process_zero:
            write_log(state.log_history, Path(str(args.output_dir)) / LOG_FILE)
        check_loss((logs or {}).get("loss", 0.0), state.global_step, args.learning_rate)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the bar."""
        self._bar.close()


def check_loss(loss: float, step: int, learning_rate: float) -> None:
    """Raises ValueError for a loss that is not a number: what is trained from there on is of no use."""
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {step}: the training has diverged; take a lower learning_rate than "
            f"{learning_rate:g}, or look for what is extreme in the data"
        )


def write_log(history: Sequence[dict[str, float]], path: Path) -> None:
    """Writes the log, a line for each entry, in one move: who reads it meanwhile sees whole lines."""
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in history))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end; a kill may leave one that was not, a user one renamed."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    whole = [path.parent for path in states if re.fullmatch(r"checkpoint-\d+", path.parent.name) and _is_json(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def state_of(checkpoint: Path) -> TrainerState:
    """How far a run had come."""
    state: TrainerState = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
