"""
GPT-2 from scratch: the model, its training, its samples.

    python train_gpt2.py                                     train: the tiny world on a laptop (2 minutes), or the 124M on a GPU
    python train_gpt2.py --sample "Once upon a time"         continue a text
    python train_gpt2.py --eval                              validation loss and HellaSwag
    python train_gpt2.py --export-hf DIR                     a folder that transformers loads
    python train_gpt2.py --bench [--preset gpt2]             tokens/s, memory, and the time of a full run on this machine
    torchrun --nproc_per_node=8 train_gpt2.py …              the same run on eight GPUs

The same command continues a run that was interrupted. A run lives in runs/<preset>/: ckpt.pt, log.csv, curves.png, samples.txt.

Chapters: the model (all of GPT-2) · OpenAI's weights · data · recipes · the machine · evaluation · a run's folder · the training run ·
how fast is it here · commands. caption.py trains its bridges in the same loop.

Letters beside the code: B batch, T time (tokens), C width, nh heads, hs head size, V vocabulary, P prefix.
GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the recipe: Brown et al. 2020 (GPT-3), appendix B.
"""
import argparse
import atexit
import codecs
import contextlib
import csv
import dataclasses
import datetime
import functools
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

import fineweb
import hellaswag
from fineweb import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2."""
    block_size: int = 1024        # T at most
    vocab_size: int = 50257       # V, rows of the token table
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768             # C
    init_std: float = 0.02        # Radford et al. 2018, section 4.1
    vocab_padding: int = 0        # the last rows that are no tokens: a rounder V makes faster matrix products; they are never emitted


PRESETS = {                      # T,   V, layers, heads, C
    "tiny":        GPTConfig(fineweb.TINY_BLOCK, 448, 4, 4, 128, init_std=0.06, vocab_padding=17),           #   0.9 M parameters
    "small":       GPTConfig(256, 50304, 4, 4, 256, init_std=0.04, vocab_padding=47),                        #    16 M, for real text on a CPU
    "gpt2":        GPTConfig(1024, 50304, 12, 12, 768, vocab_padding=47),                                    #   124 M
    "gpt2-medium": GPTConfig(1024, 50304, 24, 16, 1024, vocab_padding=47),                                   #   355 M
    "gpt2-large":  GPTConfig(1024, 50304, 36, 20, 1280, vocab_padding=47),                                   #   774 M
    "gpt2-xl":     GPTConfig(1024, 50304, 48, 25, 1600, vocab_padding=47),                                   # 1,558 M
}


class KeyValues:
    """The keys and values that one layer has computed so far, so that generation does not compute them again."""

    def __init__(self):
        self.k = self.v = None                                                   # (B, nh, T so far, hs)

    def extend(self, k, v):
        if self.k is not None:
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        return k, v


class CausalSelfAttention(nn.Module):
    """Vaswani et al. 2017, section 3.2, with as many heads as fit side by side into C."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))   # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attention(q, k, v, mask, is_causal=mask is None and T > 1)            # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def attention(q, k, v, mask=None, is_causal=False):
    """softmax(q kᵀ / √hs) v, fused (FlashAttention on GPUs), so that the (T, T) weights are never stored. Shapes (B, nh, T, hs)."""
    if q.device.type == "cpu" and q.size(2) < 512:         # there bf16's backward pass is slow on short sequences: 8.7 ms against 1.8 at T = 64
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=is_causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


