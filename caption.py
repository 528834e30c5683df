"""
Pictures in words: a frozen CLIP and a frozen GPT-2, joined by a small bridge that is all that is trained.

    python caption.py --bridge linear --sample img.jpg [more.jpg | FOLDER …]      caption pictures; trains what is missing (5 minutes on a laptop)
    python caption.py --bridge {linear,cross,qformer}                             train, score, and draw a 3 × 3 grid
    python caption.py --bridge linear --eval [--beam 5]                           results.json and scores.json
    python caption.py --compare                                                   all three under one budget, one table
    python caption.py --bench                                                     pictures/s and captions/s on this machine

Without a GPU and COCO this happens in the tiny world: pictures of coloured shapes, drawn here, a CLIP of 64 × 64 pixels, trained
here, and the decoder of `python train_gpt2.py`. With --data FOLDER (COCO 2017, or your own pictures in its layout) the same code
joins CLIP ViT-L/14 to GPT-2 124M. A run lives in runs/<world>-<bridge>/: ckpt.pt, best.pt, log.csv, curves.png, grid.png.

Chapters: the eye · the three bridges · the captioner and its layout · vision tokens on disk · two worlds · training a bridge ·
captions and what they are worth · your own pictures.

Letters beside the code: B batch, T time (tokens), C width of the decoder, S vision tokens, D their width, P prefix, K captions of a picture.
"""
import contextlib
import hashlib
import json
import math
import os
import random
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as distributed
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

import coco_eval
import fineweb
import train_gpt2
from fineweb import UserError
from train_gpt2 import MLP, attention, autocast, clock, in_turns, non_negative, pick_device, positive, processes, rank, share, summed, wait

# ---------------------------------------------------------------------------------------------------------------------
# The eye: what CLIP sees, as tokens


class Vision:
    """A frozen CLIP image encoder (Radford et al. 2021): pictures in, tokens of its last block but one out."""

    def __init__(self, visual, preprocess, name):
        self.visual, self.preprocess, self.name = visual.eval().requires_grad_(False), preprocess, name
        put_time_first(visual.transformer)

    @torch.no_grad()
    def __call__(self, images):
        """Prepared pictures (B, 3, H, W) to the class token and the patches in reading order, (B, 1 + H/p · W/p, D)."""
        with autocast(images.device.type):
            found = self.visual.to(images.device).forward_intermediates(images, indices=[len(self.visual.transformer.resblocks) - 2], stop_early=True,
                                                      intermediates_only=True, output_fmt="NLC", output_extra_tokens=True)
        return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1).float()


def put_time_first(transformer):
    """Let one of open_clip's transformers work on (T, B, C): on (B, T, C) PyTorch's attention copies its weights for each token, 40 times slower in bf16 on a CPU."""
    if all(isinstance(block.attn, nn.MultiheadAttention) for block in transformer.resblocks):
        for module in (transformer, *(block.attn for block in transformer.resblocks)):
            module.batch_first = False


