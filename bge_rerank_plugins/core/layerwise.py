"""Family 3: MiniCPM with a scoring head per layer (bge-reranker-v2-minicpm-layerwise).

MiniCPM is transformers' Granite with other names for its multipliers, so the published `model.*` tensors load into
`GraniteModel` as they are, and no code of the checkpoint is run. A head scores the final-normed hidden state after its layer,
at the last position. Layers above the highest cutoff in use are not read from disk; a higher one asked for later is.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteModel
from transformers.models.granite.modeling_granite import GranitePreTrainedModel

from .device import is_out_of_memory
from .inplace import work_in_place
from .int8 import round_linear_layers
from .last_layer import LastRows
from .linear import multiply_by_onednn
from .packing import Pack
from .prompt import Prompt
from .sequences import TokenSequence
from .weights import load_model

if TYPE_CHECKING:
    from ..settings import RerankSettings
    from .checkpoint import Checkpoint

HEAD_TYPES = ("simple", "complex", "raw")

_COUNTS = (
    "start_layer",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "vocab_size",
    "max_position_embeddings",
)
_NEEDED = ("head_type", "head_multi", *_COUNTS, "scale_emb", "scale_depth")
"""What a layerwise config says of its own, and no default would be right for."""


class LayerwiseModel(GranitePreTrainedModel):  # type: ignore[no-untyped-call]
    """The published checkpoint's layout: the backbone, and beside it one head per layer, or one for all."""

    def __init__(self, config: GraniteConfig) -> None:
        super().__init__(config)
        # peft looks for it where an adapter names a causal language model, as FlagEmbedding's; transformers, in the class alone.
        self.prepare_inputs_for_generation = None
        published = config.published
        self.model = GraniteModel(config)
        width = 1 if published["head_type"] == "simple" else config.vocab_size

        def head() -> nn.Module:
            linear = nn.Linear(config.hidden_size, width, bias=False)
            return linear if published["head_type"] == "raw" else nn.ModuleDict({"linear_head": linear})

        heads = config.num_hidden_layers - published["start_layer"] + 1
        self.lm_head = nn.ModuleList([head() for _ in range(heads)]) if published["head_multi"] else head()
        self.post_init()  # type: ignore[no-untyped-call]

    def head_row(self, layer: int, row: int) -> Tensor:
        """The head's weights for one output after a layer. Shape (hidden,)."""
        published: dict[str, Any] = self.config.published
        head: Any = self.lm_head[layer - published["start_layer"]] if published["head_multi"] else self.lm_head
        linear = head if published["head_type"] == "raw" else head["linear_head"]
        return linear.weight[0 if published["head_type"] == "simple" else row]  # type: ignore[no-any-return]


