"""
GPT-2 from scratch: the model, how it is trained, and what can be done with it.

    python train_gpt2.py                              train: toy data; with a GPU and shards, 124M
    python train_gpt2.py --sample "Once upon a time"  continue a text
    python train_gpt2.py --eval                       validation loss and HellaSwag
    python train_gpt2.py --export-hf DIR              a folder that transformers loads
    torchrun --nproc_per_node=8 train_gpt2.py ...     the same run on eight GPUs

The same command continues an interrupted run. A run lives in runs/<preset>/: ckpt.pt, log.csv,
curves.png, samples.txt.

The toy run is not GPT-2's recipe: in its few minutes it learns to look things up only with Muon, a
rate that is flat, then falls linearly, and positions that begin as sinusoids (chapters 4 and 7).
`--preset gpt2` is GPT-3's recipe: AdamW, a cosine, positions that begin at random.

To read, in an evening: 1 the model, 2 generation, 3 data, 4 the recipe, 5 training, 6 packing,
7 Muon and sinusoids. After the banner, for another evening: the loss in chunks. For reference:
evaluation, using a model, devices and processes, the folder of a run, the command line.

Letters beside the code: B batch, T time (tokens), C width, nh heads, hs head size, V vocabulary,
P prefix, N targets of a row. GPT-2: Radford et al. 2019, which tells little of how it was trained;
the recipe is GPT-3's (Brown et al. 2020).
"""
import contextlib
import csv
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fineweb
import hellaswag
from fineweb import UserError, number

# -----------------------------------------------------------------------------
# 1. The model


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2; by default that of the smallest, with 124 M parameters."""

    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50257  # tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    init_std: float = 0.02
    sinusoids: bool = False  # positions begin as waves (chapter 7)


class CausalSelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2): nh heads side by side."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        if cache is not None:  # chapter 2
            k, v = cache.extend(k, v)  # (B, nh, all so far, hs)
        # a single new position may see everything so far, so it needs no causal mask
        y = attention(q, k, v, mask, is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


recorded = None  # a list only while caption.py draws attention: the plain form adds its weights


def attention(q, k, v, mask=None, is_causal=False):
    """For each query the mean of the values, weighted by how well their keys match it.

    All are (B, nh, length, hs). FlashAttention (Dao et al. 2022) computes the same as the plain
    form below, but in tiles, and never stores the scores; PyTorch chooses it on GPUs (tested by
    test_decoder_equals_a_plain_float64_one and test_recorded_attention_is_the_fused_one).
    """
    if recorded is None:  # nearly always
        return fused_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, queries, keys)
    if is_causal:
        mask = torch.ones_like(scores, dtype=torch.bool).tril()  # causal mask: not the future
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1)
    recorded.append(weights)
    return weights @ v


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, n_embd):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # GPT-2 has the tanh approximation
        return self.c_proj(x)


class Block(nn.Module):
    """Attention gathers from other positions, the MLP works on each position by itself."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config.n_embd)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)  # residual connections: both add to x, and
        x = x + self.mlp(self.ln_2(x))  # read it through a LayerNorm (pre-norm)
        return x


class GPT(nn.Module):
    """GPT-2, with OpenAI's names of tensors."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = 64 * math.ceil(config.vocab_size / 64)  # more than V: multiples of 64 are faster
        self.wte = nn.Embedding(rows, config.n_embd)  # of tokens
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # of positions, learned
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        # weight tying: there is no separate head, logits() uses the token table (Press & Wolf 2017)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # residual scaling: 2 * n_layer of these add up in x (GPT-2, section 2.3)
                nn.init.normal_(p, std=config.init_std / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if config.sinusoids:
            self.wpe.weight.data = sinusoids(config.block_size, config.n_embd, config.init_std)

    def forward(self, idx, targets=None):
        """Token ids (B, T) to (logits (B, T, V), None); with targets to (None, mean loss)."""
        h = self.hidden_states(self.embed(idx))  # (B, T, C)
        if targets is None:
            return self.logits(h), None
        return None, self.loss(h, targets)  # the logits exist only in chunks: none to return

    def embed(self, idx, positions=None):
        """Token ids (B, T) to vectors (B, T, C). positions: (T,) or (B, T), default 0 ... T - 1."""
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        return self.wte(idx) + self.wpe(positions)

    def hidden_states(self, x, mask=None, cache=None, before_block=None):
        """Vectors (B, T, C) through all blocks: hidden states (B, T, C).

        Generation gives a KVCache for each block (chapter 2); packing a mask (B, 1, T, T), True
        where a position may attend (chapter 6); caption.py a function (i, x) -> x before block i.
        """
        for i, block in enumerate(self.h):
            if before_block is not None:
                x = before_block(i, x)
            x = block(x, mask, cache[i] if cache else None)
        return self.ln_f(x)

    def logits(self, h):
        """Hidden states (..., C) to logits (..., V), without the unused rows of the table."""
        return F.linear(h, self.wte.weight)[..., : self.config.vocab_size]

    def loss(self, h, targets, reduction="mean"):
        """Cross-entropy in nats: how surprised the model is by the targets (B, T). The plain form:

            logits = self.logits(h)                                       # (B, T, V)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        These logits take 13 GB for 64 x 1024 tokens; "The loss in chunks", behind the banner, keeps
        only a thirtieth at a time. reduction: "mean", "sum", or "none" for each target.
        """
        return cross_entropy(h, self.wte.weight, targets, self.config.vocab_size, reduction)


# -----------------------------------------------------------------------------
# 2. Generation


class KVCache:
    """The keys and values that a layer has computed so far, (B, nh, T, hs)."""

    k = v = None

    def extend(self, k, v):
        """Append those of new positions; returns all of them."""
        if self.k is not None:
            k = torch.cat([self.k, k], dim=2)
            v = torch.cat([self.v, v], dim=2)
        self.k = k
        self.v = v
        return k, v


@torch.no_grad()
def generate(model, idx, max_new_tokens, prefix=None, stop=-1, before_block=None, **sampling):
    """Continue token ids (B, T) by up to max_new_tokens: (B, T + new). The plain form:

        for _ in range(max_new_tokens):
            logits, _ = model(idx[:, -block_size:])          # everything again, for each token
            token = sample_token(logits[:, -1], temperature)
            idx = torch.cat([idx, token[:, None]], dim=1)

    Here a KV cache keeps what was computed, and a full context drops its older half, not one token
    (tested by test_cached_equals_uncached_beyond_the_context).
    stop: a token that ends its row, which is then filled up with it (-1: none). sampling: see
    sample_token(). For captions, to be skipped at first: prefix, vectors (B, P, C) before the ids,
    which then begin at position P (idx may be (B, 0)); before_block, see GPT.hidden_states().
    """
    P = 0 if prefix is None else prefix.size(1)
    room = model.config.block_size - P
    running = torch.ones(len(idx), dtype=torch.bool, device=idx.device)
    context = idx[:, -room:]
    cache = None
    for _ in range(max_new_tokens):
        if context.size(1) > room:
            # a cached key belongs to its position, so the cache cannot slide: drop the older half
            # and compute the rest again, which happens only once in room / 2 tokens
            context = context[:, -max(1, room // 2) :]
            cache = None
        positions = torch.arange(P, P + context.size(1), device=idx.device)
        if cache is None:  # prefill: keys and values of the whole context
            cache = [KVCache() for _ in model.h]
            x = model.embed(context, positions)  # (B, T, C)
            if prefix is not None:
                x = torch.cat([prefix, x], dim=1)  # (B, P + T, C)
        else:  # decode: only the newest token
            x = model.embed(context[:, -1:], positions[-1:])  # (B, 1, C)
        h = model.hidden_states(x, cache=cache, before_block=before_block)
        token = sample_token(model.logits(h[:, -1]).float(), **sampling)  # (B,)
        token = torch.where(running, token, stop)
        running &= token != stop
        idx = torch.cat([idx, token[:, None]], dim=1)
        context = torch.cat([context, token[:, None]], dim=1)
        if not running.any():
            break
    return idx


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token for each row of logits (B, V): (B,).

    temperature divides the logits; at 0 the most probable token is taken (greedy). top_k: only the
    k most probable (Fan et al. 2018). top_p: only the fewest whose probabilities reach p together
    (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature < 1e-3:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.double().softmax(dim=-1)  # in fp32 the sum of 50,257 is too rough
        before = probs.cumsum(dim=-1) - probs  # what the more probable ones reach together
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


# -----------------------------------------------------------------------------
# 3. Data
#
# The shards of a split are one long row of tokens, t0 t1 t2 ... It is cut into windows of T inputs;
# the targets are the same tokens, one place on. Each position predicts from what it sees so far:
#
#     inputs  x     t0  t1  t2  t3  |  t4  t5  t6  t7  |  ...        T = 4
#     targets y     t1  t2  t3  t4  |  t5  t6  t7  t8  |  ...
#
# An epoch is all windows in a random order that depends on (seed, epoch) alone. So any step of any
# run can be computed by itself, on any number of processes, and an interrupted run resumes exactly.


class TokenDataset:
    """The tokens of several shards in a row, memory-mapped."""

    def __init__(self, paths):
        self.paths = [Path(path) for path in paths]
        self.shards = [fineweb.read_shard(path) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        if len(self) < 2:
            folder = self.paths[0].parent
            raise UserError(f"{folder} has shards without text", "make them again (fineweb.py)")

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, stop):
        """Tokens start ... stop - 1 (int64), across shards; fewer where the row ends."""
        parts = []
        for shard, end in zip(self.shards, self.ends, strict=True):
            begin = int(end) - len(shard)
            if start < end and begin < stop:
                parts.append(shard[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts).astype(np.int64)

    def num_windows(self, T):
        """Windows of T inputs; each token but the first is a target in exactly one of them."""
        return math.ceil((len(self) - 1) / T)

    def get_batch(self, windows, T, vocab_size):
        """Inputs (B, T) of these windows, and as targets the next tokens; -100 after the end."""
        x = torch.zeros(len(windows), T, dtype=torch.long)
        y = torch.full((len(windows), T), -100)
        for row, window in enumerate(windows):
            tokens = torch.from_numpy(self.read(window * T, window * T + T + 1))
            if tokens.max() >= vocab_size:
                problem = f"{self.paths[0].parent} has token {tokens.max()} of {vocab_size:,}"
                raise UserError(problem, "its shards are for another tokenizer")
            x[row, : len(tokens[:T])] = tokens[:T]
            y[row, : len(tokens) - 1] = tokens[1:]
        return x, y


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, size):
    """The order of the `size` windows (or pictures) in an epoch, the same on every machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


