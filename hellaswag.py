"""
HellaSwag: which of four endings does the model find most likely?

    python hellaswag.py [FILE]              download the 10,042 items (12 MB) and show the first one
    python train_gpt2.py --eval [--ckpt X]  the accuracies of a model
    (training the preset gpt2 measures them every 250 steps)

Each item is the beginning of a story with four endings, one of which is right; the wrong ones were
written by a machine and chosen to deceive machines (Zellers et al. 2019). Chance is 0.25. Two ways
to measure are in use, which differ by 1.6 points on the same model:

    token mean   (build-nanogpt, llm.c)     context as it stands, then " " + ending
                 acc                        the lowest summed loss of an ending wins
                 acc_norm                   the lowest mean loss per token wins
    harness      (lm-evaluation-harness)    "activity: context", cleaned of WikiHow's markers
                 harness_acc                the lowest summed loss wins
                 harness_acc_norm           the lowest loss per character of the ending wins

Published for OpenAI's GPT-2 124M: token mean acc 0.2859, acc_norm 0.2955; harness acc 0.2892,
acc_norm 0.3114. With 10,042 items the standard error is 0.0046.

This file has the items and the counting; train_gpt2.py computes the losses of the endings.
"""
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fineweb
from fineweb import UserError

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = Path("data/hellaswag/hellaswag_val.jsonl")

# -----------------------------------------------------------------------------
# The items


def load_examples(path=None):
    """The published validation items, downloaded once, or those of another file: (items, note).

    Raises UserError when the file cannot be had or is not whole, and for a line that is no item.
    """
    if path is None:
        path = fineweb.download(URL, FILE, digest=SHA256)
    published = fineweb.file_digest(path, SHA256) == SHA256
    if path == FILE and not published:
        raise UserError(f"{path} is not the published file: remove it, or use --hellaswag {path}")
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            examples.append(parse(line, f"{path} line {number}"))
    if not examples:
        raise UserError(f"{path} has no items: name a file that has some")
    return examples, "" if published else f"{path}, not the published file"


def parse(line, where):
    """One line of the file as a dict, its label an integer; UserError when it is no item."""
    try:
        example = json.loads(line)
        texts = [example[key] for key in ("ctx", "ctx_a", "ctx_b", "activity_label")]
        texts += example["endings"]
        label = int(example["label"])
        if len(texts) != 8 or not texts[0] or not all(isinstance(t, str) for t in texts):
            raise ValueError
        if str(label) != str(example["label"]) or label not in range(4):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        fields = "ctx, ctx_a, ctx_b, activity_label, four endings and a label from 0 to 3"
        raise UserError(f"{where} is not an item with {fields}: get the file again") from None
    return example | {"label": label}


def subset(examples, limit):
    """`limit` examples at random, always the same: the file begins with one kind of story."""
    if limit is None:
        return examples
    return random.Random(0).sample(examples, min(limit, len(examples)))


# -----------------------------------------------------------------------------
# Rendering: what the model reads


@dataclass
class Item:
    """An example as the model sees it."""

    context: list[int]  # token ids
    endings: list[list[int]]  # of each of the four
    lengths: list[int]  # of each ending, by which its loss is divided for acc_norm
    label: int


def render(example, tokenizer, harness=False):
    """An example as token ids; the context and each ending are tokenized by themselves."""
    encode = tokenizer.encode_ordinary
    context = example["ctx"]
    endings = example["endings"]
    if harness:
        begin = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
        context = clean(begin)
        endings = [clean(ending) for ending in endings]
    stripped = context.rstrip() if harness else context
    blanks = context[len(stripped) :]  # the harness moves them to the endings
    tokens = [encode(f"{blanks} {ending}") for ending in endings]
    lengths = [max(len(ending), 1) for ending in (endings if harness else tokens)]
    context = encode(stripped) or [tokenizer.eot_token]  # something has to stand before an ending
    return Item(context, tokens, lengths, example["label"])


def clean(text):
    """The harness's removal of WikiHow's markers."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# -----------------------------------------------------------------------------
# Scoring


def count_correct(items, losses):
    """How many items are right by summed loss and by loss / length. losses: (items, 4), in nats."""
    losses = np.asarray(losses, dtype=np.float64).reshape(-1, 4)
    labels = np.array([item.label for item in items], dtype=int)
    lengths = np.array([item.lengths for item in items]).reshape(-1, 4)
    by_sum = (losses.argmin(1) == labels).sum()
    by_mean = ((losses / lengths).argmin(1) == labels).sum()
    return int(by_sum), int(by_mean)


def report(scores, notes=()):
    """Lines for {"acc", "acc_norm", "harness_acc", "harness_acc_norm"} (or two of them) and "n"."""
    n = max(scores["n"], 1)
    lines = []
    for label, prefix in (("token mean", ""), ("harness", "harness_")):
        if f"{prefix}acc" in scores:
            acc = f"{prefix}acc {scores[f'{prefix}acc']:.4f}"
            norm = scores[f"{prefix}acc_norm"]
            error = math.sqrt(norm * (1 - norm) / n)
            counts = f"({round(norm * n):,} of {scores['n']:,})"
            lines.append(
                f"HellaSwag  {label:10} {acc}, {prefix}acc_norm {norm:.4f} ± {error:.4f} {counts}")
    if scores["skipped"]:
        lines.append(f"{scores['skipped']:,} items skipped: an ending is longer than the context")
    return "\n".join([*lines, *notes])


def main():
    """The command at the top of this file."""
    parser = fineweb.ArgumentParser(__doc__)
    parser.add_argument("file", nargs="?", help="another file of items")
    args = parser.parse_args()
    examples, note = load_examples(args.file)
    tokenizer = fineweb.get_tokenizer("gpt2")
    print(f"{len(examples):,} items. {note}\nThe first one:")
    for label, harness in (("token mean", False), ("harness", True)):
        item = render(examples[0], tokenizer, harness)
        context = tokenizer.decode(item.context)
        print(f"\n{label}\n  context ({len(item.context)} tokens)  {context}")
        for k, ending in enumerate(item.endings):
            mark = "right" if k == item.label else ""
            print(f"  {mark:5} ({len(ending):2} tokens)   {tokenizer.decode(ending)}")


if __name__ == "__main__":
    fineweb.command_line(main)