class Layerwise:
    """A layerwise reranker. See `families.Family` for what its methods mean."""

    name: ClassVar[str] = "layerwise"
    architectures: ClassVar[tuple[str, ...]] = ("LayerWiseMiniCPMForCausalLM",)
    float16_is_safe: ClassVar[bool] = False

    def __init__(
        self,
        load: Callable[[int], LayerwiseModel],
        prompt: Prompt,
        layers: range,
        cutoff_layer: int,
        hidden_scale: float,
    ) -> None:
        self.max_length = prompt.max_length
        self.layers: range | None = layers
        self._cutoff_layer = cutoff_layer
        self._hidden_scale = hidden_scale
        self._prompt = prompt
        self._load = load
        self._use(cutoff_layer)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, settings: RerankSettings, device: torch.device, dtype: torch.dtype
    ) -> Layerwise:
        """The layers up to `cutoff_layer` with their heads on `device`.

        Raises:
            ValueError: A `cutoff_layer` that has no head, with the range of those that have one; an unknown head type; a
                `max_length` beyond the positions; weights that are not in the files.
        """
        published = checkpoint.config
        layers, cutoff_layer, prompt = _checked(checkpoint, settings)

        def load(top: int) -> LayerwiseModel:
            config, check = granite_config(published, top), partial(_check_unused, checkpoint, layers, top)
            model: Any = load_model(checkpoint, LayerwiseModel, config, dtype, device, check_unused=check)
            if dtype == torch.int8:
                round_linear_layers(model.model.layers)
            return model  # type: ignore[no-any-return]

        return cls(load, prompt, layers, cutoff_layer, hidden_scale(published))

    @classmethod
    def describe(cls, checkpoint: Checkpoint, settings: RerankSettings) -> dict[str, str]:
        """Facts from the config, by name, without loading any weights.

        Raises:
            ValueError: As `load`, but for what only the weights can tell.
        """
        layers, cutoff_layer, prompt = _checked(checkpoint, settings)
        config = checkpoint.config
        return {
            "layers": str(config["num_hidden_layers"]),
            "scores at layers": f"{layers[0]} to {layers[-1]}",
            "cutoff_layer": f"{cutoff_layer}, layers above it are not loaded",
            "hidden size": str(config["hidden_size"]),
            "vocabulary": f"{config['vocab_size']} tokens",
            "max_length": f"{prompt.max_length} tokens a pair, and {prompt.extra_tokens} of prompt",
        }

    def _use(self, top: int) -> None:
        """Loads the layers up to `top`."""
        model = self._load(top)
        self._backbone: Any = model.model
        multiply_by_onednn(self._backbone)
        work_in_place(self._backbone)
        self._heads = {
            layer: model.head_row(layer, self._prompt.answer_id).float().clone()  # without the whole head behind it
            for layer in self.layers or ()
            if layer <= top
        }
        self._top = top

    def _use_more(self, top: int) -> None:
        """Loads the layers up to `top` in place of those that are there.

        Raises:
            ValueError: They do not fit into memory, where smaller packs are no help.
        """
        self._top = 0
        self._backbone, self._heads = None, {}  # never two copies in memory
        try:
            self._use(top)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # which hold what did fit
            raise ValueError(f"cutoff_layer={top}: out of memory with the layers up to it: {error}") from error

    def encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """The model card's token ids, the query as a prefix that the passages share."""
        return self._prompt.encode(query, passages)

    def windows(self, query: str, passage: str) -> list[str]:
        """The passage in parts that fit beside the query, each overlapping the next."""
        return self._prompt.windows(query, passage)

    def forward(self, pack: Pack, cutoff_layers: Sequence[int] = ()) -> Tensor:
        """Scores after the cutoff layer, shape (sequences,), or after each of `cutoff_layers`, shape (sequences, layers)."""
        asked = cutoff_layers or (self._cutoff_layer,)
        if max(asked) > self._top:
            self._use_more(max(asked))
        rows = self._rows_after(pack, set(asked))
        scores = [
            (self._backbone.norm(rows[layer]).float() * self._hidden_scale) @ self._heads[layer] for layer in asked
        ]
        return torch.stack(scores, dim=1) if cutoff_layers else scores[0]

    def _rows_after(self, pack: Pack, layers: set[int]) -> dict[int, Tensor]:
        """Hidden states of the last positions after each of the layers, which are computed up to the highest."""
        rows: dict[int, Tensor] = {}
        highest = max(layers)

        def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                hidden = output if isinstance(output, Tensor) else output[0]
                rows[layer] = hidden[0, slice(len(pack.last_rows)) if layer == highest else pack.last_rows]

            return hook

        self._backbone.config.num_hidden_layers = highest  # GraniteModel runs that many
        hooks: list[Any] = [self._backbone.layers[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
        hooks.append(LastRows(self._backbone.layers[highest - 1]))
        try:
            self._backbone(
                input_ids=pack.input_ids[None], position_ids=pack.position_ids[None], use_cache=False, pack=pack
            )
        finally:
            for hook in hooks:
                hook.remove()
        return rows


def _check_unused(checkpoint: Checkpoint, layers: range, top: int, names: Collection[str]) -> None:
    """Raises ValueError for weights beyond those of layer `top` that tell of another `start_layer` or `num_hidden_layers`.

    The layers that the files hold, and the heads, end at one layer, which is none above the config's.
    """
    places = [re.match(r"(lm_head|model\.layers)\.(\d+)\.", name) for name in names]
    numbers = {
        kind: [int(place[2]) for place in places if place and place[1] == kind] for kind in ("lm_head", "model.layers")
    }
    head = max([top, *(number + layers.start for number in numbers["lm_head"])])
    layer = max([top, *(number + 1 for number in numbers["model.layers"])])
    if max(head, layer) > layers[-1] or (head != layer and checkpoint.config["head_multi"]):
        raise ValueError(
            f"model={checkpoint.model!r}: its config.json (start_layer, num_hidden_layers) has heads for layers "
            f"{layers.start} to {layers[-1]}; by that the heads in its files end at layer {head}, and the layers at {layer}"
        )


def _checked(checkpoint: Checkpoint, settings: RerankSettings) -> tuple[range, int, Prompt]:
    """Layers that score, the one to score at, and the prompt, once the settings are known to fit the checkpoint."""
    checkpoint.check_causal()
    if checkpoint.config.get("quantization_config"):
        raise ValueError(f"model={checkpoint.model!r}: quantised layerwise checkpoints are not supported")
    layers = layers_of(checkpoint)
    try:
        granite_config(checkpoint.config, layers[-1])
        hidden_scale(checkpoint.config)
    except Exception as error:  # what the hub's checked dataclasses raise has no common type
        raise ValueError(f"model={checkpoint.model!r}: its config.json cannot be used: {error}") from error
    cutoff_layer = layers[-1] if settings.cutoff_layer is None else settings.cutoff_layer
    check_layers([cutoff_layer], layers)
    return layers, cutoff_layer, Prompt(checkpoint, settings, checkpoint.config["max_position_embeddings"])


def layers_of(checkpoint: Checkpoint) -> range:
    """The layers that have a scoring head.

    Raises:
        ValueError: The config says too little, names a head type that is not known, or leaves no layer a head.
    """
    config = checkpoint.config
    needed = _NEEDED if config.get("head_type") == "simple" else (*_NEEDED, "dim_model_base")
    absent = [name for name in needed if name not in config]
    if absent:
        raise ValueError(f"model={checkpoint.model!r}: its config.json lacks {', '.join(absent)}")
    if config["head_type"] not in HEAD_TYPES:
        raise ValueError(
            f"head_type={config['head_type']!r} in {checkpoint.model!r}: not one of {', '.join(HEAD_TYPES)}"
        )
    for name in _COUNTS:
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"model={checkpoint.model!r}: {name}={config[name]!r} in its config.json, not 1 or more")
    layers = range(config["start_layer"], config["num_hidden_layers"] + 1)
    if not layers:
        raise ValueError(
            f"model={checkpoint.model!r}: start_layer={layers.start} is above its {config['num_hidden_layers']} layers"
        )
    return layers


def check_layers(cutoff_layers: Sequence[int], layers: range, option: str = "cutoff_layer") -> None:
    """Raises ValueError for layers without a head, naming the option and the layers with one, and for none."""
    if not cutoff_layers:
        raise ValueError("cutoff_layers=[]: name at least one layer")
    for layer in cutoff_layers:
        if layer not in layers:
            raise ValueError(f"{option}={layer!r}: this checkpoint scores at layers {layers[0]} to {layers[-1]}")


def hidden_scale(published: dict[str, Any]) -> float:
    """Factor on hidden states before a head: one over the whole vocabulary is the language model's own, with its scale."""
    if published["head_type"] == "simple":
        return 1.0
    return float(published["dim_model_base"] / published["hidden_size"])


def granite_config(published: dict[str, Any], top: int) -> GraniteConfig:
    """Granite's config for the published one, cut to `top` layers. Checked against the published class to 1e-6."""
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
    )
    rope = {**(published.get("rope_scaling") or {}), **(published.get("rope_parameters") or {})}
    return GraniteConfig(
        **{name: published[name] for name in same if name in published},
        num_hidden_layers=top,
        tie_word_embeddings=False,
        embedding_multiplier=published["scale_emb"],
        residual_multiplier=published["scale_depth"] / math.sqrt(published["num_hidden_layers"]),
        attention_multiplier=(published["hidden_size"] // published["num_attention_heads"]) ** -0.5,
        rope_parameters={
            "rope_theta": published.get("rope_theta", 10000.0),
            "rope_type": rope.pop(
                "type", "default"
            ),  # its name in older configs; newer ones have theta and type in the rest
            **rope,
        },
        published={name: published[name] for name in ("start_layer", "head_multi", "head_type")},  # type: ignore[call-arg]
    )