def pool_tokens(tokens, grid=(4, 8)):
    """Average the square of patches to `grid` rows and columns, behind the class token: (B, 1 + n², D) to (B, 1 + rows · columns, D).

    256 patches to 4 × 8 make a sequence that is eight times shorter, and a cache of 8 GB instead of 65 GB for COCO.
    """
    B, S, D = tokens.shape
    side = math.isqrt(S - 1)
    if side % grid[0] or side % grid[1]:
        raise UserError(f"a grid of {grid[0]} × {grid[1]} does not divide {side} × {side} patches: choose another --grid-size")
    square = tokens[:, 1:].transpose(1, 2).view(B, D, side, side)
    pooled = F.avg_pool2d(square, (side // grid[0], side // grid[1]))            # (B, D, rows, columns)
    return torch.cat([tokens[:, :1], pooled.flatten(2).transpose(1, 2)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The three bridges, from vision tokens (B, S, D) to a decoder of width C
#
#              what the decoder gets                                   where it is joined        trained
#   linear     S vectors, each a linear image of one vision token      before the caption        LayerNorm, Linear, positions
#   qformer    32 vectors, each gathered by a learned query            before the caption        queries, up to 4 layers, LayerNorm, Linear
#   cross      a look at all vision tokens before each of its blocks   inside                    attention and a gate for each block
#
# The prefix of the first two begins at the scale of the decoder's own token vectors, so that it is listened to from the start.


class LinearBridge(nn.Module):
    """One linear map for all vision tokens, and a learned position for each (the mapping network of ClipCap, Mokady et al. 2021, made as small as can be)."""

    def __init__(self, S, D, C, n_head, n_layer, scale):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.project = nn.Linear(D, C)
        self.positions = nn.Parameter(torch.zeros(S, C))
        self.P = S
        nn.init.normal_(self.project.weight, std=scale / math.sqrt(D))

    def forward(self, vision):
        return self.project(self.norm(vision)) + self.positions                  # (B, S, C)


class QFormerBridge(nn.Module):
    """Learned queries gather what a caption needs (Q-Former: Li et al. 2023, BLIP-2, section 3.1; queries at unit scale: without BERT's weights .02 is too quiet)."""

    def __init__(self, S, D, C, n_head, n_layer, scale, queries=32):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, C))
        self.P = queries
        self.norm = nn.LayerNorm(D)
        self.positions = nn.Parameter(torch.randn(S, D))
        self.layers = nn.ModuleList(QFormerLayer(C, D, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(C)
        self.project = nn.Linear(C, C)
        nn.init.normal_(self.project.weight, std=scale / math.sqrt(C))

    def forward(self, vision):
        vision = self.norm(vision) + self.positions                              # (B, S, D)
        x = self.queries.expand(len(vision), -1, -1)                             # (B, 32, C)
        for layer in self.layers:
            x = layer(x, vision)
        return self.project(self.ln_f(x))                                        # (B, 32, C)


class QFormerLayer(nn.Module):
    """The queries look at each other, then at the picture, then think (pre-norm)."""

    def __init__(self, C, D, n_head):
        super().__init__()
        self.ln_1, self.ln_2, self.ln_3 = nn.LayerNorm(C), nn.LayerNorm(C), nn.LayerNorm(C)
        self.attend, self.look = Attention(C, C, n_head), Attention(C, D, n_head)
        self.mlp = MLP(train_gpt2.GPTConfig(n_embd=C))

    def forward(self, x, vision):
        x = x + self.attend(self.ln_1(x), *self.attend.keys_values(self.ln_1(x)))
        x = x + self.look(self.ln_2(x), *self.look.keys_values(vision))
        return x + self.mlp(self.ln_3(x))


class CrossAttentionBridge(nn.Module):
    """Before each block of the decoder x + tanh(gate) · attention(LN(x), vision), with gates that begin at 0 (Alayrac et al. 2022, Flamingo, figure 4).

    At first the decoder is exactly what it was; the gates open as the looks become useful. Positions at the scale of the normalised
    tokens: at .02 the decoder learns what is there but hardly where.
    """

    def __init__(self, S, D, C, n_head, n_layer, scale):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.positions = nn.Parameter(torch.randn(S, D))
        self.ln = nn.ModuleList(nn.LayerNorm(C) for _ in range(n_layer))
        self.look = nn.ModuleList(Attention(C, D, n_head) for _ in range(n_layer))
        self.gates = nn.Parameter(torch.zeros(n_layer))
        self.P = 1                                         # <|endoftext|> stands before the caption

    @contextlib.contextmanager
    def looking_at(self, vision, decoder):
        """Within this context the blocks of `decoder` look at the pictures before they do what they did."""
        vision = self.norm(vision) + self.positions                              # (B, S, D)

        def hook(i):
            keys_values = self.look[i].keys_values(vision)
            return lambda block, args: (args[0] + torch.tanh(self.gates[i]) * self.look[i](self.ln[i](args[0]), *keys_values), *args[1:])

        hooks = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(decoder.h)]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


class Attention(nn.Module):
    """Queries from x (B, T, C), keys and values from another sequence (B, S, D); q, k and v begin large enough to tell tokens apart."""

    def __init__(self, C, D, n_head):
        super().__init__()
        self.n_head = n_head
        self.q, self.kv, self.out = nn.Linear(C, C), nn.Linear(D, 2 * C), nn.Linear(C, C)
        for layer in (self.q, self.kv):
            nn.init.normal_(layer.weight, std=1.5 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    def heads(self, x):
        return x.view(x.size(0), x.size(1), self.n_head, -1).transpose(1, 2)     # (B, nh, T, hs)

    def keys_values(self, source):
        return [self.heads(t) for t in self.kv(source).chunk(2, dim=-1)]

    def forward(self, x, k, v):
        return self.out(attention(self.heads(self.q(x)), k, v).transpose(1, 2).reshape(x.shape))


BRIDGES = {"linear": LinearBridge, "cross": CrossAttentionBridge, "qformer": QFormerBridge}


# ---------------------------------------------------------------------------------------------------------------------
# The captioner. The layout of a sequence is told here and nowhere else:
#
#     linear, qformer     v1 v2 … vP  a  red  circle  <|endoftext|>            v: the prefix, at positions 0 … P - 1
#     cross               <|endoftext|>  a  red  circle  <|endoftext|>         P = 1
#     targets                     a  red  circle  <|endoftext|>                each predicted one place before it stands
#
# All captions of a picture share one beginning: behind it they stand one after the other, each with the positions P, P + 1, … and
# each blind to the others, so that one pass over P + 5 · 12 tokens does the work of five over P + 12.


@dataclass
class Packed:
    """Captions in one sequence behind a beginning of P."""
    idx: torch.Tensor             # (B, T) token ids, the inputs
    positions: torch.Tensor       # (B, T)
    mask: torch.Tensor            # (B, 1, P + T, P + T), True where attention may look
    source: torch.Tensor          # (B, N) for each target, which hidden state predicts it: P - 1 for a caption's first token
    targets: torch.Tensor         # (B, N), -100 where there is none
    caption: torch.Tensor         # (B, N) the caption that a target belongs to, -1 for none

    def to(self, device, **options):
        return Packed(*(t.to(device, **options) for t in vars(self).values()))


def pack(captions, P, eot):
    """Lay out captions = [picture: [caption: [token id, …], …], …], each ended by `eot`, behind a beginning of P vectors."""
    B = len(captions)
    T = max(1, max(sum(map(len, picture)) for picture in captions))
    N = max(sum(map(len, picture)) + len(picture) for picture in captions)
    idx, positions, own = np.zeros((B, T), np.int64), np.full((B, T), P), np.full((B, T), -1)
    source, targets, caption = np.zeros((B, N), np.int64), np.full((B, N), -100), np.full((B, N), -1)
    for b, picture in enumerate(captions):
        t = n = 0
        for k, tokens in enumerate(picture):
            length = len(tokens)
            idx[b, t:t + length], positions[b, t:t + length], own[b, t:t + length] = tokens, np.arange(P, P + length), k
            source[b, n], source[b, n + 1:n + 1 + length] = P - 1, np.arange(P + t, P + t + length)
            targets[b, n:n + length], targets[b, n + length], caption[b, n:n + length + 1] = tokens, eot, k
            t, n = t + length, n + length + 1
    mask = np.tril(np.ones((P + T, P + T), bool))[None].repeat(B, 0)
    mask[:, P:, P:] &= own[:, :, None] == own[:, None, :]                        # a caption sees the beginning and itself
    return Packed(*map(torch.from_numpy, (idx, positions, mask[:, None], source, targets, caption)))


class Captioner(nn.Module):
    """A bridge, and the frozen decoder that it speaks through."""

    def __init__(self, bridge, decoder, eot):
        super().__init__()
        self.bridge, self.eot = bridge, eot
        self.decoder = decoder.eval().requires_grad_(False)

    def begin(self, vision):
        """What stands before a caption, (B, P, C), with the decoder's own positions."""
        if isinstance(self.bridge, CrossAttentionBridge):
            start = self.decoder.wte.weight[self.eot].expand(len(vision), 1, -1)
        else:
            start = self.bridge(vision)
        return start + self.decoder.wpe.weight[:start.size(1)]

    def looking_at(self, vision):
        """The context in which the decoder runs."""
        return self.bridge.looking_at(vision, self.decoder) if isinstance(self.bridge, CrossAttentionBridge) else contextlib.nullcontext()

    def forward(self, vision, packed):
        """(None, mean loss), as GPT's with targets."""
        return None, self.loss(vision, packed)

    def loss(self, vision, packed, reduction="mean"):
        """Cross-entropy in nats of captions given vision tokens (B, S, D): mean or sum over the targets, or "none" for each, (B, N)."""
        start = self.begin(vision)
        x = torch.cat([start, self.decoder.embed(packed.idx, packed.positions)], dim=1)                # (B, P + T, C)
        with self.looking_at(vision):
            h = self.decoder.decode(x, packed.mask)
        h = h.gather(1, packed.source[:, :, None].expand(-1, -1, h.size(-1)))                          # (B, N, C)
        return self.decoder.loss(h, packed.targets, reduction)

    @torch.no_grad()
    def generate(self, vision, max_new_tokens=30, prompt=(), temperature=0.0, **options):
        """Token ids (B, len(prompt) + new) for vision tokens (B, S, D); greedy unless a temperature is given. prompt: (B, n) or n ids to begin with."""
        idx = torch.as_tensor(prompt, dtype=torch.long, device=vision.device)
        idx = idx if idx.dim() == 2 else idx.expand(len(vision), -1)
        room = self.decoder.config.block_size - self.bridge.P - idx.size(1)
        with self.looking_at(vision):
            return self.decoder.generate(idx, min(max_new_tokens, room), temperature=temperature, prefix=self.begin(vision), stop=self.eot, **options)

    @torch.no_grad()
    def beam_search(self, vision, beams, max_new_tokens=30, length_penalty=1.0):
        """Token ids (B, new) of the best caption of each picture, keeping the `beams` best beginnings at every step.

        A caption of n tokens, its end among them, is worth the sum of its log probabilities / n^length_penalty (Wu et al. 2016,
        section 7, in the simple form): 0 favours short captions, 1 compares means. One beam is greedy decoding.
        """
        B, W, decoder = len(vision), beams, self.decoder
        V, device = decoder.config.vocab_size - decoder.config.vocab_padding, vision.device
        vision = vision.repeat_interleave(W, 0)                                  # (B·W, S, D)
        x, cache = self.begin(vision), [train_gpt2.KeyValues() for _ in decoder.h]
        tokens, done = torch.zeros(B, W, 0, dtype=torch.long, device=device), torch.zeros(B, W, dtype=torch.bool, device=device)
        total, length = torch.full((B, W), -math.inf, device=device), torch.zeros(B, W, device=device)
        total[:, 0] = 0                                                          # all beams are alike at first: only one may go on
        with self.looking_at(vision):
            for step in range(min(max_new_tokens, decoder.config.block_size - self.bridge.P)):
                log_p = decoder.logits(decoder.decode(x, cache=cache)[:, -1])[:, :V].float().log_softmax(-1).view(B, W, V)
                log_p = log_p.masked_fill(done[:, :, None], -math.inf)
                log_p[:, :, self.eot] = torch.where(done, 0.0, log_p[:, :, self.eot])        # what has ended stays as it is
                sums, lengths = total[:, :, None] + log_p, length + ~done
                best = (sums / lengths[:, :, None] ** length_penalty).view(B, -1).topk(W).indices        # (B, W), the best first
                parent, token = best // V, best % V
                total, length = sums.view(B, -1).gather(1, best), lengths.gather(1, parent)
                tokens = torch.cat([tokens.gather(1, parent[:, :, None].expand(-1, -1, tokens.size(2))), token[:, :, None]], dim=2)
                done = done.gather(1, parent) | (token == self.eot)
                if done.all():
                    break
                rows = (parent + W * torch.arange(B, device=device)[:, None]).view(-1)
                for layer in cache:
                    layer.k, layer.v = layer.k[rows], layer.v[rows]
                x = decoder.embed(token.view(-1, 1), torch.tensor([self.bridge.P + step], device=device))
        return tokens[:, 0]


def clean_caption(text):
    """Blanks folded, lower-cased, without the final full stop: the scorer drops all of it, and a token in twelve is saved."""
    return " ".join(text.split()).lower().removesuffix(".").rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# Vision tokens on disk: CLIP never changes, so every picture goes through it once

CHUNK = 64                       # pictures at once
SAVE_EVERY = 10                  # seconds


def cached_features(vision, pictures, folder, split, grid, device):
    """Vision tokens of pictures [{"id", "path"}, …]: (float16 memory map (N, S, D), [whether picture i could be read]).

    What is on disk is used; what is missing is computed, decoding pictures in threads while CLIP works, and goes on where it was
    interrupted. Raises UserError when the cache is of other pictures, of another CLIP or grid.
    """
    data, header = Path(folder) / f"{split}.bin", Path(folder) / f"{split}.json"
    S, D = 1 + grid[0] * grid[1], vision(prepare(vision, [Image.new("RGB", (8, 8))]).to(device)).size(-1)
    listing = hashlib.sha256(json.dumps([[p["id"], Path(p["path"]).name] for p in pictures]).encode()).hexdigest()
    about = {"format": 1, "clip": vision.name, "layer": "last but one", "grid": list(grid), "pictures": listing, "shape": [len(pictures), S, D]}
    try:
        found = coco_eval.read_json(header) if header.exists() else {**about, "done": 0, "broken": []}
    except UserError:
        found = None
    if not isinstance(found, dict) or not {"done", "broken"} <= found.keys() or {key: found.get(key) for key in about} != about:
        raise UserError(f"{folder} has vision tokens of other pictures, another CLIP or another grid, or is damaged: remove it, and they are computed anew")
    size = 2 * math.prod(about["shape"])
    if not data.exists() or data.stat().st_size != size:
        fineweb.require_space(folder, size)
        found.update(done=0, broken=[])
        data.parent.mkdir(parents=True, exist_ok=True)
        with open(data, "wb") as file:
            file.truncate(size)
    features = np.memmap(data, np.float16, "r+", shape=tuple(about["shape"]))
    if found["done"] < len(pictures):
        fill(features, found, vision, pictures, grid, device, header)
    return np.memmap(data, np.float16, "r", shape=tuple(about["shape"])), [p["id"] not in set(found["broken"]) for p in pictures]


def fill(features, found, vision, pictures, grid, device, header):
    """Compute what is missing of cached_features(), and say in the header how far it has come."""
    began, first, saved = time.time(), found["done"], time.time()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        def load(begin):
            return [threads.submit(readable, picture["path"], vision.preprocess) for picture in pictures[begin:begin + CHUNK]]

        ahead = load(first)
        for begin in range(first, len(pictures), CHUNK):
            coming, ahead = ahead, load(begin + CHUNK)
            images = [image.result() for image in coming]
            good = [i for i, image in enumerate(images) if not isinstance(image, UserError)]
            if good:
                features[[begin + i for i in good]] = pool_tokens(vision(torch.stack([images[i] for i in good]).to(device)), grid).cpu().numpy()
            for i, error in enumerate(images):
                if isinstance(error, UserError):
                    found["broken"].append(pictures[begin + i]["id"])
                    print(f"\nleft out: {error}")
            found["done"] = begin + len(images)
            last = found["done"] == len(pictures)
            if time.time() - saved > SAVE_EVERY or last:
                features.flush()
                with fineweb.atomic_write(header, "w") as file:
                    json.dump(found, file)
                saved = time.time()
            rate = (found["done"] - first) / (time.time() - began)
            if last or begin // CHUNK % 16 == 0:
                left = clock((len(pictures) - found["done"]) / rate)
                print(f"\rvision tokens: {found['done']:,} of {len(pictures):,} pictures  {rate:,.0f} pictures/s  {left} left ", end="", flush=True)
    print()


class Rows:
    """Some rows of a memory map, read when they are asked for."""

    def __init__(self, features, rows):
        self.features, self.rows = features, np.asarray(rows)
        self.shape = (len(rows), *features.shape[1:])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, pictures):
        return self.features[self.rows[pictures]]


class Live:
    """Vision tokens that are computed anew whenever they are asked for, as they would be without a cache."""

    def __init__(self, vision, pictures, grid, device):
        self.vision, self.pictures, self.grid, self.device = vision, pictures, grid, device

    def __getitem__(self, pictures):
        images = prepare(self.vision, [coco_eval.load_image(self.pictures[i]["path"]) for i in pictures])
        return pool_tokens(self.vision(images.to(self.device)), self.grid).cpu().numpy()


def readable(path, preprocess):
    """A prepared picture (3, H, W), or the UserError that says why there is none."""
    try:
        return preprocess(coco_eval.load_image(path))
    except UserError as error:
        return error


def prepare(vision, images):
    """Pillow pictures as CLIP wants them, (B, 3, H, W)."""
    return torch.stack([vision.preprocess(image) for image in images])


# ---------------------------------------------------------------------------------------------------------------------
# Two worlds: what the decoder, CLIP and the pictures are

TINY_CLIP = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32, "pool_type": "avg"},
             "text_cfg": {"context_length": 32, "vocab_size": 431, "width": 64, "heads": 2, "layers": 2}}
TINY_CLIP_STEPS, TINY_CLIP_BATCH = 500, 64


@dataclass
class World:
    """The frozen parts, and where the pictures are."""
    name: str                     # "tiny", or what the data folder is called
    data: Path
    vision: Vision
    decoder: train_gpt2.GPT
    tokenizer: object
    decoder_name: str


def open_world(args):
    """The World that the flags ask for: the full one with --data, or where there are a GPU and COCO; else the tiny one, made where it is missing."""
    coco = Path("data/coco")
    full = bool(args.data) or pick_device() == "cuda" and coco.exists() or bool(args.sample) and Path(f"runs/coco-{args.bridge}/best.pt").exists()
    if full:
        data, clip = Path(args.data or coco), args.clip or "ViT-L-14-quickgelu/openai"
        lm = args.lm or ("runs/gpt2/ckpt.pt" if train_gpt2.is_finished("runs/gpt2") else "gpt2")
        print(f"decoder    {lm}\neye        {clip}", flush=True)
    else:
        data, clip, lm = Path("data/shapes"), args.clip or "runs/tiny-clip/ckpt.pt", args.lm or "runs/tiny/ckpt.pt"
        print("world      tiny: its bridges know coloured shapes only, and see them in photographs too. For photographs:\n"
              f"           python coco_eval.py --download && python caption.py --data data/coco --bridge {args.bridge or 'linear'}", flush=True)
        make_tiny_world(data, clip, lm)
    decoder, tokenizer, checkpoint = in_turns(lambda: train_gpt2.load_checkpoint(lm))
    name = checkpoint.get("run", {}).get("preset", Path(lm).name)
    return World(data.name if full else "tiny", data, in_turns(lambda: load_clip(clip)), decoder, tokenizer, f"{name} {fingerprint(decoder)}")


def make_tiny_world(data, clip, lm):
    """Make what the tiny world lacks: the decoder, the pictures, the eye."""
    if str(lm) == "runs/tiny/ckpt.pt" and not train_gpt2.is_finished("runs/tiny"):
        print("lacking    the decoder: python train_gpt2.py --preset tiny, two minutes", flush=True)
        train_gpt2.main(["--preset", "tiny"])
    if rank() == 0 and not data.exists():
        print(f"lacking    the pictures: drawing them in {data}", flush=True)
        coco_eval.make_shapes(data)
    if rank() == 0 and str(clip) == "runs/tiny-clip/ckpt.pt" and not Path(clip).exists():
        print("lacking    the eye: a tiny CLIP, trained on these pictures and their captions", flush=True)
        train_clip(data, Path(clip))
    wait()


def fingerprint(module):
    """A short digest of a module's weights, from the first numbers of each tensor."""
    digest = hashlib.sha256()
    for name, t in module.state_dict().items():
        digest.update(f"{name} {tuple(t.shape)}".encode() + t.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_clip(which):
    """The eye: our own checkpoint (….pt from train_clip), or NAME/TAG or NAME/FILE for open_clip, such as ViT-L-14-quickgelu/openai."""
    path = Path(which)
    if path.suffix == ".pt" and path.exists():
        checkpoint = train_gpt2.read_checkpoint(path, holds="clip")
        model = open_clip.CLIP(**checkpoint["clip"])
        model.load_state_dict(checkpoint["model"])
        return Vision(model.visual, open_clip.image_transform(checkpoint["clip"]["vision_cfg"]["image_size"], is_train=False), f"tiny {fingerprint(model.visual)}")
    name, _, tag = str(which).partition("/")
    if name not in open_clip.list_models() or not tag:
        raise UserError(f"--clip {which} is neither a checkpoint that is there nor a name and tag such as ViT-L-14-quickgelu/openai")
    if tag == "openai" and name.startswith("ViT") and f"{name}-quickgelu" in open_clip.list_models():
        raise UserError(f"--clip {which}: OpenAI trained with another activation (QuickGELU), with this one CLIP sees wrongly: use {name}-quickgelu/openai")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=tag)
    except Exception as error:                             # the hub's client and torch.load raise many kinds
        why = (str(error) or type(error).__name__).splitlines()[0][:90]
        raise UserError(f"CLIP {which} cannot be loaded ({why}): give the weights as a file, --clip {name}/FILE.safetensors") from None
    if not hasattr(getattr(model.visual, "transformer", None), "resblocks"):
        raise UserError(f"--clip {which} is no vision transformer of open_clip: use one, such as ViT-L-14-quickgelu/openai")
    return Vision(model.visual, preprocess, f"{name}/{Path(tag).name} {fingerprint(model.visual)}")


def train_clip(data, path, seed=0):
    """Train the tiny world's CLIP on pictures and the captions that name all objects (Radford et al. 2021, figure 3)."""
    torch.manual_seed(seed)
    pictures, tokenizer, device = coco_eval.read_dataset(data, "train"), fineweb.get_tokenizer("tiny"), pick_device()
    model, preprocess = open_clip.CLIP(**TINY_CLIP).to(device), open_clip.image_transform(64, is_train=False)
    images = torch.stack([preprocess(coco_eval.load_image(p["path"])) for p in pictures])
    texts = torch.zeros(len(pictures), 32, dtype=torch.long)
    for row, picture in zip(texts, pictures):              # the end token has the largest id, which is where CLIP reads the text
        tokens = [tokenizer.eot_token - 1, *tokenizer.encode_ordinary(picture["captions"][-1])][:31] + [tokenizer.eot_token]
        row[:len(tokens)] = torch.tensor(tokens)
    recipe = train_gpt2.Recipe(TINY_CLIP_STEPS, 0, 0, 1.5e-3, 50, weight_decay=0.05)
    optimizer, contrast, began = train_gpt2.make_optimizer(model, recipe), open_clip.ClipLoss(), time.time()
    for step in range(recipe.steps):
        rows = torch.from_numpy(train_gpt2.step_windows(seed, step, TINY_CLIP_BATCH, len(pictures)))
        with autocast(device):
            loss = contrast(*model(images[rows].to(device), texts[rows].to(device)))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = train_gpt2.learning_rate(step, recipe)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 49:
            left = clock((recipe.steps - step - 1) * (time.time() - began) / (step + 1))
            print(f"\rtiny CLIP: step {step + 1} of {recipe.steps} | loss {loss.item():.3f} | {left} left ", end="", flush=True)
    print()
    train_gpt2.save_checkpoint(path, {"format": train_gpt2.FORMAT, "clip": TINY_CLIP, "model": model.state_dict()})


# ---------------------------------------------------------------------------------------------------------------------
# Training a bridge


@dataclass(frozen=True)
class Recipe:
    """How a bridge is trained. The three share one budget; only the learning rate is each one's own."""
    steps: int
    batch: int                    # pictures for each update, with all their captions
    micro_batch: int              # pictures computed at once
    lr: float
    warmup: int
    eval_every: int
    log_every: int = 20
    weight_decay: float = 0.01
    clip: float = 1.0
    floor: float = 0.0


LEARNING_RATES = {"linear": (5e-3, 2e-3), "cross": (5e-3, 4e-4), "qformer": (2e-3, 4e-4)}     # highest: in the tiny world, at full size
LONGEST = 100                    # tokens of a caption; those of val2017 have 57 at most, and one endless caption would take the memory of all
GATES = 10                       # their rate is that much higher: a gate has to open before anything behind it can learn
COCO_CAPTIONS = 591_753          # of train2017
STEPS, EPOCHS = 1_000, 4         # the tiny world's budget in steps, the full one's in passes over the pictures


class BridgeTraining(train_gpt2.Updates):
    """Updates of a bridge from pictures with captions; decoder and CLIP stay as they are."""
    unit = "captions"

    def __init__(self, captioner, recipe, features, captions, seed, device):
        super().__init__(captioner.bridge, recipe, device, captioner)
        self.features, self.captions, self.seed = features, captions, seed
        self.per_step = recipe.batch * sum(map(len, captions)) / len(captions)
        gates = [p for name, p in self.raw.named_parameters() if name == "gates"]
        matrices = [p for p in self.raw.parameters() if p.dim() >= 2]
        vectors = [p for name, p in self.raw.named_parameters() if p.dim() < 2 and name != "gates"]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors}, {"params": gates, "times": GATES}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def load(self, step):
        """The micro-batches of a step: [(vision tokens, packed captions, share of the step's targets)]."""
        pictures = train_gpt2.step_windows(self.seed, step, self.recipe.batch, len(self.captions))
        mine = np.array_split(pictures, processes())[rank()]                     # each process takes its slice
        parts = np.array_split(mine, -(-len(mine) // self.recipe.micro_batch))
        return [(*lay_out(self.features, self.captions, part, self.net), self.targets(part) / self.targets(pictures)) for part in parts]

    def targets(self, pictures):
        """How many targets the captions of these pictures have: their tokens, and an end for each."""
        return sum(len(tokens) + 1 for i in pictures for tokens in self.captions[i])


def lay_out(features, captions, pictures, captioner):
    """(vision tokens (B, S, D), Packed) of the given pictures."""
    vision = torch.from_numpy(np.asarray(features[pictures], dtype=np.float32))
    return vision, pack([captions[i] for i in pictures], captioner.bridge.P, captioner.eot)


def encode_captions(pictures, tokenizer, room):
    """Token ids of each picture's captions, at most `room` and LONGEST of each."""
    room = min(room, LONGEST)
    return [[tokenizer.encode_ordinary(clean_caption(caption))[:room] for caption in picture["captions"]] for picture in pictures]


@torch.no_grad()
def caption_loss(captioner, features, captions, device, batch=50):
    """(nats per token, nats per caption) over all pictures."""
    total = tokens = 0
    mine = np.arange(len(captions))[rank()::processes()]
    for part in np.array_split(mine, -(-len(mine) // batch)) if len(mine) else ():
        vision, packed = lay_out(features, captions, part, captioner)
        with autocast(device):
            total += captioner.loss(vision.to(device), packed.to(device), "sum").item()
        tokens += int((packed.targets >= 0).sum())
    total, tokens = summed(torch.tensor([total, tokens], dtype=torch.float64, device=device if device == "cuda" else "cpu")).tolist()
    return total / tokens, total / sum(map(len, captions))


def build(name, S, D, decoder):
    """A Captioner with a new bridge that fits `decoder` and S vision tokens of width D; <|endoftext|> is the decoder's last token."""
    c = decoder.config
    layers = min(4, c.n_layer // 2) if name == "qformer" else c.n_layer          # four are enough for queries, each block of the decoder looks
    bridge = BRIDGES[name](S, D, c.n_embd, c.n_head, layers, decoder.wte.weight.std().item())
    if bridge.P + 2 > c.block_size:
        raise UserError(f"a prefix of {bridge.P} leaves no room in the decoder's context of {c.block_size}: choose --grid-size 4x8")
    return Captioner(bridge, decoder, c.vocab_size - c.vocab_padding - 1)


def dataset(world, split, args, device):
    """(pictures that could be read, their vision tokens)."""
    pictures = coco_eval.read_dataset(world.data, split)
    grid = tuple(map(int, args.grid_size.split("x")))
    folder = Path("data/features") / f"{world.name}-{world.vision.name.replace('/', '-').replace(' ', '-')}-{args.grid_size}"
    features, good = in_turns(lambda: cached_features(world.vision, pictures, folder, split, grid, device))
    if not any(good):
        raise UserError(f"no picture of {world.data} ({split}) can be read: check the folder")
    return [p for p, g in zip(pictures, good) if g], Rows(features, np.flatnonzero(good))


def choose_recipe(name, world, pictures, args):
    """The bridge's recipe with the flags' changes."""
    tiny = world.name == "tiny"
    batch = args.batch or (32 if tiny else 64)
    if batch < processes():
        raise UserError(f"--batch {batch} is less than {processes()} processes: take more pictures")
    steps = args.steps or (STEPS if tiny and not args.epochs else max(1, round((args.epochs or EPOCHS) * pictures / batch)))
    return Recipe(steps, batch, min(args.micro_batch or batch, batch), args.lr or LEARNING_RATES[name][0 if tiny else 1], max(1, round(0.03 * steps)), max(1, steps // 10))


def train(name, world, args, blind=False):
    """Train a bridge, or go on with its run, until its last step; returns the run's folder. blind: its vision tokens are all 0."""
    device = pick_device()
    out = Path(args.out or "runs") / (f"{world.name}-{name}" + "-blind" * blind)
    (train_pictures, features), (val_pictures, val_features) = (dataset(world, split, args, device) for split in ("train", "val"))
    if blind:
        features, val_features = (np.zeros(f.shape, np.float16) for f in (features, val_features))
    torch.manual_seed(args.seed)
    captioner = build(name, *features.shape[1:], world.decoder).to(device)
    recipe, room = choose_recipe(name, world, len(train_pictures), args), world.decoder.config.block_size - captioner.bridge.P
    run = {"bridge": name, "S": features.shape[1], "D": features.shape[2], "decoder": world.decoder_name, "clip": world.vision.name, "grid": args.grid_size,
           "pictures": len(train_pictures), "seed": args.seed, "batch": recipe.batch}
    checkpoint = train_gpt2.unfinished(out, run) if not args.restart else None
    if checkpoint and checkpoint["step"] >= recipe.steps:
        return out
    val_features = Rows(val_features, [i for i, p in enumerate(val_pictures) if not unseen(p)])
    captions, seen = (encode_captions(p, world.tokenizer, room) for p in (train_pictures, [p for p in val_pictures if not unseen(p)]))
    training = BridgeTraining(captioner, recipe, features, captions, args.seed, device)
    header = {"run": run, "best": checkpoint["best"] if checkpoint else math.inf}
    if checkpoint:
        training.restore(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").unlink(missing_ok=True)          # they come last, and tell that a run is finished
    parameters = sum(p.numel() for p in captioner.bridge.parameters())
    print(f"bridge     {name}{', blind' * blind}: {parameters:,} trainable parameters, {recipe.steps:,} steps of {recipe.batch} pictures, in {out}", flush=True)

    def validate():
        token, caption = caption_loss(captioner, val_features, seen, device)
        print(f"           val {token:.4f} nats a token, {caption:.3f} a caption", flush=True)
        better, header["best"] = token < header["best"], min(token, header["best"])
        if better and rank() == 0:
            train_gpt2.save_checkpoint(out / "best.pt", {"format": train_gpt2.FORMAT, "run": run, "step": training.step, "model": captioner.bridge.state_dict()}, keep=False)
        return {"val_val": token}

    train_gpt2.loop(training, validate, ["val_val"], out, header, 0)
    wait()                                                 # best.pt is whole
    return out


def unseen(picture):
    """Whether a picture of the shapes world has a pair of colour and shape that no training picture has."""
    return bool(picture["scene"]) and any((o["colour"], o["shape"]) in fineweb.UNSEEN for o in picture["scene"]["objects"])


def load_captioner(path, world, grid):
    """The Captioner of a checkpoint. Raises UserError when it was trained for another decoder, another CLIP or another grid."""
    checkpoint = train_gpt2.read_checkpoint(path)
    run = checkpoint["run"]
    for part, here, flag in (("decoder", world.decoder_name, "lm"), ("clip", world.vision.name, "clip"), ("grid", grid, "grid-size")):
        if run.get(part) != here:
            raise UserError(f"{path} was trained for another {part} ({run.get(part)}, and here is {here}): name the right one with --{flag}, or train anew with --restart")
    captioner = build(run["bridge"], run["S"], run["D"], world.decoder)
    captioner.bridge.load_state_dict(checkpoint["model"])
    return captioner.eval().to(pick_device())


# ---------------------------------------------------------------------------------------------------------------------
# Captions, and what they are worth


@torch.no_grad()
def write_captions(captioner, features, tokenizer, prompts=None, beams=1, batch=250, **options):
    """A caption for each row of features (N, S, D); prompts: N token lists of one length that the captions begin with. Several processes share the rows."""
    device, mine, texts, batch = next(captioner.bridge.parameters()).device, range(rank(), len(features), processes()), [], max(1, batch // beams)
    for begin in range(0, len(mine), batch):
        part = list(mine[begin:begin + batch])
        vision = torch.from_numpy(np.asarray(features[part], dtype=np.float32)).to(device)
        with autocast(device.type):
            if beams > 1:
                rows = captioner.beam_search(vision, beams, **options).tolist()
            else:
                rows = captioner.generate(vision, prompt=[prompts[i] for i in part] if prompts else (), **options).tolist()
        texts += [tokenizer.decode([token for token in row if token != captioner.eot], errors="replace").strip() for row in rows]
    if processes() == 1:
        return texts
    shares = [None] * processes()
    distributed.all_gather_object(shares, texts)
    return [shares[i % processes()][i // processes()] for i in range(len(features))]


def share_of_facts(captioner, features, pictures, tokenizer):
    """How often a fact is stated rightly when a caption is begun that has to state it: {"count", "objects", "place", "relation"}."""
    rng, right = random.Random(0), {}
    asked = [fineweb.questions(picture["scene"], rng) for picture in pictures]
    for fact in asked[0]:
        texts = write_captions(captioner, features, tokenizer, [tokenizer.encode_ordinary(question[fact]) for question in asked], max_new_tokens=8)
        right[fact] = float(np.mean([fineweb.facts(text, picture["scene"])[fact] is True for text, picture in zip(texts, pictures)]))
    return right


def evaluate(out, world, args):
    """Score the best bridge of a run on the validation pictures: prints a table, writes results.json, scores.json and grid.png; returns the scores.

    "shuffled": each picture's captions from the tokens of another; what is still right there is guessed.
    """
    device = pick_device()
    captioner = load_captioner(args.ckpt or Path(out) / "best.pt", world, args.grid_size)
    pictures, features = dataset(world, "val", args, device)
    captions = encode_captions(pictures, world.tokenizer, captioner.decoder.config.block_size - captioner.bridge.P)
    seen, rest = [i for i, p in enumerate(pictures) if not unseen(p)], [i for i, p in enumerate(pictures) if unseen(p)]
    shuffled = np.roll(seen, 1)
    decoding = f"beam {args.beam}, length penalty {args.length_penalty}" if args.beam > 1 else "greedy"
    beams = {"beams": args.beam, "length_penalty": args.length_penalty} if args.beam > 1 else {}
    texts = write_captions(captioner, features[seen], world.tokenizer, **beams)
    scores = coco_eval.evaluate({pictures[i]["id"]: pictures[i]["captions"] for i in seen}, {pictures[i]["id"]: text for i, text in zip(seen, texts)})
    row = {"parameters": sum(p.numel() for p in captioner.bridge.parameters()), "pictures": len(seen), "decoding": decoding}
    row["nats a caption"] = caption_loss(captioner, features[seen], [captions[i] for i in seen], device)[1]
    row["shuffled"] = caption_loss(captioner, features[shuffled], [captions[i] for i in seen], device)[1]
    row |= scores["corpus"]
    if all(picture["scene"] for picture in pictures):
        told = [pictures[i] for i in seen]
        row["facts"] = share_of_facts(captioner, features[seen], told, world.tokenizer)
        row["facts, shuffled"] = share_of_facts(captioner, features[shuffled], told, world.tokenizer)
        row["facts, unseen pairs"] = share_of_facts(captioner, features[rest], [pictures[i] for i in rest], world.tokenizer)
    if rank() == 0:
        write_scores(Path(out), [pictures[i] for i in seen], texts, {**row, **scores})
    print(f"{len(seen)} validation pictures of {world.data}, {decoding}: {row['nats a caption']:.2f} nats a caption, with shuffled pictures {row['shuffled']:.2f}")
    print(coco_eval.table(scores, len(seen)))
    for kind in ("facts", "facts, shuffled", "facts, unseen pairs"):
        if kind in row:
            print(f"{kind:22} " + "  ".join(f"{fact} {share:.2f}" for fact, share in row[kind].items()))
    print(f"{out} has best.pt, results.json, scores.json, curves.png and grid.png")
    return row


def write_scores(out, pictures, texts, scores):
    """results.json in COCO's format, scores.json, and grid.png with nine of the pictures."""
    for file, content in (("results.json", [{"image_id": p["id"], "caption": text} for p, text in zip(pictures, texts)]), ("scores.json", scores)):
        with fineweb.atomic_write(out / file, "w", encoding="utf-8") as target:
            json.dump(content, target)
    nine = range(0, len(pictures), max(len(pictures) // 9, 1))[:9]
    draw_grid(out / "grid.png", [coco_eval.load_image(pictures[i]["path"]) for i in nine], [texts[i] for i in nine])


def draw_grid(path, pictures, captions, columns=3, size=256):
    """Pictures with their captions below, `columns` beside each other, as one PNG."""
    font, gap, text = ImageFont.load_default(17), 24, 96
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + text) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = gap + i % columns * (size + gap), gap + i // columns * (size + text)
        scale = size / max(picture.size)
        small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.LANCZOS)
        sheet.paste(small, (x + (size - small.width) // 2, y + (size - small.height) // 2))
        draw.multiline_text((x, y + size + 6), "\n".join(textwrap.wrap(caption, 31)[:4]), "#111827", font)
    with fineweb.atomic_write(path) as file:
        sheet.save(file, "PNG")


def compare(world, args):
    """Train and score all three bridges under one budget, and a blind one of each: one table, one picture of the loss curves."""
    rows, lines, folder, steps = {}, {}, Path(args.out or "runs") / f"{world.name}-compare", args.steps
    for name in BRIDGES:
        out, blind = train(name, world, args), train(name, world, args, blind=True)
        rows[name] = evaluate(out, world, args)
        log, blind_log = train_gpt2.read_log(out / "log.csv"), train_gpt2.read_log(blind / "log.csv")
        steps = steps or log[-1]["step"]
        for run, kept in ((out, log), (blind, blind_log)):
            if kept[-1]["step"] != steps:
                raise UserError(f"{run} has {kept[-1]['step']:,.0f} steps and another run {steps:,.0f}: one budget for all, use --restart, or another --out")
        per_caption = rows[name]["nats a caption"] / min(r["val_val"] for r in log if "val_val" in r)
        rows[name] |= {"blind": min(r["val_val"] for r in blind_log if "val_val" in r) * per_caption, "seconds": log[-1]["seconds"]}
        for label, kept in ((name, log), (f"{name}, blind", blind_log)):
            lines[label] = ([r["step"] for r in kept if "val_val" in r], [r["val_val"] for r in kept if "val_val" in r])
    lines = dict(sorted(lines.items(), key=lambda line: "blind" in line[0]))
    if rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    train_gpt2.draw_curves(folder / "curves.png", [("validation loss, nats per token", "step", lines)])
    table = comparison(rows)
    with fineweb.atomic_write(folder / "table.md", "w", encoding="utf-8") as file:
        file.write(table + "\n")
    print(f"\n{table}\n\n{folder} has table.md and curves.png")


def comparison(rows):
    """The table of --compare, in Markdown: rows = {bridge: what evaluate() returned}."""
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]

    def line(label, show):
        lines.append(f"| {label} | " + " | ".join(show(row) for row in rows.values()) + " |")

    line("trainable parameters", lambda r: f"{r['parameters']:,}")
    for key in ("nats a caption", "blind", "shuffled"):
        line("validation loss, nats a caption" if key == "nats a caption" else f"… {key}", lambda r: f"{r[key]:.2f}")
    line(f"CIDEr-D, {next(iter(rows.values()))['decoding']}", lambda r: f"{r['CIDEr']:.3f}")
    line(coco_eval.METEOR_NAME, lambda r: f"{r['METEOR']:.3f}")
    if all("facts" in row for row in rows.values()):
        for fact in next(iter(rows.values()))["facts"]:
            line(f"{fact} right (shuffled; unseen pairs)", lambda r: f"{r['facts'][fact]:.2f} ({r['facts, shuffled'][fact]:.2f}; {r['facts, unseen pairs'][fact]:.2f})")
    line("training, s", lambda r: f"{r['seconds']:.0f}")
    return "\n".join(lines)


def bench(world, args, seconds=8):
    """Print how fast each bridge trains here: with CLIP in the loop, from cached tokens, and with all captions of a picture in one pass."""
    device, grid = pick_device(), tuple(map(int, args.grid_size.split("x")))
    pictures, features = dataset(world, "train", args, device)
    for name in BRIDGES:
        captioner = build(name, *features.shape[1:], world.decoder).to(device)
        packed = encode_captions(pictures, world.tokenizer, world.decoder.config.block_size - captioner.bridge.P)
        single, recipe, rates = [picture[:1] for picture in packed], choose_recipe(name, world, len(pictures), args), {}
        print(f"{name}: {sum(p.numel() for p in captioner.bridge.parameters()):,} trainable parameters, {recipe.batch} pictures a step")
        live = Live(world.vision, pictures, grid, device)
        for way, tokens, captions in (("CLIP in the loop", live, single), ("cached", features, single), ("cached, packed", features, packed)):
            training = BridgeTraining(captioner, recipe, tokens, captions, args.seed, device)
            training.update()[0].item()                    # to warm up
            rate = train_gpt2.steps_per_second(training, seconds)
            rates[way] = rate * training.per_step
            print(f"  {way:16}  {rate * recipe.batch:9,.1f} pictures/s  {rates[way]:9,.1f} captions/s  {rates[way] / rates['CLIP in the loop']:6.1f} times"
                  f"  an epoch of COCO's {COCO_CAPTIONS:,} captions: {clock(COCO_CAPTIONS / rates[way])}", flush=True)
            training.thread.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Your own pictures

KINDS = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"}


def find_pictures(names):
    """[(path, picture), …] of files and folders. What cannot be read is named on stderr; UserError when nothing can, or a file is named twice."""
    paths = []
    for name in map(Path, names):
        inside = sorted(p for p in name.iterdir() if p.suffix.lower() in KINDS) if name.is_dir() else [name]
        if not inside:
            raise UserError(f"{name} has no pictures ({', '.join(sorted(KINDS))}): name another folder")
        paths += inside
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is named twice: name it once")
    found = []
    for path in paths:
        try:
            found.append((path, coco_eval.load_image(path)))
        except UserError as error:
            if len(paths) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
    if not found:
        raise UserError("none of these pictures can be read: name others")
    return found


def sample(args):
    """Caption one's own pictures with the best bridge of a run, training first what is missing."""
    found = find_pictures(args.sample)
    world = open_world(args)
    if args.ckpt:
        path = Path(args.ckpt)
    else:
        path = Path(args.out or "runs") / f"{world.name}-{args.bridge}" / "best.pt"
        if args.restart or not path.with_name("scores.json").exists():
            print(f"lacking    the bridge: training {args.bridge}", flush=True)
            evaluate(train(args.bridge, world, args), world, args)
    captioner = load_captioner(path, world, args.grid_size)
    print(f"bridge     {path}")
    device, grid = pick_device(), tuple(map(int, args.grid_size.split("x")))
    images = [image for _, image in found]
    tokens = np.concatenate([pool_tokens(world.vision(prepare(world.vision, images[i:i + CHUNK]).to(device)), grid).cpu().numpy() for i in range(0, len(images), CHUNK)])
    options = {"temperature": args.temperature, "top_p": args.top_p, "generator": torch.Generator(device).manual_seed(args.seed)} if args.num > 1 else {}
    if args.beam > 1 and args.num == 1:
        options = {"beams": args.beam, "length_penalty": args.length_penalty}
    texts = [write_captions(captioner, tokens, world.tokenizer, **options) for _ in range(args.num)]
    for i, (file, _) in enumerate(found):
        for told in texts:
            print(f"{file}: {told[i]}")
    if args.grid:
        draw_grid(args.grid, images, texts[0])
        print(f"drawn in {args.grid}")


def main():
    """The commands at the top of this file."""
    parser = fineweb.Parser(__doc__)
    group = parser.add_argument_group("what to do (without any of these: train --bridge, then score it)")
    group.add_argument("--bridge", choices=BRIDGES, help="how the picture gets into the decoder")
    group.add_argument("--sample", nargs="+", metavar="PICTURE", help="caption pictures, or folders of them")
    group.add_argument("--eval", action="store_true", help="score the bridge on the validation pictures")
    group.add_argument("--compare", action="store_true", help="train and score all three bridges")
    group.add_argument("--bench", action="store_true", help="measure how fast the bridges train on this machine")
    group = parser.add_argument_group("the frozen parts and the pictures")
    group.add_argument("--data", metavar="DIR", help="pictures with captions in COCO's layout (default: data/coco with a GPU, else the tiny world)")
    group.add_argument("--lm", metavar="CKPT", help="the decoder: a checkpoint of train_gpt2.py, a folder of safetensors, or gpt2")
    group.add_argument("--clip", metavar="CLIP", help="the eye: NAME/TAG or NAME/FILE of open_clip (default ViT-L-14-quickgelu/openai)")
    group.add_argument("--grid-size", default="4x8", choices=("4x8", "8x8", "16x16"), help="vision tokens behind the class token (default: %(default)s)")
    group = parser.add_argument_group("training")
    group.add_argument("--out", metavar="DIR", help="folder of the runs (default: runs)")
    group.add_argument("--epochs", type=positive, help="passes over the pictures")
    group.add_argument("--steps", type=positive, help="updates of the bridge, instead of --epochs")
    group.add_argument("--batch", type=positive, help="pictures for each update")
    group.add_argument("--micro-batch", type=positive, help="pictures computed at once: lower it when memory is short")
    group.add_argument("--lr", type=non_negative, help="highest learning rate")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--restart", action="store_true", help="forget what is in the run's folder")
    group = parser.add_argument_group("captions")
    group.add_argument("--ckpt", metavar="FILE", help="the bridge (default: the run's best.pt)")
    group.add_argument("--num", type=positive, default=1, help="how many captions for each picture, drawn with --temperature and --top-p")
    group.add_argument("--temperature", type=non_negative, default=0.8)
    group.add_argument("--top-p", type=share, default=0.9)
    group.add_argument("--beam", type=positive, default=1, metavar="N", help="keep the N best beginnings (default: %(default)s, greedy)")
    group.add_argument("--length-penalty", type=non_negative, default=1.0, metavar="X", help="a caption of n tokens is worth its log probability / n^X (default: %(default)s)")
    group.add_argument("--grid", metavar="FILE", help="draw the pictures with their captions")
    args = parser.parse_args()
    train_gpt2.join_processes()
    if args.compare:
        compare(open_world(args), args)
    elif args.bench:
        bench(open_world(args), args)
    elif not args.bridge:
        raise UserError("give --bridge linear, cross or qformer, or --compare, or --bench")
    elif args.sample:
        sample(args)
    else:
        world = open_world(args)
        out = Path(args.out or "runs") / f"{world.name}-{args.bridge}"
        evaluate(out if args.eval else train(args.bridge, world, args), world, args)


if __name__ == "__main__":
    fineweb.command_line(main)