def step_indices(seed, step, batch_size, size):
    """The windows (or pictures) of a step, which may cross the boundary of an epoch."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(seed, int(p // size), size)[p % size] for p in places])


def get_micro_batches(dataset, recipe, seed, config, step):
    """This process's part of a step: [(x (B, T), y (B, T), share of the step's targets), ...].

    Several processes (ranks) may train together: each takes its slice of the step's windows, and
    cuts it into micro-batches that fit into its memory.
    """
    T = config.block_size
    windows = step_indices(seed, step, recipe.batch_size // T, dataset.num_windows(T))
    targets = np.minimum(len(dataset) - 1 - windows * T, T).sum()  # T each, but for the last window
    batches = []
    for part in share_out(windows, recipe):
        x, y = pin(*dataset.get_batch(part, T, config.vocab_size))  # quick to copy to a GPU
        batches.append((x, y, (y >= 0).sum().item() / targets))
    return batches


def share_out(chosen, recipe):
    """This rank's windows (or pictures) of a step, in parts that are computed at once."""
    mine = np.array_split(chosen, world_size())[rank()]
    return np.array_split(mine, math.ceil(len(mine) / recipe.micro_batch))


# -----------------------------------------------------------------------------
# 4. The recipe


@dataclass(frozen=True)
class Recipe:
    """How something is trained: a GPT here, the bridges in caption.py."""

    max_steps: int
    batch_size: int  # tokens (bridges: pictures) for each update of the weights
    micro_batch: int  # windows (pictures) computed at once, at most; gradients are accumulated
    lr: float  # the highest learning rate
    warmup_steps: int
    cooldown: float = 0.0  # share of the steps in which the rate falls linearly; 0: a cosine
    muon: float = 0.0  # the rate of Muon's matrices as a multiple of lr; 0: AdamW for everything
    weight_decay: float = 0.1  # pulls matrices toward 0, so that none grows without need
    grad_clip: float = 1.0  # a longer gradient is scaled to this length: one bad batch does no harm
    eval_every: int = 250
    eval_tokens: int = 10_485_760  # the same whatever the batch size: losses can be compared
    log_every: int = 20


PRESETS = {  # T, V, layers, heads, C
    # 0.9 M parameters, for the toy data (with an init_std of .02 its loss stays on a plateau);
    # 16 M, for real text on a CPU
    "tiny": GPTConfig(fineweb.TOY_BLOCK, 431, 4, 4, 128, init_std=0.06, sinusoids=True),
    "small": GPTConfig(256, 50257, 4, 4, 256, init_std=0.04),
    # OpenAI's four sizes: 124 M (with two recipes), 355 M, 774 M and 1,558 M
    "gpt2": GPTConfig(1024, 50257, 12, 12, 768),
    "gpt2-fast": GPTConfig(1024, 50257, 12, 12, 768),
    "gpt2-medium": GPTConfig(1024, 50257, 24, 16, 1024),
    "gpt2-large": GPTConfig(1024, 50257, 36, 20, 1280),
    "gpt2-xl": GPTConfig(1024, 50257, 48, 25, 1600),
}
RECIPES = {  # steps, tokens a step, micro-batch, learning rate, warm-up steps
    # not GPT-2's recipe, which does not teach it to read maps in a few minutes: Muon, sinusoids,
    # and a rate that is flat, then falls linearly, do
    "tiny": Recipe(1_900, 1_536, 24, 1e-3, 40, cooldown=0.5, muon=20,
                   eval_every=190, eval_tokens=20_480),
    "small": Recipe(500, 8_192, 16, 2e-3, 50, eval_every=50, eval_tokens=16_384),
    # GPT-3's recipe: 19,073 steps of 524,288 tokens are 10.0 B, 715 of them 375 M. The larger sizes
    # have GPT-3's rates, and the same steps (its XL had steps of 1 M tokens)
    "gpt2": Recipe(19_073, 524_288, 16, 6e-4, 715),
    # Not yet run at full size. 4.5 B tokens with Muon at .01, a flat rate, then linear, no decay:
    # near record 4 of modded-nanogpt, which reached the 3.28 on FineWeb of llm.c's 10 B tokens with
    # 3.3 B (and rotary positions). AdamW's rate and warm-up are those of its AdamW baseline
    "gpt2-fast": Recipe(8_600, 524_288, 16, 1.8e-3, 250, cooldown=0.29, muon=5.6, weight_decay=0.0),
    "gpt2-medium": Recipe(19_073, 524_288, 8, 3e-4, 715),
    "gpt2-large": Recipe(19_073, 524_288, 4, 2.5e-4, 715),
    "gpt2-xl": Recipe(19_073, 524_288, 2, 2e-4, 715),
}


