"""The options of fine-tuning and of mining, defined and described once; the command line makes its flags from them.

Those that transformers' `TrainingArguments` has keep its names and go there as they are. Knows nothing of torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from ..settings import Settings

TRAINING_ARGUMENTS = (
    "output_dir",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "bf16",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "seed",
)
"""Fields of `FinetuneSettings` that `TrainingArguments` takes as they are."""


class FinetuneSettings(Settings):
    """The options of one training run.

    Raises:
        pydantic.ValidationError: A `ValueError` that names the option, the value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(
        min_length=1,
        description="Hub id or local directory of the reranker to train on, or of a base model that has no scoring head yet: "
        "a BERT or (XLM-)RoBERTa encoder, a MiniCPM.",
    )
    data: str = Field(
        min_length=1,
        description='JSON lines, each {"query": "...", "pos": ["..."], "neg": ["..."]}, with "prompt", or "pos_scores" and '
        '"neg_scores", where wanted.',
    )
    output_dir: str = Field(
        min_length=1, description="New or empty folder for the model, its checkpoints, the log and the plot."
    )
    eval_data: str | None = Field(
        default=None, description="More such lines to measure MRR on; by default some lines of the data are held out."
    )
    held_out: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the lines that is held out, by whole queries, where there is no eval_data; 0: none.",
    )
    max_held_out: int = Field(default=500, ge=1, description="Most lines that are held out.")

    train_group_size: int = Field(
        default=8, ge=2, description="Passages of a group: one positive first, the others negatives."
    )
    query_max_len: int | None = Field(
        default=None,
        ge=1,
        description="Longest query in tokens; longer ones are cut. As query_max_length when scoring. By default 3/4 of the "
        "longest pair.",
    )
    passage_max_len: int | None = Field(
        default=None,
        ge=1,
        description="Room for a passage in tokens: pairs are cut to query_max_len + passage_max_len, as with that max_length "
        "when scoring. By default pairs are as long as when scoring: 1024, or what the positions allow if that is less.",
    )
    prompt: str | None = Field(
        default=None, description="Question for the LLM rerankers, where a line has none; by default the model card's."
    )
    query_instruction: str | None = Field(default=None, description="Text put before every query, as when scoring.")
    passage_instruction: str | None = Field(default=None, description="Text put before every passage, as when scoring.")

    lora: bool | None = Field(
        default=None,
        description="Train a LoRA adapter rather than all weights. By default for the LLM rerankers, not for cross-encoders.",
    )
    lora_rank: int = Field(default=32, ge=1, description="Rank of the adapter.")
    lora_alpha: int = Field(default=64, ge=1, description="Scale of the adapter, times its rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: str | list[str] | None = Field(
        default=None,
        description="Layers that get an adapter. By default q_proj,k_proj,v_proj,o_proj of the LLM rerankers, "
        "query,key,value,dense of cross-encoders.",
    )
    merge: bool = Field(
        default=False,
        description="Save the model with its adapter merged rather than the adapter. Always so for a layerwise reranker made "
        "from a base model.",
    )
    start_layer: int | None = Field(
        default=None,
        ge=1,
        description="Lowest layer whose head is trained, layerwise checkpoints only. By default the checkpoint's, and 8 for a "
        "base model.",
    )
    self_distillation: bool = Field(
        default=False, description="Let the lower layers learn from the top one too, layerwise checkpoints only."
    )
    knowledge_distillation: bool = Field(
        default=False,
        description="Learn from pos_scores and neg_scores, too: the KL divergence from the softmax of a group's is added to "
        "the loss, as FlagEmbedding does.",
    )
    teacher_temperature: float = Field(
        default=1.0, gt=0, description="The teacher's scores are divided by this before their softmax."
    )

    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Dropout inside the model while it is trained. By default the checkpoint's own.",
    )
    num_train_epochs: float = Field(default=1.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(default=None, ge=1, description="So many optimizer steps, instead of whole passes.")
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate. By default 2e-4 with LoRA, 6e-5 for all weights."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="What becomes of the learning rate after the warmup, which constant goes without."
    )
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to this norm; 0: not at all.")
    per_device_train_batch_size: int = Field(default=1, ge=1, description="Groups a device takes at once.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Batches an optimizer step.")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice rather than keep them: less memory, more time."
    )
    bf16: bool = Field(
        default=False, description="Compute in bfloat16. Weights that are trained, and those saved, stay float32."
    )
    logging_steps: int = Field(default=10, ge=1, description="Log the loss every so many steps.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Measure MRR every so many steps; by default a tenth of them, and at the end."
    )
    save_steps: int = Field(default=500, ge=1, description="Save a checkpoint to resume from every so many steps.")
    save_total_limit: int = Field(default=2, ge=1, description="Checkpoints that are kept, the newest.")
    resume: bool = Field(
        default=False, description="Go on from the newest checkpoint in output_dir, with the same options as before."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,  # numpy takes no larger one
        description="Fixes the order of the data, the negatives and the new weights.",
    )
    use_cpu: bool = Field(default=False, description="Train on the CPU even where there is something faster.")

    peft_path: str | None = Field(default=None, description="LoRA adapter that is merged before the training.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the model on the hub.")
    cache_dir: str | None = Field(default=None, description="Directory of the hub's download cache.")
    local_files_only: bool = Field(default=False, description="Never download; use only files that are already here.")
    token: str | None = Field(default=None, repr=False, exclude=True, description="Access token for the hub.")
    show_progress: bool | None = Field(
        default=None, description="Progress bar on standard error; by default where that is a terminal."
    )

    @field_validator("passage_max_len")
    @classmethod
    def _lengths_come_together(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("query_max_len") is None:
            raise ValueError(f"passage_max_len={value}: give query_max_len too, the pair is as long as both")
        return value

    @field_validator("teacher_temperature")
    @classmethod
    def _there_is_a_teacher(cls, value: float, info: ValidationInfo) -> float:
        if value != 1.0 and not info.data.get("knowledge_distillation", True):
            raise ValueError(f"teacher_temperature={value}: goes with knowledge_distillation")
        return value

    @property
    def max_length(self) -> int | None:
        """Longest pair in tokens, as the option of `Scorer`; None for its default."""
        if self.query_max_len is None or self.passage_max_len is None:
            return None
        return self.query_max_len + self.passage_max_len


class MineSettings(Settings):
    """The options of mining hard negatives.

    Raises:
        pydantic.ValidationError: A `ValueError` that names the option, the value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid")

    retriever: str = Field(
        default="bm25",
        min_length=1,
        description="What finds them: 'bm25', or hub id or local directory of a sentence-transformers encoder, which "
        "text without spaces between words needs.",
    )
    corpus: str | None = Field(
        default=None,
        description='JSON lines, each {"text": "..."}, to find them in; by default all passages of the data.',
    )
    first: int = Field(default=10, ge=1, description="Best place in the ranking that a negative is drawn from.")
    last: int = Field(default=210, ge=1, description="Worst place in the ranking that a negative is drawn from.")
    negatives: int = Field(default=15, ge=1, description="How many to draw for each query.")
    seed: int = Field(default=0, ge=0, description="Fixes what is drawn.")
    cache_dir: str | None = Field(default=None, description="Directory of the hub's download cache, for an encoder.")
    local_files_only: bool = Field(default=False, description="Never download; use only files that are already here.")
    token: str | None = Field(default=None, repr=False, exclude=True, description="Access token for the hub.")

    @field_validator("last")
    @classmethod
    def _range_is_not_empty(cls, value: int, info: ValidationInfo) -> int:
        first = info.data.get("first", 1)
        if value < first:
            raise ValueError(f"last={value}: less than first={first}")
        return value
