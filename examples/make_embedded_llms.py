"""Make the embedded LLM rerankers: a tiny decoder of Gemma's layout and a layerwise one of MiniCPM's.

    pip install "bge-rerank-plugins[demo,finetune]"
    python examples/make_embedded_llms.py --sources path/to/site-packages --output made

Everything is made of docstrings of installed packages: the tokenizer, the queries and the passages, read and kept apart
from the standard library's as in `train_embedded.py`. `bge-rerank finetune` then trains each model three times, the commands
are printed as they are run:

1. on random words, of which the right passage has some of the query's, so that it learns to look for them;
2. on docstrings beside passages drawn at random;
3. on docstrings beside those that BM25 ranks high (`bge-rerank mine`), learning from the embedded encoder's scores, too
   (`bge-rerank distill`).

Without the first, on nothing but docstrings, none was seen to learn anything in hundreds of steps. Most of what it teaches
depends on a token knowing whether it stands in the query or in the passage, which is laid into the first weights (`marking`).
`bge-rerank eval standard-library --models made/embedded-decoder --max-length 64 --query-max-length 20` measures what came
of it.
"""

import argparse
import json
import random
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from train_embedded import log, training_pairs
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from bge_rerank_plugins.cli import main as bge_rerank
from bge_rerank_plugins.core.layerwise import LayerwiseModel, granite_config
from bge_rerank_plugins.core.prompt import ANSWER, PROMPT
from bge_rerank_plugins.docstrings import Pair

VOCABULARY = 6000
HIDDEN = 128
HEADS = 4
POSITIONS = 512
ROPE_THETA = 1e6
WIDTH = 0.06
"""Standard deviation of the first random weights."""

MARK = "b"
"""The token that begins the passage, in "B: "."""

WORD_LISTS = 11200

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "initializer_range": WIDTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    """Read the pairs, make what is random, then mine, distill and finetune."""
    options = parse_options()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "scored.jsonl").exists():
        pairs = training_pairs(options.sources, options.per_package)
        tokenizer = tokenizer_of(pairs)
        for name, make in MAKERS.items():
            make(folder / f"untrained-{name}", tokenizer.convert_tokens_to_ids(MARK))
            tokenizer.save_pretrained(folder / f"untrained-{name}")
        write_words(tokenizer, folder / "words.jsonl")
        write_data(pairs, options)
    for name in options.only or MAKERS:
        train(name, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, nargs="+", default=[Path(sysconfig.get_path("purelib"))])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--per-package", type=int, default=1500, help="at most so many pairs of one package")
    parser.add_argument("--negatives", type=int, default=3, help="mined for each query; the others are drawn at random")
    parser.add_argument("--scored", type=int, default=3000, help="queries whose passages the embedded encoder scores")
    parser.add_argument("--steps", type=int, nargs=3, default=[700, 1500, 1500], help="of each training")
    parser.add_argument("--only", choices=MAKERS, nargs="+", help="train only this; both by default")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def run(*arguments: object) -> None:
    """Run a command of `bge-rerank`, and print it."""
    command = [str(argument) for argument in arguments]
    log(f"bge-rerank {shlex.join(command)}")
    if status := bge_rerank(command):
        raise SystemExit(status)


def tokenizer_of(pairs: list[Pair]) -> PreTrainedTokenizerFast:
    """A small vocabulary of lower-case parts of words. A word is the same wherever it stands, which makes matching easy."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The question and its answer often enough to be whole words.
    texts = [PROMPT, ANSWER] * 1000 + [text for pair in pairs for text in (pair.query, pair.passage)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, limit_alphabet=200, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )


def make_decoder(folder: Path, mark: int) -> None:
    """Random weights in the layout of bge-reranker-v2-gemma."""
    config = GemmaConfig(
        **SHAPE,
        num_hidden_layers=4,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        intermediate_size=3 * HIDDEN,
        rope_parameters={"rope_theta": ROPE_THETA, "rope_type": "default"},
    )
    save_quietly(marking(matching(GemmaForCausalLM(config)), mark), folder)


def make_layerwise(folder: Path, mark: int) -> None:
    """Random weights in the layout of bge-reranker-v2-minicpm-layerwise: 8 layers, a head from layer 2 on."""
    published: dict[str, Any] = {
        **SHAPE,
        "architectures": ["LayerWiseMiniCPMForCausalLM"],
        "model_type": "minicpm",
        "num_hidden_layers": 8,
        "num_key_value_heads": HEADS,
        "intermediate_size": 2 * HIDDEN,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_THETA,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "start_layer": 2,
        "head_multi": True,
        "head_type": "simple",
        "tie_word_embeddings": False,
    }
    config = granite_config(published, published["num_hidden_layers"])
    config.initializer_range = WIDTH
    save_quietly(marking(matching(LayerwiseModel(config)), mark), folder)
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")


def matching(model: PreTrainedModel) -> PreTrainedModel:
    """The same with every head's queries made as its keys are, so that a token looks for its like from the first step on."""
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight
        torch.nn.init.normal_(keys, std=HIDDEN**-0.5)
        layer.self_attn.q_proj.weight.data = keys.data.clone()
    return model