def get_lr(step, recipe):
    """The learning rate of a step: a cosine (Brown et al. 2020, appendix B), or flat, then linear.

    A high rate gets far, but the weights bounce about: the loss drops when the rate is lowered,
    whenever that is. So the second (Zhai et al. 2021, section 3.5) lowers it only near the end.
    """
    # 1) linear warm-up: AdamW's first steps are of full length, however little is known by then
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    # 2) with a cooldown: flat, then linear to 0 in the last steps
    if recipe.cooldown:
        return recipe.lr * min(1, (1 - step / recipe.max_steps) / recipe.cooldown)
    # 3) without: a cosine, from lr at progress 0 down to a tenth of it at progress 1
    progress = (step - recipe.warmup_steps) / max(recipe.max_steps - recipe.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return recipe.lr * (0.1 + 0.9 * cosine)


def configure_optimizer(model, recipe):
    """AdamW (Loshchilov & Hutter 2019); if recipe.muon, Muon for the linear layers' matrices.

    AdamW divides each number's step by the usual size of its gradient. betas: how long it
    remembers the gradient (10 steps) and its size (20 steps).
    """
    groups = {}
    for module in model.modules():
        is_linear = isinstance(module, (nn.Linear, nn.MultiheadAttention))
        for p in module.parameters(recurse=False):
            if p.requires_grad:
                decay = recipe.weight_decay if p.dim() >= 2 else 0.0  # not biases and LayerNorms
                muon = recipe.muon > 0 and is_linear and p.dim() == 2
                scale = recipe.muon if muon else 1.0
                group = {"params": [], "weight_decay": decay, "lr_scale": scale, "muon": muon}
                groups.setdefault((decay, muon), group)["params"].append(p)
    optimizer = Muon if recipe.muon else torch.optim.AdamW
    return optimizer(list(groups.values()), lr=recipe.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


# -----------------------------------------------------------------------------
# 5. Training


def train_step(model, optimizer, micro_batches, recipe, device):
    """One update of the weights from this rank's micro-batches: (loss, norm of the gradient).

    Gradient accumulation: backward() adds to .grad, so the gradients of the micro-batches, each
    weighted by its share of the step's targets, add up to that of the whole batch (tested by
    test_micro_batches_add_up). A loss that is not finite leaves the weights as they are.

    Mixed precision: weights, gradients and sums are fp32; autocast casts the inputs of matrix
    products to bf16, numbers of 16 bits with the range of fp32 but only 8 bits of precision.
    """
    total = torch.zeros((), device=device)
    for i, (*inputs, share) in enumerate(micro_batches):
        inputs = [x.to(device, non_blocking=True) for x in inputs]
        # with several ranks DistributedDataParallel (DDP) averages their gradients in backward()
        # (all-reduce), so that all make the same update; only the last micro-batch needs that
        sync = i == len(micro_batches) - 1 or world_size() == 1
        with contextlib.nullcontext() if sync else model.no_sync():
            with autocast(device):
                _, loss = model(*inputs)
            # share is of the whole step, so what we need is the sum over ranks, not the average
            (loss * share * world_size()).backward()
        total += loss.detach() * share
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)  # gradient clipping
    loss, norm = torch.stack([all_reduce(total), norm]).tolist()  # here the CPU waits for the GPU
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def validate(model, config, val_sets, tokenizer, eval_tokens, batch, device):
    """Print the mean loss over text that is never trained on; returns columns of the log.

    In nats per token, and in bits per byte of text, which can be compared between tokenizers.
    val_sets: {name: TokenDataset}, of each the first eval_tokens. batch: windows at once.
    """
    T = config.block_size
    pieces = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]
    num_bytes = torch.tensor([*map(len, pieces)])  # of each token
    num_bytes[tokenizer.eot_token] = 0
    row = {}
    for name, dataset in val_sets.items():
        count = max(1, min(dataset.num_windows(T), eval_tokens // T))
        windows = np.arange(count)[rank() :: world_size()]  # this rank's
        sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        for i in range(0, len(windows), batch):
            x, y = dataset.get_batch(windows[i : i + batch], T, config.vocab_size)
            with autocast(device):
                _, loss = model(x.to(device), y.to(device))
            y = y[y >= 0]
            sums += torch.tensor([loss.item() * len(y), len(y), num_bytes[y].sum().item()])
        nats, tokens, size = all_reduce(sums.to(device)).tolist()  # over all ranks
        row[f"val_{name}"] = loss = nats / tokens
        bits = nats / math.log(2) / max(size, 1)
        measure = f"{loss:.4f} nats per token, {bits:.3f} bits per byte"
        print(f"           {name} {measure}, of {tokens:,.0f} tokens")
    return row


def train(preset, data, out, recipe, seed=0, restart=False):
    """Train a preset on the shards in `data`, or go on with the run in `out`. The loop below:

        for each step:
            every recipe.eval_every steps        validation loss, HellaSwag, checkpoint, curves
            lr = get_lr(step)
            loss = train_step(micro-batches)     forward, backward, add up, clip, update
            every recipe.log_every steps         a line on the screen and in log.csv
            after Ctrl-C                         save, leave; the same command goes on from here
    """
    device = pick_device()
    config = PRESETS[preset]
    train_set, val_sets, tokenizer = open_data(data, config)
    torch.manual_seed(seed)
    model = GPT(config).to(device)
    optimizer = configure_optimizer(model, recipe)
    identity = {  # what must stay the same when the run is resumed
        "preset": preset,
        "tokenizer": tokenizer.name,
        "data": digest(train_set),
        "seed": seed,
        "batch_size": recipe.batch_size,
    }
    run = Run(out, identity, recipe, "tokens", restart)
    run.resume(model, optimizer)  # from ckpt.pt, if there is one
    describe(run, preset, data, model, train_set, device)  # what will be done, on the screen
    items = load_hellaswag(tokenizer) if preset.startswith("gpt2") else []
    parallel = parallelize(model)  # the same weights, in DDP and torch.compile where they apply
    get_batches = functools.partial(get_micro_batches, train_set, recipe, seed, config)

    def evaluate():
        row = validate(parallel, config, val_sets, tokenizer, recipe.eval_tokens,
                       recipe.micro_batch, device)
        if items and run.step >= recipe.eval_every:  # a trial of 20 steps need not wait for it
            row["hellaswag"] = evaluate_hellaswag(model, items, device)["acc_norm"]
        return row

    with run:  # notes Ctrl-C; keeps other processes out of the folder
        # for step in range(run.step, recipe.max_steps): batches = get_batches(step), by threads
        for step, batches in prefetch(get_batches, run.step, recipe.max_steps):
            if step and step % recipe.eval_every == 0:
                run.record(evaluate(), model, optimizer)  # log.csv, ckpt.pt, curves.png
            lr = get_lr(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss, norm = train_step(parallel, optimizer, batches, recipe, device)
            run.count_step(loss, norm)  # run.step is now step + 1: the finished steps
            stop = run.stop_requested()  # by Ctrl-C, on any rank
            if stop or run.step % recipe.log_every == 0 or run.step in (1, recipe.max_steps):
                run.progress(loss, lr, norm, flops_per_token(config))
            if stop:
                run.save_and_exit(model, optimizer)
        if not run.finished:
            run.record(evaluate(), model, optimizer)
    if rank() == 0:
        finish(run, model, tokenizer)  # samples, and what to do next


# -----------------------------------------------------------------------------
# 6. Packing: several continuations of one beginning
#
# Four endings follow the context of a HellaSwag item, five captions follow a picture. The plain way
# computes the beginning again for each of them:
#
#     c1 c2 c3 a1 a2
#     c1 c2 c3 b1 b2 b3
#
# Packed, they share it (a2 and b3 are only predicted). Each token sees the beginning and its own
# continuation, and is at the position that it would have alone:
#
#     token                c1 c2 c3 a1 b1 b2
#     position              0  1  2  3  3  4
#
#                    keys  c1 c2 c3 a1 b1 b2       predicts
#     query  c1             x  .  .  .  .  .
#            c2             x  x  .  .  .  .
#            c3             x  x  x  .  .  .       a1, and b1
#            a1             x  x  x  x  .  .       a2
#            b1             x  x  x  .  x  .       b2
#            b2             x  x  x  .  x  x       b3


@dataclass
class Packed:
    """Several continuations of one beginning, in one sequence of P + T positions; see pack().

    P vectors that are no tokens (a picture's prefix) may stand first; idx and positions leave them
    out, mask and source count them.
    """

    idx: torch.Tensor  # (B, T) token ids
    positions: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, 1, P + T, P + T), True where a query (row) may see a key (column)
    source: torch.Tensor  # (B, N), the place whose hidden state predicts a target
    targets: torch.Tensor  # (B, N), -100 where there is none
    owner: torch.Tensor  # (B, N), the continuation of a target, -1 where there is none

    def to(self, device, **options):
        return Packed(*(t.to(device, **options) for t in vars(self).values()))

    def pin_memory(self):
        return Packed(*(t.pin_memory() for t in vars(self).values()))

    def at_source(self, h):
        """The hidden states (B, N, C), out of (B, P + T, C), that predict the targets."""
        return h.gather(1, self.source[:, :, None].expand(-1, -1, h.size(2)))


def pack(rows, P=0):
    """Pack rows of (beginning, [continuation, ...]), all of token ids, after P vectors.

    The beginning is part 0, continuation k is part k + 1. For the example above, with P = 0:

        a column for each token            a column for each target
        token     c1 c2 c3 a1 b1 b2        target    a1 a2 b1 b2 b3
        part       0  0  0  1  2  2        source     2  3  2  4  5
                                           owner      0  0  1  1  1

    The losses are then (tested by test_packed_continuations_have_the_losses_of_separate_ones)

        h = model.hidden_states(model.embed(packed.idx, packed.positions), packed.mask)
        loss = model.loss(packed.at_source(h), packed.targets, "none")             # (B, N)
    """
    layouts = [lay_out(beginning, continuations, P) for beginning, continuations in rows]
    idx, positions, part, source, targets, owner = zip(*layouts, strict=True)
    part = pad(part, -1)  # (B, P + T)
    same_part = part[:, :, None] == part[:, None, :]  # (B, query, key)
    to_beginning = part[:, None, :] == 0
    causal = torch.ones(same_part.shape[1:], dtype=torch.bool).tril()
    mask = (same_part | to_beginning) & causal
    idx, positions = (pad(ids, 0, part.size(1) - P) for ids in (idx, positions))
    return Packed(idx, positions, mask[:, None], pad(source, 0), pad(targets, -100), pad(owner, -1))


def lay_out(beginning, continuations, P):
    """A row of pack(): lists of ids, positions, parts, sources, targets and owners."""
    idx = [*beginning]
    end = P + len(beginning)
    positions = [*range(P, end)]
    part = [0] * end
    source = []
    targets = []
    owner = []
    for k, tokens in enumerate(continuations):
        inputs = tokens[:-1]  # the last token is never an input
        # the end of the beginning predicts the first token, each token the one after it
        source += [end - 1, *range(len(part), len(part) + len(inputs))]
        targets += tokens
        owner += [k] * len(tokens)
        idx += inputs
        positions += range(end, end + len(inputs))
        part += [k + 1] * len(inputs)
    return idx, positions, part, source, targets, owner


def pad(rows, value, length=None):
    """Lists as one tensor (B, length): the longest, rounded up to 8, so that few shapes occur."""
    length = 8 * math.ceil(max(map(len, rows)) / 8) if length is None else length
    rows = [[*row, *[value] * (length - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.long)


# -----------------------------------------------------------------------------
# 7. What helps a short training: Muon, and positions that begin as sinusoids


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with "muon": orthogonalized steps (Muon, Jordan et al. 2024).

    A matrix maps directions to directions; its singular values S in G = U S V^T say how strongly.
    A gradient has few large ones: a step along it moves a few directions far and the others hardly
    at all. U V^T, with all singular values 1, moves all of them equally far, so that rare things
    are learned sooner:

        gradient   3.0  0.0      orthogonalized   1  0
                   0.0  0.1                       0  1

        momentum = 0.95 * momentum + grad
        update = orthogonalize(grad + 0.95 * momentum)                       # Nesterov's momentum
        weight -= lr * (update * sqrt(max(1, rows / columns)) + weight_decay * weight)
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                self.muon_step(group)
        super().step()  # AdamW passes over what has no gradient

    def muon_step(self, group):
        updates = {}  # matrices of one shape are orthogonalized together
        for p in group["params"]:
            update = self.add_momentum(p)
            for part in zip(split(p), split(update), strict=True):
                updates.setdefault(part[0].shape, []).append(part)
            p.grad = None
        for (rows, columns), pairs in updates.items():
            steps = orthogonalize(torch.stack([update for _, update in pairs]))
            scale = math.sqrt(max(1, rows / columns))
            for (weight, _), step in zip(pairs, steps, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(step, alpha=-group["lr"] * scale)

    def add_momentum(self, p):
        state = self.state[p]
        if not state:
            # AdamW, when a run is resumed, expects a step with each state
            state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))
        momentum = state["momentum"].mul_(0.95).add_(p.grad)
        return p.grad + 0.95 * momentum


def split(matrix):
    """The square maps in a matrix: c_attn's are q, k and v; cross-attention's kv are two."""
    rows, columns = matrix.shape
    squares = rows / columns
    return matrix.chunk(int(squares)) if squares in (2, 3) else [matrix]


def orthogonalize(G):
    """U V^T for each matrix U S V^T of G (n, rows, columns), roughly, by Newton-Schulz steps.

    Each step makes s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 of every singular value s, which takes
    all but the smallest of them, from at most 1, to about .7 ... 1.2 in five steps. It needs matrix
    products alone, in bf16 where that is fast.
    """
    X = G.bfloat16() if uses_bf16(G.device) else G
    tall = X.size(1) > X.size(2)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above this norm
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


def sinusoids(T, C, std):
    """Positions (T, C) that begin as sinusoids (Vaswani et al. 2017, section 3.5), then learn.

    A pair of waves for each of the periods 2, 4, 8 ... 2 T tells positions apart at that scale, as
    the digits of a binary number do. GPT-2's learned positions come to look like waves too, but a
    short run has no time for that: from random positions it often did not learn the columns of the
    toy map.
    """
    periods = 2.0 ** torch.arange(1, math.log2(T) + 2)
    t = torch.arange(T)[:, None] + 0.25  # at whole numbers the sine of period 2 is always 0
    angles = 2 * math.pi * t / periods
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (T, 2 * len(periods))
    # each wave in a random direction of its own, spread over all C numbers of a position; scaled to
    # the length of random positions with this std
    directions = torch.linalg.qr(torch.randn(C, waves.size(1)))[0]  # orthogonal
    return waves @ directions.T * std * math.sqrt(C / len(periods))


# =============================================================================
# From here on: tooling, for reference
# =============================================================================
# The loss in chunks (optional): without the logits of a whole batch

ROWS = 2048  # of logits that exist at a time


@torch.compiler.disable  # a compiled model would keep all chunks
def cross_entropy(h, weight, targets, n_vocab, reduction):
    """GPT.loss() of hidden states h (B, T, C) under a head (V, C)."""
    if reduction == "none":  # the logits of a row at a time
        rows = []
        for h_row, target in zip(h, targets, strict=True):
            logits = F.linear(h_row, weight)[:, :n_vocab].float()
            rows.append(F.cross_entropy(logits, target, reduction="none"))
        return torch.stack(rows)
    total = ChunkedCrossEntropy.apply(h.flatten(0, 1), weight, targets.flatten(), n_vocab)
    return total if reduction == "sum" else total / (targets != -100).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of hidden states h (rows, C) under a head W (V, C), in chunks.

    The gradient of -log softmax(z)[y] in z is softmax(z) - one_hot(y), known as soon as the logits
    are. So the forward pass computes it too, chunk after chunk:

        for i in range(0, len(h), ROWS):
            logits = h[i:i + ROWS] @ W.T                                   # (rows, V)
            loss += cross_entropy(logits, targets[i:i + ROWS])
            grad_logits = softmax(logits) - one_hot(targets[i:i + ROWS])
            grad_h[i:i + ROWS] = grad_logits @ W
            grad_W += grad_logits.T @ h[i:i + ROWS]

    An autograd.Function says itself what its gradients are: forward() keeps them in ctx, and
    backward() multiplies them with the gradient of what was made of the loss (tested by
    test_loss_and_its_gradients_equal_float64).
    """

    @staticmethod
    def forward(ctx, h, weight, targets, n_vocab):
        dtype = h.dtype
        if torch.is_autocast_enabled(h.device.type):
            dtype = torch.get_autocast_dtype(h.device.type)  # mixed precision: products in bf16
        W = weight.to(dtype)
        total = torch.zeros((), device=h.device)
        needs_h, needs_weight = ctx.needs_input_grad[:2]  # False where no gradient is asked for
        grad_h = torch.empty_like(h) if needs_h else None
        grad_weight = torch.zeros_like(weight) if needs_h and needs_weight else None
        buffer = W.new_empty(min(len(h), ROWS), len(W))  # one for all chunks: new memory is slow
        for i in range(0, len(h), ROWS):
            x = h[i : i + ROWS].to(dtype)
            target = targets[i : i + ROWS, None]
            valid = target != -100
            logits = torch.mm(x, W.T, out=buffer[: len(x)])
            total += loss_and_gradient(logits, target, n_vocab)
            grad_logits = logits  # the last line has overwritten them
            if needs_h:
                grad_h[i : i + ROWS] = grad_logits @ W * valid
            if grad_weight is not None:
                grad_weight += grad_logits.T @ (x * valid)
        ctx.save_for_backward(grad_h, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grads = [None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors]
        return *grads, None, None


def loss_and_gradient(logits, target, n_vocab):
    """Summed cross-entropy of logits (rows, V), which are overwritten by their gradient.

    target: (rows, 1); rows whose target is -100 have no loss, and their gradient must not be used.
    On CUDA this is one compiled function, although GPT.loss() is left out of the compiled model:
    so the logits are read twice and written once.
    """
    if logits.is_cuda:
        return compiled(softmax_minus_one_hot)(logits, target, n_vocab)
    rows = max(1, 500_000 // logits.size(1))  # as many as fit into a CPU's cache in fp32
    pieces = zip(logits.split(rows), target.split(rows), strict=True)
    return sum(softmax_minus_one_hot(z, y, n_vocab) for z, y in pieces)


def softmax_minus_one_hot(logits, target, n_vocab):
    """loss_and_gradient() in plain PyTorch; compiled, it stores nothing else of the size (rows, V)
    (tested by test_the_compiled_head_stores_no_second_logits).
    """
    logits[:, n_vocab:] = -math.inf  # unused rows of the table get no probability
    log_p = F.log_softmax(logits, dim=1, dtype=torch.float32)
    index = target.clamp(min=0)
    if torch.compiler.is_compiling():  # a scatter_() would be compiled with a copy of everything
        one_hot = torch.arange(logits.size(1), device=logits.device) == index
        log_p_target = torch.where(one_hot, log_p, 0.0).sum(1, keepdim=True)  # (rows, 1)
        logits.copy_(log_p.exp() - one_hot.float())
    else:
        log_p_target = log_p.gather(1, index)
        logits.copy_(log_p.exp_())
        logits.scatter_(1, index, (log_p_target.exp() - 1).to(logits.dtype))
    return -(log_p_target * (target != -100)).sum()


# -----------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def ending_losses(model, items, device):
    """The summed loss in nats of each ending of HellaSwag items, (items, 4)."""
    tokens_at_once = 1_024 if device.type == "cpu" else 16_384
    sizes = np.array([len(item.context) + sum(map(len, item.endings)) for item in items])
    order = np.argsort(-sizes, kind="stable")  # the longest first: out of memory comes early
    losses = np.zeros((len(items), 4))
    hidden_states = compiled(model.hidden_states)
    begin = 0
    while begin < len(items):  # items of like length together
        chosen = order[begin : begin + max(1, tokens_at_once // sizes[order[begin]])]
        rows = []
        for item in [items[i] for i in chosen]:
            room = model.config.block_size - max(map(len, item.endings))
            rows.append((item.context[-room:], item.endings))  # too long: cut from the left
        packed = pack(rows).to(device)
        try:
            h = hidden_states(model.embed(packed.idx, packed.positions), packed.mask)
            loss = model.loss(packed.at_source(h), packed.targets, "none").double()  # (B, N)
        except torch.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            tokens_at_once //= 2
            continue
        each = [(loss * (packed.owner == k)).sum(1) for k in range(4)]
        losses[chosen] = torch.stack(each, 1).cpu().numpy()
        begin += len(chosen)
    return losses


def evaluate_hellaswag(model, items, device, method="token mean"):
    """Print and return {"acc", "acc_norm"}; each rank takes its share of the items."""
    mine = items[rank() :: world_size()]
    with autocast(device):
        losses = ending_losses(model, mine, device)
    correct = torch.tensor(hellaswag.count_correct(mine, losses), device=device)
    acc, acc_norm = (all_reduce(correct) / len(items)).tolist()
    print(hellaswag.report(acc, acc_norm, len(items), method))
    return {"acc": acc, "acc_norm": acc_norm}


def load_hellaswag(tokenizer):
    """HellaSwag's items, to be measured during training; without a network there are none."""
    examples = []
    try:
        with rank_zero_first():
            examples = hellaswag.load_examples()
    except UserError as error:
        print(f"HellaSwag  is not measured: {error}")
    missing = torch.tensor(float(not examples), device=pick_device())
    if all_reduce(missing).item():  # all ranks measure it or none, or they would wait forever
        return []
    return [hellaswag.render(example, tokenizer) for example in examples]


def evaluate(path, data, limit):
    """Print the validation losses of a model, and its accuracies on HellaSwag."""
    device = pick_device()
    with rank_zero_first():
        model, tokenizer, checkpoint = load_model(path)
        preset = checkpoint.get("run", {}).get("preset")
        if preset == "tiny" and data is None:
            fineweb.make_toy_text(default_data("tiny"))
    center_tokens(model.to(device))
    folder = Path(data or default_data(preset))
    print(f"{path}, {folder}:")
    if data or folder.exists():
        _, val_sets, _ = open_data(folder, model.config)
        tokens = 65_536 if device.type == "cpu" else Recipe.eval_tokens
        batch = math.ceil(16_384 / model.config.block_size)
        validate(model, model.config, val_sets, tokenizer, tokens, batch, device)
    else:
        print("no validation loss: there are no shards (python fineweb.py downloads them)")
    if tokenizer.name != "gpt2" or model.config.block_size < 256:
        print("no HellaSwag: it needs GPT-2's tokens and a context of 256")
        return
    with rank_zero_first():
        examples = hellaswag.subset(hellaswag.load_examples(), limit)
    for method in ("token mean", "harness"):
        items = [hellaswag.render(example, tokenizer, method) for example in examples]
        evaluate_hellaswag(model, items, device, method)


# -----------------------------------------------------------------------------
# Using a model

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SUPPORTED = {  # what this GPT computes, in the words of a config.json of transformers
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
    "tokenizer": ["gpt2", "tiny"],  # our own entry, in what --export-hf writes
}


def load_model(name):
    """(model, tokenizer, checkpoint) of a checkpoint, a run, or weights in OpenAI's layout ({}).

    The last are a folder with config.json and model.safetensors, as transformers and --export-hf
    write it, or, where no file has that name, one in OPENAI, downloaded once.
    """
    path = Path(name)
    if not path.exists() and str(name) in OPENAI:
        for file in ("config.json", "model.safetensors"):  # they lie side by side
            path = fineweb.hub_download(f"openai-community/{name}", file)
    if path.is_dir():
        path = path / ("ckpt.pt" if (path / "ckpt.pt").exists() else "model.safetensors")
        if not path.exists():
            problem = f"{name} has neither ckpt.pt, of a run, nor model.safetensors"
            raise UserError(problem, "train first, or save the model as one safetensors file")
    if path.suffix == ".safetensors":
        checkpoint = {}
        model, tokenizer = from_pretrained(path)
    else:
        checkpoint = read_checkpoint(path, holds="config")
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        tokenizer = checkpoint["run"]["tokenizer"]
    return model.eval(), fineweb.get_tokenizer(tokenizer), checkpoint


def from_pretrained(path):
    """(GPT, name of its tokenizer) from a safetensors file in OpenAI's layout, with config.json."""
    config_file = path.with_name("config.json")
    with fineweb.reading(config_file, "a model's configuration"):
        config = dict(json.loads(config_file.read_bytes() if config_file.exists() else "{}"))
    for key, values in SUPPORTED.items():
        if config.get(key, values[0]) not in values:
            problem = f"{config_file}: {key} is {config[key]!r}"
            raise UserError(problem, f"{values[0]!r} is what is computed here")
    with fineweb.reading(path, "a whole GPT-2", SafetensorError):
        tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
        table = tensors["wte.weight"]
        block_size, C = tensors["wpe.weight"].shape
    if not torch.equal(tensors.get("lm_head.weight", table), table):
        raise UserError(f"{path} has a head of its own", "only a tied one is computed here")
    n_head = config.get("n_head", C / 64)  # OpenAI's heads have size 64
    if n_head not in range(1, C + 1) or C % n_head:
        raise UserError(f"{config_file} is missing or wrong ({n_head} heads)", "get it again")
    tokenizer = config.get("tokenizer", "gpt2")
    n_vocab = check_vocabulary(path, tokenizer, len(table))
    n_layer = sum(name.endswith("ln_1.weight") for name in tensors)
    model = GPT(GPTConfig(block_size, n_vocab, n_layer, int(n_head), C))
    with fineweb.reading(path, "a whole GPT-2", RuntimeError):
        unused = model.wte.num_embeddings - n_vocab
        tensors["wte.weight"] = F.pad(table[:n_vocab], (0, 0, 0, unused))
        for name in model.state_dict():
            tensors[name] = tensors[name].T if is_conv1d(name) else tensors[name]
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return model, tokenizer


def check_vocabulary(path, tokenizer, rows):
    """How many tokens a model's tokenizer has; UserError if its folder has another vocabulary."""
    n_vocab = fineweb.get_tokenizer(tokenizer).n_vocab
    if rows < n_vocab:
        problem = f"{path} has {rows:,} tokens, and the tokenizer {tokenizer} {n_vocab:,}"
        raise UserError(problem, "only these two tokenizers are known here: gpt2 and tiny")
    if tokenizer == "gpt2":
        for file in filter(Path.exists, map(path.with_name, ("vocab.json", "tokenizer.json"))):
            with fineweb.reading(file, "a vocabulary"):
                words = json.loads(file.read_bytes())
                words = words["model"]["vocab"] if file.name == "tokenizer.json" else words
            if words != json.loads(fineweb.gpt2_files()["vocab.json"]):
                raise UserError(f"{file} is not GPT-2's vocabulary", "only that one is known here")
        if rows > n_vocab:
            print(f"{path}: the rows after GPT-2's {n_vocab:,} tokens are not used")
    return n_vocab


def is_conv1d(name):
    """Whether OpenAI's file has this matrix as (in, out), the transpose of nn.Linear's."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def export_hf(model, tokenizer, folder):
    """Write a folder that transformers' from_pretrained() loads, with GPT-2's tokenizer."""
    c = model.config
    tensors = {}
    for name, t in model.state_dict().items():
        t = t.T if is_conv1d(name) else t
        tensors[f"transformer.{name}"] = t.detach().cpu().contiguous()
    tensors["transformer.wte.weight"] = model.wte.weight.detach().cpu()[: c.vocab_size].clone()
    config = {
        **{key: values[0] for key, values in SUPPORTED.items()},
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "tokenizer": tokenizer.name,
        "bos_token_id": tokenizer.eot_token,
        "eos_token_id": tokenizer.eot_token,
        "architectures": ["GPT2LMHeadModel"],
        "torch_dtype": "float32",
    }
    files = {"model.safetensors": save(tensors, metadata={"format": "pt"})}
    if tokenizer.name == "gpt2":
        for_tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size}
        files |= fineweb.gpt2_files()
        files["tokenizer_config.json"] = json.dumps(for_tokenizer).encode()
    files["config.json"] = json.dumps(config, indent=2).encode()
    for name, content in files.items():
        with fineweb.atomic_write(Path(folder) / name) as file:
            file.write(content)
    print(f"{folder} is ready for transformers.AutoModelForCausalLM.from_pretrained")
    if tokenizer.name != "gpt2":
        print(f"its tokenizer, {tokenizer.name}, is this project's own: transformers has none")


GPT.center = 0.0  # what center_tokens() has moved; caption.py takes it off a prefix again


@torch.no_grad()
def center_tokens(model):
    """Move the mean row of the token table into the positions: all probabilities stay as they are.

    OpenAI's logits lie between -35 and -120: a constant for each position, which softmax ignores.
    But bf16 has steps of .5 there, and of .01 near 0. The embeddings wte[i] + wpe[t] stay the same;
    all logits h @ wte[i] of a position fall by one number, h @ mean.
    """
    mean = model.wte.weight[: model.config.vocab_size].mean(0)
    model.wte.weight -= mean
    model.wpe.weight += mean
    model.center = model.center + mean
    return model


def freeze(model, device):
    """The model on `device`, not to be trained; its matrices in bf16 where products are.

    For a weight without a gradient autocast does not keep the copy in bf16 that it makes: it would
    cast the weight again for each generated token, which took most of the time of a token.
    """
    model.to(device).eval().requires_grad_(False)
    if isinstance(model, GPT):
        center_tokens(model)
    if uses_bf16(device):
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) or name == "wte":
                module.bfloat16()
    return model


def complete(model, tokenizer, text, max_new_tokens, num=1, seed=0, **sampling):
    """[the text with a continuation, ...]: `num` of them, by a model that is frozen."""
    device = pick_device()
    prompt = [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]
    idx = torch.tensor([prompt] * num, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    options = {"stop": tokenizer.eot_token, "generator": generator, **sampling}
    with autocast(device):
        rows = generate(model, idx, max_new_tokens, **options)[:, len(prompt) :].tolist()
    return [text + continued for continued in decode(rows, tokenizer)]


def decode(rows, tokenizer):
    """The texts of lists of token ids, without <|endoftext|>."""
    rows = [[token for token in row if token != tokenizer.eot_token] for row in rows]
    return [tokenizer.decode(row, errors="replace") for row in rows]


def newest_run():
    """The checkpoint of a preset's run that was written last."""
    paths = [Path(f"runs/{preset}/ckpt.pt") for preset in PRESETS]
    present = [path for path in paths if path.exists()]
    return max(present, key=lambda path: path.stat().st_mtime, default=paths[0])


# -----------------------------------------------------------------------------
# Devices and processes

# dense bf16, a second; sm80 is the first generation of NVIDIA's GPUs with bf16 (A100)
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "4090": 165e12, "A5000": 111e12}
FAST_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def pick_device():
    """The GPU of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def use_device():
    """Make the GPU of this rank the current one of this thread."""
    if torch.cuda.is_available():
        torch.cuda.set_device(pick_device())


def uses_bf16(device):
    """Whether the hardware has bf16 products: CUDA from sm80; CPUs with AVX512-BF16 (AMX too)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast(device):
    """Mixed precision: within this context matrix products are in bf16, where that is fast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(device))


def prefetch(get, first, last, ahead=4):
    """Yield (step, get(step)) for steps first ... last - 1, while threads prepare the next four:

        for step in range(first, last):
            yield step, get(step)

    Reading 512 windows from all over a disk for the first time took one thread 0.2 to 0.5 s, and
    four threads 0.1 s.
    """

    def begin():
        use_device()
        torch.set_num_threads(1)  # of a loader: more of them slowed training by a sixth

    torch.get_num_threads()  # settles how many threads a step has, before begin() can
    futures = {}  # of steps that are being prepared
    with ThreadPoolExecutor(ahead, initializer=begin) as threads:
        for step in range(first, last):
            for later in range(step, min(step + ahead, last)):
                if later not in futures:
                    futures[later] = threads.submit(get, later)
            yield step, futures.pop(step).result()


def pin(*tensors):
    """Tensors in pinned memory, which a GPU can read by itself while the CPU goes on."""
    return [t.pin_memory() for t in tensors] if torch.cuda.is_available() else tensors


def join_processes():
    """Under torchrun, make this process one of several (ranks): NCCL on GPUs, gloo on CPUs."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    missing = {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    if missing:
        raise UserError(f"RANK is set, but not {', '.join(missing)}", "unset it, or use torchrun")
    use_device()
    timeout = datetime.timedelta(minutes=10)
    if torch.cuda.is_available():
        dist.init_process_group("nccl", timeout=timeout, device_id=pick_device())
    else:
        dist.init_process_group("gloo", timeout=timeout)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all


def leave_processes():
    """Wait for all ranks, then end their group; threads of it would abort the process at exit."""
    if dist.is_initialized():
        dist.barrier(patient_group())
        dist.destroy_process_group()
        patient_group.cache_clear()


def rank():
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor):
    """The tensor summed over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the body first (it downloads or computes), then the others, who find it done."""
    group = patient_group() if world_size() > 1 else None
    if rank() > 0:
        dist.barrier(group)
    try:
        yield
    finally:
        if group and rank() == 0:
            dist.barrier(group)


@functools.cache
def patient_group():
    """All ranks, with a timeout of a day, not minutes: what rank 0 prepares may take hours."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def parallelize(model, compile=True):
    """The model as it is trained: with DDP on several ranks, and compiled on GPUs."""
    if world_size() > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return compiled(model) if compile else model


@functools.cache  # once for each function
def compiled(function):
    """A function or model through torch.compile, on a GPU where that works."""
    return torch.compile(function) if can_compile() else function


@functools.cache
def can_compile():
    """Whether torch.compile works here, on a GPU; if not, says why, once."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.compile(torch.sin)(torch.ones(1, device=pick_device()))
        return True
    except torch.OutOfMemoryError:  # another program has the memory; the compiler may be fine
        raise
    except Exception as error:  # the compiler's, Triton's or a subprocess's; often no Python.h
        reason = " ".join(str(error).split("\n")[:2])[:150]
        print(f"not compiled, so training is slower: {type(error).__name__}: {reason}")
        return False


def fused_attention(q, k, v, **options):
    """PyTorch's scaled_dot_product_attention, with the kernels that are fast here."""
    if q.is_cuda and (options["attn_mask"] is not None or q.size(2) != k.size(2)):
        # many shapes: cuDNN, which PyTorch prefers on an H100, would plan each of them for .4 s
        with sdpa_kernel(FAST_SDPA):
            return F.scaled_dot_product_attention(q, k, v, **options)
    if q.is_cuda or q.size(2) >= 512:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):  # short sequences on a CPU: bf16 is 5 times slower
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)


