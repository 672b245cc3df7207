"""Make the embedded LLM rerankers: a tiny decoder of Gemma's layout and a layerwise one of MiniCPM's.

    pip install "bge-rerank-plugins[demo,finetune]"
    python examples/make_embedded_llms.py --sources path/to/site-packages --output made

Everything is made of docstrings of installed packages: the tokenizer, the queries and the passages, read and kept apart
from the standard library's as in `train_embedded.py`. From random weights, `bge-rerank finetune` lets both learn from the
embedded encoder, whose scores `bge-rerank distill` writes beside the negatives that `bge-rerank mine` finds. The commands
are printed as they are run.
`evaluate_embedded.py --models made/embedded-decoder` measures what came of it.

No checkpoint of it is in the package yet: 400 steps of 4 queries, which is what was tried, left the decoder's loss where it
began. The defaults are larger and have not been run.
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
WIDTH = 0.06
"""Standard deviation of the first random weights."""

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
    options.output.mkdir(parents=True, exist_ok=True)
    scored = options.output / "scored.jsonl"
    untrained = {name: options.output / f"untrained-{name}" for name in MAKERS}
    if not scored.exists():
        pairs = training_pairs(options.sources, options.per_package)
        tokenizer = tokenizer_of(pairs)
        for name, make in MAKERS.items():
            make(untrained[name])
            tokenizer.save_pretrained(untrained[name])
        write_data(pairs, options)
    for name in options.only or MAKERS:
        train(name, untrained[name], scored, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, nargs="+", default=[Path(sysconfig.get_path("purelib"))])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--per-package", type=int, default=1500, help="at most so many pairs of one package")
    parser.add_argument("--queries", type=int, default=20000, help="so many of the pairs, drawn at random")
    parser.add_argument("--negatives", type=int, default=3, help="mined for each query; the others are drawn at random")
    parser.add_argument(
        "--scored", type=int, default=20000, help="so many of them, the first, are scored and trained on"
    )
    parser.add_argument("--steps", type=int, default=20000)
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


def make_decoder(folder: Path) -> None:
    """Random weights in the layout of bge-reranker-v2-gemma."""
    config = GemmaConfig(
        **SHAPE, num_hidden_layers=4, num_key_value_heads=1, head_dim=HIDDEN // HEADS, intermediate_size=3 * HIDDEN
    )
    save_quietly(matching(GemmaForCausalLM(config)), folder)


def make_layerwise(folder: Path) -> None:
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
        "rope_theta": 10000.0,
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
    save_quietly(matching(LayerwiseModel(config)), folder)
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")


def matching(model: PreTrainedModel) -> PreTrainedModel:
    """The same with every head's queries made as its keys are, so that a token looks for its like from the first step on.

    That is most of what a reranker this small can learn, and from other random weights it takes much longer.
    """
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight
        torch.nn.init.normal_(keys, std=HIDDEN**-0.5)
        queries = layer.self_attn.q_proj.weight
        queries.data = keys.data.repeat(len(queries) // len(keys), 1)
    return model


def save_quietly(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)


MAKERS = {"embedded-decoder": make_decoder, "embedded-layerwise": make_layerwise}


def write_data(pairs: list[Pair], options: argparse.Namespace) -> None:
    """Write the lines, find their hard negatives, let the teacher score them."""
    folder = options.output
    chosen = random.sample(pairs, min(options.queries, len(pairs)))
    lines = [{"query": pair.query, "pos": [pair.passage], "neg": []} for pair in chosen]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    mined = folder / "mined.jsonl"
    run("mine", folder / "pairs.jsonl", "--output", mined, "--first", 1, "--last", 30, "--negatives", options.negatives)
    some = folder / "mined-first.jsonl"
    some.write_text(
        "".join(mined.read_text(encoding="utf-8").splitlines(keepends=True)[: options.scored]), encoding="utf-8"
    )
    run("distill", some, "--output", folder / "scored.jsonl", "--model", "embedded", "--max-length", 112)


def train(name: str, untrained: Path, scored: Path, options: argparse.Namespace) -> None:
    """Train one of them, and put what is shipped, in bfloat16, into a folder of its name."""
    trained, shipped = options.output / f"trained-{name}", options.output / name
    run(
        "finetune", untrained, "--data", scored, "--output-dir", trained, "--no-lora", "--knowledge-distillation",
        "--teacher-temperature", 2.0, "--query-max-len", 20, "--passage-max-len", 44, "--train-group-size", 8,
        "--per-device-train-batch-size", 4, "--max-steps", options.steps, "--learning-rate", 3e-4,
        "--lr-scheduler-type", "cosine", "--held-out", 0.01, "--logging-steps", 20, "--eval-steps", 100,
        "--save-steps", 100, "--seed", options.seed,
        *(["--resume"] if (trained / "finetune.json").exists() else []),
    )  # fmt: skip
    shutil.rmtree(shipped, ignore_errors=True)
    shipped.mkdir()
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(trained / "model.safetensors").items()}
    save_file(weights, shipped / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / file, shipped / file)
    log(f"{shipped}: {sum(path.stat().st_size for path in shipped.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
