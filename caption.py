"""
Pictures in words: a frozen CLIP and a frozen GPT-2, joined by a small bridge that is trained.

    python caption.py --bridge linear --sample img.jpg     caption pictures; trains what is missing
    python caption.py --bridge {linear,cross,qformer}      train and score a bridge, draw a grid
    python caption.py --bridge linear --eval [--beam 5]    results.json and scores.json
    python caption.py --bridge linear --scst [--sample]    train it further, on CIDEr-D; use that
    python caption.py --bridge linear --export FILE        the bridge alone, to share; --ckpt FILE
    python caption.py --compare                            all three, and a blind one, in one table

Without a GPU and COCO this is the toy setup: drawn pictures of colored shapes, a CLIP of 64 x 64
pixels that is trained here, and the decoder of `python train_gpt2.py`. It has read scenes as a map
of 32 words after <|endoftext|> (fineweb.py, "The toy text"); linear and qformer put vectors in
those places and learn to make them look like the words to the decoder. With --data FOLDER
(COCO 2017, or your own pictures in its layout) the same code joins CLIP ViT-L/14 to GPT-2 124M. A
run lives in runs/<setup>-<bridge>/: ckpt.pt, best.pt, log.csv, curves.png; its evaluation adds
results.json, scores.json, grid.png.

Chapters: 1 the image encoder, 2 the three bridges, 3 the captioner, 4 training a bridge, 5
self-critical training, 6 evaluation and comparison, 7 your own pictures. Appendices: A vision
tokens on disk, B the toy setup and the full one, C the recipe and the folder of a run.

Letters beside the code: B batch, T time (tokens), C width of the decoder, P prefix, S vision
tokens, D their width, N targets of a row, V vocabulary, W beams.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import random
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional as F
from tqdm import tqdm

import coco_eval
import fineweb
import train_gpt2
from fineweb import UserError, number
from train_gpt2 import MLP, KVCache, Recipe, Run, attention, autocast, get_lr, pick_device, rank

# -----------------------------------------------------------------------------
# 1. The image encoder: what CLIP sees, as tokens


class ImageEncoder:
    """The frozen image half of CLIP (Radford et al. 2021), which has learned to match captions.

    It is a vision transformer: each patch of the picture is a token, and one more, the class token,
    comes to describe the whole. We take the tokens after the second-to-last block: in OpenAI's CLIP
    the loss sees only the class token of the last block, so its patches were trained for nothing.
    """

    def __init__(self, visual, preprocess, name):
        self.visual = train_gpt2.freeze(visual, pick_device())
        self.preprocess = preprocess  # Pillow picture to (3, H, W)
        self.name = name
        # PyTorch's attention on (B, T, C) copies its weights for each token: 40 times slower in
        # bf16 on a CPU than on (T, B, C), which open_clip can have too
        blocks = visual.transformer.resblocks
        if all(isinstance(block.attn, nn.MultiheadAttention) for block in blocks):
            for module in (visual.transformer, *(block.attn for block in blocks)):
                module.batch_first = False

    @torch.no_grad()
    def __call__(self, images):
        """Prepared pictures (B, 3, H, W) to class token and patches in reading order, (B, S, D)."""
        device = pick_device()
        second_to_last = len(self.visual.transformer.resblocks) - 2
        options = {"indices": [second_to_last], "stop_early": True, "intermediates_only": True}
        options |= {"output_fmt": "NLC", "output_extra_tokens": True}
        with autocast(device):
            out = self.visual.forward_intermediates(images.to(device), **options)
        class_token = out["image_intermediates_prefix"][0]
        return torch.cat([class_token, out["image_intermediates"][0]], dim=1).float()


def pool_tokens(tokens):
    """Average the square of patches to 4 x 8: (B, 1 + n * n, D) to (B, 1 + 32, D).

    256 patches to 32 make a sequence eight times shorter, and a cache of 8 GB instead of 65.
    """
    B, S, D = tokens.shape
    side = math.isqrt(S - 1)
    square = tokens[:, 1:].transpose(1, 2).view(B, D, side, side)
    pooled = F.adaptive_avg_pool2d(square, (4, 8))  # (B, D, 4, 8)
    return torch.cat([tokens[:, :1], pooled.flatten(2).transpose(1, 2)], dim=1)


# -----------------------------------------------------------------------------
# 2. The three bridges, from vision tokens (B, S, D) to a decoder of width C
#
#              what the decoder gets                            where             trained
#   linear     S vectors, a linear map of each vision token     before the text   the map
#   qformer    32 vectors, gathered by learned queries          before the text   up to 4 layers
#   cross      attention to the vision tokens, per block        inside            map, attention
#   blind      what linear makes of zeros, to compare with      before the text   the map
#
# Each has the same two methods: prefix(vision) gives the vectors before the text, or None;
# before_block(vision) gives a function (i, x) that changes x before block i of the decoder, or
# None. A prefix begins at the scale of the decoder's own token vectors, so that it influences the
# decoder from the first step.


class LinearBridge(nn.Module):
    """A linear map of each vision token, as in LiMBeR (Merullo et al. 2022), and positions.

    ClipCap (Mokady et al. 2021) maps one vector of a picture to a prefix, with an MLP. The other
    two bridges begin with this map too.
    """

    def __init__(self, S, D, decoder):
        super().__init__()
        self.P = S
        C = decoder.config.n_embd
        self.norm = nn.LayerNorm(D)
        self.project = nn.Linear(D, C)
        self.positions = nn.Parameter(torch.zeros(S, C))
        nn.init.normal_(self.project.weight, std=token_scale(decoder) / math.sqrt(D))

    def prefix(self, vision):
        return self.project(self.norm(vision)) + self.positions  # (B, S, C)

    def before_block(self, vision):
        return None


class BlindBridge(LinearBridge):
    """A linear bridge that sees zeros, to compare with: what it reaches needs no picture."""

    def prefix(self, vision):
        return super().prefix(torch.zeros_like(vision))


class QFormerBridge(nn.Module):
    """Learned queries gather what a caption needs (BLIP-2, Li et al. 2023, section 3.1).

    BLIP-2 begins with BERT's weights and a first stage that has losses of its own; here all begins
    at random and learns from the captions alone.
    """

    def __init__(self, S, D, decoder):
        super().__init__()
        C = decoder.config.n_embd
        self.P = 32
        self.linear = LinearBridge(S, D, decoder)
        nn.init.normal_(self.linear.positions, std=token_scale(decoder))
        self.queries = nn.Parameter(0.02 * torch.randn(self.P, C))
        self.ln = nn.LayerNorm(C)
        n_layer = max(1, min(4, decoder.config.n_layer // 3))
        self.layers = nn.ModuleList(QFormerLayer(decoder.config) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(C)
        self.project = nn.Linear(C, C)
        nn.init.normal_(self.project.weight, std=token_scale(decoder) / math.sqrt(C))

    def prefix(self, vision):
        vision = self.ln(self.linear.prefix(vision))  # (B, S, C)
        x = self.queries.expand(len(vision), -1, -1)  # (B, 32, C)
        for layer in self.layers:
            x = layer(x, vision)
        return self.project(self.ln_f(x))  # (B, 32, C)

    def before_block(self, vision):
        return None


class QFormerLayer(nn.Module):
    """Queries attend to each other; an MLP; queries attend to the picture (pre-norm).

    In BLIP-2 the MLP comes last. Placed there, the toy's learned pairs of color and shape by heart:
    it read a red cross, which no training picture has, as a red circle.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_self = nn.LayerNorm(C)
        self.ln_mlp = nn.LayerNorm(C)
        self.ln_cross = nn.LayerNorm(C)
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config)
        self.mlp = MLP(C)

    def forward(self, x, vision):
        normed = self.ln_self(x)
        x = x + self.self_attn(normed, *self.self_attn.keys_values(normed))
        x = x + self.mlp(self.ln_mlp(x))
        return x + self.cross_attn(self.ln_cross(x), *self.cross_attn.keys_values(vision))


