"""The model cards' procedures in plain code: one pair at a time, unpadded, float32, nothing shared with the package."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast


class EncoderReference:
    """A cross-encoder as its model card runs it: the tokenizer cuts and joins the pair, the model gives one logit."""

    def __init__(self, directory: str, max_length: int) -> None:
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory)
        self.model = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager").eval()
        self.max_length = max_length

    def ids(self, query: str, passage: str) -> tuple[list[int], list[int]]:
        """Token ids and segments of a pair. The query is cut first, to 3/4 of the length, then the passage."""
        template = self.tokenizer.num_special_tokens_to_add(pair=True)
        query_room = min(self.max_length * 3 // 4, self.max_length - template)
        query_ids = self.tokenizer(query, add_special_tokens=False)["input_ids"][:query_room]
        passage_ids = self.tokenizer(passage, add_special_tokens=False)["input_ids"]
        passage_ids = passage_ids[: self.max_length - template - len(query_ids)]
        two_segments = type(self.model).__name__.startswith("Bert")
        if two_segments:
            ids = [0, *query_ids, 2, *passage_ids, 2]
            return ids, [0] * (len(query_ids) + 2) + [1] * (len(passage_ids) + 1)
        return [0, *query_ids, 2, 2, *passage_ids, 2], [0] * (len(query_ids) + len(passage_ids) + 4)

    def score(self, query: str, passage: str) -> float:
        ids, types = self.ids(query, passage)
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        return float(logits)


PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing "
    "a prediction of either 'Yes' or 'No'."
)


class PromptReference:
    """`get_inputs` of the LLM model cards, with `prepare_for_model` spelled out since transformers 5 dropped it."""

    def __init__(self, directory: str, max_length: int, prompt: str = PROMPT, marks: tuple[str, str] = ("A: ", "B: ")):
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory)
        self.max_length, self.prompt, self.marks = max_length, prompt, marks

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def ids(self, query: str, passage: str) -> list[int]:
        first = [self.tokenizer.bos_token_id, *self.tokens(self.marks[0] + query)[: self.max_length * 3 // 4]]
        second = self.tokens("\n") + self.tokens(self.marks[1] + passage)[: self.max_length]
        excess = len(first) + len(second) - self.max_length
        if excess > 0:
            assert excess < len(second)
            second = second[:-excess]
        return first + second + self.tokens("\n") + self.tokens(self.prompt)


class DecoderReference(PromptReference):
    """The logit of "Yes" as the model card of bge-reranker-v2-gemma takes it: the whole vocabulary, then one of it."""

    def __init__(self, directory: str, max_length: int, **options: Any) -> None:
        super().__init__(directory, max_length, **options)
        self.model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        self.yes = self.tokens("Yes")[0]

    def score(self, query: str, passage: str) -> float:
        with torch.inference_mode():
            return float(self.model(torch.tensor([self.ids(query, passage)])).logits[0, -1, self.yes])


class LayerwiseReference(PromptReference):
    """MiniCPM written out from its definition, layer by layer, with the heads of the published checkpoint's layout."""

    def __init__(self, directory: str, max_length: int, **options: Any) -> None:
        super().__init__(directory, max_length, **options)
        self.config = json.loads((Path(directory) / "config.json").read_text())
        self.weights = load_file(Path(directory) / "model.safetensors")

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.weights[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name + ".weight"].T

    def rotated(self, x: Tensor) -> Tensor:
        """Rotary positions, scaled linearly if at all, over the halves of each head. x has shape (heads, tokens, head_dim)."""
        dim = x.shape[-1]
        speeds = self.config["rope_theta"] ** (-torch.arange(0, dim, 2).float() / dim)
        places = torch.arange(x.shape[1]).float() / (self.config["rope_scaling"] or {}).get("factor", 1.0)
        angles = torch.outer(places, speeds).repeat(1, 2)
        halves = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
        return x * angles.cos() + halves * angles.sin()

    def attention(self, x: Tensor, layer: str) -> Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q, k, v = (self.linear(x, f"{layer}.self_attn.{part}_proj") for part in "qkv")
        q, k, v = (part.view(len(x), n, -1).transpose(0, 1) for part, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
        k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
        logits = self.rotated(q) @ self.rotated(k).transpose(1, 2) / q.shape[-1] ** 0.5
        logits += torch.full(logits.shape[1:], -torch.inf).triu(1)
        return self.linear((logits.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1), f"{layer}.self_attn.o_proj")

    def head(self, hidden: Tensor, layer: int) -> float:
        name = "lm_head"
        if self.config["head_multi"]:
            name += f".{layer - self.config['start_layer']}"
        if self.config["head_type"] != "raw":
            name += ".linear_head"
        if self.config["head_type"] == "simple":
            return float(self.linear(hidden, name)[0])
        scale = self.config["hidden_size"] / self.config["dim_model_base"]
        return float(self.linear(hidden / scale, name)[self.tokens("Yes")[0]])

    def scores(self, query: str, passage: str) -> dict[int, float]:
        """The score after every layer that has one."""
        layers = self.config["num_hidden_layers"]
        depth = self.config["scale_depth"] / layers**0.5
        x = self.weights["model.embed_tokens.weight"][self.ids(query, passage)] * self.config["scale_emb"]
        scores = {}
        for number in range(1, layers + 1):
            name = f"model.layers.{number - 1}"
            x = x + depth * self.attention(self.norm(x, f"{name}.input_layernorm.weight"), name)
            inner = self.norm(x, f"{name}.post_attention_layernorm.weight")
            gate, up = (self.linear(inner, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
            x = x + depth * self.linear(torch.nn.functional.silu(gate) * up, f"{name}.mlp.down_proj")
            if number >= self.config["start_layer"]:
                scores[number] = self.head(self.norm(x[-1], "model.norm.weight"), number)
        return scores
