"""
HellaSwag: which of four endings does the model find most likely?

    python hellaswag.py                     download the 10,042 items (12 MB) and show the first one
    python train_gpt2.py --eval [--ckpt X]  the accuracies of a model
    (training a preset gpt2... measures the token mean every 250 steps)

Each item is the beginning of a story with four endings, one of which is right; the wrong ones were
written by a machine and chosen to deceive machines (Zellers et al. 2019). Chance is 0.25. Two ways
to measure are in use, whose acc_norm differs by 1.6 points on the same model:

    token mean   (build-nanogpt, llm.c)     context as it stands, then " " + ending
                 acc                        the lowest summed loss of an ending wins
                 acc_norm                   the lowest mean loss per token wins
    harness      (lm-evaluation-harness)    "activity: context", cleaned of WikiHow's markers
                 harness_acc                the lowest summed loss wins
                 harness_acc_norm           the lowest loss per character of the ending wins

For example: "A man is sitting on a roof. he" / "is using wrap to wrap a pair of skis." / "is
ripping level tiles off." / "is holding a rubik's cube." / "starts pulling up roofing on a roof."
(right).

Published for OpenAI's GPT-2 124M: token mean acc 0.2859, acc_norm 0.2955; harness acc 0.2892,
acc_norm 0.3114. With 10,042 items the standard error is 0.0046.

This file has the items and the counting. To read, in four minutes: what the model reads, how
likely it finds an ending, and the two ways to count.
"""
import hashlib
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests

import fineweb
from fineweb import UserError

# -----------------------------------------------------------------------------
# Rendering: what the model reads


@dataclass
class Item:
    """An example as the model sees it."""

    context: list[int]  # token ids
    endings: list[list[int]]  # of each of the four
    lengths: list[int]  # of each ending, by which its loss is divided for acc_norm
    label: int


def render(example, tokenizer, method="token mean"):
    """An example as token ids; the context and each ending are tokenized by themselves."""
    if method == "harness":
        return render_harness(example, tokenizer)
    context = tokenizer.encode_ordinary(example["ctx"])
    endings = [tokenizer.encode_ordinary(f" {ending}") for ending in example["endings"]]
    return Item(context, endings, [*map(len, endings)], example["label"])


# -----------------------------------------------------------------------------
# Scoring


def count_correct(items, losses):
    """How many items are right by summed loss and by loss / length. losses: (items, 4), in nats.

    The loss of an ending is how surprised the model is by its tokens, after the context:

        idx = torch.tensor([item.context + ending])                            # (1, T)
        logits, _ = model(idx)                                                 # (1, T, V)
        log_p = logits[0, :-1].log_softmax(-1)                                 # of the next token
        log_p = log_p.gather(1, idx[0, 1:, None])                              # of the right one
        loss = -log_p[-len(ending):].sum()

    train_gpt2.py's ending_losses() computes the context only once for its four endings (packing, in
    chapter 7, later; tested by test_endings_have_the_losses_of_one_at_a_time).
    """
    losses = np.asarray(losses, dtype=np.float64).reshape(-1, 4)
    labels = np.array([item.label for item in items], dtype=int)
    lengths = np.array([item.lengths for item in items]).reshape(-1, 4)
    by_sum = (losses.argmin(1) == labels).sum()
    by_mean = ((losses / lengths).argmin(1) == labels).sum()
    return int(by_sum), int(by_mean)


# =============================================================================
# From here on: tooling, for reference
# =============================================================================
# The harness's rendering


def render_harness(example, tokenizer):
    """render() as lm-evaluation-harness does it."""
    begin = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
    context = clean(begin)
    endings = [clean(ending) for ending in example["endings"]]
    spaces = context[len(context.rstrip()) :]  # the harness moves them to the endings
    tokens = [tokenizer.encode_ordinary(f"{spaces} {ending}") for ending in endings]
    lengths = [max(len(ending), 1) for ending in endings]  # in characters
    return Item(tokenizer.encode_ordinary(context.rstrip()), tokens, lengths, example["label"])


def clean(text):
    """The harness's removal of WikiHow's markers."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# -----------------------------------------------------------------------------
# The items, the report

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = Path("data/hellaswag/hellaswag_val.jsonl")


def load_examples():
    """The published validation items, downloaded once (12 MB); an OSError without a network."""
    if not FILE.exists():
        answer = requests.get(URL, timeout=30)
        answer.raise_for_status()
        with fineweb.atomic_write(FILE) as file:
            file.write(answer.content)
    content = FILE.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{FILE} is not the published file", "remove it, and try again")
    return [json.loads(line) for line in content.splitlines()]


def subset(examples, limit):
    """`limit` examples at random, always the same: the file begins with one kind of story."""
    return random.Random(0).sample(examples, min(limit or len(examples), len(examples)))


def report(acc, acc_norm, count, method):
    """A line of results, with the names that the head of this file gives them."""
    prefix = "harness_" if method == "harness" else ""
    error = math.sqrt(acc_norm * (1 - acc_norm) / count)  # the standard error
    scores = f"{prefix}acc {acc:.4f}, {prefix}acc_norm {acc_norm:.4f} ± {error:.4f}"
    return f"HellaSwag  {method:10} {scores} of {count:,} items"


def main():
    """The command at the top of this file."""
    fineweb.make_parser(__doc__).parse_args()
    examples = load_examples()
    tokenizer = fineweb.get_tokenizer(50257)
    print(f"{len(examples):,} items. The first one:")
    for method in ("token mean", "harness"):
        item = render(examples[0], tokenizer, method)
        print(f"\n{method}: {tokenizer.decode(item.context)!r}; ending {item.label} is right of")
        print(*map(tokenizer.decode, item.endings), sep="\n")


if __name__ == "__main__":
    fineweb.command_line(main)