class CrossAttentionBridge(nn.Module):
    """Cross-attention before each block (Flamingo, Alayrac et al. 2022, figure 4), without its MLP:

        for i, block in enumerate(decoder.h):
            x = x + cross_attn[i](ln[i](x), ln[i](vision))
            x = block(x)

    At first each adds zeros, so that training begins with the decoder as it is (Flamingo has a gate
    for this, tanh(0)).
    """

    def __init__(self, S, D, decoder):
        super().__init__()
        self.P = 1  # <|endoftext|> stands before the caption
        C = decoder.config.n_embd
        self.linear = LinearBridge(S, D, decoder)
        nn.init.normal_(self.linear.positions, std=token_scale(decoder))
        self.ln = nn.ModuleList(nn.LayerNorm(C) for _ in decoder.h)
        self.cross_attn = nn.ModuleList(Attention(decoder.config) for _ in decoder.h)
        for cross_attn in self.cross_attn:
            nn.init.zeros_(cross_attn.c_proj.weight)
            nn.init.zeros_(cross_attn.c_proj.bias)

    def prefix(self, vision):
        return None

    def before_block(self, vision):
        vision = self.linear.prefix(vision)  # (B, S, C)
        keys_values = []  # once for all tokens
        for ln, cross_attn in zip(self.ln, self.cross_attn, strict=True):
            keys_values.append(cross_attn.keys_values(ln(vision)))

        def look(i, x):
            return x + self.cross_attn[i](self.ln[i](x), *keys_values[i])  # (B, T, C)

        return look


class Attention(train_gpt2.CausalSelfAttention):
    """Attention from x (B, T, C) to another sequence (B, S, C), with the tensors of GPT-2's own."""

    def split_heads(self, x):
        return x.view(x.size(0), x.size(1), self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)

    def keys_values(self, source):
        C = source.size(2)
        y = F.linear(source, self.c_attn.weight[C:], self.c_attn.bias[C:])  # (B, S, 2 C)
        k, v = y.split(C, dim=2)  # each (B, S, C)
        return self.split_heads(k), self.split_heads(v)

    def forward(self, x, k, v):
        C = x.size(2)
        q = F.linear(x, self.c_attn.weight[:C], self.c_attn.bias[:C])  # (B, T, C)
        y = attention(self.split_heads(q), k, v)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


def token_scale(decoder):
    """The standard deviation of the decoder's token vectors."""
    return decoder.wte.weight.float().std().item()


BRIDGES = {
    "linear": LinearBridge,
    "cross": CrossAttentionBridge,
    "qformer": QFormerBridge,
    "blind": BlindBridge,
}


def build(name, S, D, decoder):
    """A Captioner with a new bridge for S vision tokens of width D."""
    room = decoder.config.block_size
    if S + 2 > room:
        raise UserError(f"{S} vision tokens leave no room in a context of {room}: use another --lm")
    return Captioner(BRIDGES[name](S, D, decoder), decoder)


# -----------------------------------------------------------------------------
# 3. The captioner. The layout of a sequence:
#
#     linear, qformer    v1 ... vP                   a    red     circle           P = 33, 32
#     cross                          <|endoftext|>   a    red     circle           P = 1
#     targets                        a               red  circle  <|endoftext|>
#
# All captions of a picture are packed after one prefix (train_gpt2.pack), where each attends to the
# prefix and to itself: one pass over P + 5 * 12 tokens does the work of five over P + 12.


class Captioner(nn.Module):
    """A bridge, and the frozen decoder that it feeds with a prefix or attends into."""

    def __init__(self, bridge, decoder):
        super().__init__()
        self.bridge = bridge
        self.decoder = decoder.eval().requires_grad_(False)
        self.eot = decoder.config.n_vocab - 1  # <|endoftext|> is the last token of both tokenizers
        # tokens of a caption that fit; val2017 has 57 at most, and an endless one would fill memory
        self.room = min(100, decoder.config.block_size - bridge.P)

    def beginning(self, vision):
        """What stands before the caption, (B, P, C), with the decoder's positions."""
        prefix = self.bridge.prefix(vision)
        if prefix is None:
            prefix = self.decoder.wte.weight[self.eot].expand(len(vision), 1, -1)
        return prefix + self.decoder.wpe.weight[: self.bridge.P]

    def pack(self, captions):
        """Packed captions; captions: for each picture token lists, ended by <|endoftext|>."""
        beginning = [self.eot] * self.bridge.P  # placeholders, replaced in loss()
        rows = [(beginning, [ids[: self.room] for ids in group]) for group in captions]
        return train_gpt2.pack(rows)

    def forward(self, vision, packed, weights=None):
        """(None, mean loss), as GPT has it with targets.

        weights (B, K): of each caption's loss, which is then summed and divided by B; chapter 5.
        """
        if weights is None:
            return None, self.loss(vision, packed)
        nats = self.loss(vision, packed, "none")  # (B, N)
        weight = weights.gather(1, packed.owner.clamp(min=0))  # (B, N), of a token's caption
        return None, (nats * weight).sum() / len(weights)

    def loss(self, vision, packed, reduction="mean"):
        """Cross-entropy in nats of captions, given vision tokens (B, S, D); see GPT.loss."""
        x = self.decoder.embed(packed.idx, packed.positions)  # (B, P + T, C)
        x = torch.cat([self.beginning(vision), x[:, self.bridge.P :]], dim=1)
        look = self.bridge.before_block(vision)
        h = self.decoder.hidden_states(x, packed.mask, before_block=look)
        return self.decoder.loss(packed.at_source(h), packed.targets, reduction)

    @torch.no_grad()
    def generate(self, vision, max_new_tokens=30, prompt=None, temperature=0.0, **sampling):
        """Token ids (B, n + new) for vision tokens (B, S, D); greedy without a temperature.

        prompt: (B, n) ids with which the captions begin.
        """
        if prompt is None:
            prompt = torch.empty(len(vision), 0, dtype=torch.long, device=vision.device)
        sampling |= {"prefix": self.beginning(vision), "stop": self.eot, "temperature": temperature}
        sampling["before_block"] = self.bridge.before_block(vision)
        length = min(max_new_tokens, self.room - prompt.size(1))
        return train_gpt2.generate(self.decoder, prompt, length, **sampling)

    def prefill(self, vision, W):
        """(cache, hidden states (B * W, C) of the last position): once a picture, then W rows."""
        cache = [KVCache() for _ in self.decoder.h]
        look = self.bridge.before_block(vision)
        h = self.decoder.hidden_states(self.beginning(vision), cache=cache, before_block=look)
        for layer in cache:
            layer.k = layer.k.repeat_interleave(W, 0)
            layer.v = layer.v.repeat_interleave(W, 0)
        return cache, h[:, -1].repeat_interleave(W, 0)

    @torch.no_grad()
    def beam_search(self, vision, beams, max_new_tokens=30, length_penalty=1.0):
        """Token ids (B, new) of the best caption, keeping W = `beams` beginnings at every step:

            for each step:
                candidates = [(beam + token, sum of log p) for beam in beams for token in tokens]
                beams = the W best of candidates

        A caption of n tokens is worth the sum of its log probabilities / n^length_penalty (Wu et
        al. 2016, section 7, in its simple form): 0 favors short captions, 1 compares means. One
        beam is greedy decoding. test_beam_search_equals_greedy_and_brute_force
        """
        B = len(vision)
        W = beams
        device = vision.device
        first_row = W * torch.arange(B, device=device)[:, None]  # of the cache, for each picture
        tokens = torch.zeros(B, W, 0, dtype=torch.long, device=device)
        done = torch.zeros(B, W, dtype=torch.bool, device=device)
        total = torch.full((B, W), -math.inf, device=device)
        total[:, 0] = 0  # the beams are alike at first: only one may go on
        cache, h = self.prefill(vision, W)
        look = self.bridge.before_block(vision.repeat_interleave(W, 0))
        for step in range(min(max_new_tokens, self.room)):
            log_p = self.decoder.logits(h).float().log_softmax(-1).view(B, W, -1)
            V = log_p.size(2)
            log_p[done] = -math.inf  # a finished beam is followed by <|endoftext|>, for free
            log_p[:, :, self.eot][done] = 0.0
            sums = total[:, :, None] + log_p
            lengths = (tokens != self.eot).sum(2) + 1  # with the next token, or the end
            worth = sums / lengths[:, :, None] ** length_penalty
            best = worth.view(B, -1).topk(W).indices  # (B, W), the best first
            parent = best // V
            token = best % V
            total = sums.view(B, -1).gather(1, best)
            tokens = tokens.gather(1, parent[:, :, None].expand_as(tokens))
            tokens = torch.cat([tokens, token[:, :, None]], dim=2)
            done = done.gather(1, parent) | (token == self.eot)
            if done.all():
                break
            rows = (first_row + parent).view(-1)  # a beam takes over the cache of its parent
            for layer in cache:
                layer.k = layer.k[rows]
                layer.v = layer.v[rows]
            position = torch.full((1,), self.bridge.P + step, device=device)
            x = self.decoder.embed(token.view(-1, 1), position)
            h = self.decoder.hidden_states(x, cache=cache, before_block=look)[:, -1]
        return tokens[:, 0]


