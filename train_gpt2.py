"""
GPT-2 from scratch: the model, how it is trained, and what can be done with it.

    python train_gpt2.py                              train: toy data; with a GPU and shards, 124M
    python train_gpt2.py --init gpt2 --data DIR       train OpenAI's weights further, on your text
    python train_gpt2.py --sample "Once upon a time"  continue a text
    python train_gpt2.py --eval                       validation loss and HellaSwag
    python train_gpt2.py --export-hf DIR              a folder that transformers loads
    torchrun --nproc_per_node=8 train_gpt2.py ...     the same run on eight GPUs

The same command continues an interrupted run. A run lives in runs/<preset>/: ckpt.pt, log.csv,
curves.png, and best.safetensors, of the lowest validation loss, where text is read again and again.

To read: 1 the model, 2 generation, 3 data, 4 the recipe, 5 training, all as for GPT-2 124M;
hellaswag.py. On the second evening the toy text in fineweb.py; 6 what helps a short training, as
the toy's: Muon, a flat rate, sinusoids; before caption.py, 7 packing. After the banner, for another
evening: the loss in chunks. For reference: presets, evaluation, devices and processes, the folder
of a run.

Letters beside the code: B batch, T time (tokens), C width, nh heads, hs head size, V vocabulary,
P prefix, N targets of a row. GPT-2: Radford et al. 2019, which tells little of how it was trained;
rates and betas are GPT-3's (Brown et al. 2020).
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
import shlex
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from tiktoken.load import read_file_cached
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import fineweb
import hellaswag
from fineweb import UserError, number

# attention() and GPT.loss() have fast forms, after the banner, that compute the same; with PLAIN=1
# in the environment the plain ones run, as they stand in chapter 1
FAST = "PLAIN" not in os.environ

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
    sinusoids: bool = False  # positions begin as waves (chapter 6)


def attention_weights(q, k, mask=None, is_causal=False):
    """How much each query attends to each key, (B, nh, queries, keys): each row sums to 1."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # scaled: near 1, whatever hs is
    if is_causal:
        mask = torch.ones_like(scores, dtype=torch.bool).tril()  # causal mask: not the future
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


