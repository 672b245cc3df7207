"""Norms in parts and in one kernel compute what transformers' own do."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bge_rerank_plugins.core import norms
from bge_rerank_plugins.core.inplace import work_in_place
from bge_rerank_plugins.core.norms import RootMeanSquareNorm, norm_in_one_kernel


@pytest.mark.parametrize("kind", [GemmaRMSNorm, GraniteRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 29, 16), (1, 29, 3, 16), (1, 1, 16), (29, 16)])
@torch.inference_mode()
def test_norms_in_parts_compute_what_they_did(
    kind: Any, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(norms.NUMBERS_AT_HAND, "cpu", 7 * 16 + 3)
    theirs = kind(16).to(dtype)
    theirs.weight.copy_(torch.rand(16) + 0.5)
    model = nn.ModuleDict({"input_layernorm": theirs})
    work_in_place(model)
    ours = model["input_layernorm"]
    assert isinstance(ours, RootMeanSquareNorm)
    seen: list[int] = []
    theirs.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2]))
    states = torch.randn(shape, dtype=dtype)
    before = states.clone()
    found = ours(states)
    assert torch.equal(found, theirs(states))
    assert torch.equal(states, before)
    assert max(seen[:-1]) <= 7, "not in parts"


@pytest.mark.parametrize("kind", [GemmaRMSNorm, GraniteRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("offset", [0.5, 60.0])
@torch.inference_mode()
def test_norms_in_one_kernel_compute_what_they_did(
    kind: Any, dtype: torch.dtype, tolerance: float, offset: float
) -> None:
    """As on a GPU, also where a weight is so large that one more of it would not show in half precision."""
    norm = kind(16).to(dtype)
    norm.weight.copy_(torch.rand(16) + offset)
    in_one_kernel = norm_in_one_kernel(norm)
    assert in_one_kernel is not None
    assert in_one_kernel.func is (norms._scaled_from_one if kind is GemmaRMSNorm else norms._scaled)
    states = torch.randn(1, 29, 16, dtype=dtype)
    torch.testing.assert_close(in_one_kernel(states), norm(states), rtol=tolerance, atol=tolerance)


def test_a_norm_of_another_kind_stays_what_it_is() -> None:
    class OddRMSNorm(GraniteRMSNorm):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states) + 1

    assert norm_in_one_kernel(OddRMSNorm(16)) is None