# -----------------------------------------------------------------------------
# 4. Training a bridge


@dataclass
class PictureSet:
    """Pictures, their vision tokens, and the token ids of their captions."""

    pictures: list  # as coco_eval.read_dataset() gives them
    captions: list  # for each picture a list of token lists, ended by <|endoftext|>
    features: np.ndarray  # (all pictures, S, D), float16, on disk
    rows: np.ndarray  # for each picture its row of the features

    def __len__(self):
        return len(self.pictures)

    def vision(self, chosen=slice(None)):
        """Vision tokens (B, S, D) of the chosen pictures, by default of all."""
        return torch.from_numpy(self.features[self.rows[chosen]].astype(np.float32))

    def shuffled(self):
        """Each picture with the vision tokens of the one before it."""
        return replace(self, rows=np.roll(self.rows, 1))


def get_micro_batches(train_set, captioner, recipe, seed, step):
    """This rank's micro-batches of a step: [(vision, packed captions, share of the targets)]."""
    chosen = train_gpt2.step_indices(seed, step, recipe.batch_size, len(train_set))

    def targets(pictures):  # the tokens of all their captions, as pack() cuts them
        captions = itertools.chain(*(train_set.captions[i] for i in pictures))
        return sum(min(len(ids), captioner.room) for ids in captions)

    mine = np.array_split(chosen, train_gpt2.world_size())[rank()]
    batches = []
    for part in np.array_split(mine, math.ceil(len(mine) / recipe.micro_batch)):
        packed = captioner.pack([train_set.captions[i] for i in part])
        vision, packed = train_gpt2.pin(train_set.vision(part), packed)
        batches.append((vision, packed, targets(part) / targets(chosen)))
    return batches