def attention(q, k, v, mask=None, is_causal=False):
    """For each query the mean of the values, weighted by how well their keys match it.

    All are (B, nh, length, hs); mask is True where a query may see a key. FlashAttention (Dao et
    al. 2022) computes it in tiles, and never stores the weights; on GPUs PyTorch has such a kernel.
    """
    if FAST:
        return fast_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return attention_weights(q, k, mask, is_causal) @ v


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
        # T positions need the causal mask; in chapter 2 a single new one may see all before it
        y = attention(q, k, v, mask, is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


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
    """Attention gathers from other positions, the MLP works on each position by itself.

    GPT-2 also had dropout, against learning text by heart; text that is seen once needs none.
    """

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
        self.wte = nn.Embedding(rows, config.n_embd)  # token id -> vector
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position -> vector, learned
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
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
        return None, self.loss(h, targets)

    def embed(self, idx, positions=None):
        """Token ids (B, T) to vectors (B, T, C). positions: (T,) or (B, T), default 0 ... T - 1."""
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        return self.wte(idx) + self.wpe(positions)

    def hidden_states(self, x, mask=None, cache=None):
        """Vectors (B, T, C) through all blocks: hidden states (B, T, C).

        Generation gives a KVCache for each block (chapter 2); packing a mask (B, 1, T, T), True
        where a position may attend (chapter 7).
        """
        for i, block in enumerate(self.h):
            x = block(x, mask, cache[i] if cache else None)
        return self.ln_f(x)

    def head(self):
        """The table (V, C) that hidden states are compared with.

        Weight tying: it is that of the tokens, there is no other (Press & Wolf 2017).
        """
        return self.wte.weight

    def logits(self, h):
        """Hidden states (..., C) to logits (..., V), without the unused rows of the table."""
        return F.linear(h, self.head())[..., : self.config.vocab_size]

    @torch.compiler.disable
    def loss(self, h, targets):
        """Cross-entropy: the mean of -log p(target) over the targets (B, T), in nats.

        It says how surprised the model is by them. A target of -100 does not count.
        """
        if FAST:  # the same number in much less memory ("The loss in chunks", after the banner)
            return chunked_cross_entropy(h, self.head(), targets, self.config.vocab_size)
        logits = self.logits(h).float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def losses(self, h, targets):
        """The cross-entropy of each target, (B, T); row by row, which takes less memory."""
        rows = []
        for h_row, target in zip(h, targets, strict=True):
            rows.append(F.cross_entropy(self.logits(h_row).float(), target, reduction="none"))
        return torch.stack(rows)


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
def generate(model, idx, max_new_tokens, stop=-1, **sampling):
    """Continue token ids (B, T) by up to max_new_tokens: (B, T + new). The plain form:

        for _ in range(max_new_tokens):
            logits, _ = model(idx[:, -block_size:])          # everything again, for each token
            token = sample_token(logits[:, -1], temperature)
            idx = torch.cat([idx, token[:, None]], dim=1)

    Here a KV cache keeps what was computed, and a full context drops its older half, not one token
    (tested by test_cached_equals_uncached_beyond_the_context).

    stop: a token that ends its row, which is then filled up with it (-1: none). sampling: see
    sample_token().
    """
    room = model.config.block_size
    running = torch.ones(len(idx), dtype=torch.bool, device=idx.device)
    context = idx[:, -room:]
    cache = None
    for _ in range(max_new_tokens):
        if context.size(1) > room:
            # a cached key belongs to its position, so the cache cannot slide: drop the older half
            # and compute the rest again, which happens only once in room / 2 tokens
            context = context[:, -max(1, room // 2) :]
            cache = None
        positions = torch.arange(context.size(1), device=idx.device)
        if cache is None:  # prefill: keys and values of the whole context
            cache = [KVCache() for _ in model.h]
            x = model.embed(context, positions)  # (B, T, C)
        else:  # decode: only the newest token
            x = model.embed(context[:, -1:], positions[-1:])  # (B, 1, C)
        h = model.hidden_states(x, cache=cache)
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


TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def from_pretrained(tensors, n_head):
    """A GPT with OpenAI's weights, {name: tensor}; the names are those that GPT has here.

    OpenAI's matrices are (in, out), the transposes of nn.Linear's. load_model(), after the banner,
    gets the file, and looks whether it is a GPT-2 that this one can be.
    """
    n_vocab, C = tensors["wte.weight"].shape
    block_size = len(tensors["wpe.weight"])
    n_layer = sum(name.endswith("ln_1.weight") for name in tensors)
    model = GPT(GPTConfig(block_size, n_vocab, n_layer, n_head, C))
    for name, p in model.named_parameters():
        source = tensors[name].T if name.endswith(TRANSPOSED) else tensors[name]
        p.data[: len(source)] = source  # the token table has some unused rows at its end
    return model


# -----------------------------------------------------------------------------
# 3. Data
#
# A shard is one long row of tokens, t0 t1 t2 ... It is cut into windows of T inputs; the targets
# are the same tokens, one place on. Each position predicts from what it sees so far:
#
#     inputs  x     t0  t1  t2  t3  |  t4  t5  t6  t7  |  ...        T = 4
#     targets y     t1  t2  t3  t4  |  t5  t6  t7  t8  |  ...
#
# A window may hold parts of several documents. Attention crosses their borders; <|endoftext|> tells
# the model that what stands before it belongs to another one.
#
# An epoch is all windows in a random order that depends on (seed, epoch) alone. So any step of any
# run can be computed by itself, on any number of processes, and an interrupted run resumes exactly.


class TokenDataset:
    """Windows of T + 1 tokens, cut from shards that are memory-mapped.

    They do not cross shards: the last tokens of a shard, fewer than T, are not used.
    """

    def __init__(self, paths, config):
        self.T = config.block_size
        self.shards = [fineweb.read_shard(path, config.vocab_size) for path in paths]
        self.ends = np.cumsum([max(len(shard) - 1, 0) // self.T for shard in self.shards])
        if len(self) == 0:
            problem = f"{paths[0]} has less than a window of {self.T:,} tokens"
            raise UserError(problem, "get more text, or take a smaller --preset")

    def __len__(self):
        """The number of windows."""
        return int(self.ends[-1])

    def get_batch(self, windows):
        """Inputs (B, T) of these windows, and as targets (B, T) the next tokens."""
        rows = []
        for window in windows:
            i = np.searchsorted(self.ends, window, side="right")  # its shard
            first = self.ends[i - 1] if i else 0  # window of that shard
            begin = (window - first) * self.T
            rows.append(self.shards[i][begin : begin + self.T + 1])
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return tokens[:, :-1], tokens[:, 1:]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, size):
    """The order of the `size` windows in an epoch, the same on every machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


def step_indices(seed, step, batch_size, size):
    """The windows of a step, which may cross the boundary of an epoch."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(seed, int(p // size), size)[p % size] for p in places])


# -----------------------------------------------------------------------------
# 4. The recipe


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; by default GPT-2 124M (RECIPES, after the banner, has the others).

    It has GPT-3's rates and betas, shortened to 10 B tokens, 375 M of them to warm up. GPT-3 read
    300 B, with a context of 2,048 and a batch that grew.
    """

    max_steps: int = 19_073
    batch_size: int = 524_288  # tokens for each update of the weights
    micro_batch: int = 16  # windows computed at once, at most; gradients are accumulated
    lr: float = 6e-4  # the highest learning rate
    warmup_steps: int = 715
    cooldown: float = 0.0  # share of the steps in which the rate falls to 0 (chapter 6; 0: cosine)
    muon: float = 0.0  # rate of matrices under Muon, as a multiple of lr (chapter 6; 0: AdamW)
    weight_decay: float = 0.1  # pulls matrices toward 0, so that none grows without need
    grad_clip: float = 1.0  # a longer gradient is scaled to this length: one bad batch does no harm
    eval_every: int = 250
    eval_tokens: int = 10_485_760  # the same whatever the batch size: losses can be compared
    log_every: int = 20


def get_lr(step, recipe):
    """The learning rate of a step (Brown et al. 2020, appendix B)."""
    # 1) linear warm-up: AdamW's first steps are of full length, however little is known by then
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.cooldown:
        return flat_then_linear(step, recipe)  # chapter 6
    # 2) a cosine, from lr at progress 0 down to a tenth of it at progress 1
    progress = (step - recipe.warmup_steps) / max(recipe.max_steps - recipe.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return recipe.lr * (0.1 + 0.9 * cosine)


def configure_optimizer(model, recipe):
    """AdamW (Loshchilov & Hutter 2019) for what is trained. Each number w with its gradient g:

        m = 0.9 * m + 0.1 * g                      # moving average of the gradient, over 10 steps
        v = 0.95 * v + 0.05 * g * g                # and of its square, over 20 (betas: .9, .95)
        m_hat = m / (1 - 0.9 ** t)                 # at step t: both began at 0, and are too small
        v_hat = v / (1 - 0.95 ** t)
        w -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)

    So each number moves by about lr, be its gradient large or small.
    """
    options = {"lr": recipe.lr, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    if recipe.muon:
        return Muon(muon_groups(model, recipe), **options)  # chapter 6
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]  # biases and LayerNorms: no weight decay
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **options)


# -----------------------------------------------------------------------------
# 5. Training
#
# The whole of it, for one process; each function of this chapter does a line or two:
#
#     for step in range(max_steps):
#         if step % 250 == 0:
#             save a checkpoint; measure validation loss and HellaSwag
#         for x, y, share in get_micro_batches(train_set, recipe, seed, step):
#             _, loss = model(x, y)                         # forward
#             (loss * share).backward()                     # backward; gradients add up
#         clip_grad_norm_(model.parameters(), grad_clip)
#         optimizer.lr = get_lr(step, recipe)
#         optimizer.step()
#         optimizer.zero_grad()


def get_micro_batches(dataset, recipe, seed, step):
    """A step's windows, in micro-batches that fit into memory: [(x, y, share of the step), ...].

    Several processes may train together, each on its part of the step: of 512 windows each of two
    gets 256, in 16 micro-batches of 16, whose shares are 16 / 512.
    """
    windows = step_indices(seed, step, recipe.batch_size // dataset.T, len(dataset))
    batches = []
    for part in share_out(windows, recipe):
        batches.append((*dataset.get_batch(part), len(part) / len(windows)))
    return batches


def share_out(windows, recipe):
    """This process's windows of a step, in parts that are computed at once."""
    mine = np.array_split(windows, world_size())[rank()]
    return np.array_split(mine, math.ceil(len(mine) / recipe.micro_batch))


def train_step(model, optimizer, micro_batches, recipe, device):
    """One update of the weights: (loss, norm of the gradient).

    Gradient accumulation: backward() adds to .grad, so the gradients of the micro-batches, each
    weighted by its share of the step, add up to that of the whole batch (tested by
    test_micro_batches_add_up). Several processes (ranks) each add up their own; then all_reduce
    sums these over all ranks, so that all make the same update.

    Mixed precision: weights, gradients and sums are fp32; autocast casts the inputs of matrix
    products to bf16, numbers of 16 bits with the range of fp32 but only 8 bits of precision.
    """
    # all to the GPU at once: a copy between two micro-batches would wait for the first
    micro_batches = [([x.to(device) for x in inputs], share) for *inputs, share in micro_batches]
    total = torch.zeros((), device=device)
    for inputs, share in micro_batches:
        with autocast(device):
            _, loss = model(*inputs)
        (loss * share).backward()
        total += loss.detach() * share
    for p in model.parameters():
        if p.grad is not None:
            all_reduce(p.grad)
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)  # gradient clipping
    loss, norm = torch.stack([all_reduce(total), norm]).tolist()  # waits for the GPU
    if math.isfinite(loss + norm):  # else the weights stay as they are
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def validate(model, val_sets, tokenizer, eval_tokens, batch, device):
    """Print the mean loss over text that is never trained on; returns columns of the log.

    In nats per token, and in bits per byte of text: a tokenizer with longer tokens has more nats
    for each, but bits per byte can be compared. val_sets: {name: TokenDataset}, of each the first
    eval_tokens. batch: windows at once.
    """
    pieces = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]
    num_bytes = torch.tensor([*map(len, pieces)])  # of each token
    num_bytes[tokenizer.eot_token] = 0
    row = {}
    for name, dataset in val_sets.items():
        count = max(1, min(len(dataset), eval_tokens // dataset.T))
        windows = np.arange(count)[rank() :: world_size()]  # this rank's
        sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        for i in progress(range(0, len(windows), batch), f"validation {name}"):
            x, y = dataset.get_batch(windows[i : i + batch])
            with autocast(device):
                _, loss = model(x.to(device), y.to(device))
            sums += torch.tensor([loss.item() * y.numel(), y.numel(), num_bytes[y].sum().item()])
        nats, tokens, size = all_reduce(sums.to(device)).tolist()  # over all ranks
        row[f"val_{name}"] = loss = nats / tokens
        bits = nats / math.log(2) / max(size, 1)
        measure = f"{loss:.4f} nats per token, {bits:.3f} bits per byte"
        print(f"           {name} {measure}, of {tokens:,.0f} tokens", flush=True)
    return row


def fit(run, model, batches, evaluate, device):
    """The training loop, from the step where the run stands to the last.

    run: the folder of the run, with the weights and their optimizer. model(*inputs) gives (_,
    loss). batches: yields (step, micro-batches). evaluate(): prints losses, and returns columns of
    the log.
    """
    recipe = run.recipe
    for step, micro_batches in batches:
        if step % recipe.eval_every == 0:  # at step 0 the loss is near ln V: any token may follow
            run.save()  # the checkpoint; before the evaluation, which takes a while
            run.record(evaluate())  # in log.csv and curves.png
        lr = get_lr(step, recipe)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)  # only Muon has another (chapter 6)
        loss, norm = train_step(model, run.optimizer, micro_batches, recipe, device)
        run.end_step(loss, norm, lr)  # prints a line now and then; after Ctrl-C saves, and leaves
    run.save()
    run.record(evaluate())
    run.finish()


def train(preset, data, out, recipe, seed=0, init=None):
    """Train a preset on the shards in `data`, or go on with the run in `out`.

    init: instead of random weights, those of a trained model, as load_model() names it.
    """
    device = pick_device()
    torch.manual_seed(seed)
    model = GPT(PRESETS[preset]) if init is None else load_model(init)[0]
    model.to(device).train()
    optimizer = configure_optimizer(model, recipe)
    train_set, val_sets = open_data(data, model.config)
    run = open_run(out, model, optimizer, recipe, train_set, seed, init)
    with run:  # takes the folder for itself; goes on from its checkpoint; notes Ctrl-C
        if not run.finished:
            fast_model = compiled(model)  # by torch.compile, on a GPU
            tokenizer = fineweb.get_tokenizer(model.config.vocab_size)
            items = load_hellaswag(tokenizer) if preset.startswith("gpt2") else []

            def evaluate():
                with centered_head(model):  # the same probabilities, with less rounding in bf16
                    sizes = (recipe.eval_tokens, recipe.micro_batch)
                    row = validate(fast_model, val_sets, tokenizer, *sizes, device)
                    if items and run.step >= recipe.eval_every:  # not in a trial of 20 steps
                        row["hellaswag"] = evaluate_hellaswag(model, items, device)
                return row

            # get_batches(step) gives a step's micro-batches; threads prepare the next few
            get_batches = functools.partial(get_micro_batches, train_set, recipe, seed)
            batches = prefetch(get_batches, run.step, recipe.max_steps)
            fit(run, fast_model, batches, evaluate, device)
    show_samples(run)


# -----------------------------------------------------------------------------
# 6. What helps a short training: a flat rate, Muon, and positions that begin as sinusoids


def flat_then_linear(step, recipe):
    """get_lr() after the warm-up, flat, then linear to 0 (Zhai et al. 2021, section 3.5).

    A high rate gets far, but the weights bounce about: the loss drops when the rate is lowered,
    whenever that is. So it is lowered only near the end, for a share `cooldown` of the steps.
    """
    return recipe.lr * min(1, (1 - step / recipe.max_steps) / recipe.cooldown)


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with "muon": orthogonalized steps (Muon, Jordan et al. 2024).

    A matrix maps vectors to vectors. Its singular value decomposition U S V^T says how: it turns
    them (V^T), stretches each direction by its singular value (S), and turns the result (U). A
    gradient G has few large singular values; Muon's step is U V^T, where all of them are 1:

        momentum = 0.95 * momentum + grad
        update = orthogonalize(grad + 0.95 * momentum)                       # Nesterov's momentum
        scale = sqrt(longer side / shorter side)
        weight -= lr * (scale * update + weight_decay * weight)

    (The numbers of U V^T get smaller with the longer side; scale makes them as large as those of a
    square of the shorter one.) AdamW treats each number by itself, so it too follows the few:

                          gradient       AdamW, first step    Muon
                          2.0  2.0         1  1               .03   1.0
                          2.0  1.9         1  1               1.0  -.03
        singular values   3.95  .05        2  0               1     1

    Why that is faster is not settled; perhaps since what is rare in the data, the small singular
    values, is learned as soon as the rest.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                self.muon_step(group["params"], group["lr"], group["weight_decay"])
        super().step()  # AdamW passes over what has no gradient

    def muon_step(self, matrices, lr, weight_decay):
        weights = []
        updates = []
        for p in matrices:
            state = self.state[p]
            if not state:
                # AdamW, when a run is resumed, expects a step with each state
                state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))
            momentum = state["momentum"].mul_(0.95).add_(p.grad)
            weights += split(p)
            updates += split(p.grad + 0.95 * momentum)
            p.grad = None
        for weight, update in zip(weights, orthogonalize_all(updates), strict=True):
            scale = math.sqrt(max(weight.shape) / min(weight.shape))
            weight.mul_(1 - lr * weight_decay)
            weight.add_(update, alpha=-lr * scale)


