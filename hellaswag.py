"""
HellaSwag: which of four endings does the model find most likely?

    python hellaswag.py [FILE]                 fetch the 10,042 validation items (12 MB), check them, show one as the model sees it
    python train_gpt2.py --eval [--ckpt …]     the accuracies of a model
    (training the preset gpt2 measures it every 250 steps)

Each item is the beginning of a story with four endings, one of them right; the wrong ones were written by a machine and chosen to
deceive machines (Zellers et al. 2019). Chance is 0.25. There are two ways to measure it, which differ by 1.6 points on the same model:

    token mean   (build-nanogpt, llm.c)       context as it stands, then " " + ending
                 acc: the lowest summed loss of an ending wins         acc_norm: the lowest mean loss for each of its tokens wins
    harness      (lm-evaluation-harness)      "activity: context", brackets and double blanks removed
                 harness_acc: the lowest summed loss wins              harness_acc_norm: … divided by the ending's length in characters

Published for OpenAI's GPT-2 124M: token mean acc 0.2859, acc_norm 0.2955; harness acc 0.2892, acc_norm 0.3114. With 10,042 items the
standard error is 0.0046.
"""
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed

import fineweb
from fineweb import UserError

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = Path("data/hellaswag/hellaswag_val.jsonl")

# ---------------------------------------------------------------------------------------------------------------------
# The items


def load_examples(path=None):
    """(examples, note): the published validation items, fetched once; or those of a file that is named, with a note if it is another.

    Raises UserError without a network and a file, when the file is not whole, or when a line is no item (with its number).
    """
    if path is None:
        path = fineweb.download(URL, FILE, digest=SHA256)
        if fineweb.file_digest(path, SHA256) != SHA256:
            raise UserError(f"{path} is not the published file: remove it and it is fetched again, or name it with --hellaswag {path}")
    lines = Path(path).read_bytes().splitlines()
    examples = [parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise UserError(f"{path} has no items: name a file that has some")
    return examples, "" if fineweb.file_digest(path, SHA256) == SHA256 else f"{path}, not the published file"


def parse(line, where):
    """One item of the file as a dict; UserError when it is none."""
    try:
        example = json.loads(line)
        texts = [example[key] for key in ("ctx", "ctx_a", "ctx_b", "activity_label")] + list(example["endings"])
        if len(texts) != 8 or not all(isinstance(text, str) for text in texts) or example["label"] not in (0, 1, 2, 3) or not example["ctx"]:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} is no HellaSwag item with ctx, ctx_a, ctx_b, activity_label, label and four endings: fetch the file again") from None
    return example


def subset(examples, limit):
    """`limit` of the examples, the same ones every time, drawn at random: the file begins with one kind of story."""
    return random.Random(0).sample(examples, min(limit, len(examples))) if limit else examples


@dataclass
class Item:
    """An example as the model sees it."""
    context: list[int]
    endings: list[list[int]]      # four
    characters: list[int]         # length of each ending, as the harness counts
    label: int


def render(example, tokenizer, harness=False):
    """The Item of an example: the context's tokens, and those of each ending with a blank before it, each text tokenised by itself."""
    if harness:
        context = clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
        endings = [clean(ending) for ending in example["endings"]]
    else:
        context, endings = example["ctx"], example["endings"]
    return Item(tokenizer.encode_ordinary(context), [tokenizer.encode_ordinary(" " + ending) for ending in endings], [max(len(ending), 1) for ending in endings],
                int(example["label"]))