def train(name, setup, args):
    """Train a bridge, or go on with its run, until the last step; returns the run's folder."""
    device = pick_device()
    train_set = load_pictures(setup, "train")
    val_set = load_pictures(setup, "val")
    torch.manual_seed(args.seed)
    captioner = build(name, *train_set.features.shape[1:], setup.decoder).to(device)
    if args.scst:  # continues from the bridge that was trained with cross-entropy
        captioner = load_captioner(trained_bridge(run_folder(name, args)), setup, args)
    recipe = choose_recipe(name, setup, len(train_set), args)
    optimizer = train_gpt2.configure_optimizer(captioner.bridge, recipe)
    identity = run_identity(name, captioner, setup, train_set, recipe, args)
    out = run_folder(name, args, args.scst)
    run = Run(out, identity, recipe, "pictures", args.restart)
    run.resume(captioner.bridge, optimizer)
    if run.step >= recipe.max_steps:
        return out
    parameters = sum(p.numel() for p in captioner.bridge.parameters())
    print(f"bridge     {out}: {parameters:,} trainable parameters", flush=True)
    parallel = train_gpt2.parallelize(captioner, compile=False)
    if args.scst:
        batches = sampled_batches(train_set, captioner, setup.tokenizer, recipe, run.step, args)
    else:
        get_batches = functools.partial(get_micro_batches, train_set, captioner, recipe, args.seed)
        batches = train_gpt2.prefetch(get_batches, run.step, recipe.max_steps)
    with run:
        if args.scst and run.step == 0:
            run.log(validate(captioner, val_set, run, setup.tokenizer))
        for step, micro_batches in batches:
            lr = get_lr(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss, norm = train_gpt2.train_step(parallel, optimizer, micro_batches, recipe, device)
            run.count_step(loss, norm)
            stop = run.stop_requested() and run.step < recipe.max_steps
            is_eval_step = run.step % recipe.eval_every == 0 or run.step == recipe.max_steps
            row = {}
            if run.step % recipe.log_every == 0 or run.step == 1 or is_eval_step or stop:
                row = run.progress(loss, lr, norm, recipe.batch_size)
            if is_eval_step and not stop:
                row |= validate(captioner, val_set, run, setup.tokenizer if args.scst else None)
            run.log(row)
            if is_eval_step or stop:
                run.save(captioner.bridge, optimizer)
            if stop:
                run.exit()
    return out


def validate(captioner, val_set, run, tokenizer=None):
    """Print the validation loss and return it for the log; the best bridge so far is in best.pt.

    tokenizer: given in self-critical training, where the best is that with the highest CIDEr-D.
    """
    token, caption = caption_loss(captioner, val_set, pick_device())
    print(f"           val {token:.4f} nats per token, {caption:.3f} per caption", flush=True)
    row = {"val_val": token}
    score = token  # the lower the better
    if tokenizer:
        scores, _ = score_captions(captioner, val_set, tokenizer)
        row["cider"] = scores["corpus"]["CIDEr"]
        print(f"           CIDEr-D of greedy captions {row['cider']:.4f}", flush=True)
        score = -row["cider"]
    if score < run.best and rank() == 0:
        run.best = score
        content = {"run": run.identity, "model": captioner.bridge.state_dict()}
        train_gpt2.save_checkpoint(run.out / "best.pt", content, keep=False)
    return row


# -----------------------------------------------------------------------------
# 5. Self-critical training: captions that are trained on their score

SAMPLES = 5  # K captions of each picture
ANCHOR = 0.5  # weight of the references' cross-entropy; rewards lie between 0 and 10
END = "<end>"  # a word of the reward


def sampled_batches(train_set, captioner, tokenizer, recipe, first_step, args):
    """Yield (step, [(vision, packed captions, their weights, share of the step's pictures)]).

    Cross-entropy teaches each word after the words that people wrote. What is scored are whole
    captions of the model's own; their score has no gradient, but their probability has one
    (REINFORCE), so sampled captions that score well are made more probable (Rennie et al. 2017):

        samples = [sample(picture) for k in range(K)]                    # at temperature 1
        rewards = [cider(sample) for sample in samples]
        for k in range(K):
            baseline = mean of the other rewards                         # Luo 2020
            loss -= (rewards[k] - baseline) * log_p(samples[k]) / K
            loss -= ANCHOR * log_p(references[k]) / K

    The baseline does not depend on the sample, so on average it changes nothing; it takes away most
    of the noise: a caption that is as good as the others is left alone. The end counts as a word,
    or captions would end in "on a". The references' cross-entropy stays in the loss: without it the
    bridge forgets what the best-scored kind of caption does not say. The printed loss is no measure
    of quality; only its gradient means something.
    test_self_critical_gradient_equals_the_exact_one
    """
    device = pick_device()
    references = []
    for picture in train_set.pictures:
        references.append([[*coco_eval.tokenize(text), END] for text in picture["captions"]])
    cider = coco_eval.CIDEr(references)
    for step in range(first_step, recipe.max_steps):
        seed = (args.seed * 10**6 + step) * 1000 + rank()
        generator = torch.Generator(device).manual_seed(seed)
        chosen = train_gpt2.step_indices(args.seed, step, recipe.batch_size, len(train_set))
        mine = np.array_split(chosen, train_gpt2.world_size())[rank()]
        batches = []
        for part in np.array_split(mine, math.ceil(len(mine) / recipe.micro_batch)):
            vision = train_set.vision(part).to(device)
            drawn = draw_samples(captioner, vision, generator)
            rewards = []
            groups = []
            for picture, samples in zip(part, drawn, strict=True):
                for ids in samples:
                    words = coco_eval.tokenize(train_gpt2.decode([ids], tokenizer)[0])
                    words += [END] * ids.count(captioner.eot)
                    rewards.append(cider.score(references[picture], words))
                groups.append(samples + train_set.captions[picture][:SAMPLES])
            rewards = torch.tensor(rewards).view(-1, SAMPLES)  # (B, K)
            baselines = (rewards.sum(1, keepdim=True) - rewards) / (SAMPLES - 1)
            advantages = rewards - baselines
            weights = torch.cat([advantages, torch.full_like(advantages, ANCHOR)], dim=1) / SAMPLES
            batches.append((vision, captioner.pack(groups), weights, len(part) / len(chosen)))
        yield step, batches


def draw_samples(captioner, vision, generator):
    """For each picture K sampled captions: lists of token ids, up to <|endoftext|>."""
    repeated = vision.repeat_interleave(SAMPLES, 0)  # (B * K, S, D)
    with autocast(vision.device):
        rows = captioner.generate(repeated, temperature=1.0, generator=generator).tolist()
    eot = captioner.eot
    rows = [row[: row.index(eot) + 1] if eot in row else row for row in rows]
    return [rows[i : i + SAMPLES] for i in range(0, len(rows), SAMPLES)]


# -----------------------------------------------------------------------------
# 6. Evaluation and comparison


@torch.no_grad()
def caption_loss(captioner, pictures, device, batch=50):
    """(nats per token, nats per caption) over a PictureSet."""
    nats = 0.0
    tokens = 0
    for i in range(0, len(pictures), batch):
        part = range(i, min(i + batch, len(pictures)))
        packed = captioner.pack([pictures.captions[j] for j in part])
        with autocast(device):
            vision = pictures.vision(part).to(device)
            nats += captioner.loss(vision, packed.to(device), "sum").item()
        tokens += (packed.targets >= 0).sum().item()
    return nats / tokens, nats / sum(map(len, pictures.captions))


def write_captions(captioner, vision, tokenizer, prompts=None, beams=1, **options):
    """A caption for each picture of vision (B, S, D); options as of generate(), of one beam."""
    device = pick_device()
    rows = []
    batch = max(1, 250 // beams)
    for i in range(0, len(vision), batch):
        part = vision[i : i + batch].to(device)
        prompt = None if prompts is None else prompts[i : i + batch].to(device)
        with autocast(device):
            if beams > 1:
                ids = captioner.beam_search(part, beams)
            else:
                ids = captioner.generate(part, prompt=prompt, **options)
        rows += ids.tolist()
    return [text.strip() for text in train_gpt2.decode(rows, tokenizer)]


def ask_facts(pictures, tokenizer, answer):
    """{fact: how often it is right} when answer() completes beginnings (B, n) that ask for it."""
    rng = random.Random(0)
    asked = [coco_eval.questions(picture["scene"], rng) for picture in pictures]
    shares = {}
    for fact in coco_eval.FACTS:
        prompts = [tokenizer.encode_ordinary(question[fact]) for question in asked]
        texts = answer(torch.tensor(prompts))
        pairs = zip(texts, pictures, strict=True)
        correct = [coco_eval.facts(text, p["scene"])[fact] is True for text, p in pairs]
        shares[fact] = sum(correct) / len(correct)
    return shares


def map_facts(setup, pictures):
    """ask_facts() of the decoder that reads the scene as a map in words, to compare with."""
    tokenizer = setup.tokenizer
    maps = [fineweb.scene_map(picture["scene"]) + "\n" for picture in pictures]
    maps = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(t)] for t in maps])
    newline = tokenizer.encode_ordinary("\n")[0]

    def answer(prompts):
        idx = torch.cat([maps, prompts], dim=1).to(pick_device())
        with autocast(pick_device()):
            out = train_gpt2.generate(setup.decoder, idx, 8, temperature=0, stop=newline)
        texts = [tokenizer.decode(row[maps.size(1) :]) for row in out.tolist()]
        return [text.split("\n")[0] for text in texts]

    return ask_facts(pictures, tokenizer, answer)


def score_captions(captioner, pictures, tokenizer, beams=1):
    """(what coco_eval.evaluate() gives, the captions) of a PictureSet."""
    texts = write_captions(captioner, pictures.vision(), tokenizer, beams=beams)
    references = {picture["id"]: picture["captions"] for picture in pictures.pictures}
    return coco_eval.evaluate(references, dict(zip(references, texts, strict=True))), texts


