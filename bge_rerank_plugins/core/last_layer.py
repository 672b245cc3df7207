"""The last layer of a causal language model, for the rows that are read after it: the last token of each sequence.

transformers' layer computes it, with three hooks: it is given the few rows, its attention all of them, and what follows the
attention the few again. Knows nothing of heads or scores.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .linear import in_few_sizes


class LastRows:
    """Has a layer return the pack's last rows, shape (1, sequences or more, hidden), and compute no others after its attention.

    Keys and values of all rows are made, queries and their attention too. For layers of Llama's build, which the model calls with
    `pack=pack`.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: Any) -> None:
        self._states: Tensor | None = None
        self._rows: Tensor | None = None
        self._hooks = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.self_attn.register_forward_pre_hook(self._attend, with_kwargs=True),
            layer.self_attn.o_proj.register_forward_pre_hook(self._leave),
        ]

    def remove(self) -> None:
        """Leaves the layer as it was."""
        for hook in self._hooks:
            hook.remove()

    def _enter(
        self, layer: Any, inputs: tuple[Tensor], options: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        (states,) = inputs
        self._states = layer.input_layernorm(states)
        self._rows = in_few_sizes(options["pack"].last_rows, states)
        return (states[:, self._rows],), options

    def _attend(self, _: nn.Module, inputs: tuple[()], options: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        states, self._states = self._states, None
        return inputs, {**options, "hidden_states": states}

    def _leave(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        rows, self._rows = self._rows, None
        return (inputs[0][:, rows],)
