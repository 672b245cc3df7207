"""Train the embedded model: a LoRA adapter that makes a cross-encoder of a small sentence embedding model.

    pip install "bge-rerank-plugins[demo]" peft
    python examples/train_embedded.py --sources path/to/site-packages --output adapter

The first sentence of a docstring is the query, its name and the rest the passage; the negatives are what BM25 ranks
highest besides it. The docstrings are those of installed packages, read without importing them. Nothing that the
standard library says is trained on, as that is what the demo searches and `bge-rerank eval standard-library` measures on.
Needs a C++ compiler, for `torch.compile`.
"""

import argparse
import json
import os
import random
import re
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bm25s
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from bge_rerank_plugins.docstrings import Pair, source_docstrings, split, standard_library
from bge_rerank_plugins.models import BASE_MODEL, embedded_base

NEGATIVES = 7
NEGATIVES_FROM_TOP = 20
MAX_LENGTH = 112
WARMUP_STEPS = 100
SHINGLE_WORDS = 6
REPORT_EVERY = 50
_WORD = re.compile(r"\w+")

# A query and its passages, the one that answers it first.
RankingList = tuple[str, list[str]]


def main() -> None:
    """Read the pairs, find their negatives, train."""
    options = parse_options()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    examples = training_pairs(options.sources, options.per_package)
    log(f"{len(examples)} training pairs")
    order = query_order(len(examples), options.steps * options.queries)
    lists = ranking_lists(examples, order)
    if options.lines is None:
        train(lists, options)
    else:
        write_lines(lists, options.lines)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, nargs="+", default=[Path(sysconfig.get_path("purelib"))])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="train, and write the adapter there")
    what.add_argument("--lines", type=Path, help="write the data of `bge-rerank finetune` there instead")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--queries", type=int, default=6, help="queries a step, each with its passage and 7 others")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--per-package", type=int, default=1500, help="at most so many pairs of one package")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores that share a step's queries")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def log(message: str) -> None:
    """Print with the time of day."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


# ------------------------------------------------------------------------------------------------------- the data


def training_pairs(sources: list[Path], per_package: int) -> list[Pair]:
    """Read the pairs of all packages, without what the standard library says too and without repeated queries."""
    held_out = HeldOut()
    by_package: dict[str, dict[str, Pair]] = defaultdict(dict)
    for docstring in (found for folder in sources for found in source_docstrings(folder)):
        pair = split(docstring)
        if pair is not None and not held_out.has(pair, docstring.text):
            by_package[docstring.name.partition(".")[0]].setdefault(normal(pair.query), pair)
    by_query: dict[str, Pair] = {}
    for package, found in sorted(by_package.items()):
        chosen = random.sample(list(found.values()), min(per_package, len(found)))
        log(f"{package}: {len(chosen)} of {len(found)} pairs")
        for pair in chosen:
            by_query.setdefault(normal(pair.query), pair)
    return list(by_query.values())


class HeldOut:
    """What the standard library says, to be kept out of the training data; packages do copy parts of it."""

    def __init__(self) -> None:
        docstrings = standard_library()
        self.texts = {normal(docstring.text) for docstring in docstrings}
        self.queries = {normal(pair.query) for pair in map(split, docstrings) if pair is not None}
        self.shingles = {shingle for docstring in docstrings for shingle in shingles(docstring.text)}

    def has(self, pair: Pair, text: str) -> bool:
        """Whether the query or the text is in the standard library, or a fifth of the text's runs of words are."""
        own = shingles(text)
        return (
            normal(pair.query) in self.queries
            or normal(text) in self.texts
            or len(own & self.shingles) > 0.2 * len(own)
        )


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def normal(text: str) -> str:
    """A text without what does not make it another one: case, punctuation, white space."""
    return " ".join(words(text))


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of `SHINGLE_WORDS` words."""
    found = words(text)
    return {tuple(found[i : i + SHINGLE_WORDS]) for i in range(len(found) - SHINGLE_WORDS + 1)}


def query_order(pairs: int, queries: int) -> list[int]:
    """Every pair once in random order, then once more, as often as the steps need."""
    order: list[int] = []
    while len(order) < queries:
        order += random.sample(range(pairs), pairs)
    return order[:queries]


def ranking_lists(examples: list[Pair], order: list[int]) -> list[RankingList]:
    """Give each query its own passage and negatives drawn from the top of BM25's ranking."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize([pair.passage for pair in examples], show_progress=False), show_progress=False)
    queries = bm25s.tokenize([examples[i].query for i in order], show_progress=False)
    ranked, _ = index.retrieve(queries, k=NEGATIVES_FROM_TOP, show_progress=False)
    lists = []
    for own, row in zip(order, ranked.tolist(), strict=True):
        others = [i for i in row if i != own and not alike(examples[own], examples[i])]
        if len(others) >= NEGATIVES:
            chosen = [own, *random.sample(others, NEGATIVES)]
            lists.append((examples[own].query, [examples[i].passage for i in chosen]))
    log(f"{len(lists)} of {len(order)} queries have enough negatives")
    return lists