def muon_groups(model, recipe):
    """Three groups: the matrices of linear maps, for Muon; tables and other matrices; vectors."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    maps = []
    others = []
    vectors = []
    for name, p in model.named_parameters():
        if p.dim() == 2 and name.endswith("weight") and id(p) not in tables:
            maps.append(p)
        else:
            (others if p.dim() >= 2 else vectors).append(p)
    decay = recipe.weight_decay
    return [
        {"params": maps, "weight_decay": decay, "lr_scale": recipe.muon, "muon": True},
        {"params": others, "weight_decay": decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]


def split(matrix):
    """The maps in a matrix: c_attn has q, k and v, cross-attention's kv two; an MLP's is one."""
    rows, columns = matrix.shape
    squares = rows / columns
    return matrix.chunk(int(squares)) if squares in (2, 3) else [matrix]


def orthogonalize_all(matrices):
    """U V^T of each matrix; those of one shape together, which is up to three times as fast."""
    shapes = {}
    for i, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append(i)
    results = {}
    for chosen in shapes.values():
        steps = orthogonalize(torch.stack([matrices[i] for i in chosen]))
        results |= zip(chosen, steps, strict=True)
    return [results[i] for i in range(len(matrices))]


def orthogonalize(G):
    """U V^T for each matrix U S V^T of G (n, rows, columns), roughly, by Newton-Schulz steps.

    X X^T X is U S^3 V^T, so a polynomial of odd powers of X acts on S alone. A step makes
    s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which takes all but the smallest s, from at most 1, to
    about .7 ... 1.2 in five steps. It needs matrix products alone, in bf16 where that is fast.
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
    # each wave in a random direction of its own, spread over all C numbers of a position; .7 times
    # as long as random positions with this std (twice as long, the toy did not learn its map)
    directions = torch.linalg.qr(torch.randn(C, waves.size(1)))[0]  # orthogonal
    return waves @ directions.T * std * math.sqrt(C / waves.size(1))