class MLP(nn.Module):
    """Two linear layers with GELU between them (Hendrycks & Gimpel 2016, in the tanh form that GPT-2 uses)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))             # (B, T, 4C) in between


class Block(nn.Module):
    """Attention gathers from other positions, the MLP thinks about what came; each adds to the residual stream x."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2, with OpenAI's tensor names. The steps embed, decode, logits and loss can be taken one by one by other files."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        for name, p in self.named_parameters():            # LayerNorms stay at 1 and 0
            if name.endswith("c_proj.weight"):             # 2 · n_layer of them add up in the residual stream (Radford et al. 2019, section 2.3)
                nn.init.normal_(p, std=config.init_std / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, idx, positions=None):
        """Token ids (B, T) to vectors (B, T, C). positions: (T,) or (B, T), by default 0 … T - 1."""
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        return self.wte(idx) + self.wpe(positions)

    def decode(self, x, mask=None, cache=None):
        """Vectors (B, T, C) to hidden states after the last LayerNorm (B, T, C).

        mask: True where attention may look, broadcast to (B, nh, T, T); without one it looks at itself and backwards.
        cache: a list of n_layer KeyValues; x then stands behind what they hold, and they are extended by it.
        """
        past = cache[0].k.size(2) if cache and cache[0].k is not None else 0
        if mask is None and past and x.size(1) > 1:
            mask = torch.ones(x.size(1), past + x.size(1), dtype=torch.bool, device=x.device).tril(past)
        for i, block in enumerate(self.h):
            x = block(x, mask, cache[i] if cache else None)
        return self.ln_f(x)

    def logits(self, h):
        """Hidden states (B, T, C) to logits (B, T, V), with the token table as the head."""
        return F.linear(h, self.wte.weight)

    def loss(self, h, targets, reduction="mean"):
        """Cross-entropy in nats of targets (B, T) given hidden states (B, T, C); targets of -100 do not count.

        reduction: "mean" over the targets that count, "sum", or "none", which gives (B, T) with 0 where nothing counts.
        """
        if reduction == "none":
            return torch.stack([F.cross_entropy(self.logits(row).float(), t, reduction="none") for row, t in zip(h, targets)])
        total = ChunkedCrossEntropy.apply(h.reshape(-1, h.size(-1)), self.wte.weight, targets.reshape(-1), torch.is_grad_enabled())
        return total if reduction == "sum" else total / (targets != -100).sum()

    def forward(self, idx, targets=None):
        """Token ids (B, T) to (logits (B, T, V), None); with targets (B, T) to (None, mean loss): then logits are never stored."""
        h = self.decode(self.embed(idx))
        if targets is None:
            return self.logits(h), None
        return None, self.loss(h, targets)

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, prefix=None, stop=None, generator=None, use_cache=True):
        """Yield one new token for each row, (B,), at a time; the arguments are those of generate()."""
        B, P = idx.size(0), 0 if prefix is None else prefix.size(1)
        room, V = self.config.block_size - P, self.config.vocab_size - self.config.vocab_padding
        if room < 2:
            raise UserError(f"a prefix of {P} leaves no room in a context of {self.config.block_size} tokens: use a smaller one")
        running = torch.ones(B, dtype=torch.bool, device=idx.device)
        context, cache = idx[:, -room:], None              # context: the ids that the model sees
        for _ in range(max_new_tokens):
            if context.size(1) > room:                     # full: drop the older half, so that this happens once in T/2 tokens only
                context, cache = context[:, -(room // 2):], None
            positions = torch.arange(P, P + context.size(1), device=idx.device)
            if cache is None or not use_cache:             # look at everything
                cache = [KeyValues() for _ in self.h]
                x = self.embed(context, positions)
                h = self.decode(x if prefix is None else torch.cat([prefix, x], dim=1), cache=cache)
            else:                                          # look at the newest token only
                h = self.decode(self.embed(context[:, -1:], positions[-1:]), cache=cache)
            token = sample_token(self.logits(h[:, -1])[:, :V].float(), temperature, top_k, top_p, generator)        # (B,)
            if stop is not None:
                token = torch.where(running, token, stop)
                running = running & (token != stop)
            yield token
            context = torch.cat([context, token[:, None]], dim=1)
            if not running.any():
                return

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, **options):
        """Continue token ids (B, T) by up to max_new_tokens, giving (B, T + new).

        temperature, top_k, top_p, generator: see sample_token. prefix: vectors (B, P, C) that stand before the ids, which then
        begin at position P; idx may be empty (B, 0) behind one. stop: a token id that ends its row; the row is filled up with it.
        """
        return torch.cat([idx, *(token[:, None] for token in self.stream(idx, max_new_tokens, **options))], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """OpenAI's weights ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", fetched once), or a folder or .safetensors file in their layout."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        path = fetch_openai(name_or_dir) if str(name_or_dir) in OPENAI else Path(name_or_dir)
        path = path / "model.safetensors" if path.is_dir() else path
        try:
            tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
        except (SafetensorError, FileNotFoundError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): fetch or export it again") from None
        try:
            V, C = tensors["wte.weight"].shape
            layers = sum(name.endswith("ln_1.weight") for name in tensors)
            config_file = path.with_name("config.json")
            n_head = json.loads(config_file.read_text())["n_head"] if config_file.exists() else C // 64        # OpenAI's heads have size 64
            model = cls(GPTConfig(len(tensors["wpe.weight"]), V, layers, n_head, C))
            weights = {name: tensors[name].T if is_conv1d(name) else tensors[name] for name in model.state_dict()}
            model.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path} does not hold a GPT-2 ({str(error).splitlines()[0]}): name a folder with GPT-2's weights") from None
        return model


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of rows of hidden states (N, C), a chunk of rows at a time.

    The logits of a whole batch would take 13 GB in fp32 at 64 × 1024 tokens. The gradient of -log softmax(z)[y] with respect
    to z is softmax(z) - onehot(y), so it is known as soon as the logits are: the forward pass computes it, and the logits of
    a chunk are forgotten before the next one. Nothing is computed twice.
    """
    ROWS = 2048

    @staticmethod
    def forward(ctx, h, weight, targets, needs_grad):
        low = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
        N, V, w, total, ctx.grad_weight = len(h), len(weight), weight.to(low), torch.zeros((), device=h.device), None
        ctx.grad_h = torch.empty_like(h) if needs_grad and ctx.needs_input_grad[0] else None
        room = w.new_empty(min(N, ChunkedCrossEntropy.ROWS), V)                  # for the logits of a chunk, again and again: new memory is slow
        piece = max(1, 500_000 // V) if h.device.type == "cpu" else ChunkedCrossEntropy.ROWS           # so many rows in fp32 stay in a CPU's cache
        for i in range(0, N, ChunkedCrossEntropy.ROWS):
            rows, y = h[i:i + ChunkedCrossEntropy.ROWS].to(low), targets[i:i + ChunkedCrossEntropy.ROWS]
            counts, y = (y != -100)[:, None], y.clamp(min=0)[:, None]            # (rows, 1)
            logits = torch.mm(rows, w.T, out=room[:len(rows)])                   # (rows, V)
            for z, target, count in zip(*(t.split(piece) for t in (logits, y, counts))):
                log_p = F.log_softmax(z, dim=1, dtype=torch.float32)
                total -= (log_p.gather(1, target) * count).sum()
                if needs_grad:                             # the logits become their gradient, in place
                    z.copy_(log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32)))
            if ctx.grad_h is not None:
                ctx.grad_h[i:i + ChunkedCrossEntropy.ROWS] = logits @ w * counts
            if needs_grad and ctx.needs_input_grad[1]:
                grad = (logits.T @ (rows * counts)).to(weight.dtype)             # (V, C)
                ctx.grad_weight = grad if ctx.grad_weight is None else ctx.grad_weight.add_(grad)
        return total

    @staticmethod
    def backward(ctx, grad):
        grads, ctx.grad_h, ctx.grad_weight = (ctx.grad_h, ctx.grad_weight), None, None       # given away: other gradients are added to them in place
        return *(None if g is None else g.mul_(grad) for g in grads), None, None


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token for each row of logits (B, V), giving (B,).

    temperature: divides the logits; 0 takes the most probable token. top_k: only the k most probable (Fan et al. 2018).
    top_p: only the fewest tokens whose probabilities reach p together (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:], -math.inf)
    if top_p is not None:
        ordered, ids = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(1, ids, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Weights from OpenAI, and to transformers: the same tensor names, but for four matrices in each block that are transposed

OPENAI = {                       # bytes, SHA-256 where it is known
    "gpt2": (548_105_171, "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": (None, None), "gpt2-large": (None, None), "gpt2-xl": (None, None),
}


def fetch_openai(name):
    """The path of OpenAI's weights in safetensors, downloaded once into data/<name>/."""
    size, digest = OPENAI[name]
    url = f"{fineweb.HUB}/openai-community/{name}/resolve/main/model.safetensors"
    return fineweb.download(url, Path("data") / name / "model.safetensors", size, digest)


def is_conv1d(name):
    """Whether OpenAI's file keeps this matrix as (in, out), the other way round than nn.Linear."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def export_hf(model, tokenizer, folder):
    """Write config.json and model.safetensors such that transformers' AutoModelForCausalLM.from_pretrained(folder) gives the same logits."""
    from safetensors.torch import save
    c, folder = model.config, Path(folder)
    V = c.vocab_size - c.vocab_padding
    tensors = {f"transformer.{name}": (t.T if is_conv1d(name) else t).detach().cpu().contiguous() for name, t in model.state_dict().items()}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V].clone()
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": V, "n_positions": c.block_size, "n_embd": c.n_embd,
              "n_layer": c.n_layer, "n_head": c.n_head, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "bos_token_id": tokenizer.eot_token, "eos_token_id": tokenizer.eot_token, "torch_dtype": "float32"}
    with fineweb.atomic_write(folder / "model.safetensors") as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with fineweb.atomic_write(folder / "config.json", "w") as file:
        json.dump(config, file, indent=2)


# ---------------------------------------------------------------------------------------------------------------------
# Data: all shards of a split are one long row of tokens, cut into windows of T; an epoch is those windows in a random order