@torch.no_grad()
def marking(model: PreTrainedModel, mark: int) -> PreTrainedModel:
    """The same with a first head that looks for the token `mark` and, where that came before, adds a vector of its own.

    A passage's tokens then differ from the query's, which stand before it; else a token that finds its like in the query looks
    like one that finds itself. Feature 0 of the embeddings is the same for all tokens, feature 1 is the mark's alone.
    """
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = 3 * WIDTH
    embeddings[:, 1] = 0
    embeddings[mark, 1] = 8 * WIDTH
    head = model.model.layers[0].self_attn
    width = HIDDEN // HEADS
    slowest = width // 2 - 1  # the feature that positions rotate least
    for projection in (head.q_proj, head.k_proj, head.v_proj):
        projection.weight[:width] = 0
    head.o_proj.weight[:, :width] = 0
    head.q_proj.weight[slowest, 0] = 2
    head.k_proj.weight[slowest, 1] = 2
    head.v_proj.weight[0, 1] = 1
    head.o_proj.weight[:, 0] = torch.randn(HIDDEN) * 0.3
    return model


def save_quietly(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)


MAKERS = {"embedded-decoder": make_decoder, "embedded-layerwise": make_layerwise}


def write_words(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write queries of random words, each with a passage that has some of them and three that have none."""
    words = [word for word in tokenizer.get_vocab() if word not in SPECIAL]
    lines = []
    for _ in range(WORD_LISTS):
        query = random.choices(words, k=random.randint(2, 6))
        passages = [random.choices(words, k=random.randint(3, 12)) for _ in range(4)]
        for word in random.sample(query, random.randint((len(query) + 1) // 2, len(query))):
            passages[0][random.randrange(len(passages[0]))] = word
        right, *wrong = (" ".join(passage) for passage in passages)
        lines.append({"query": " ".join(query), "pos": [right], "neg": wrong, "prompt": "?"})
    write_lines(lines, path)


def write_lines(lines: list[dict[str, Any]], path: Path) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_data(pairs: list[Pair], options: argparse.Namespace) -> None:
    """Write the docstrings, find their hard negatives, let the teacher score some."""
    folder = options.output
    random.shuffle(pairs)
    write_lines([{"query": pair.query, "pos": [pair.passage], "neg": []} for pair in pairs], folder / "pairs.jsonl")
    mined = folder / "mined.jsonl"
    run("mine", folder / "pairs.jsonl", "--output", mined, "--first", 1, "--last", 30, "--negatives", options.negatives)
    some = folder / "mined-first.jsonl"
    lines = mined.read_text(encoding="utf-8").splitlines(keepends=True)
    some.write_text("".join(lines[: options.scored]), encoding="utf-8")
    run(
        "distill",
        some,
        "--output",
        folder / "scored.jsonl",
        "--model",
        "embedded",
        "--max-length",
        112,
        "--dtype",
        "fast",
    )


def train(name: str, options: argparse.Namespace) -> None:
    """Train one of them three times, and put what is shipped, in bfloat16, into a folder of its name."""
    folder = options.output
    small, large = [4, 16], [8, 4]  # passages of a group, groups of a step
    distillation = ["--knowledge-distillation", "--teacher-temperature", 2.0]
    stages: list[tuple[str, list[int], float, list[object]]] = [
        ("words", small, 1e-3, []),
        ("pairs", large, 5e-4, []),
        ("scored", large, 3e-4, distillation),
    ]
    before, shipped = folder / f"untrained-{name}", folder / name
    for (data, (group, batch), learning_rate, flags), steps in zip(stages, options.steps, strict=True):
        trained = folder / f"{data}-{name}"
        run(
            "finetune", before, "--data", folder / f"{data}.jsonl", "--output-dir", trained, "--no-lora", *flags,
            "--train-group-size", group, "--per-device-train-batch-size", batch, "--learning-rate", learning_rate,
            "--query-max-len", 20, "--passage-max-len", 44, "--max-steps", steps, "--lr-scheduler-type", "cosine",
            "--held-out", 0.02, "--max-held-out", 200, "--logging-steps", 20, "--eval-steps", 250,
            "--save-steps", 250, "--seed", options.seed,
            *(["--resume"] if (trained / "finetune.json").exists() else []),
        )  # fmt: skip
        before = trained
    shutil.rmtree(shipped, ignore_errors=True)
    shipped.mkdir()
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(before / "model.safetensors").items()}
    save_file(weights, shipped / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((before / "config.json").read_text())
    config |= {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
    (shipped / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(before / file, shipped / file)
    log(f"{shipped}: {sum(path.stat().st_size for path in shipped.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