# -----------------------------------------------------------------------------
# 7. Packing: several continuations of one beginning (to be read before caption.py)
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


def lay_out(beginning, continuations, P=0):
    """Lists of ids, positions, parts, sources, targets and owners of one beginning.

    The beginning is part 0, continuation k is part k + 1. For the example above:

        a column for each token            a column for each target
        token     c1 c2 c3 a1 b1 b2        target    a1 a2 b1 b2 b3
        position   0  1  2  3  3  4        source     2  3  2  4  5      where it is predicted
        part       0  0  0  1  2  2        owner      0  0  1  1  1      its continuation

    P vectors that are no tokens, a picture's prefix, may stand before the beginning. They belong to
    part 0, and all positions and sources are P larger.
    """
    idx = [*beginning]
    end = P + len(beginning)
    positions = [*range(P, end)]
    part = [0] * end
    source = []
    targets = []
    owner = []
    for k, tokens in enumerate(continuations):  # len(part) is the next free place
        inputs = tokens[:-1]  # the last token is never an input
        # the end of the beginning predicts the first token, each token the one after it
        source += [end - 1, *range(len(part), len(part) + len(inputs))]
        targets += tokens
        owner += [k] * len(tokens)
        idx += inputs
        positions += range(end, end + len(inputs))
        part += [k + 1] * len(inputs)
    return idx, positions, part, source, targets, owner


def pack(rows, P=0):
    """Pack rows of (beginning, [continuation, ...]), all of token ids, after P vectors: a Packed.

    The losses are then (tested by test_packed_continuations_have_the_losses_of_separate_ones)

        h = model.hidden_states(model.embed(packed.idx, packed.positions), packed.mask)
        losses = model.losses(packed.at_source(h), packed.targets)             # (B, N)
    """
    layouts = [lay_out(beginning, continuations, P) for beginning, continuations in rows]
    idx, positions, part, source, targets, owner = zip(*layouts, strict=True)
    part = pad(part, -1)  # (B, P + T); padding is part -1, which no token sees
    same_part = part[:, :, None] == part[:, None, :]  # (B, query, key)
    to_beginning = part[:, None, :] == 0
    causal = torch.ones(same_part.shape[1:], dtype=torch.bool).tril()
    mask = (same_part | to_beginning) & causal
    idx, positions = (pad(ids, 0, part.size(1) - P) for ids in (idx, positions))
    return Packed(idx, positions, mask[:, None], pad(source, 0), pad(targets, -100), pad(owner, -1))


@dataclass
class Packed:
    """What pack() makes; where P vectors stand first, idx and positions leave them out."""

    idx: torch.Tensor  # (B, T) token ids
    positions: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, 1, P + T, P + T), True where a query (row) may see a key (column)
    source: torch.Tensor  # (B, N), the place whose hidden state predicts a target
    targets: torch.Tensor  # (B, N), -100 where there is none
    owner: torch.Tensor  # (B, N), the continuation of a target, -1 where there is none

    def to(self, device):
        return Packed(*(t.to(device) for t in vars(self).values()))

    def at_source(self, h):
        """The hidden states that predict the targets: h[b, source[b, n]] for each b and n.

        Out of (B, P + T, C) come (B, N, C); gather() wants an index for each of the C numbers.
        """
        return h.gather(1, self.source[:, :, None].expand(-1, -1, h.size(2)))