def clean(text):
    """The harness's cleaning of WikiHow's markers."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


# ---------------------------------------------------------------------------------------------------------------------
# Many items at once. The four endings stand one after the other behind their context, which is computed once:
#
#     tokens       c1 c2 c3 | a1 a2 | b1 b2 b3 | …        positions  0 1 2 | 3 4 | 3 4 5 | …
#     part          0  0  0    1  1    2  2  2            a token sees its context and its own ending
#
# Logits are needed where an ending's token is predicted, nowhere else. Items of like length are computed together.

CPU_BATCH, GPU_BATCH = 1_024, 16_384        # about so many tokens at once: on a CPU little padding is worth more than many rows
ROUND = 8                        # lengths are rounded up to a multiple: few shapes, and such as matrix units like


def pack(items, block_size):
    """Tensors of a batch of items: idx, positions (B, T), mask (B, 1, T, T), source and targets (B, N), ending (B, N) with -1 for padding."""
    contexts = [item.context[-(block_size - max(map(len, item.endings))):] for item in items]        # too long: cut from the left
    T = max(len(c) + sum(map(len, item.endings)) for c, item in zip(contexts, items))
    N = max(sum(map(len, item.endings)) for item in items)
    T, N = (-(-n // ROUND) * ROUND for n in (T, N))
    idx, positions, part = np.zeros((len(items), T), np.int64), np.zeros((len(items), T), np.int64), np.full((len(items), T), -1)
    source, targets, ending = np.zeros((len(items), N), np.int64), np.full((len(items), N), -100), np.full((len(items), N), -1)
    for b, (context, item) in enumerate(zip(contexts, items)):
        t, n, c = len(context), 0, len(context)
        idx[b, :c], positions[b, :c], part[b, :c] = context, np.arange(c), 0
        for k, tokens in enumerate(item.endings):
            e = len(tokens)
            idx[b, t:t + e], positions[b, t:t + e], part[b, t:t + e] = tokens, np.arange(c, c + e), k + 1
            targets[b, n:n + e], ending[b, n:n + e], source[b, n], source[b, n + 1:n + e] = tokens, k, c - 1, np.arange(t, t + e - 1)
            t, n = t + e, n + e
    mask = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    mask &= np.tril(np.ones((T, T), bool))
    return tuple(map(torch.from_numpy, (idx, positions, mask[:, None], source, targets, ending)))


@torch.no_grad()
def ending_losses(model, items, device):
    """The summed loss in nats of each ending of each item, (len(items), 4) in float64, in the order of `items`."""
    batch = CPU_BATCH if torch.device(device).type == "cpu" else GPU_BATCH
    size = [len(item.context) + sum(map(len, item.endings)) for item in items]
    order, losses, begin = np.argsort(size, kind="stable")[::-1], np.zeros((len(items), 4)), 0       # the longest first: memory that is short is short at once
    while begin < len(items):
        chosen = order[begin:begin + max(1, batch // size[order[begin]])]
        idx, positions, mask, source, targets, ending = (t.to(device) for t in pack([items[i] for i in chosen], model.config.block_size))
        h = model.decode(model.embed(idx, positions), mask)                      # (B, T, C)
        h = h.gather(1, source[:, :, None].expand(-1, -1, h.size(-1)))           # (B, N, C)
        loss, ending = model.loss(h, targets, "none").cpu().double(), ending.cpu()             # (B, N)
        losses[chosen] = torch.stack([(loss * (ending == k)).sum(1) for k in range(4)], 1).numpy()
        begin += len(chosen)
    return losses


def evaluate(model, tokenizer, examples, device, harness=False):
    """Accuracies of a model on examples: {"acc", "acc_norm", "n", "skipped"}, with harness=True also {"harness_acc", "harness_acc_norm"}.

    model: the raw module, on `device`, within autocast if its products are to be in bf16. With several processes each takes a share.
    "skipped": items with an ending longer than the model's context, which cannot be scored.
    """
    scores = {}
    for prefix in ("", "harness_") if harness else ("",):
        items = rendered(examples, tokenizer, bool(prefix))
        fitting = [item for item in items if max(map(len, item.endings)) < model.config.block_size]
        rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        mine = fitting[rank::processes]
        losses = ending_losses(model, mine, device)
        lengths = np.array([item.characters if prefix else list(map(len, item.endings)) for item in mine]).reshape(-1, 4)
        labels = np.array([item.label for item in mine], dtype=int)
        right = torch.tensor([(losses.argmin(1) == labels).sum(), ((losses / lengths).argmin(1) == labels).sum()], device=device, dtype=torch.float32)
        if processes > 1:
            distributed.all_reduce(right)
        acc, acc_norm = (right / max(len(fitting), 1)).tolist()
        scores |= {f"{prefix}acc": acc, f"{prefix}acc_norm": acc_norm}
    return {**scores, "n": len(fitting), "skipped": len(items) - len(fitting)}


_RENDERED = {}


def rendered(examples, tokenizer, harness):
    """The examples' Items; tokenised once in a run. The examples are kept beside them, so that their id stays theirs."""
    key = id(examples), tokenizer.name, harness
    if key not in _RENDERED:
        _RENDERED[key] = examples, [render(example, tokenizer, harness) for example in examples]
    return _RENDERED[key][1]


def report(scores, note=""):
    """The accuracies as lines, with their counts and standard errors."""
    lines, n = [], scores["n"]
    for label, key in (("token mean", ""), ("harness", "harness_")):
        if f"{key}acc" in scores:
            acc, norm = scores[f"{key}acc"], scores[f"{key}acc_norm"]
            error = math.sqrt(norm * (1 - norm) / max(n, 1))
            lines.append(f"HellaSwag  {label:10} {key}acc {acc:.4f}, {key}acc_norm {norm:.4f} ± {error:.4f} ({round(norm * n):,} of {n:,})")
    skipped = [f"{scores['skipped']:,} items left out: an ending is longer than the context"] if scores["skipped"] else []
    return "\n".join([*lines, *skipped, *([note] if note else [])])


def main():
    """The command at the top of this file."""
    parser = fineweb.Parser(__doc__)
    parser.add_argument("file", nargs="?", help="another file of items")
    args = parser.parse_args()
    examples, note = load_examples(args.file)
    tokenizer = fineweb.get_tokenizer("gpt2")
    print(f"{len(examples):,} items{f' ({note})' if note else ''}. The first one:")
    for label, harness in (("token mean", False), ("harness", True)):
        item = render(examples[0], tokenizer, harness)
        print(f"\n{label}\n  context ({len(item.context)} tokens)  {tokenizer.decode(item.context)}")
        for k, ending in enumerate(item.endings):
            print(f"  {'right' if k == item.label else '     '} ({len(ending):2} tokens)   {tokenizer.decode(ending)}")


if __name__ == "__main__":
    fineweb.command_line(main)