class Tokens:
    """The tokens of several shards in a row, memory-mapped."""

    def __init__(self, paths):
        self.shards = [fineweb.read_shard(path) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.paths = [Path(path) for path in paths]

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, stop):
        """Tokens start … stop - 1 as int64, across the borders of shards; fewer where the row ends."""
        parts, i = [], int(np.searchsorted(self.ends, start, side="right"))
        while start < stop and i < len(self.shards):
            begin = int(self.ends[i]) - len(self.shards[i])
            parts.append(self.shards[i][start - begin:stop - begin])
            start, i = int(self.ends[i]), i + 1
        return np.concatenate(parts).astype(np.int64)

    def windows(self, T):
        """How many windows of T inputs there are; every token but the very first is a target in exactly one of them."""
        return -(-(len(self) - 1) // T)

    def targets(self, windows, T):
        """How many targets the windows have together."""
        return int(np.minimum(T, len(self) - 1 - np.asarray(windows) * T).sum())

    def batch(self, windows, T, vocab):
        """Inputs and targets (B, T) of the given windows; behind the end of the row targets are -100."""
        x, y = np.zeros((len(windows), T), dtype=np.int64), np.full((len(windows), T), -100, dtype=np.int64)
        for row, window in enumerate(windows):
            tokens = self.read(window * T, window * T + T + 1)
            if tokens.max() >= vocab:
                raise UserError(f"{self.paths[0].parent} has token {tokens.max()}, beyond the vocabulary of {vocab:,}: the shards are for another tokenizer")
            x[row, :len(tokens[:T])], y[row, :len(tokens) - 1] = tokens[:T], tokens[1:]
        return torch.from_numpy(x), torch.from_numpy(y)


def find_shards(folder):
    """Tokens of the folder's shards: (for training, {name: for validation}). Raises UserError when either is missing."""
    train, val = [], {}
    for path in sorted(Path(folder).glob("*")):
        if found := re.fullmatch(r"(.+)_(train|val)_\d+\.(bin|npy)", path.name):
            (train if found[2] == "train" else val.setdefault(found[1], [])).append(path)
    if not train or not val:
        raise UserError(f"{folder} has no shards *_train_*.bin and *_val_*.bin: make them with python fineweb.py (--help tells how)")
    train, val = Tokens(train), {name: Tokens(paths) for name, paths in val.items()} if len(val) > 1 else {"val": Tokens(*val.values())}
    if min(map(len, (train, *val.values()))) < 2:
        raise UserError(f"{folder} has shards without text: make them again from files that have some")
    return train, val


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, windows):
    """The order of the windows in an epoch: a random permutation, the same on every machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(windows)


def step_windows(seed, step, per_step, windows):
    """The windows of a step: a function of seed and step alone, so that a run can be continued anywhere. A step may straddle epochs."""
    place = np.arange(step * per_step, (step + 1) * per_step)
    return np.array([epoch_order(seed, int(p // windows), windows)[p % windows] for p in place])


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained."""
    steps: int
    batch_tokens: int             # tokens for each update of the weights
    micro_batch: int              # windows that are computed at once; their gradients add up until batch_tokens are there
    lr: float                     # the highest learning rate
    warmup: int
    eval_every: int = 250
    eval_tokens: int = 10_485_760
    log_every: int = 10
    weight_decay: float = 0.1
    clip: float = 1.0
    floor: float = 0.1            # the lowest learning rate as a share of the highest
    hellaswag: bool = False       # measured with each evaluation, from step 250 on


RECIPES = {                 #   steps, tokens a step, micro-batch, lr, warm-up
    "tiny":        Recipe(2_000, 24 * 64, 24, 2e-3, 40, eval_every=200, eval_tokens=20_480, log_every=20),
    "small":       Recipe(500, 8_192, 16, 2e-3, 50, eval_every=50, eval_tokens=16_384),
    "gpt2":        Recipe(19_073, 524_288, 16, 6e-4, 715, hellaswag=True),                # 19,073 × 524,288 = 10.0 B tokens; 715 × 524,288 = 375 M as in GPT-3
    "gpt2-medium": Recipe(19_073, 524_288, 8, 3e-4, 715, hellaswag=True),
    "gpt2-large":  Recipe(19_073, 524_288, 4, 2.5e-4, 715, hellaswag=True),
    "gpt2-xl":     Recipe(19_073, 524_288, 2, 2e-4, 715, hellaswag=True),
}


def learning_rate(step, recipe):
    """Linear warm-up, then a cosine down to `floor` of the highest, a tenth in Brown et al. 2020, appendix B."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = min((step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1), 1)
    return recipe.lr * (recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, recipe):
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices and tables only: biases and LayerNorms have nothing to gain from it."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# The machine

PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "4090": 165e12, "3090": 71e12, "A5000": 111e12}      # dense bf16 FLOP/s


def pick_device():
    """cuda, mps or cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def join_processes():
    """Under torchrun, make this process one of several: NCCL on GPUs, gloo on CPUs; only the first one prints."""
    if "RANK" in os.environ and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(days=1))       # one may compute long for all
        atexit.register(distributed.destroy_process_group)
        if distributed.get_rank():
            sys.stdout = open(os.devnull, "w")