def evaluate(out, setup, args, beam=None):
    """Score the best bridge of a run on the validation pictures: print, write files, return a dict.

    The files are results.json, scores.json, grid.png (of beam search: results_beam.json ...).
    "shuffled": each caption with the tokens of another picture; what is right then was guessed.
    """
    device = pick_device()
    tokenizer = setup.tokenizer
    captioner = load_captioner(Path(out) / "best.pt", setup, args)
    val_set = load_pictures(setup, "val")
    decoding = f"beam {beam}" if beam else "greedy"
    scores, texts = score_captions(captioner, val_set, tokenizer, beam or 1)
    row = {"parameters": sum(p.numel() for p in captioner.bridge.parameters())}
    row |= {"pictures": len(val_set), "decoding": decoding} | scores["corpus"]
    row["nats per caption"] = caption_loss(captioner, val_set, device)[1]
    row["shuffled"] = caption_loss(captioner, val_set.shuffled(), device)[1]
    lines = []
    if val_set.pictures[0]["scene"]:  # the toy pictures, whose scenes are known
        unseen = load_pictures(setup, "unseen")
        pairs = zip(texts, val_set.pictures, strict=True)
        wrong = [False in coco_eval.facts(text, p["scene"]).values() for text, p in pairs]
        row["captions true"] = 1 - sum(wrong) / len(wrong)
        groups = {"": val_set, ", unseen pairs": unseen, ", shuffled": val_set.shuffled()}
        for kind, group in groups.items():
            parts = (captioner, group.vision(), tokenizer)
            answer = functools.partial(write_captions, *parts, max_new_tokens=8)
            for fact, share in ask_facts(group.pictures, tokenizer, answer).items():
                row[fact + kind] = share
            facts = [f"{fact} {row[fact + kind]:.2f}" for fact in coco_eval.FACTS]
            lines.append(f"{'facts' + kind:22} {'  '.join(facts)}")
        lines.append(f"captions without a false statement: {row['captions true']:.2f}")
    if rank() == 0:
        write_scores(Path(out), val_set.pictures, texts, row | scores, "_beam" if beam else "")
    losses = f"{row['nats per caption']:.2f} nats per caption, shuffled {row['shuffled']:.2f}"
    print(f"{len(val_set)} validation pictures of {setup.data}, {decoding}: {losses}")
    print("\n".join([coco_eval.table(scores, len(val_set)), *lines]))
    if coco_eval.find_layout(setup.data, "val")[2]:
        print("a tenth of the pictures was held out: not comparable with results on val2017")
    print(f"{out} has best.pt, results, scores, curves.png and grid.png")
    return row