def alike(a: Pair, b: Pair) -> bool:
    """Whether a passage may answer the other's query as well, so that it is no negative."""
    return overlap(a.query, b.query) > 0.6 or overlap(a.passage, b.passage) > 0.7


def overlap(a: str, b: str) -> float:
    """The share of words that two texts have in common."""
    first, second = set(words(a)), set(words(b))
    return len(first & second) / len(first | second)


def write_lines(lists: list[RankingList], path: Path) -> None:
    """Write the lists as training data in the model cards' format."""
    lines = [{"query": query, "pos": passages[:1], "neg": passages[1:]} for query, passages in lists]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# --------------------------------------------------------------------------------------------------- the training


def train(lists: list[RankingList], options: argparse.Namespace) -> None:
    """Train the adapter with listwise cross-entropy, and save it every so many steps."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    model = untrained_model()
    forward = torch.compile(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = len(lists) // options.queries
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)

    def backward(part: list[RankingList]) -> float:
        """Add the gradients of a part of a step's lists, and return its part of the step's mean loss."""
        torch.set_num_threads(1)
        logits = score(forward, tokenizer, part)
        target = torch.zeros(len(part), dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum") / options.queries
        loss.backward()
        return loss.item()

    # A part of the step for each core. With torch's own threads the cores wait for each other at every operation,
    # which was several times slower on a machine that does other work too.
    workers = ThreadPoolExecutor(options.threads)
    losses: list[float] = []
    for step in range(1, steps + 1):
        batch = lists[(step - 1) * options.queries : step * options.queries]
        optimizer.zero_grad()
        losses.append(sum(workers.map(backward, (batch[i :: options.threads] for i in range(options.threads)))))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0:
            log(f"step {step}/{steps}: loss {sum(losses[-REPORT_EVERY:]) / REPORT_EVERY:.3f}")
        if step % options.save_every == 0 or step == steps:
            save(model, options.output)


def untrained_model() -> PeftModel:
    """The base model with a new classifier and an adapter that does nothing yet."""
    # On a CPU the backward pass of plain attention is faster than that of scaled_dot_product_attention.
    base = AutoModelForSequenceClassification.from_pretrained(
        embedded_base(), num_labels=1, attn_implementation="eager"
    )
    adapter = LoraConfig(
        task_type=TaskType.SEQ_CLS,  # which trains and saves the classifier, too
        r=16,
        lora_alpha=32,
        target_modules=["query", "key", "value", "dense"],
    )
    # Without dropout: most pairs are seen once, so there is little to overfit.
    return get_peft_model(base, adapter).eval()


def score(forward: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, lists: list[RankingList]) -> torch.Tensor:
    """The logits of all pairs. *Shape:* (lists, 1 + NEGATIVES), the right passage first."""
    inputs = tokenizer(
        [query for query, passages in lists for _ in passages],
        [passage for _, passages in lists for passage in passages],
        truncation="longest_first",
        max_length=MAX_LENGTH,
        padding="max_length",  # most pairs are cut at that length, and one shape is compiled once
        return_tensors="pt",
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = forward(**inputs).logits
    return logits.float().view(len(lists), 1 + NEGATIVES)


def save(model: PeftModel, folder: Path) -> None:
    """Save the adapter as PEFT does, with the base model's name on the hub instead of its path on this machine."""
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": BASE_MODEL}
    said = {name: value for name, value in settings.items() if value not in (None, False, {}, [])}
    config.write_text(
        json.dumps(said, indent=2) + "\n"
    )  # options that are off would be unknown to older versions of peft
    log(f"saved {folder}")


if __name__ == "__main__":
    main()