def rank():
    """Which of the processes this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes():
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def summed(tensor):
    """A tensor summed over all processes, in place."""
    if processes() > 1:
        distributed.all_reduce(tensor)
    return tensor


def wait():
    """Until all processes are here."""
    if processes() > 1:
        distributed.barrier()


def in_turns(function):
    """What function() returns, called by one process after the other: the first may fetch or compute something, the others then find it."""
    for turn in range(processes()):
        if turn == rank():
            result = function()
        wait()
    return result


def autocast(device):
    """Matrix products in bf16 where the hardware has it (weights stay fp32): CUDA from sm80, CPUs with AVX512-BF16 or AMX."""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device if device != "mps" else "cpu", dtype=torch.bfloat16, enabled=has_bf16)


def compiled(model, device):
    """The model compiled for training on a GPU, or as it is; the raw module stays the one that is evaluated and saved."""
    if device != "cuda":
        return model
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
        model.loss = torch.compiler.disable(model.loss)    # it keeps gradients in the context, which cannot be traced
        return torch.compile(model)
    except (RuntimeError, ImportError, OSError) as error:
        print(f"not compiled: no working compiler here ({type(error).__name__}); training goes on, slower")
        return model


def flops_per_token(config):
    """Of forward and backward pass: 6 for each weight that multiplies, and attention's 12 · L · C · T (Chowdhery et al. 2022, appendix B)."""
    weights = 12 * config.n_layer * config.n_embd ** 2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def validation_loss(model, tokens, tokenizer, limit, micro_batch, device):
    """Mean loss over the first `limit` targets of a validation set: {"loss": nats per token, "bits": bits per byte of text}."""
    T, total, count, size = model.config.block_size, 0.0, 0, 0
    windows = np.arange(max(1, min(tokens.windows(T), limit // T)))[rank()::processes()]
    length = token_lengths(tokenizer)
    for chunk in np.array_split(windows, -(-len(windows) // micro_batch)) if len(windows) else ():
        x, y = tokens.batch(chunk, T, tokenizer.n_vocab)
        with autocast(device):
            total += model.loss(model.decode(model.embed(x.to(device))), y.to(device), "sum").item()
        count += int((y >= 0).sum())
        size += int(length[y[y >= 0]].sum())
    total, count, size = summed(torch.tensor([total, count, size], dtype=torch.float64, device=device if device == "cuda" else "cpu")).tolist()
    return {"loss": total / count, "bits": total / math.log(2) / max(size, 1)}


def measure_hellaswag(model, tokenizer, examples, device, harness=False):
    """hellaswag.evaluate() at the precision of training."""
    with autocast(device):
        return hellaswag.evaluate(model, tokenizer, examples, device, harness)


def items_for_training():
    """HellaSwag's items; without them training goes on, and says so."""
    try:
        return hellaswag.load_examples()[0]
    except UserError as error:
        print(f"HellaSwag  not measured: {error}", flush=True)


@functools.lru_cache(maxsize=2)
def token_lengths(tokenizer):
    """Bytes of text for each token id; <|endoftext|> is none."""
    special = tokenizer.special_tokens_set
    return torch.tensor([0 if tokenizer.decode([i]) in special else len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab)])


@torch.no_grad()
def context_use(model, tokenizer, device, scenes=200):
    """How often the model states a fact rightly when it is shown the map of a new scene: {"count", "objects", "place", "relation"}."""
    rng, right, newline = random.Random(2), {}, tokenizer.encode("\n")[0]
    drawn = [fineweb.random_scene(rng) for _ in range(scenes)]
    asked = [fineweb.questions(scene, rng) for scene in drawn]
    for fact in asked[0]:
        prompts = [[tokenizer.eot_token, *tokenizer.encode_ordinary(f"{fineweb.scene_map(scene)}\n{question[fact]}")] for scene, question in zip(drawn, asked)]
        rows = model.generate(torch.tensor(prompts, device=device), 8, temperature=0, stop=newline).tolist()      # questions of a kind are equally long
        begin = 1 + len(tokenizer.encode_ordinary(fineweb.scene_map(drawn[0]) + "\n"))
        right[fact] = sum(fineweb.facts(tokenizer.decode(row[begin:]).split("\n")[0], scene)[fact] is True for row, scene in zip(rows, drawn)) / scenes
    return right


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder: checkpoint, log, curves

FORMAT = 1                       # of ckpt.pt


def save_checkpoint(path, checkpoint, keep=True):
    """Write a checkpoint of tensors, numbers, strings and dicts; keep: the one before stays as NAME.prev.pt. A failed write leaves both as they were."""
    path = Path(path)
    new = path.with_suffix(".new.pt")
    try:
        with fineweb.atomic_write(new) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:               # torch wraps what the disk says into a RuntimeError
        why = error.strerror if isinstance(error, OSError) else "the disk did not take all of it"
        raise UserError(f"{path} cannot be written ({why}): make room; what was saved before is still there") from None
    if keep and path.exists():
        os.replace(path, path.with_suffix(".prev.pt"))
    os.replace(new, path)


def read_checkpoint(path, holds="run"):
    """The dict that save_checkpoint wrote. Raises UserError when there is none, when it is damaged, of another version, or has no `holds`."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is not there: train first (python train_gpt2.py), or name a checkpoint with --ckpt")
    try:
        with zipfile.ZipFile(path) as parts:               # torch does not look at their checksums
            if parts.testzip():
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["format"]
    except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, RuntimeError, KeyError, EOFError, TypeError, ValueError) as error:
        other = path.with_suffix(".prev.pt")               # these are what a damaged file makes the reader stumble over
        what_to_do = f"rename {other} to it" if other.exists() else "remove it, and it is made anew"
        raise UserError(f"{path} is not a checkpoint of this program ({type(error).__name__}): {what_to_do}") from None
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this program writes {FORMAT}: use the program that wrote it, or --restart")
    if holds not in checkpoint:
        raise UserError(f"{path} is a checkpoint of another kind: it has no {holds!r}")
    return checkpoint


def load_checkpoint(path):
    """(model, tokenizer, checkpoint) from a checkpoint's path; OpenAI's names and folders of safetensors work too, with checkpoint {}."""
    if str(path) in OPENAI or Path(path).is_dir() or Path(path).suffix == ".safetensors":
        return GPT.from_pretrained(path).eval(), fineweb.get_tokenizer("gpt2"), {}
    checkpoint = read_checkpoint(path, holds="config")
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), fineweb.get_tokenizer(checkpoint["run"]["tokenizer"]), checkpoint


class Log:
    """log.csv: a row for each logged step. When a run is continued, rows behind its checkpoint are dropped: they come again."""

    def __init__(self, path, columns, step):
        self.path, self.columns = Path(path), columns
        rows = [row for row in read_log(self.path) if row["step"] <= step] if step else []
        with fineweb.atomic_write(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def add(self, **row):
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)


def read_log(path):
    """The rows of log.csv as dicts of floats; what is empty or cut off is left out."""
    rows = []
    if Path(path).exists():
        with open(path, newline="", errors="replace") as file:
            for row in csv.DictReader(line.replace("\0", "") for line in file):
                try:
                    rows.append({key: float(value) for key, value in row.items() if value})
                except (TypeError, ValueError):            # a line that was not finished when the machine stopped
                    continue
    return [row for row in rows if "step" in row]


def draw_curves(path, panels, size=(900, 480)):
    """Draw line charts side by side: panels = [(title, label of x, {name of a line: (xs, ys)}), …]."""
    width, height = 2 * size[0], 2 * size[1]               # twice as large, then shrunk: smooth lines
    picture = Image.new("RGB", (width * len(panels), height), "white")
    draw, font, bold = ImageDraw.Draw(picture), ImageFont.load_default(30), ImageFont.load_default(38)
    colours = ("#94a3b8", "#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")
    for p, (title, x_label, lines) in enumerate(panels):
        left, top, right, bottom = p * width + 140, 100, (p + 1) * width - 60, height - 120
        points = [(x, y) for xs, ys in lines.values() for x, y in zip(xs, ys) if math.isfinite(y)]
        x_low, x_high, x_step = nice_ticks([x for x, _ in points])
        y_low, y_high, y_step = nice_ticks([y for _, y in points])
        def at(x, y):
            return left + (x - x_low) / (x_high - x_low) * (right - left), bottom - (y - y_low) / (y_high - y_low) * (bottom - top)
        for i in range(round((x_high - x_low) / x_step) + 1):
            x = x_low + i * x_step
            draw.line([at(x, y_low), at(x, y_high)], "#e5e7eb", 2)
            draw.text((at(x, y_low)[0], bottom + 16), f"{x:,.10g}", "#374151", font, anchor="mt")
        for i in range(round((y_high - y_low) / y_step) + 1):
            y = y_low + i * y_step
            draw.line([at(x_low, y), at(x_high, y)], "#e5e7eb", 2)
            draw.text((left - 16, at(x_low, y)[1]), f"{y:.6g}", "#374151", font, anchor="rm")
        draw.line([(left, top), (left, bottom), (right, bottom)], "#374151", 4)
        draw.text(((left + right) / 2, 28), title, "#111827", bold, anchor="mt")
        draw.text(((left + right) / 2, height - 24), x_label, "#374151", font, anchor="mb")
        for (xs, ys), colour in zip(lines.values(), colours):
            draw.line([at(x, y) for x, y in zip(xs, ys) if math.isfinite(y)], colour, 5, joint="curve")
        behind = [at(x, y)[1] for xs, ys in lines.values() for x, y in zip(xs, ys) if math.isfinite(y) and at(x, y)[0] > right - 420]
        tall = 48 * len(lines)
        legend = min(range(top + 32, bottom - tall, 24), key=lambda place: sum(place - 32 < y < place + tall for y in behind))        # where the fewest points are
        for i, (label, colour) in enumerate(zip(lines, colours)):
            draw.line([(right - 380, legend + 48 * i), (right - 320, legend + 48 * i)], colour, 8)
            draw.text((right - 300, legend + 48 * i), label, "#111827", font, anchor="lm")
    with fineweb.atomic_write(path) as file:
        picture.reduce(2).save(file, "PNG")


def nice_ticks(values, about=6):
    """(lowest tick, highest tick, distance) that hold all values, at 1, 2 or 5 times a power of ten."""
    low, high = min(values, default=0), max(values, default=1)
    span = high - low or 1
    unit = 10 ** math.floor(math.log10(span / about))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= about)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return low, high if high > low else low + step, step


def draw_run(out):
    """runs/<name>/curves.png from its log: training and validation loss."""
    rows = read_log(out / "log.csv")
    lines = {"training": ([r["step"] for r in rows if "loss" in r], [r["loss"] for r in rows if "loss" in r])}
    for column in dict.fromkeys(c for row in rows for c in row if c.startswith("val_")):
        lines[column.removeprefix("val_").replace("val", "validation")] = ([r["step"] for r in rows if column in r], [r[column] for r in rows if column in r])
    panels, measured = [("loss, nats per token", "step", lines)], [r for r in rows if "hellaswag" in r]
    if measured:
        steps, shares = [r["step"] for r in measured], [r["hellaswag"] for r in measured]
        panels.append(("HellaSwag, acc_norm by token mean", "step", {"this run": (steps, shares), "OpenAI's 124M": (steps, [0.2955] * len(steps))}))
    draw_curves(out / "curves.png", panels)


# ---------------------------------------------------------------------------------------------------------------------
# The training run

PATIENCE = 10                    # steps in a row whose loss is not finite before the run stops


def choose_world(args):
    """(preset, data folder): as the flags say, else the 124M where there are a GPU and its data, else what a CPU can carry."""
    full = Path("data/fineweb_edu")
    if args.preset is None:
        on_gpu = pick_device() == "cuda" and (args.data or full.exists())
        on_gpu = on_gpu and len(find_shards(args.data or full)[0]) >= 100e6      # a book is too little for the 124M
        args.preset = "gpt2" if on_gpu else "small" if args.data else "tiny"
        if args.preset == "tiny":
            why = f"no shards in {full}" if pick_device() == "cuda" else "no GPU here"
            print(f"world      tiny: {why}. Full size: python fineweb.py --tokens 10B, then python train_gpt2.py --preset gpt2")
    data = Path(args.data or ("data/tiny" if args.preset == "tiny" else full))
    if args.preset == "tiny" and not args.data:
        fineweb.make_tiny(data)
    return args.preset, data


def choose_recipe(args, config, preset):
    """The preset's recipe with the flags' changes. Raises UserError, naming the nearest that do, when a batch does not divide."""
    given = {key: getattr(args, key) for key in ("steps", "batch_tokens", "micro_batch", "lr", "eval_every") if getattr(args, key) is not None}
    recipe = dataclasses.replace(RECIPES[preset], **given)
    T, micro = config.block_size, recipe.micro_batch
    windows, rest = divmod(recipe.batch_tokens, T)
    if not rest and windows % processes():
        fitting = [n for n in range(1, windows + 1) if windows % n == 0]
        near = [max(n for n in fitting if n < processes()), *[n for n in fitting if n > processes()][:1]]
        raise UserError(f"{processes()} processes cannot share the {windows:,} windows of a step evenly: take {' or '.join(map(str, near))}, or another --batch-tokens")
    if args.micro_batch is None:                           # the largest up to the preset's that divides
        micro = next(m for m in range(micro, 0, -1) if windows // processes() % m == 0)
    unit = T * micro * processes()
    if recipe.batch_tokens % unit:
        low, high = recipe.batch_tokens // unit * unit, -(-recipe.batch_tokens // unit) * unit
        several = f" on {processes()} processes" if processes() > 1 else ""
        raise UserError(f"--batch-tokens {recipe.batch_tokens:,} is no multiple of {micro} windows of {T} tokens{several}: "
                        f"take {f'{low:,} or ' if low else ''}{high:,}, or another --micro-batch")
    return dataclasses.replace(recipe, micro_batch=micro)


class Updates:
    """What a step changes: weights, optimizer, and the count of skipped steps. A subclass says what a step learns from: load(step)."""

    def __init__(self, model, recipe, device, net):
        """model: what is trained and saved. net: called with a micro-batch, gives (…, loss)."""
        self.raw, self.net, self.recipe, self.device = model, net, recipe, device
        self.optimizer = make_optimizer(model, recipe)
        self.step, self.seconds = 0, 0.0
        self.skipped, self.streak, self.worst = (torch.zeros((), device=device) for _ in range(3))
        on_this_gpu = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)} if device == "cuda" else {}
        self.thread, self.ahead = ThreadPoolExecutor(1, **on_this_gpu), None

    def update(self):
        """One step; returns its loss and gradient norm, still on the device, so that nobody waits for them.

        A loss or gradient that is not finite must not reach the weights. AdamW's fused kernel looks at found_inf on the device,
        as it does for torch.amp.GradScaler, and leaves everything as it is.
        """
        batches = (self.ahead or self.thread.submit(self.load, self.step)).result()
        self.ahead = self.thread.submit(self.load, self.step + 1)                # prepared while this step computes
        total = torch.zeros((), device=self.device)
        for x, y, share in batches:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            with autocast(self.device):
                loss = self.net(x, y)[1] * share
            loss.backward()
            total += loss.detach()
        self.synchronise(total)
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), self.recipe.clip)
        bad = (~torch.isfinite(norm + total)).float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe) * group.get("times", 1.0)
        self.optimizer.found_inf = bad
        if self.device != "mps" or not bad.item():         # there the fused kernel does not look
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped, self.streak = self.skipped + bad, (self.streak + bad) * bad
        self.worst = torch.maximum(self.worst, self.streak)
        self.step += 1
        return total, norm

    def synchronise(self, total):
        """Sum gradients and loss over all processes, once a step and in one piece; each holds its share of the mean already."""
        if processes() > 1:
            tensors = [p.grad for p in self.raw.parameters() if p.grad is not None] + [total]
            flat = summed(torch.cat([t.flatten() for t in tensors]))
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def state(self):
        return {"step": self.step, "seconds": self.seconds, "skipped": int(self.skipped), "model": self.raw.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, checkpoint):
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.skipped += checkpoint["skipped"]
        self.raw.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])


class Training(Updates):
    """Updates of a GPT from windows of tokens."""
    unit = "tokens"               # what its speed is counted in

    def __init__(self, model, recipe, tokens, seed, device):
        super().__init__(model, recipe, device, compiled(model, device))
        self.tokens, self.seed, self.per_step = tokens, seed, recipe.batch_tokens

    def load(self, step):
        """The micro-batches of a step: [(inputs, targets, share of the step's targets)]."""
        T = self.raw.config.block_size
        windows = step_windows(self.seed, step, self.recipe.batch_tokens // T, self.tokens.windows(T))
        vocab = self.raw.config.vocab_size - self.raw.config.vocab_padding
        mine = windows.reshape(processes(), -1, self.recipe.micro_batch)[rank()]           # each process takes its slice
        targets, batches = self.tokens.targets(windows, T), [self.tokens.batch(part, T, vocab) for part in mine]
        if self.device == "cuda":
            batches = [(x.pin_memory(), y.pin_memory()) for x, y in batches]
        return [(x, y, self.tokens.targets(part, T) / targets) for (x, y), part in zip(batches, mine)]


def train(args):
    """Train, or go on with a run, until its last step; Ctrl-C and SIGTERM save and stop."""
    preset, data = choose_world(args)
    config, device, out = PRESETS[preset], pick_device(), Path(args.out or f"runs/{preset}")
    recipe, (tokens, val) = choose_recipe(args, config, preset), find_shards(data)
    tokenizer = fineweb.get_tokenizer("tiny" if preset == "tiny" else "gpt2")
    run = {"preset": preset, "tokenizer": tokenizer.name, "seed": args.seed, "batch_tokens": recipe.batch_tokens, "train_tokens": len(tokens)}
    checkpoint = unfinished(out, run) if not args.restart else None
    if checkpoint:
        if checkpoint["step"] >= recipe.steps and is_finished(out):
            print(f"{out} is finished ({checkpoint['step']:,} steps). To begin anew: --restart; to look at it: "
                  f'python train_gpt2.py --sample "The " --ckpt {shlex.quote(str(out / "ckpt.pt"))}')
            return
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.txt").unlink(missing_ok=True)          # they come last, and tell that a run is finished
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")             # TF32 for what stays fp32
    model = GPT(config).to(device)
    training = Training(model, recipe, tokens, args.seed, device)
    if checkpoint:
        training.restore(checkpoint)
        del checkpoint                                     # as large as weights and optimizer
    describe(preset, data, out, device, model, recipe, tokens, training.step)
    examples = in_turns(items_for_training) if recipe.hellaswag else None
    if summed(torch.tensor(float(examples is None), device=device)).item():      # all measure it or none, or they would wait for each other
        examples = None

    def validate():
        scores = {name: validation_loss(model, shards, tokenizer, recipe.eval_tokens, recipe.micro_batch, device) for name, shards in val.items()}
        print("           " + "   ".join(f"{name} {score['loss']:.4f} nats a token, {score['bits']:.3f} bits a byte" for name, score in scores.items()), flush=True)
        row = {f"val_{name}": score["loss"] for name, score in scores.items()}
        if examples and training.step >= 250:
            score = measure_hellaswag(model, tokenizer, examples, device)
            print("           " + hellaswag.report(score), flush=True)
            row["hellaswag"] = score["acc_norm"]
        return row

    loop(training, validate, [*(f"val_{name}" for name in val), "hellaswag"], out, {"config": asdict(config), "run": run}, flops_per_token(config))
    if rank() == 0:
        finish(training, tokenizer, out, preset, f" --data {shlex.quote(str(args.data))}" if args.data else "")


def unfinished(out, run):
    """The checkpoint in a run's folder, or None. Raises UserError when it is one of another run."""
    found = next((out / name for name in ("ckpt.pt", "ckpt.prev.pt") if (out / name).exists()), None)
    if not found:
        return None
    checkpoint = read_checkpoint(found)
    for key, value in run.items():
        if checkpoint["run"].get(key) != value:
            raise UserError(f"{found} was made with {key} {checkpoint['run'].get(key)}, not {value}: keep to it, choose another --out, or begin anew with --restart")
    return checkpoint


def is_finished(out):
    """Whether the run in a folder has come to its end: its samples are written last."""
    return (Path(out) / "ckpt.pt").exists() and (Path(out) / "samples.txt").exists()


def describe(preset, data, out, device, model, recipe, tokens, step):
    """What will be done, a line each."""
    T, c = model.config.block_size, model.config
    precision = "bf16 products, fp32 weights" if autocast(device)._enabled else "fp32"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device
    mixture = " (80 % scenes of coloured shapes, 20 % English)" if data.name == "tiny" else ""
    print(f"data       {data}: {len(tokens):,} tokens for training{mixture}")
    print(f"device     {name}{f', {processes()} processes' if processes() > 1 else ''}")
    print(f"precision  {precision}")
    print(f"model      {preset}: {sum(p.numel() for p in model.parameters()):,} parameters ({c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {T})")
    several = f"{processes()} processes × " if processes() > 1 else ""
    print(f"step       {recipe.batch_tokens:,} tokens = {several}{recipe.batch_tokens // T // recipe.micro_batch // processes()} micro-batches of {recipe.micro_batch} × {T}")
    epochs, continued = recipe.steps * recipe.batch_tokens / len(tokens), f"; going on after step {step:,}" if step else ""
    print(f"run        {out}: {recipe.steps:,} steps, {epochs:.1f} epochs{continued}", flush=True)


def loop(training, validate, columns, out, header, flops):
    """Steps until the last one: log, evaluate and save where it is time.

    validate() prints and returns what the `columns` of log.csv hold. header: what a checkpoint says of its run. flops: of each unit, for MFU.
    """
    recipe, path, columns = training.recipe, out / "ckpt.pt", ["step", "loss", "lr", "norm", "skipped", *columns, f"{training.unit}_per_second", "seconds"]
    require_same_step(training)
    with fineweb.only_one(out) if rank() == 0 else contextlib.nullcontext(), signals_noted() as signals:
        for torn in out.glob(".*.tmp") if rank() == 0 else ():                   # what a kill in the middle of writing has left
            torn.unlink()
        stops = torch.zeros((), device=training.device)    # how many processes had a signal, a step ago
        log, began, first = Log(out / "log.csv", columns, training.step) if rank() == 0 else None, time.time(), training.step
        while training.step < recipe.steps:
            try:
                loss, norm = training.update()
            except torch.OutOfMemoryError:
                raise UserError(f"the GPU's memory is too small for micro-batches of {recipe.micro_batch}: use --micro-batch {max(recipe.micro_batch // 2, 1)}") from None
            step = training.step
            last, asked = step == recipe.steps, bool(signals)
            if processes() > 1:                            # a signal to one stops all at the same step: a step later, so that nobody waits for the sum
                stops, before = summed(torch.tensor(float(asked), device=training.device)), stops
                asked = before.item() > 0
            row = {}
            if step % recipe.log_every == 0 or step % recipe.eval_every == 0 or step == 1 or last or asked:
                row = {"loss": loss.item(), "lr": learning_rate(step - 1, recipe), "norm": norm.item(), "skipped": int(training.skipped)}
                now = time.time()
                seconds, began = now - began, now
                training.seconds += seconds
                row |= {f"{training.unit}_per_second": (step - first) * training.per_step / seconds, "seconds": training.seconds}
                first = step
                print(progress(step, row, training, flops), flush=True)
                if training.worst >= PATIENCE:
                    raise UserError(f"the loss was not finite in {PATIENCE} steps in a row: go on from the last good checkpoint, {path}, with a lower --lr")
            if step % recipe.eval_every == 0 or last:
                row |= validate()
            if row and log:
                log.add(step=step, **row)
            if step % recipe.eval_every == 0 or last or asked:
                if log:
                    save_checkpoint(path, {"format": FORMAT, **header, **training.state()})
                    draw_run(out)
                began = time.time()
                if asked and not last:
                    print(f"stopped after step {step:,}, saved in {path}; the same command goes on from there")
                    sys.exit(128 + (signals or [signal.SIGTERM])[0])


@contextlib.contextmanager
def signals_noted():
    """Within this context Ctrl-C and SIGTERM are noted in a list, so that a run can save before it ends."""
    noted = []
    handlers = {number: signal.signal(number, lambda n, _: noted.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def require_same_step(training):
    """Raise UserError unless all processes stand at the same step: on several machines the run's folder has to be one that all of them see."""
    if summed(torch.tensor(float(training.step), device=training.device)).item() != training.step * processes():
        raise UserError("the processes found different checkpoints: let --out be a folder that all machines share")


def progress(step, row, training, flops):
    """The line on the screen for a logged step."""
    steps, rate = training.recipe.steps, row[f"{training.unit}_per_second"]
    left = (steps - step) * training.per_step / rate
    skipped = f" | skipped {row['skipped']}" if row["skipped"] else ""
    return (f"step {step:>6,} of {steps:,} | loss {row['loss']:7.4f} | lr {row['lr']:.2e} | norm {row['norm']:5.2f} | "
            f"{rate:9,.0f} {training.unit}/s{mfu(rate, flops, training.device)}{skipped} | {clock(left)} left")


def clock(seconds):
    """2.5 h, or minutes:seconds."""
    return f"{seconds / 3600:,.1f} h" if seconds > 5400 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def finish(training, tokenizer, out, preset, data):
    """What the run has come to: how well the context is used, samples, and where to go from here."""
    model = training.raw.eval()
    if preset == "tiny":
        use = context_use(model, tokenizer, training.device)
        print("shown the maps of 200 new scenes, it states rightly: " + ", ".join(f"{fact} {share:.2f}" for fact, share in use.items()))
    prompts = [fineweb.scene_map(fineweb.random_scene(random.Random(0), unseen=False)) + "\n", "The ", "If "] if preset == "tiny" else ["", "The ", "In the beginning"]
    texts = []
    for prompt in prompts:
        idx = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]], device=training.device)
        generator = torch.Generator(training.device).manual_seed(0)
        room = min(model.config.block_size - idx.size(1), 200)
        row = model.generate(idx, room, temperature=0.8, top_k=50, stop=tokenizer.eot_token, generator=generator)[0, 1:].tolist()
        texts.append(tokenizer.decode([token for token in row if token != tokenizer.eot_token], errors="replace"))
    with fineweb.atomic_write(out / "samples.txt", "w", encoding="utf-8") as file:
        file.write(f"after step {training.step:,}\n" + "".join(f"\n--- {text}\n" for text in texts))
    for text in texts:
        print("---", text.strip())
    print(f"---\n{training.seconds:.0f} s of training. {out} has the checkpoint, log.csv, curves.png and samples.txt. Next:")
    path = f" --ckpt {shlex.quote(str(out / 'ckpt.pt'))}" if out.as_posix() != "runs/tiny" else ""
    print(f'  python train_gpt2.py --sample "The "{path}\n  python train_gpt2.py --eval{path}{data}\n  python train_gpt2.py --export-hf gpt2-hf{path}')


# ---------------------------------------------------------------------------------------------------------------------
# How fast is it here?


def bench(args):
    """Print tokens/s, MFU and peak memory of training on random tokens, and the time of a full run; on a GPU for growing micro-batches."""
    device = pick_device()
    preset = args.preset or ("gpt2" if device == "cuda" else "tiny")
    config, recipe = PRESETS[preset], RECIPES[preset]
    sizes = [args.micro_batch] if args.micro_batch else [4, 8, 16, 32, 64] if device == "cuda" else [recipe.micro_batch]
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{preset}: {processes()} process{'es' if processes() > 1 else ''} on {machine}, "
          f"{'bf16 products' if autocast(device)._enabled else 'fp32'}, context {config.block_size}", flush=True)
    for size in sizes:
        try:
            rate, memory = measure(config, recipe, size, args.batch_tokens or (4 if device == "cuda" else 1) * size * config.block_size * processes(), device)
        except torch.OutOfMemoryError:
            print(f"micro-batch {size:>3}: does not fit into the GPU's memory")
            break
        full = recipe.steps * recipe.batch_tokens
        print(f"micro-batch {size:>3}: {rate:9,.0f} tokens/s{mfu(rate, flops_per_token(config), device)} | peak {memory / 1e9:.1f} GB | "
              f"a full run of {full / 1e6:,.1f} M tokens: {clock(full / rate)}", flush=True)


def measure(config, recipe, micro_batch, batch_tokens, device, seconds=10):
    """(tokens/s, peak bytes) of training steps, after three to warm up."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.compiler.reset()                                 # a size of its own for each call, as a run has only one
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:      # Windows keeps what is mapped
        shard, vocab = Path(folder) / "random_train_000001.bin", config.vocab_size - config.vocab_padding
        fineweb.write_shard(shard, np.random.default_rng(0).integers(0, vocab, 4 * batch_tokens + 1))
        tokens = Tokens([shard])
        training = Training(GPT(config).to(device), dataclasses.replace(recipe, batch_tokens=batch_tokens, micro_batch=micro_batch), tokens, 0, device)
        for _ in range(3):
            training.update()[0].item()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = batch_tokens * steps_per_second(training, seconds)
        training.thread.shutdown()
    return rate, torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()


def steps_per_second(training, seconds):
    """How fast training.update() is, over so many seconds at least, on all processes alike."""
    began, steps = time.time(), 0
    while not steps or summed(torch.tensor(float(time.time() - began < seconds), device=training.device)).item() == processes():
        for _ in range(3):                                 # wait for the device now and then only, as training does
            loss, _ = training.update()
        loss.item()
        steps += 3
    return steps / (time.time() - began)


def peak_memory():
    """The most bytes that this process has had, where the system tells."""
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return math.nan


def mfu(rate, flops, device):
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) as text, where the card's peak is known."""
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((peak for name, peak in PEAK.items() if name in card), None)
    return f" | MFU {rate * flops / peak / processes():5.1%}" if peak and flops else ""


# ---------------------------------------------------------------------------------------------------------------------
# Commands on a checkpoint


def newest_checkpoint(args):
    """--ckpt, or the run of the largest preset that is there."""
    if args.ckpt:
        return args.ckpt
    return next((path for path in (Path("runs") / preset / "ckpt.pt" for preset in reversed(PRESETS)) if path.exists()), Path("runs/tiny/ckpt.pt"))


@torch.no_grad()
def sample(args):
    """Print continuations of a prompt as they are generated; with --num the first one streams and the others follow."""
    path = newest_checkpoint(args)
    model, tokenizer, _ = load_checkpoint(path)
    device = pick_device()
    model.to(device)
    text = args.sample.encode("utf-8", "surrogateescape").decode("utf-8", "replace")         # a terminal's odd bytes
    prompt = [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]
    generator = torch.Generator(device).manual_seed(args.seed)
    rows, decoders = [[] for _ in range(args.num)], [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(args.num)]
    print(text, end="", flush=True)
    tokens = model.stream(torch.tensor([prompt] * args.num, device=device), args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                          stop=tokenizer.eot_token, generator=generator)
    with autocast(device):
        for token in tokens:
            for i, t in enumerate(token.tolist()):
                rows[i].append("" if t == tokenizer.eot_token else decoders[i].decode(tokenizer.decode_single_token_bytes(t)))
            print(rows[0][-1], end="", flush=True)
    print("".join(f"\n---\n{text}{''.join(row)}" for row in rows[1:]))


def evaluate(args):
    """Print the validation losses of a checkpoint, and its accuracies on HellaSwag."""
    path = newest_checkpoint(args)
    model, tokenizer, checkpoint = in_turns(lambda: load_checkpoint(path))
    device, preset = pick_device(), checkpoint.get("run", {}).get("preset", "gpt2")
    model.to(device)
    data = Path(args.data or ("data/tiny" if preset == "tiny" else "data/fineweb_edu"))
    if preset == "tiny" and not args.data:
        fineweb.make_tiny(data)
    recipe = RECIPES[preset]
    if not args.data and not data.exists():
        print(f"validation not measured: no shards in {data} (python fineweb.py fetches them)")
    for name, tokens in (find_shards(data)[1] if args.data or data.exists() else {}).items():
        score = validation_loss(model, tokens, tokenizer, recipe.eval_tokens, recipe.micro_batch, device)
        print(f"{name:10s} {score['loss']:.4f} nats a token, {score['bits']:.3f} bits a byte  ({path}, {data})")
    if preset == "tiny":
        print("context    " + ", ".join(f"{fact} {share:.2f}" for fact, share in context_use(model, tokenizer, device).items()) + "  (maps of 200 new scenes)")
        print(f"HellaSwag  not measured: its items are longer than this model's context of {model.config.block_size} tokens")
    else:
        examples, note = in_turns(lambda: hellaswag.load_examples(args.hellaswag))
        chosen = hellaswag.subset(examples, args.limit)
        note = ", ".join(filter(None, [note, f"{len(chosen):,} of {len(examples):,} items, a fixed random subset" if args.limit else ""]))
        print(hellaswag.report(measure_hellaswag(model, tokenizer, chosen, device, harness=True), note))


def main(arguments=None):
    """The commands at the top of this file."""
    parser = fineweb.Parser(__doc__)
    group = parser.add_argument_group("training")
    group.add_argument("--preset", choices=PRESETS, help="shape and recipe of the model")
    group.add_argument("--data", help="folder of shards (python fineweb.py makes one)")
    group.add_argument("--out", help="folder of the run (default runs/<preset>)")
    group.add_argument("--steps", type=positive, help="updates of the weights")
    group.add_argument("--batch-tokens", type=positive, help="tokens for each update")
    group.add_argument("--micro-batch", type=positive, help="windows computed at once: lower it when memory is short")
    group.add_argument("--lr", type=non_negative, help="highest learning rate")
    group.add_argument("--eval-every", type=positive, help="steps between evaluations and checkpoints")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--restart", action="store_true", help="forget what is in the run's folder")
    group.add_argument("--bench", action="store_true", help="measure speed and memory on this machine")
    group = parser.add_argument_group("with a trained model")
    group.add_argument("--sample", metavar="TEXT", help="continue TEXT")
    group.add_argument("--eval", action="store_true", help="validation loss and HellaSwag")
    group.add_argument("--limit", type=positive, metavar="N", help="measure HellaSwag on N of its items, always the same")
    group.add_argument("--hellaswag", metavar="FILE", help="items of HellaSwag other than the published file")
    group.add_argument("--export-hf", metavar="DIR", help="write a folder for transformers")
    group.add_argument("--ckpt", help="a checkpoint, a folder with safetensors, or gpt2, gpt2-medium, gpt2-large, gpt2-xl from OpenAI")
    group.add_argument("--max-new-tokens", type=positive, default=200)
    group.add_argument("--temperature", type=non_negative, default=0.8)
    group.add_argument("--top-k", type=positive)
    group.add_argument("--top-p", type=share)
    group.add_argument("--num", type=positive, default=1, help="how many samples")
    args = parser.parse_args(arguments)
    join_processes()
    if args.bench:
        bench(args)
    elif args.sample is not None:
        sample(args)
    elif args.eval:
        evaluate(args)
    elif args.export_hf:
        model, tokenizer, _ = load_checkpoint(newest_checkpoint(args))
        export_hf(model, tokenizer, args.export_hf)
        print(f"{args.export_hf} is ready for transformers.AutoModelForCausalLM.from_pretrained")
    else:
        train(args)


def share(text):
    """A number above 0, up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def non_negative(text):
    """A number from 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return value


def positive(text):
    """An integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    fineweb.command_line(main)