def flops_per_token(config):
    """Of a training step (Chowdhery et al. 2022, appendix B): 6 per weight, and attention's."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def hardware_use(flops_per_second):
    """Peak memory as text, and on GPUs MFU (model FLOPs utilization) of an assumed peak."""
    if not torch.cuda.is_available():
        status = Path("/proc/self/status")  # on Linux
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
        return f" | {int(match[1]) / 1e6:.1f} GB" if match else ""
    text = f" | {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    for name, peak in PEAK_FLOPS.items():  # cards of one name differ (PCIe, laptops)
        if re.search(rf"\b{name}\b", torch.cuda.get_device_name()) and flops_per_second:
            mfu = flops_per_second / peak / world_size()
            text += f" | MFU {mfu:5.1%} of {peak / 1e12:.0f} TFLOP/s"
    return text


# -----------------------------------------------------------------------------
# The folder of a run

FORMAT = 3  # of checkpoints
PATIENCE = 10  # steps in a row whose loss is not finite before a run gives up
STATE = ("step", "finished", "seconds", "skipped", "best", "rows")  # of a Run, in its checkpoint


class Run:
    """The folder of a run, by one process at a time: checkpoint, log.csv, and how to stop.

    identity: what must stay the same when it is continued; names: of parts, which may change. unit:
    what its speed counts. Inside `with run`, Ctrl-C, SIGTERM and SIGHUP are noted and the loop is
    asked to stop; without torchrun the second one stops at once.
    """

    def __init__(self, out, identity, recipe, unit, restart=False, names=None):
        self.out = Path(out)
        self.path = self.out / "ckpt.pt"
        self.identity = identity
        self.names = names or {}
        self.recipe = recipe
        self.unit = unit
        self.restart = restart
        self.step = 0  # finished steps
        self.finished = False  # and evaluated
        self.seconds = 0.0  # of training, without evaluation
        self.skipped = 0  # steps whose loss was not finite
        self.best = math.inf  # the lowest validation loss, where someone asks for it
        self.skipped_in_a_row = 0
        self.signal = None
        self.rows = []  # of log.csv; what it has after a checkpoint is done again

    def resume(self, model, optimizer):
        """Go on where the checkpoint in the folder stopped; UserError if it is of another run."""
        what_to_do = "choose another --out, or --restart"
        refuse_other_files(self.out, self.unit)
        if self.path.exists() and not self.restart:
            checkpoint = read_checkpoint(self.path, what_to_do=what_to_do)
            for key, value in self.identity.items():
                before = checkpoint["run"].get(key)
                if before != value:
                    problem = f"{self.path} was made with {key} {before}, not {value}"
                    raise UserError(problem, what_to_do)
            with fineweb.reading(self.path, "of this version", RuntimeError, what_to_do=what_to_do):
                model.load_state_dict(checkpoint["model"])
                optimizer.load_state_dict(checkpoint["optimizer"])
                for name in STATE:
                    setattr(self, name, checkpoint[name])
                recipe = Recipe(**checkpoint["recipe"])
            ended = self.step >= self.recipe.max_steps
            if ended and recipe != self.recipe:
                problem = f"{self.out} has come to its end with another recipe"
                raise UserError(problem, f"give more --steps than {self.step}, or {what_to_do}")
            self.finished = self.finished and ended
        steps = torch.tensor(float(self.step), device=pick_device())
        if all_reduce(steps).item() != self.step * world_size():
            raise UserError("the ranks found different checkpoints", "share --out among all")

    def __enter__(self):
        self.out.mkdir(parents=True, exist_ok=True)
        self.stack = contextlib.ExitStack()
        if rank() == 0:
            self.stack.enter_context(fineweb.lock(self.out))
            for name in ("ckpt.pt", "best.pt", "log.csv"):
                old = [*self.out.glob(f".{name}.*.tmp")]  # of a kill in the middle of writing
                for path in (*old, self.out / name) if self.restart else old:
                    path.unlink(missing_ok=True)
            with open(self.out / "log.csv", "a") as file:  # tells that this is the folder of a run
                file.write("" if file.tell() else "step\n")
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
            if number and signal.getsignal(number) != signal.SIG_IGN:
                self.stack.callback(signal.signal, number, signal.signal(number, self.on_signal))
        self.time = time.time()
        self.shown = (self.step, self.seconds)
        return self

    def __exit__(self, kind, error, traceback):
        self.stack.close()
        if error is None and self.stop_requested():  # in the last evaluation
            self.exit()
        if isinstance(error, torch.OutOfMemoryError):
            smaller = self.recipe.micro_batch // 2
            otherwise = "free some, or take a smaller model"
            what_to_do = f"use --micro-batch {smaller}" if smaller else otherwise
            raise UserError("out of memory", what_to_do) from error
        if isinstance(error, RuntimeError) and "timed out" in str(error).lower():
            raise UserError("another rank does not answer", "look at its output") from error

    def on_signal(self, number, frame):
        """Ask the loop to stop; without torchrun the next signal is no longer caught."""
        self.signal = number
        message = b"\nstopping after this step\n"
        if world_size() == 1:  # torchrun passes Ctrl-C on: its processes get it twice
            message += b"once more stops at once\n"
            for other in (signal.SIGINT, signal.SIGTERM):
                signal.signal(other, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # a terminal that was closed
            os.write(2, message)

    def stop_requested(self):
        """Whether a rank was asked to stop: then all do, at the same step."""
        asked = torch.tensor(float(self.signal is not None), device=pick_device())
        return all_reduce(asked).item() > 0

    def save_and_exit(self, model, optimizer):
        """What a stop in the middle of training does."""
        self.save(model, optimizer)
        self.exit()

    def exit(self):
        """End the process as the signal would have."""
        again = "the command without --restart" if self.restart else "the same command"
        print(f"stopped after step {self.step:,}; {again} resumes it")
        leave_processes()
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def count_step(self, loss, norm):
        """One step more is done; UserError if too many were not finite."""
        self.step += 1
        self.seconds += time.time() - self.time
        self.time = time.time()
        finite = math.isfinite(loss + norm)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == PATIENCE:
            problem = f"the loss was not finite in {PATIENCE} steps in a row"
            raise UserError(problem, f"go on from {self.path} with a lower --lr")

    def progress(self, loss, lr, norm, flops=0):
        """Print and log a line about the steps since the last line. flops: of a token."""
        step, seconds = self.shown
        self.shown = (self.step, self.seconds)
        rate = (self.step - step) * self.recipe.batch_size / (self.seconds - seconds)
        remaining = (self.recipe.max_steps - self.step) * self.recipe.batch_size / rate
        skipped = f" | skipped {self.skipped}" if self.skipped else ""
        begin = f"step {self.step:>6,} of {self.recipe.max_steps:,} | loss {loss:7.4f}"
        speed = f"{rate:9,.{0 if rate > 100 else 1}f} {self.unit}/s{hardware_use(rate * flops)}"
        rates = f"lr {lr:.2e} | norm {norm:5.2f}"
        left = tqdm.format_interval(remaining)
        print(f"{begin} | {rates} | {speed}{skipped} | {left} left")
        row = {"loss": loss, "lr": lr, "norm": norm, "skipped": self.skipped}
        self.log(row | {f"{self.unit}_per_second": rate, "seconds": self.seconds})

    def log(self, row):
        """Add to the step's row of log.csv, which is written anew: a row may have new columns."""
        if not self.rows or self.rows[-1]["step"] != self.step:
            self.rows.append({"step": self.step})
        self.rows[-1] |= row
        if rank() == 0:
            with fineweb.atomic_write(self.out / "log.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, dict.fromkeys(itertools.chain(*self.rows)))
                writer.writeheader()
                writer.writerows(self.rows)

    def record(self, row, model, optimizer):
        """After an evaluation: log its row, write the checkpoint, draw the curves."""
        self.finished = self.step == self.recipe.max_steps
        self.log(row)
        self.save(model, optimizer)

    def save(self, model, optimizer):
        """Write the checkpoint, and draw the curves."""
        if rank() == 0:
            content = {
                "run": self.identity | self.names,
                "recipe": asdict(self.recipe),
                **{name: getattr(self, name) for name in STATE},
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            if isinstance(model, GPT):
                content["config"] = asdict(model.config)
            save_checkpoint(self.path, content)
            draw_run(self.out / "curves.png", self.rows)
        if world_size() > 1:
            dist.barrier()  # what rank 0 has written is whole, before another one ends or reads it
        self.time = time.time()


def refuse_other_files(folder, unit):
    """UserError for a folder in which something else lies than a run of this kind, or nothing."""
    log = Path(folder) / "log.csv"
    names = {path.name for path in Path(folder).glob("[!.]*")}
    if names and not names & {"ckpt.pt", "log.csv"}:
        raise UserError(f"{folder} has files, but no run", "choose another --out")
    columns = log.read_text(errors="replace").split("\n")[0] if log.exists() else ""
    if "_per_second" in columns and f"{unit}_per_second" not in columns:
        raise UserError(f"{folder} has another kind of run", "choose another --out")


def save_checkpoint(path, content):
    """Write tensors, numbers, strings and dicts, all or nothing."""
    try:
        with fineweb.atomic_write(path) as file:
            torch.save({"format": FORMAT} | content, file)
    except (OSError, RuntimeError) as error:  # PyTorch turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or "the disk did not take all of it"
        raise UserError(f"{path} cannot be written ({reason})", "make room, and go on") from error


def read_checkpoint(path, holds="run", what_to_do="name another"):
    """What save_checkpoint() wrote; UserError when it is damaged, or another kind of file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is not there", "train first, or name another --ckpt")
    what = f"a whole checkpoint of a {holds}, format {FORMAT}"
    damage = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, RuntimeError, OSError)
    with fineweb.reading(path, what, *damage, what_to_do=what_to_do):
        with zipfile.ZipFile(path) as parts:  # PyTorch does not look at the checksums
            if parts.testzip():
                raise zipfile.BadZipFile("its checksum is wrong")
        # mapped, eight processes on a machine with GPUs share one copy in its memory
        mapped = torch.cuda.is_available()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"format {checkpoint['format']}")
    if holds not in checkpoint:
        raise UserError(f"{path} is not {what}, but has {', '.join(checkpoint)}", "name another")
    return checkpoint


def is_finished(path):
    """Whether there is the checkpoint of a run that has come to its last step."""
    return Path(path).exists() and read_checkpoint(path).get("finished", False)


def draw_run(path, rows):
    """A chart of the rows of a log: losses, and beside them HellaSwag or CIDEr-D if measured."""
    titles = {
        "hellaswag": "HellaSwag, acc_norm by token mean (OpenAI's 124M: 0.2955)",
        "cider": "CIDEr-D of greedy captions",
    }
    lines = {"training": curve(rows, "loss")}
    panels = {"loss, nats per token": lines}
    for name in dict.fromkeys(itertools.chain(*rows)):
        if name.startswith("val_"):
            lines[name.replace("val_val", "validation").removeprefix("val_")] = curve(rows, name)
        if name in titles:
            panels[titles[name]] = {"validation": curve(rows, name)}
    draw_curves(path, panels)


def curve(rows, key):
    """The points (step, value) of a column of the log."""
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def draw_curves(path, panels):
    """Line charts side by side; panels: {title: {label of a line: [(step, y), ...]}}."""
    image = Image.new("RGB", (1800 * len(panels), 960), "white")
    for i, (title, lines) in enumerate(panels.items()):
        draw_panel(ImageDraw.Draw(image), 1800 * i, f"{title}, by step", lines)
    with fineweb.atomic_write(path) as file:
        image.reduce(2).save(file, "PNG")  # halved: smooth lines


def draw_panel(draw, x0, title, lines):
    """One chart, 1800 x 960 pixels, whose left edge is at x0."""
    left, right = x0 + 140, x0 + 1740
    top, bottom = 100, 840
    points = np.array(sum(lines.values(), [])).reshape(-1, 2)
    x_ticks = nice_ticks(points[:, 0])
    y_ticks = nice_ticks(points[:, 1])
    font = ImageFont.load_default(30)

    def pixels(x, y):
        x = np.interp(x, [x_ticks[0], x_ticks[-1]], [left, right])
        return x, np.interp(y, [y_ticks[0], y_ticks[-1]], [bottom, top])

    for tick in x_ticks:
        x, _ = pixels(tick, 0)
        draw.line((x, top, x, bottom), "#e5e7eb", 2)
        draw.text((x, bottom + 16), f"{tick:,.6g}", "#374151", font, "mt")
    for tick in y_ticks:
        _, y = pixels(0, tick)
        draw.line((left, y, right, y), "#e5e7eb", 2)
        draw.text((left - 16, y), f"{tick:,.6g}", "#374151", font, "rm")
    draw.text(((left + right) / 2, 28), title, "#111827", font, "mt")
    for i, (label, line) in enumerate(lines.items()):
        color = ("#94a3b8", "#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")[i % 6]
        if len(line) == 1:  # a dot
            x, y = pixels(*line[0])
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), color)
        if line:  # none where no value is finite
            draw.line([pixels(x, y) for x, y in line], color, 5, "curve")
        x = left + 280 * i  # the legend stands below the chart
        draw.line((x, 924, x + 50, 924), color, 8)
        draw.text((x + 64, 924), label, "#111827", font, "lm")


def nice_ticks(values):
    """About six ticks, at 1, 2 or 5 times a power of ten, between which all values lie."""
    low = min(values, default=0)
    span = (max(values, default=1) - low) or 1
    unit = 10 ** math.floor(math.log10(span / 6))
    step = min(unit * m for m in (1, 2, 5, 10) if span <= 6.001 * unit * m)
    first = math.floor(low / step)
    last = max(math.ceil((low + span) / step), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


# -----------------------------------------------------------------------------
# Command line


def default_data(preset):
    """Where the shards of a preset are without --data."""
    return Path("data/tiny" if preset == "tiny" else "data/fineweb_edu")


def choose_setup(preset, data, device):
    """(preset, folder of shards): by flag; else gpt2 (GPU, 100 M tokens), small (--data), tiny."""
    if preset is None:
        preset = "small" if data else "tiny"  # small: less than 100 M tokens, or on a CPU
        folder = Path(data or default_data("gpt2"))
        if fineweb.read_tokens_info(folder)["tokenizer"] == "tiny":
            preset = "tiny"
        elif device.type == "cuda" and folder.exists() and len(open_shards(folder)[0]) >= 1e8:
            preset = "gpt2"
    if preset == "tiny" and data is None:
        print("setup      toy. The full one: python fineweb.py --tokens 10B, then, with a GPU,")
        print("           python train_gpt2.py --preset gpt2")
        with rank_zero_first():
            fineweb.make_toy_text(default_data("tiny"))
    return preset, Path(data or default_data(preset))


def recipe_flags(args):
    """{name: value} of the flags that change a recipe, as far as they were given."""
    names = Recipe.__dataclass_fields__
    return {key: value for key, value in vars(args).items() if key in names and value is not None}


def with_flags(recipe, flags, T=1):
    """The recipe with these flags; UserError if the ranks cannot share a step, in windows of T."""
    recipe = replace(recipe, **flags)
    if recipe.batch_size % T or recipe.batch_size < T * world_size():
        what_to_do = f"give a multiple of {T:,}, at least {T * world_size():,}"
        raise UserError(f"a step of {recipe.batch_size:,} cannot be shared out", what_to_do)
    warmup_steps = min(recipe.warmup_steps, math.ceil(recipe.max_steps / 10))  # of a short trial
    return replace(recipe, warmup_steps=warmup_steps)


def open_shards(folder):
    """The shards of a folder: (training set, {name: validation set}), one set for each NAME."""
    train = []
    val = {}
    for path in sorted(Path(folder).glob("*.bin")):
        match = re.fullmatch(r"(.+)_(train|val)(_\d+)?", path.stem)
        if match:
            paths = train if match[2] == "train" else val.setdefault(match[1], [])
            paths.append(path)
    if not train or not val:
        wanted = "shards NAME_train_000001.bin and NAME_val_000000.bin"
        raise UserError(f"{folder} has no {wanted}", "make them with fineweb.py")
    if len(val) == 1:
        val = {"val": val.popitem()[1]}
    return TokenDataset(train), {name: TokenDataset(paths) for name, paths in val.items()}


def open_data(folder, config):
    """(training set, validation sets, tokenizer); UserError for tokens of another vocabulary."""
    train_set, val_sets = open_shards(folder)
    tokenizer = fineweb.get_tokenizer(fineweb.read_tokens_info(folder)["tokenizer"])
    if tokenizer.n_vocab != config.vocab_size:
        vocabulary = f"{config.vocab_size:,}"
        problem = f"{folder} has tokens of {tokenizer.name}, and the model has {vocabulary}"
        raise UserError(problem, "name shards of the model's tokenizer with --data")
    numbers = [int(path.stem[-6:]) for path in train_set.paths if path.stem[-6:].isdigit()]
    missing = set(range(min(numbers, default=0), max(numbers, default=0))) - set(numbers)
    if missing:
        print(f"{folder} lacks the training shards {', '.join(map(str, sorted(missing)))}")
    return train_set, val_sets, tokenizer


def digest(dataset):
    """Tells datasets apart: a hash of the shards' lengths and of their first and last tokens."""
    ends = hashlib.sha256()
    for shard in dataset.shards:
        ends.update(f"{len(shard)} ".encode() + shard[:1000].tobytes() + shard[-1000:].tobytes())
    return ends.hexdigest()[:16]


def describe(run, preset, data, model, train_set, device):
    """What will be done, a line each."""
    recipe = run.recipe
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads"
    precision = "bf16 products, fp32 weights" if uses_bf16(device) else "fp32"
    parameters = sum(p.numel() for p in model.parameters())
    epochs = recipe.max_steps * recipe.batch_size / len(train_set)
    state = f"; {run.step:,} are done (--restart starts over)" if run.step else ""
    print(f"model      {preset}: {parameters:,} parameters on {world_size()} x {name}, {precision}")
    print(f"data       {data}: {len(train_set):,} tokens, {recipe.batch_size:,} for each step")
    print(f"run        {run.out}: {recipe.max_steps:,} steps, {epochs:.1f} epochs{state}")


def finish(run, model, tokenizer):
    """Write and print samples, and what to do next."""
    freeze(model, pick_device())
    samples = ""
    for prompt in ("", "The ", "In the beginning"):
        length = min(model.config.block_size, 200)
        texts = complete(model, tokenizer, prompt, length, temperature=0.8, top_k=50)
        samples += f"--- {texts[0]}\n"
    with fineweb.atomic_write(run.out / "samples.txt", "w") as file:
        file.write(samples)
    print(samples)
    print(f"{run.seconds:.0f} s of training; {run.out} has checkpoint, log, curves and samples.")
    print(f'Next: python train_gpt2.py --sample "The " --ckpt {shlex.quote(str(run.out))}')


def main():
    """The commands at the top of this file."""
    parser = fineweb.ArgumentParser(__doc__)
    positive = number(int, 1)
    training = parser.add_argument_group("training")
    training.add_argument("--preset", choices=PRESETS, help="shape and recipe of the model")
    training.add_argument("--out", help="folder of the run (default: runs/<preset>)")
    training.add_argument("--steps", dest="max_steps", type=positive, help="updates of the weights")
    training.add_argument("--batch-tokens", dest="batch_size", type=number(int, 1, 10**8),
                          help="tokens a step")
    training.add_argument("--micro-batch", type=positive, help="windows at once: less memory")
    training.add_argument("--lr", type=number(float, 0, 1), help="the highest learning rate")
    training.add_argument("--eval-every", type=positive, help="steps between evaluations")
    training.add_argument("--restart", action="store_true", help="forget the run in the folder")
    parser.add_argument("--data", help="folder of shards (python fineweb.py makes one)")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    group = parser.add_argument_group("with a trained model")
    task = group.add_mutually_exclusive_group()
    task.add_argument("--sample", metavar="TEXT", type=str, help="continue TEXT")
    task.add_argument("--eval", action="store_true", help="validation loss and HellaSwag")
    task.add_argument("--export-hf", metavar="DIR", help="write a folder for transformers")
    group.add_argument("--ckpt", help="checkpoint, run, folder for transformers, or gpt2, gpt2-xl")
    group.add_argument("--limit", type=positive, help="use only so many random HellaSwag items")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=positive, default=200, help="(200)")
    sampling.add_argument("--temperature", type=number(float, 0, 100), default=0.8, help="(0.8)")
    sampling.add_argument("--top-k", type=positive, help="only the k most probable tokens")
    sampling.add_argument("--top-p", type=number(float, 0.001, 1), help="only the nucleus of p")
    sampling.add_argument("--num", type=number(int, 1, 10_000), default=1, help="samples (1)")
    args = parser.parse_args()
    join_processes()
    path = args.ckpt or newest_run()
    if args.eval:
        parser.only("--eval", "--ckpt", "--data", "--limit")
        evaluate(path, args.data, args.limit)
    elif args.export_hf:
        parser.only("--export-hf", "--ckpt")
        model, tokenizer, _ = load_model(path)
        print(f"model      {path}")
        export_hf(model, tokenizer, args.export_hf)
    elif args.sample is not None:
        parser.only("--sample", "--ckpt", "--seed", sampling)
        model, tokenizer, _ = load_model(path)
        print(f"model      {path}")
        freeze(model, pick_device())
        options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        inputs = (args.sample, args.max_new_tokens, args.num, args.seed)
        print(*complete(model, tokenizer, *inputs, **options), sep="\n---\n", end="\n---\n")
    else:
        parser.only("training", training, "--data", "--seed")
        preset, data = choose_setup(args.preset, args.data, pick_device())
        recipe = with_flags(RECIPES[preset], recipe_flags(args), PRESETS[preset].block_size)
        train(preset, data, args.out or f"runs/{preset}", recipe, args.seed, args.restart)
    leave_processes()


if __name__ == "__main__":
    fineweb.command_line(main)