def write_scores(out, pictures, texts, scores, suffix):
    """results.json in COCO's format, scores.json and grid.png; the suffix is for beam search."""
    results = [{"image_id": p["id"], "caption": t} for p, t in zip(pictures, texts, strict=True)]
    for name, content in (("results", results), ("scores", scores)):
        with fineweb.atomic_write(out / f"{name}{suffix}.json", "w") as file:
            json.dump(content, file)
    chosen = range(0, len(pictures), max(len(pictures) // 9, 1))[:9]
    draw_grid(out / f"grid{suffix}.png", {pictures[i]["path"]: texts[i] for i in chosen})


def draw_grid(path, captions, size=256):
    """{path of a picture: its caption} as one PNG: captions below pictures, three in a row."""
    font = ImageFont.load_default(17)
    gap = 24
    below = 96  # for the caption
    height = math.ceil(len(captions) / 3) * (size + below) + gap
    sheet = Image.new("RGB", (3 * (size + gap) + gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(captions.items()):
        x = gap + i % 3 * (size + gap)
        y = gap + i // 3 * (size + below)
        image = coco_eval.load_image(picture)
        sheet.paste(ImageOps.pad(image, (size, size), color="white"), (x, y))
        lines = textwrap.wrap(caption, 31)[:4]
        draw.multiline_text((x, y + size + 6), "\n".join(lines), "#111827", font)
    with fineweb.atomic_write(path) as file:
        sheet.save(file, "PNG")


def compare(args):
    """Train and score all bridges under one budget, with one seed or more: a table and a chart."""
    path = run_folder("compare", args) / "table.md"
    results = []
    for seed in range(args.seed, args.seed + (args.seeds or 1)):
        args.seed = seed  # in the toy setup that of the decoder and of CLIP too
        results.append(compare_bridges(open_setup(args), args))
    table = "\n".join(comparison(results))
    if rank() == 0:
        with fineweb.atomic_write(path, "w") as file:
            file.write(table + "\n")
    print(f"\n{table}\n\n{path.parent} has table.md and curves.png")


def compare_bridges(setup, args):
    """{bridge: its numbers} for one seed, also of the map in words."""
    columns = {}
    curves = {}
    steps = set()
    val_set = load_pictures(setup, "val")
    for name in BRIDGES:
        out = train(name, setup, args)
        log = train_gpt2.read_log(out / "log.csv")
        curves[name] = train_gpt2.curve(log, "val_val")
        steps.add(log[-1]["step"])
        columns[name] = evaluate(out, setup, args) | {"seconds": log[-1]["seconds"]}
    if len(steps) > 1:
        raise UserError("the runs have different budgets: give --restart, or another --out")
    if setup.tokenizer.name == "tiny" and val_set.pictures[0]["scene"]:
        columns["map in words"] = map_facts(setup, val_set.pictures)
    if rank() == 0:
        path = run_folder("compare", args) / "curves.png"
        train_gpt2.draw_curves(path, {"validation loss, nats per token": curves})
    return columns


def comparison(results):
    """The lines of --compare's table; several results (seeds) give a mean and the extremes."""
    names = list(results[0])
    yield f"| | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    losses = dict.fromkeys(("nats per caption", "shuffled", "CIDEr", "METEOR"), ".3f")
    facts = [*coco_eval.FACTS, "captions true", "objects, unseen pairs", "objects, shuffled"]
    rows = {"parameters": ",.0f"} | losses | dict.fromkeys(facts, ".2f") | {"seconds": ".0f"}
    for key, form in rows.items():
        cells = []
        for name in names:
            values = [result[name][key] for result in results if key in result[name]]
            cells.append(format(np.mean(values), form) if values else "")
            if len({format(value, form) for value in values}) > 1:
                cells[-1] += f" ({min(values):{form}}-{max(values):{form}})"
        if any(cells):
            yield f"| {key} | {' | '.join(cells)} |"


# -----------------------------------------------------------------------------
# 7. Your own pictures

KINDS = ".jpg .jpeg .jfif .png .gif .webp .avif .bmp .tif .tiff".split()


def find_pictures(names):
    """The paths of files, of the pictures in folders, and of addresses, which are downloaded."""
    paths = []
    for name in names:
        if name.startswith(("https://", "http://")):
            file = hashlib.sha256(name.encode()).hexdigest()[:8] + Path(name.split("?")[0]).suffix
            name = fineweb.download(name, Path("data/pictures") / file)
        name = Path(name)
        inside = [name]
        if name.is_dir():
            inside = sorted(path for path in name.iterdir() if path.suffix.lower() in KINDS)
        if not inside:
            raise UserError(f"{name} has no pictures ({' '.join(KINDS)}): name another folder")
        if not inside[0].exists():
            raise UserError(f"{name} is not there: check the path")
        paths += inside
    return paths


def sample(args):
    """Caption your own pictures with the best bridge of a run, training first what is missing."""
    sampling_seed = args.seed
    args.seed = 0  # of what is trained
    paths = find_pictures(args.sample)
    if len(paths) == 1:
        coco_eval.load_image(paths[0])  # fails here, before anything is trained
    setup = open_setup(args)
    bridge = args.ckpt
    if not bridge:
        out = run_folder(args.bridge, args, args.scst)
        bridge = out / "best.pt"
        if args.restart or not list(out.glob("scores*.json")):
            print(f"missing    the bridge: training {args.bridge}", flush=True)
            evaluate(train(args.bridge, setup, args), setup, args)
    captioner = load_captioner(bridge, setup, args)
    options = {"beams": args.beam or 1}
    if args.num or args.temperature is not None or args.top_p:
        temperature = 0.8 if args.temperature is None else args.temperature
        generator = torch.Generator(pick_device()).manual_seed(sampling_seed)
        options = {"temperature": temperature, "top_p": args.top_p or 0.9, "generator": generator}
    captions = {}
    for path in paths:
        try:
            image = coco_eval.load_image(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        tokens = setup.encoder(setup.encoder.preprocess(image)[None])  # (1, 1 + n * n, D)
        vision = pool_tokens(tokens).expand(args.num or 1, -1, -1)  # (captions, S, D)
        texts = write_captions(captioner, vision, setup.tokenizer, **options)
        for text in texts:
            print(f"{path}: {text}", flush=True)
        captions[path] = texts[0]
    if not captions:
        raise UserError("none of these pictures can be read: name others")
    if args.grid:
        draw_grid(args.grid, captions)
        print(f"{args.grid} has the pictures with their captions")


def load_captioner(path, setup, args):
    """The Captioner of a bridge's file; UserError if its decoder or CLIP was another."""
    run, tensors = read_bridge(path)
    here = {"lm": setup.decoder_name, "clip": setup.encoder.name}
    here["bridge"] = args.bridge or run["bridge"]
    for flag, value in here.items():
        if str(run.get(flag)).split()[-1] != value.split()[-1]:  # of "name fingerprint" the latter
            reason = f"{path} was trained with --{flag} {run.get(flag)}, not {value}"
            raise UserError(f"{reason}: name that one, or train anew")
    captioner = build(run["bridge"], run["S"], run["D"], setup.decoder)
    with fineweb.reading(path, "a bridge of this version", RuntimeError, what_to_do="train anew"):
        captioner.bridge.load_state_dict(tensors)
    return captioner.eval().to(pick_device())


def read_bridge(path):
    """(what a bridge needs: decoder, CLIP ..., its tensors), from a checkpoint or an export."""
    if Path(path).suffix != ".safetensors":
        checkpoint = train_gpt2.read_checkpoint(path)
        if "bridge" not in checkpoint["run"]:
            raise UserError(f"{path} is not a bridge: name the best.pt of a run of caption.py")
        return checkpoint["run"], checkpoint["model"]
    with fineweb.reading(path, "a bridge that --export wrote", SafetensorError, FileNotFoundError):
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["run"]), {k: file.get_tensor(k) for k in file.keys()}


def export(args):
    """Write a trained bridge alone as a safetensors file, with what it needs in its metadata."""
    run, tensors = read_bridge(trained_bridge(run_folder(args.bridge, args, args.scst)))
    path = Path(args.export.removesuffix(".safetensors") + ".safetensors")
    with fineweb.atomic_write(path) as file:
        file.write(save(tensors, metadata={"run": json.dumps(run)}))
    print(f"{path} has the bridge: python caption.py --ckpt {path} --sample img.jpg")


# -----------------------------------------------------------------------------
# Appendix A: vision tokens on disk. CLIP never changes, so each picture goes through it once

CLIP_BATCH = 64


def load_pictures(setup, split):
    """The PictureSet of a split, without the pictures that cannot be read."""
    pictures = coco_eval.read_dataset(setup.data, split)
    with train_gpt2.rank_zero_first():
        features = cached_features(setup.encoder, pictures, setup.data.name)
    rows = np.flatnonzero(~np.isnan(features[:, 0, 0]))
    if not len(rows):
        raise UserError(f"no picture of {setup.data} ({split}) can be read: check the folder")
    pictures = [pictures[i] for i in rows]
    captions = []
    for picture in pictures:
        group = []
        for text in picture["captions"]:  # the scorer ignores case and the full stop, too
            text = " ".join(text.split()).lower().removesuffix(".").rstrip()
            group.append([*setup.tokenizer.encode_ordinary(text), setup.tokenizer.eot_token])
        captions.append(group)
    return PictureSet(pictures, captions, features, rows)


def cached_features(encoder, pictures, name):
    """Vision tokens of pictures [{"id", "path"}, ...]: a memory map (pictures, S, D), float16.

    The file is named after a digest of CLIP and the pictures (path, size, time of change). An
    interrupted pass resumes with its last whole batch. A picture that cannot be read is NaN.
    """
    digest = hashlib.sha256(f"{encoder.name} 4x8".encode())
    for picture in pictures:
        path = Path(picture["path"]).absolute()
        change = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None
        digest.update(f"{picture['id']} {path} {change}\n".encode("utf-8", "surrogateescape"))
    path = Path("data/features") / f"{name}-{digest.hexdigest()[:16]}.bin"
    shape = (len(pictures), 33, encoder.visual.transformer.width)
    batch_bytes = 2 * CLIP_BATCH * shape[1] * shape[2]

    def get_batch(i):
        batch = pictures[i * CLIP_BATCH : (i + 1) * CLIP_BATCH]
        return torch.stack([prepared(encoder, picture) for picture in batch])

    if not path.exists():
        part = path.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        with fineweb.lock(part), open(part, "ab") as file:
            done = file.tell() // batch_bytes
            file.truncate(done * batch_bytes)
            batches = math.ceil(len(pictures) / CLIP_BATCH)
            loader = train_gpt2.prefetch(get_batch, done, batches, min(os.cpu_count(), 16))
            options = {"initial": done, "total": batches, "unit_scale": CLIP_BATCH}
            options |= {"desc": "vision tokens", "unit": " pictures", "disable": None}
            for _, batch in tqdm(loader, **options):
                tokens = pool_tokens(encoder(batch)).cpu().numpy().astype(np.float16)
                file.write(tokens.tobytes())
        os.replace(part, path)
    return np.memmap(path, np.float16, "r", shape=shape)


def prepared(encoder, picture):
    """A picture as CLIP wants it, (3, H, W); NaN, and a line that says why, if it is broken."""
    try:
        return encoder.preprocess(coco_eval.load_image(picture["path"]))
    except UserError as error:
        tqdm.write(f"left out: {error}")
        return torch.full_like(encoder.preprocess(Image.new("RGB", (8, 8))), math.nan)


# -----------------------------------------------------------------------------
# Appendix B: the toy setup and the full one

VISION = {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32}
VISION["pool_type"] = "avg"
TEXT = {"context_length": 32, "vocab_size": 431, "width": 64, "heads": 2, "layers": 2}
TOY_CLIP = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}


@dataclass
class Setup:
    """The frozen parts, and where the pictures are."""

    toy: bool
    data: Path
    encoder: ImageEncoder
    decoder: train_gpt2.GPT
    tokenizer: object
    decoder_name: str


def open_setup(args):
    """The toy setup, made if it is missing, or the full one."""
    toy = is_toy(args)
    if toy:
        data = Path("data/shapes")
        clip = args.clip or f"runs/toy-clip{seed_suffix(args)}/ckpt.pt"
        tiny = f"runs/tiny{seed_suffix(args)}"
        lm = args.lm or f"{tiny}/ckpt.pt"
        print("setup      toy: its bridges know colored shapes only. For photographs on a laptop:")
        print("           python coco_eval.py --download --val-only   (1.1 + 2.3 GB, up to 4 h)")
        print(f"           python caption.py --data data/coco --bridge {args.bridge or 'linear'}")
        if not args.lm and not Path(tiny, "samples.txt").exists():  # a run writes it at its end
            flags = ["--preset", "tiny", "--seed", str(args.seed), "--out", tiny]
            print("missing    the decoder: python train_gpt2.py", *flags, flush=True)
            train_gpt2.main(flags)  # on all ranks
        with train_gpt2.rank_zero_first():
            if not (data / "unseen").exists():
                print(f"missing    the pictures: drawing them in {data}", flush=True)
                coco_eval.make_shapes(data)
            if not args.clip and not Path(clip).exists():
                print("missing    the image encoder: a tiny CLIP on these pictures", flush=True)
                train_clip(data, clip, args.seed)
    else:
        data = Path(args.data or "data/coco")
        clip = args.clip or "ViT-L-14-quickgelu/openai"
        own = Path("runs/gpt2/samples.txt").exists()
        lm = args.lm or ("runs/gpt2/ckpt.pt" if own else "gpt2")
        print(f"setup      decoder {lm}, CLIP {clip}, pictures {data}", flush=True)
    with train_gpt2.rank_zero_first():
        decoder, tokenizer, checkpoint = train_gpt2.load_model(lm)
        preset = checkpoint.get("run", {}).get("preset", Path(lm).name)
        decoder_name = f"{preset} {fingerprint(decoder)}"
        encoder = load_clip(clip)
    train_gpt2.freeze(decoder, pick_device())
    return Setup(toy, data, encoder, decoder, tokenizer, decoder_name)


def is_toy(args):
    """Whether this is the toy setup: no --data, and no GPU with COCO; or that of --ckpt."""
    if args.ckpt:
        return read_bridge(args.ckpt)[0]["toy"]
    return not args.data and not (pick_device().type == "cuda" and Path("data/coco").exists())


def fingerprint(module):
    """A short digest of a module's weights, from the first numbers of each tensor."""
    digest = hashlib.sha256()
    for name, t in module.state_dict().items():
        sample = t.flatten()[:16].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(t.shape)}".encode() + sample)
    return digest.hexdigest()[:16]


def load_clip(which):
    """The ImageEncoder of our own checkpoint, or of open_clip: NAME/TAG or NAME/FILE."""
    import open_clip  # here, because it takes five seconds

    if Path(which).suffix == ".pt" and Path(which).exists():
        checkpoint = train_gpt2.read_checkpoint(which, holds="clip")
        model = open_clip.CLIP(**checkpoint["clip"])
        model.load_state_dict(checkpoint["model"])
        preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
        return ImageEncoder(model.visual, preprocess, f"toy {fingerprint(model.visual)}")
    name, _, tag = str(which).partition("/")
    tag = tag or "openai"  # without a tag open_clip takes random weights
    options = {"pretrained": tag, "force_quick_gelu": tag == "openai"}  # OpenAI's activation
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
        identity = f"{name}/{Path(tag).name} {fingerprint(model.visual)}"
        return ImageEncoder(model.visual, preprocess, identity)
    except Exception as error:  # the hub's client and torch.load raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:90]
        what_to_do = "name a vision transformer's NAME/TAG, ViT-L-14-quickgelu/openai, or NAME/FILE"
        raise UserError(f"--clip {which} cannot be loaded ({reason}): {what_to_do}") from None


def train_clip(data, path, seed=0):
    """Train the toy CLIP on pictures and the captions that name all objects.

    Contrastive loss (Radford et al. 2021, figure 3): in a batch each picture must find its own
    caption among all captions, and each caption its picture. Colors alone would nearly do for that,
    and shapes would hardly be learned, so there are hard negatives: groups of 8 pictures with the
    same colors. In every second step pictures are gray and captions without colors, so that shapes
    are learned apart from their colors.
    """
    import open_clip

    torch.manual_seed(seed)
    device = pick_device()
    pictures = coco_eval.read_dataset(data, "train")
    model = open_clip.CLIP(**TOY_CLIP).to(device)
    preprocess = open_clip.image_transform(64, is_train=False)
    images = torch.stack([preprocess(coco_eval.load_image(p["path"])) for p in pictures])
    captions = [picture["captions"][-1].replace(",", "").split() for picture in pictures]
    colors = [" ".join(sorted(set(words) & set(fineweb.COLORS))) for words in captions]
    texts = clip_texts(captions)
    gray_texts = clip_texts([[w for w in words if w not in fineweb.COLORS] for words in captions])
    recipe = Recipe(500, 64, 64, 1.5e-3, 50, muon=13, weight_decay=0.05)
    optimizer = train_gpt2.configure_optimizer(model, recipe)
    contrastive_loss = open_clip.ClipLoss()
    for step in tqdm(range(recipe.max_steps), desc="toy CLIP", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, recipe) * group["lr_scale"]
        chosen = similar_pictures(colors, seed, step, recipe.batch_size)
        x = images[chosen]  # (B, 3, H, W)
        y = texts[chosen]
        if step % 2:
            weights = torch.rand(len(x), 3, 1, 1)  # of red, green and blue
            x = (x * weights / weights.sum(1, keepdim=True)).sum(1, keepdim=True).expand_as(x)
            y = gray_texts[chosen]
        with autocast(device):
            loss = contrastive_loss(*model(x.to(device), y.to(device)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
    train_gpt2.save_checkpoint(path, {"clip": TOY_CLIP, "model": model.state_dict()})


def similar_pictures(colors, seed, step, batch_size, group=8):
    """The pictures of a step: groups that have the same colors, in an order of each epoch's own."""
    steps = max(len(colors) // batch_size, 1)  # of an epoch
    rng = np.random.default_rng([seed, step // steps])
    order = rng.permutation(len(colors))
    order = order[np.argsort(np.array(colors)[order], kind="stable")]
    groups = order[: len(order) // group * group].reshape(-1, group)
    order = rng.permutation(groups).ravel()
    return order[step % steps * batch_size :][:batch_size]


def clip_texts(captions):
    """Token ids (B, 32) for CLIP, which reads a text at its largest id: <|endoftext|>."""
    tokenizer = fineweb.get_tokenizer("tiny")
    rows = []
    for words in captions:  # 21 at most, after " .", a token that no caption has
        tokens = [tokenizer.eot_token - 1, *tokenizer.encode_ordinary(" ".join(words))]
        rows.append([*tokens, tokenizer.eot_token] + [0] * (31 - len(tokens)))
    return torch.tensor(rows)


# -----------------------------------------------------------------------------
# Appendix C: the recipe and the folder of a run

# the highest learning rate, and Muon's as a multiple of it (0: AdamW alone)
TOY_RATES = {"linear": (2.8e-2, 1.4), "cross": (1e-2, 2), "qformer": (7e-3, 2)}
FULL_RATES = {"linear": (2e-3, 0), "cross": (4e-4, 0), "qformer": (4e-4, 0)}


def choose_recipe(name, setup, pictures, args):
    """All bridges share one budget; only the learning rates are each one's own."""
    rates = TOY_RATES if setup.toy else FULL_RATES
    lr, muon = rates["linear" if name == "blind" else name]
    batch = args.batch_size or (32 if setup.toy else 64)
    steps = 500 if setup.toy else math.ceil(4 * pictures / batch)
    decay = 0.1
    if args.scst:  # a step samples captions, which takes longer, and only corrects
        steps = math.ceil(0.6 * steps)
        lr /= 10
        decay = 0.0
    steps = args.max_steps or steps
    warmup = max(1, round(0.03 * steps))
    options = {"cooldown": 0.6, "weight_decay": decay, "eval_every": max(1, steps // 10)}
    recipe = Recipe(steps, batch, batch, lr, warmup, muon=muon, **options)
    return train_gpt2.with_flags(recipe, args)


def trained_bridge(folder):
    """The best bridge of a run that has come to its end, of which its scores are the mark."""
    if not list(folder.glob("scores*.json")):
        raise UserError(f"{folder} has no trained bridge: train it to its end first")
    return folder / "best.pt"


def run_identity(name, captioner, setup, train_set, recipe, args):
    """What has to stay the same when a run is continued, and what its bridge needs to be used."""
    S, D = train_set.features.shape[1:]
    captions = hashlib.sha256(json.dumps(train_set.captions).encode()).hexdigest()[:16]
    identity = {"toy": setup.toy, "bridge": name, "S": S, "D": D, "captions": captions}
    identity |= {"lm": setup.decoder_name, "clip": setup.encoder.name}
    if args.scst:  # samples depend on what is computed together
        parts = [recipe.micro_batch, train_gpt2.world_size()]
        identity |= {"base": fingerprint(captioner.bridge), "parts": parts}
    return identity | {"seed": args.seed, "batch_size": recipe.batch_size}


def run_folder(name, args, scst=False):
    """--out, or runs/<setup>-<bridge>[-<seed>], and -scst; --compare has a folder for each."""
    folder = name + seed_suffix(args)
    setup = "toy" if is_toy(args) else Path(args.data or "data/coco").resolve().name
    out = Path(args.out or f"runs/{setup}-{folder}")
    if args.compare and args.out:
        out = out / folder
    return out.with_name(f"{out.name}-scst") if scst else out


def seed_suffix(args):
    """What stands after the names of runs with another seed than 0."""
    return f"-{args.seed}" if args.seed else ""


# -----------------------------------------------------------------------------
# Command line


def flags():
    """The parser of the command line."""
    parser = fineweb.ArgumentParser(__doc__)
    positive = number(int, 1)
    group = parser.add_argument_group("what to do (default: train --bridge and score it)")
    group.add_argument("--bridge", choices=BRIDGES, help="how the picture gets into the decoder")
    group.add_argument("--scst", action="store_true", help="train it further, on CIDEr-D itself")
    task = group.add_mutually_exclusive_group()
    task.add_argument("--sample", nargs="+", metavar="PICTURE", help="files, folders, https://…")
    task.add_argument("--eval", action="store_true", help="score the bridge of a run")
    task.add_argument("--export", metavar="FILE", help="write the bridge as FILE.safetensors")
    task.add_argument("--compare", action="store_true", help="train and score all bridges")
    group = parser.add_argument_group("the frozen parts and the pictures")
    group.add_argument("--data", metavar="DIR", help="pictures in COCO's layout (data/coco)")
    group.add_argument("--lm", metavar="CKPT", help="the decoder, as train_gpt2.py --ckpt names it")
    group.add_argument("--clip", help="open_clip NAME/TAG or NAME/FILE (ViT-L-14-quickgelu/openai)")
    group = parser.add_argument_group("training")
    group.add_argument("--out", metavar="DIR", help="the run (default: runs/<setup>-<bridge>)")
    group.add_argument("--steps", dest="max_steps", type=positive, help="updates of the bridge")
    group.add_argument("--batch", dest="batch_size", type=positive, help="pictures a step")
    group.add_argument("--micro-batch", type=positive, help="pictures at once, for less memory")
    group.add_argument("--lr", type=number(float, 0, 1), help="the highest learning rate")
    group.add_argument("--seed", type=number(int, 0, 10**6), default=0, help="also of --num")
    group.add_argument("--seeds", type=positive, help="how many to --compare, from --seed on")
    group.add_argument("--restart", action="store_true", help="forget what is in the run's folder")
    group = parser.add_argument_group("captions")
    group.add_argument("--ckpt", metavar="FILE", help="the bridge (default: best.pt of the run)")
    group.add_argument("--num", type=positive, help="captions to sample for each picture")
    group.add_argument("--temperature", type=number(float, 0, 100), help="of sampling (0.8)")
    group.add_argument("--top-p", type=number(float, 0.001, 1), help="of sampling (0.9)")
    group.add_argument("--beam", type=number(int, 2), metavar="W", help="beam search (else greedy)")
    group.add_argument("--grid", metavar="FILE", help="draw the pictures with their captions")
    return parser


def main():
    """The commands at the top of this file."""
    parser = flags()
    args = parser.parse_args()
    if not args.bridge and not args.compare and not args.ckpt:
        raise UserError("give --bridge linear, cross or qformer, or --compare, or --ckpt")
    sampling = ("--num", "--temperature", "--top-p")
    if args.beam:
        parser.refuse("--beam", *sampling)
    if args.compare:
        parser.refuse("--compare", "--bridge", "--beam", "--scst")
    else:
        parser.refuse("one bridge", "--seeds")
    if not args.sample:
        parser.refuse("anything but --sample", *sampling, "--grid", "--ckpt")
    elif not parser.given & set(sampling):
        parser.refuse("the most probable caption", "--seed")
    training = ("--steps", "--lr", "--batch", "--micro-batch", "--restart")
    if args.ckpt:
        parser.refuse("--ckpt", *training, "--out", "--scst")
    if args.eval or args.export:
        parser.refuse("a trained bridge", *training)
    if args.export:
        parser.refuse("--export", "--beam")
    train_gpt2.join_processes()
    if args.export:
        export(args)
    elif args.sample:
        sample(args)
    elif args.compare:
        compare(args)
    else:
        if args.eval:
            trained_bridge(run_folder(args.bridge, args, args.scst))  # or an error
        setup = open_setup(args)
        if not args.eval:
            train(args.bridge, setup, args)
        evaluate(run_folder(args.bridge, args, args.scst), setup, args, args.beam)


if __name__ == "__main__":
    fineweb.command_line(main)