def pad(rows, value, length=None):
    """Lists as one tensor (B, length): the longest, rounded up to 8, so that few shapes occur."""
    length = 8 * math.ceil(max(map(len, rows)) / 8) if length is None else length
    rows = [[*row, *[value] * (length - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.long)


# =============================================================================
# From here on: tooling, for reference
# =============================================================================
# Presets

PRESETS = {  # T, V, layers, heads, C
    # for the toy data, 0.9 M parameters (with an init_std of .02 its loss was seen on a plateau)
    "tiny": GPTConfig(fineweb.TOY_BLOCK, 431, 4, 4, 128, init_std=0.06, sinusoids=True),
    # for real text on a CPU, 16 M
    "small": GPTConfig(256, 50257, 4, 4, 256, init_std=0.04),
    # OpenAI's four sizes: 124 M (with two recipes), 355 M, 774 M and 1,558 M
    "gpt2": GPTConfig(),
    "gpt2-fast": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
RECIPES = {  # steps, tokens a step, micro-batch, learning rate, warm-up steps
    "tiny": Recipe(
        1_600, 2_048, 32, 1e-3, 40, cooldown=0.5, muon=16, eval_every=150, eval_tokens=20_480
    ),
    "small": Recipe(500, 8_192, 16, 2e-3, 50, eval_every=50, eval_tokens=16_384),
    "gpt2": Recipe(),
    # Not yet run at full size: 4.5 B tokens with Muon at .01, a flat rate, then linear, no decay.
    # That is near record 4 of modded-nanogpt, which reached llm.c's loss after 10 B tokens with 3.3
    # (and rotary positions)
    "gpt2-fast": Recipe(8_600, 524_288, 16, 1.8e-3, 250, cooldown=0.29, muon=5.6, weight_decay=0.0),
    "gpt2-medium": Recipe(micro_batch=8, lr=3e-4),
    "gpt2-large": Recipe(micro_batch=4, lr=2.5e-4),
    "gpt2-xl": Recipe(micro_batch=2, lr=2e-4),
    # for --init: few steps, and a low rate that falls to a tenth, so that little is forgotten
    "fine-tune": Recipe(200, 32_768, 4, 3e-5, 10, eval_every=20, eval_tokens=65_536, log_every=5),
}

# -----------------------------------------------------------------------------
# The loss in chunks (optional): without the logits of a whole batch


def chunked_cross_entropy(h, weight, targets, n_vocab):
    """GPT.loss() of hidden states h (B, T, C) under a head (V, C).

    The logits of 16 x 1024 tokens take 3.3 GB, and their gradient as much. Here only some thousand
    rows of them exist at a time; a compiled model would keep all, so GPT.loss() is not compiled.
    """
    total = ChunkedCrossEntropy.apply(h.flatten(0, 1), weight, targets.flatten(), n_vocab)
    return total / (targets != -100).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of hidden states h (rows, C) under a head W (V, C), in chunks.

    The gradient of -log softmax(z)[y] in z is softmax(z) - one_hot(y), known as soon as the logits
    are. So the forward pass computes it too, chunk after chunk:

        for i in range(0, len(h), rows):
            logits = h[i:i + rows] @ W.T                                   # (rows, V)
            loss += cross_entropy(logits, targets[i:i + rows])
            grad_logits = softmax(logits) - one_hot(targets[i:i + rows])
            grad_h[i:i + rows] = grad_logits @ W
            grad_W += grad_logits.T @ h[i:i + rows]

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
        rows = 8192 if h.is_cuda else 2048  # of logits that exist at a time
        buffer = W.new_empty(min(len(h), rows), len(W))  # one for all chunks: new memory is slow
        for i in range(0, len(h), rows):
            x = h[i : i + rows].to(dtype)
            target = targets[i : i + rows, None]
            valid = target != -100
            logits = torch.mm(x, W.T, out=buffer[: len(x)])
            total += loss_and_gradient(logits, target, n_vocab)
            grad_logits = logits  # the last line has overwritten them
            if needs_h:
                grad_h[i : i + rows] = grad_logits @ W * valid
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
    """loss_and_gradient() in plain PyTorch; compiled, it stores nothing else of size (rows, V)."""
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
# Models: OpenAI's, a run's, and those for transformers

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SUPPORTED = {  # what this GPT computes, in the words of a config.json of transformers
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}


def load_model(name):
    """(model, tokenizer) of a run, a checkpoint, or weights in OpenAI's layout.

    Of a run these are the best, or else the last. OpenAI's layout has a folder with config.json and
    model.safetensors, as transformers and --export-hf write it, or a name on the hub ("gpt2").
    """
    path = Path(name)
    for file in ("model.safetensors", "ckpt.pt", "best.safetensors"):
        if Path(name, file).exists():
            path = Path(name, file)
    if not path.is_file():
        if path.is_dir() or path.suffix or str(name).startswith(("runs/", "/", ".")):
            raise UserError(f"{name} has no model", "train first, or name another one")
        repo = f"openai-community/{name}" if name in OPENAI else str(name)
        for file in ("config.json", "vocab.json", "model.safetensors"):  # they lie side by side
            path = fineweb.hub_download(repo, file)
    if path.suffix == ".safetensors":
        about, tensors = read_weights(path)
    else:
        checkpoint = read_checkpoint(path)
        about, tensors = checkpoint["about"], checkpoint["model"]
        if checkpoint["step"] == 0:
            raise UserError(f"in {name} nothing is trained yet", "let it train first")
    if "config" in about:
        model = GPT(GPTConfig(**about["config"]))
        model.load_state_dict(tensors)
    else:
        model = read_openai(path, tensors)
    print(f"model      {path}" + (f", step {about['step']:,}" if "step" in about else ""))
    return model.eval(), fineweb.get_tokenizer(model.config.vocab_size)


def read_openai(path, tensors):
    """from_pretrained() of tensors whose config.json lies beside `path`, if this GPT can be that.

    Names may begin with "transformer."; tables longer than GPT-2's vocabulary are cut to it.
    """
    with fineweb.reading(path, "a GPT-2 with its config.json", OSError):
        config = json.loads(path.with_name("config.json").read_bytes())
    for key, values in SUPPORTED.items():
        if config.get(key, values[0]) not in values:
            problem = f"{path.parent}: {key} is {config[key]!r}"
            raise UserError(problem, f"{values[0]!r} is what is computed here")
    with fineweb.reading(path, "a whole GPT-2", RuntimeError):
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        table = tensors["wte.weight"]
        if not torch.equal(tensors.get("lm_head.weight", table), table):
            raise ValueError("its head is not its token table")
        tensors["wte.weight"] = table[:50257]
        for file in filter(Path.exists, map(path.with_name, ("vocab.json", "tokenizer.json"))):
            words = json.loads(file.read_bytes())
            words = words["model"]["vocab"] if file.name == "tokenizer.json" else words
            if words != json.loads(gpt2_files()["vocab.json"]):
                raise ValueError(f"{file.name} is not GPT-2's")
        return from_pretrained(tensors, config["n_head"])


def gpt2_files():
    """GPT-2's vocabulary as transformers names its two files; tiktoken has them in its cache."""
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
    return {ours: read_file_cached(address + theirs) for ours, theirs in names.items()}


def export_hf(model, tokenizer, folder):
    """Write a new folder that transformers' from_pretrained() loads, with GPT-2's tokenizer."""
    c = model.config
    tensors = {}
    for name, t in model.state_dict().items():
        t = t.T if name.endswith(TRANSPOSED) else t
        tensors[f"transformer.{name}"] = t.contiguous()
    tensors["transformer.wte.weight"] = model.wte.weight.detach()[: c.vocab_size].clone()
    config = {
        **{key: values[0] for key, values in SUPPORTED.items()},
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "bos_token_id": tokenizer.eot_token,
        "eos_token_id": tokenizer.eot_token,
        "architectures": ["GPT2LMHeadModel"],
        "torch_dtype": "float32",
    }
    with fineweb.new_folder(folder) as building:  # it must be new
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        fineweb.write_json(building / "config.json", config)
        if tokenizer.name == "gpt2":  # the toy's is this project's own: transformers has none
            about = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size}
            fineweb.write_json(building / "tokenizer_config.json", about)
            for name, content in gpt2_files().items():
                (building / name).write_bytes(content)
    print(f"{folder} is ready for transformers.AutoModelForCausalLM.from_pretrained")


@torch.no_grad()
def freeze(model, device):
    """The model on `device`, not to be trained; its matrices in bf16 where products are.

    For a weight without a gradient autocast does not keep the copy in bf16 that it makes: it would
    cast the weight again for each generated token, which took most of the time of a token.
    """
    model.to(device).eval().requires_grad_(False)
    if uses_bf16(device):
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
                module.bfloat16()
    if isinstance(model, GPT):
        center_head(model)
    return model


@torch.no_grad()
def center_head(model):
    """For a model that is not trained: its head becomes the token table minus its mean row.

    The probabilities stay the same. OpenAI's logits lie between -35 and -120, where bf16 has steps
    of .25 and .5. Without the mean row all logits of a position move by one number, which softmax
    ignores, toward 0, where the steps are finer.
    """
    table = model.wte.weight
    head = table - table[: model.config.vocab_size].mean(0)
    head = head.bfloat16() if uses_bf16(table.device) else head
    model.head = lambda: head  # in place of the method


@contextlib.contextmanager
def centered_head(model):
    """center_head() within this context."""
    center_head(model)
    yield
    del model.head


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


# -----------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def ending_losses(model, items, device):
    """The summed loss in nats of each ending of HellaSwag items, (items, 4)."""
    batch = 8 if device.type == "cpu" else 64
    sizes = [len(item.context) + sum(map(len, item.endings)) for item in items]
    order = np.argsort(sizes)[::-1]  # the longest first: out of memory comes early
    losses = np.zeros((len(items), 4))
    for i in progress(range(0, len(items), batch), "HellaSwag"):
        chosen = order[i : i + batch]  # items of like length
        rows = []
        for item in [items[i] for i in chosen]:
            room = model.config.block_size - max(map(len, item.endings))
            rows.append((item.context[-room:], item.endings))  # too long: cut from the left
        packed = pack(rows).to(device)
        h = model.hidden_states(model.embed(packed.idx, packed.positions), packed.mask)
        loss = model.losses(packed.at_source(h), packed.targets).double()  # (B, N)
        each = [(loss * (packed.owner == k)).sum(1) for k in range(4)]
        losses[chosen] = torch.stack(each, 1).cpu().numpy()
    return losses


def evaluate_hellaswag(model, items, device, method="token mean"):
    """Print a report and return acc_norm; each rank takes its share of the items."""
    mine = items[rank() :: world_size()]
    with autocast(device):
        losses = ending_losses(model, mine, device)
    correct = torch.tensor(hellaswag.count_correct(mine, losses), device=device)
    acc, acc_norm = (all_reduce(correct) / len(items)).tolist()
    print(hellaswag.report(acc, acc_norm, len(items), method), flush=True)
    return acc_norm


def load_hellaswag(tokenizer):
    """HellaSwag's items, to be measured during training; without a network there are none."""
    examples = []
    try:
        with first_of_node_first():
            examples = hellaswag.load_examples()
    except (UserError, OSError) as error:
        print(f"HellaSwag  is not measured: {error}", file=sys.stderr)
    if any_rank(not examples):  # all ranks measure it or none, or they would wait forever
        return []
    return [hellaswag.render(example, tokenizer) for example in examples]


def evaluate(name, data, limit):
    """Print the validation losses of a model, and its accuracies on HellaSwag."""
    device = pick_device()
    with first_of_node_first():
        model, tokenizer = load_model(name)
    freeze(model, device)
    data = data or Path("data/toy" if tokenizer.name == "tiny" else "data/fineweb_edu")
    if data.exists() or data != Path("data/fineweb_edu"):
        _, val_sets = open_data(data, model.config)
        tokens = 65_536 if device.type == "cpu" else Recipe.eval_tokens
        batch = math.ceil(16_384 / model.config.block_size)
        validate(model, val_sets, tokenizer, tokens, batch, device)
    else:
        print("no validation loss: give --data, or get FineWeb-Edu (python fineweb.py)")
    if tokenizer.name != "gpt2" or model.config.block_size < 256:
        print("no HellaSwag: it needs GPT-2's tokens and a context of 256")
        return
    with first_of_node_first():
        examples = hellaswag.subset(hellaswag.load_examples(), limit)
    for method in ("token mean", "harness"):
        items = [hellaswag.render(example, tokenizer, method) for example in examples]
        evaluate_hellaswag(model, items, device, method)


# -----------------------------------------------------------------------------
# Devices and processes

FAST_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fast_attention(q, k, v, **options):
    """PyTorch's scaled_dot_product_attention, with the kernels that are fast here."""
    if q.device.type == "cpu" and q.size(2) < 512:  # short on a CPU: bf16 is 5 times slower
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    if options["attn_mask"] is not None or q.size(2) != k.size(2):
        with sdpa_kernel(FAST_SDPA):  # many shapes: cuDNN would plan each of them for .4 s
            return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q, k, v, **options)


def pick_device():
    """The GPU of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def uses_bf16(device):
    """Whether the hardware has bf16 products: CUDA from sm80; CPUs with AVX512-BF16 (AMX too)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast(device):
    """Mixed precision: within this context matrix products are in bf16, where that is fast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(device))


def progress(parts, what):
    """The parts, with a bar on a terminal, which goes when they are done."""
    return tqdm(parts, what, leave=False, disable=rank() > 0 or None)


def prefetch(get, first, last, ahead=4):
    """Yield (step, get(step)) for steps first ... last - 1, while threads prepare the next four:

        for step in range(first, last):
            yield step, get(step)

    Reading 512 windows from all over a disk for the first time took one thread 0.2 to 0.5 s, and
    four threads 0.1 s. A loader has one thread of PyTorch's: more slowed training by a sixth.
    """
    torch.get_num_threads()  # settles how many threads a step has, before a loader has only one
    with ThreadPoolExecutor(ahead, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        futures = [threads.submit(get, step) for step in range(first, min(first + ahead, last))]
        for step in range(first, last):
            yield step, futures.pop(0).result()
            if step + ahead < last:
                futures.append(threads.submit(get, step + ahead))


def join_processes():
    """Under torchrun, make this process one of several (ranks): NCCL on GPUs, gloo on CPUs."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    timeout = datetime.timedelta(hours=2)  # what one rank prepares for all may take a while
    if torch.cuda.is_available():
        torch.cuda.set_device(pick_device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all


def leave_processes():
    """Wait for all ranks, then end their group; threads of it would abort the process at exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank():
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor):
    """The tensor summed over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag):
    """Whether a flag is set on any rank: all get the same answer."""
    if world_size() == 1:
        return flag
    return all_reduce(torch.tensor(float(flag), device=pick_device())).item() > 0


@contextlib.contextmanager
def first_of_node_first():
    """The first rank of each machine runs the body (it downloads), then the others find it done."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier()
    try:
        yield
    finally:
        if is_first:
            barrier()


@functools.cache  # once for each function
def compiled(function):
    """A function or model through torch.compile, on a GPU; as it is, where that fails."""
    if not torch.cuda.is_available():
        return function
    try:
        torch.compile(torch.sin)(torch.ones(1, device=pick_device()))
        return torch.compile(function)
    except Exception as error:  # the compiler's, Triton's or a subprocess's; often no Python.h
        print(f"not compiled, so training is slower: {str(error)[:150]}")
        return function


def flops_per_token(config):
    """Of a training step (Chowdhery et al. 2022, appendix B): 6 per weight, and attention's."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def short_hash(content):
    """16 hexadecimal digits that tell contents apart."""
    return hashlib.sha256(repr(content).encode(errors="replace")).hexdigest()[:16]


def fingerprint(module):
    """Tells weights apart, by the first numbers of each tensor."""
    tensors = module.state_dict().items()
    return short_hash([(name, t.shape, t.flatten()[:16].tolist()) for name, t in tensors])


# -----------------------------------------------------------------------------
# The folder of a run


@dataclass
class Run:
    """The folder of a run, for one command at a time: ckpt.pt, log.csv, curves.png.

    Inside `with run` the first Ctrl-C, SIGTERM or SIGHUP asks the loop to stop after its step.
    """

    out: Path
    model: nn.Module  # what is saved and resumed
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    identity: dict  # what must stay the same when it is continued
    about: dict  # what one has to know to use the weights
    unit: str = "tokens"  # what its speed counts
    keep_best: bool = True  # the weights of the lowest validation loss, in best.safetensors
    step: int = 0  # finished steps
    finished: bool = False  # the last evaluation is done
    seconds: float = 0.0  # of training, without evaluation
    rows: list = field(default_factory=list)  # of log.csv; after a checkpoint they are done again
    stop: bool = False  # a signal asked for it

    def __enter__(self):
        path = self.out / "ckpt.pt"
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.out / ".lock", timeout=0)  # for one command at a time
        if rank() == 0:
            self.lock.acquire()  # before the checkpoint is read: another may still write it
            if not path.exists():
                if any(self.out.glob("[!.]*")):
                    raise UserError(f"{self.out} has files, but no run", "choose another --out")
                self.save()  # from now on this is the folder of a run
        barrier()
        self.resume(read_checkpoint(path))
        weights = float(int(fingerprint(self.model)[:8], 16))
        total = all_reduce(torch.tensor(weights, dtype=torch.double, device=pick_device()))
        if total.item() != weights * world_size():
            raise UserError("the ranks have different weights", "share --out among them")
        self.handlers = {}
        for each in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(each) != signal.SIG_IGN:  # as nohup makes it
                self.handlers[each] = signal.signal(each, self.on_signal)
        steps = f"{self.step:,} of {self.recipe.max_steps:,} steps are done"
        print(f"run        {self.out}, {steps}; {self.recipe.batch_size:,} {self.unit} a step")
        self.time = time.perf_counter()
        self.shown = (self.step, self.seconds)
        return self

    def __exit__(self, kind, error, traceback):
        for each, handler in self.handlers.items():
            signal.signal(each, handler)
        self.lock.release()

    def resume(self, checkpoint):
        """Go on from a checkpoint; UserError if it is of another run. At step 0 nothing is lost."""
        if checkpoint["step"] == 0:
            return
        for key, now in self.identity.items():
            before = checkpoint["identity"].get(key)
            if before != now:
                problem = f"{self.out} was trained with other {key.removeprefix('digest of ')}"
                problem += "" if "digest" in key else f" ({before}, not {now})"
                raise UserError(problem, "choose another --out")
        self.model.load_state_dict(checkpoint["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # rates and decays of today's recipe
        self.optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": groups})
        for name in ("step", "seconds", "rows"):
            setattr(self, name, checkpoint[name])
        self.finished = checkpoint["finished"] and self.step >= self.recipe.max_steps
        if self.finished and checkpoint["recipe"] != asdict(self.recipe):
            print(f"{self.out} has come to its end: flags of training are not used")

    def on_signal(self, which, frame):
        """Ask the loop to stop; without torchrun the next signal is no longer caught."""
        self.stop = True
        if world_size() == 1:  # torchrun passes Ctrl-C on: its processes get it twice
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # a terminal that was closed
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def end_step(self, loss, norm, lr):
        """Count a step, and log it now and then; to stop, save first, then print, and leave."""
        stop = any_rank(self.stop)
        self.step += 1
        self.seconds += time.perf_counter() - self.time
        self.time = time.perf_counter()
        recipe = self.recipe
        is_logged = self.step % recipe.log_every == 0 or self.step in (1, recipe.max_steps)
        line = self.describe_step(loss, norm, lr) if is_logged or stop else ""
        if stop:
            self.save()
        if not math.isfinite(loss + norm):
            line += f"\nthe loss or its gradient is not finite: step {self.step:,} changed nothing"
        if line:
            print(line, flush=True)
        if stop:
            print(f"stopped after step {self.step:,}; the same command resumes it", flush=True)
            leave_processes()
            sys.exit(130)

    def describe_step(self, loss, norm, lr):
        """Log the steps since the last line, and return one about them."""
        step, seconds = self.shown
        self.shown = (self.step, self.seconds)
        rate = (self.step - step) * self.recipe.batch_size / (self.seconds - seconds)
        row = {"loss": loss, "lr": lr, "norm": norm, f"{self.unit}_per_second": rate}
        self.log(row | {"seconds": self.seconds})
        left = (self.recipe.max_steps - self.step) * self.recipe.batch_size / rate
        begin = f"step {self.step:>6,} of {self.recipe.max_steps:,} | loss {loss:7.4f}"
        speed = f"{rate:9,.{0 if rate > 100 else 1}f} {self.unit}/s"
        if torch.cuda.is_available() and isinstance(self.model, GPT):
            # divided by the card's peak (A100 312, H100 989) it is the MFU
            tera = rate * flops_per_token(self.model.config) / world_size() / 1e12
            memory = torch.cuda.max_memory_allocated() / 1e9
            speed += f" | {memory:.1f} GB | {tera:.0f} TFLOP/s"
        rates = f"lr {lr:.2e} | norm {norm:5.2f}"
        return f"{begin} | {rates} | {speed} | {tqdm.format_interval(left)} left"

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

    def record(self, row):
        """Log an evaluation, keep the weights if they are the best so far, draw the curves."""
        self.log(row)
        if rank() == 0:
            best = max(filter(math.isfinite, map(quality, self.rows)), default=None)
            if self.keep_best and quality(row) == best:
                about = self.about | {"step": self.step}
                save_weights(self.out / "best.safetensors", self.model, about)
            draw_run(self.out, self.rows)
        self.time = time.perf_counter()

    def finish(self):
        """Save the last evaluation, too; after a signal end the command, not only this run."""
        self.finished = True
        self.save()
        if any_rank(self.stop):
            leave_processes()
            sys.exit(130)

    def save(self):
        """Write the checkpoint; the other ranks go on meanwhile, or wait in leave_processes()."""
        if rank() == 0:
            names = ("identity", "step", "finished", "seconds", "rows")
            content = {
                **{name: getattr(self, name) for name in names},
                "about": self.about | {"step": self.step},
                "recipe": asdict(self.recipe),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            with fineweb.atomic_write(self.out / "ckpt.pt") as file:
                torch.save(content, file)


DAMAGE = (RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError)


def read_checkpoint(path):
    """What Run.save() wrote: tensors, numbers, strings and dicts."""
    what = "a whole checkpoint of this program"
    with fineweb.reading(path, what, *DAMAGE):
        with zipfile.ZipFile(path) as parts:
            if parts.testzip():  # PyTorch does not look at the checksums
                raise ValueError("its checksum is wrong")
        # mapped, eight processes on a machine with GPUs share one copy in its memory
        mapped = torch.cuda.is_available()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        checkpoint["about"]["step"]  # a KeyError in those of other programs
    return checkpoint


def is_finished(out):
    """Whether the run in a folder has come to its end; its tensors are not read."""
    path = Path(out, "ckpt.pt")
    with fineweb.reading(path, "a whole checkpoint of this program", *DAMAGE):
        return path.exists() and torch.load(path, "cpu", weights_only=True, mmap=True)["finished"]


def save_weights(path, module, about):
    """A module's weights as one safetensors file, with what one has to know to use them."""
    with fineweb.atomic_write(path) as file:
        file.write(save(module.state_dict(), {"about": json.dumps(about)}))


def read_weights(path):
    """(what save_weights() wrote of them, or {}; the tensors) of a safetensors file."""
    with fineweb.reading(path, "a file of weights", SafetensorError):
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            return about, {name: file.get_tensor(name) for name in file.keys()}


def quality(row):
    """What the best row of a log has most of: CIDEr-D, or else the lowest mean validation loss."""
    losses = [value for name, value in row.items() if name.startswith("val")]
    return row.get("cider", -np.mean(losses) if losses else -math.inf)


def draw_run(out, rows):
    """Charts of the rows of a log: losses, and HellaSwag or CIDEr-D where they are measured."""
    names = dict.fromkeys(itertools.chain(*rows))
    losses = [name for name in names if name == "loss" or name.startswith("val")]
    draw_chart(out / "curves.png", "nats per token", {name: curve(rows, name) for name in losses})
    for name in {"hellaswag", "cider"} & set(names):
        draw_chart(out / f"{name}.png", name, {name: curve(rows, name)})


def curve(rows, key):
    """The points (step, value) of a column of the log."""
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def draw_chart(path, title, lines):
    """A line chart as a PNG; lines: {label: [(step, y), ...]}."""
    points = np.array([(0.0, 0.0), *sum(lines.values(), [])])[1:]
    low = points.min(0, initial=math.inf)
    high = np.maximum(points.max(0, initial=-math.inf), low + 1e-9)
    image = Image.new("RGB", (1800, 960), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(30)
    for share in np.linspace(0, 1, 6):
        step, y = low + share * (high - low)
        draw.text((140 + 1600 * share, 856), f"{step:,.0f}", "black", font, "mt")
        draw.text((124, 840 - 740 * share), f"{y:.4g}", "black", font, "rm")
    draw.text((940, 28), f"{title}, by step", "black", font, "mt")
    for i, (label, line) in enumerate(filter(lambda item: item[1], lines.items())):
        color = ("#94a3b8", "#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")[i % 6]
        pixels = (140, 840) + (np.array(line) - low) / (high - low) * (1600, -740)
        draw.line([*map(tuple, pixels)], color, 5, "curve")
        draw.circle(pixels[-1], 8, color)
        draw.text((140 + 280 * i, 924), label, color, font, "lm")
    with fineweb.atomic_write(path) as file:
        image.reduce(2).save(file, "PNG")  # halved: smooth lines


# -----------------------------------------------------------------------------
# Command line


def recipe_flags(args):
    """{name: value} of the flags that change a recipe, as far as they were given."""
    names = Recipe.__dataclass_fields__
    return {key: value for key, value in vars(args).items() if key in names and value is not None}


def with_flags(recipe, flags):
    """The recipe with these flags; a short trial has a short warm-up."""
    recipe = replace(recipe, **flags)
    return replace(recipe, warmup_steps=min(recipe.warmup_steps, math.ceil(recipe.max_steps / 10)))


def check_batch_size(recipe, T=1):
    """UserError if the ranks cannot share a step, in windows of T (pictures: 1)."""
    if recipe.batch_size % T or recipe.batch_size < T * world_size():
        what_to_do = f"give a multiple of {T:,}, at least {T * world_size():,}"
        raise UserError(f"a step of {recipe.batch_size:,} cannot be shared out", what_to_do)
    sizes = {len(part) for part in share_out(range(recipe.batch_size // T), recipe)}
    if len(sizes) > 1 and torch.cuda.is_available():
        print(f"note       micro-batches of {sorted(sizes)}: equal ones are compiled only once")


def open_data(folder, config):
    """(training set, {name: validation set}) of a folder of shards; data/toy is made."""
    if folder == Path("data/toy"):
        with first_of_node_first():
            fineweb.make_toy_text(folder)
    train = sorted(Path(folder).glob("*_train_??????.bin"))
    val = {}
    for path in sorted(Path(folder).glob("*_val_??????.bin")):
        val.setdefault(path.stem.rpartition("_val_")[0], []).append(path)
    if not train or not val:
        what = f"{folder} has no shards NAME_train_000001.bin and NAME_val_000000.bin"
        raise UserError(what, "make them with fineweb.py")
    val_sets = {name: TokenDataset(paths, config) for name, paths in val.items()}
    return TokenDataset(train, config), val_sets


def open_run(out, model, optimizer, recipe, train_set, seed, init):
    """The Run of a GPT; says what will be done."""
    check_batch_size(recipe, train_set.T)
    ends = [(len(s), s[:1000].tobytes(), s[-1000:].tobytes()) for s in train_set.shards]
    identity = {  # what must stay the same when the run is resumed
        "shape": str(model.config),
        "optimizer": type(optimizer).__name__,
        "seed": seed,
        "batch size": recipe.batch_size,
        "digest of data": short_hash(ends),
        "digest of first weights": fingerprint(model) if init else "",
    }
    run = Run(Path(out), model, optimizer, recipe, identity, about={"config": asdict(model.config)})
    epochs = recipe.max_steps * recipe.batch_size / (len(train_set) * train_set.T)
    # where each text is read once, the last weights are the best, and a write of half a gigabyte
    # (the 124M; est. 1 s) is saved at each evaluation; but older ones must not pass for them
    run.keep_best = epochs >= 2 or (run.out / "best.safetensors").exists()
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    precision = "bf16 products, fp32 weights" if uses_bf16(device) else "fp32"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model      {parameters:,} parameters on {world_size()} x {name}, {precision}")
    print(f"data       {epochs:.1f} epochs of {len(train_set) * train_set.T:,} tokens")
    if parameters > 1e8 and device.type == "cpu":
        print("           no GPU is seen: is its driver (nvidia-smi) too old for this PyTorch?")
    return run


def show_samples(run):
    """Print samples of a finished run, and what to do next."""
    if rank() > 0:
        return
    model, tokenizer = load_model(run.out)
    freeze(model, pick_device())
    for prompt in ("", "The ", "In the beginning"):
        length = min(model.config.block_size, 200)
        print("---", *complete(model, tokenizer, prompt, length, temperature=0.8, top_k=50))
    print(f"---\n{run.seconds:.0f} s of training; {run.out} has checkpoint, log and curves.")
    print(f'Next: python train_gpt2.py --sample "The " --ckpt {shlex.quote(str(run.out))}')


def main():
    """The commands at the top of this file."""
    parser = fineweb.make_parser(__doc__)
    positive = number(int, 1)
    add = parser.add_argument
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--preset", choices=PRESETS, help="shape and recipe of the model")
    shape.add_argument("--init", metavar="CKPT", help="begin with these weights (as --ckpt)")
    add("--data", type=Path, help="folder of shards (python fineweb.py makes one)")
    add("--out", help="folder of the run (default: runs/<preset>)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--steps", dest="max_steps", type=positive, help="updates of the weights")
    add("--batch-tokens", dest="batch_size", type=positive, help="tokens a step")
    add("--micro-batch", type=positive, help="windows at once: less memory")
    add("--lr", type=number(float, 0, 1), help="the highest learning rate")
    add("--eval-every", type=positive, help="steps between evaluations")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--sample", metavar="TEXT", help="continue TEXT")
    task.add_argument("--eval", action="store_true", help="validation loss and HellaSwag")
    task.add_argument("--export-hf", metavar="DIR", help="write a folder for transformers")
    add("--ckpt", help="checkpoint, run, folder for transformers, or on the hub: gpt2, gpt2-xl")
    add("--limit", type=positive, help="use only so many random HellaSwag items")
    add("--max-new-tokens", type=positive, default=200, help="of a sample (200)")
    add("--temperature", type=number(float, 0, 100), default=0.8, help="of a sample (0.8)")
    add("--top-k", type=positive, help="sample only the k most probable tokens")
    add("--top-p", type=number(float, 0.001, 1), help="sample only the nucleus of p")
    add("--num", type=number(int, 1, 10_000), default=1, help="samples (1)")
    args = parser.parse_args()
    join_processes()
    name = args.ckpt or f"runs/{args.preset or 'tiny'}"
    which = "ckpt" if args.ckpt else "preset"
    if args.eval:
        fineweb.only(parser, args, "--eval", f"{which} data limit")
        evaluate(name, args.data, args.limit)
    elif args.export_hf:
        fineweb.only(parser, args, "--export-hf", which)
        if rank() == 0:
            export_hf(*load_model(name), args.export_hf)
    elif args.sample is not None:
        options = "max_new_tokens num seed temperature top_k top_p"
        fineweb.only(parser, args, "--sample", f"{which} {options}")
        model, tokenizer = load_model(name)
        freeze(model, pick_device())
        options = {key: getattr(args, key) for key in options.split()}
        texts = complete(model, tokenizer, args.sample, **options)
        print(*texts, sep="\n---\n", end="\n---\n")
    else:
        recipe = "max_steps batch_size micro_batch lr eval_every"
        fineweb.only(parser, args, "training", f"preset init data out seed {recipe}")
        start_training(args)
    leave_processes()


def start_training(args):
    """train() for the flags; the preset, if not given, is what this machine can train."""
    preset = "fine-tune" if args.init else args.preset
    if not preset:
        shards = Path(args.data or "data/fineweb_edu").glob("*_train_??????.bin")
        size = sum(path.stat().st_size for path in shards)
        preset = "small" if args.data else "tiny"
        if torch.cuda.is_available() and size >= 2e8:  # 100 M tokens
            preset = "gpt2"
    data = args.data or Path("data/toy" if preset == "tiny" else "data/fineweb_edu")
    if data == Path("data/toy"):
        print("setup      toy. The full one: python fineweb.py --tokens 10B, then, with a GPU,")
        print("           python train_gpt2.py --preset gpt2")
    recipe = with_flags(RECIPES[preset], recipe_flags(args))
    train(preset, data, args.out or f"runs/{preset}", recipe, args.seed, args.init)


if __name__ == "__main__":
    fineweb.command_line(main)
