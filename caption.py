"""
Pictures in words: a frozen CLIP and a frozen GPT-2, joined by a small bridge that is trained.

    python caption.py --bridge linear --sample img.jpg     caption pictures; trains what is missing
    python caption.py --bridge {linear,cross,qformer}      train and score a bridge, draw a grid
    python caption.py --bridge linear --eval [--beam 5]    results.json and scores.json
    python caption.py --bridge linear --scst [--sample]    train it further, on CIDEr-D; use that
    python caption.py --ckpt FILE --sample img.jpg         with a bridge of somebody else
    python caption.py --compare                            all three, and a blind one, in one table

Without a GPU and COCO this is the toy setup: drawn pictures of colored shapes, a CLIP of 64 x 64
pixels that is trained here, and the decoder of `python train_gpt2.py`. With --data FOLDER (COCO
2017, or your own pictures in its layout) the same code joins OpenAI's CLIP to GPT-2 124M. A run
lives in runs/<setup>-<bridge>/: ckpt.pt, log.csv, curves.png, and best.safetensors, the bridge
alone, which is what one shares; its evaluation adds results.json, scores.json, grid.png.

To read, in an evening: 0 why it works, 1 the image encoder, 2 the three bridges, 3 the captioner,
4 training a bridge; CIDEr-D in coco_eval.py; 5 self-critical training. For reference, after the
banner: beam search, evaluation and comparison, your own pictures, vision tokens on disk, the two
setups, the command line.

Letters beside the code: B batch, T time (tokens), C width of the decoder, P prefix, S vision
tokens, D their width, N targets of a row, V vocabulary, W beams, K samples.
"""
import contextlib
import functools
import io
import itertools
import math
import os
import random
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import numpy as np
import requests
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from tqdm import tqdm

import coco_eval
import fineweb
import train_gpt2
from fineweb import UserError, number
from train_gpt2 import MLP, KVCache, Recipe, Run, autocast, fit, get_lr, pick_device

# -----------------------------------------------------------------------------
# 0. Why it works
#
# CLIP (Radford et al. 2021) is two encoders, of pictures and of texts, that were trained on 400 M
# pictures from the web with their captions. In a batch of them each picture has to find its own
# caption among all, and each caption its picture (the contrastive loss):
#
#     similarity = pictures @ captions.T * scale      # (B, B), of vectors of length 1
#     right = torch.arange(B)                         # picture i belongs to caption i
#     loss = (cross_entropy(similarity, right) + cross_entropy(similarity.T, right)) / 2
#
# So the image encoder knows what people say of a picture, but cannot say it. GPT-2, the decoder,
# can talk, but sees nothing. A bridge, small beside both, turns what the one sees into something
# that the other can read.
#
# Both stay frozen: they know more than COCO could teach them, nothing of it is forgotten, and a
# picture has to go through CLIP only once. GPT-2 can read vectors that are no words because its
# blocks never see words: they see vectors, whose keys and values they compare and mix. A vector
# with the right directions in it is looked up like a word.
#
# Looking things up in the context has to be learned, though. GPT-2 has learned it from the web; the
# toy decoder learns it from scenes that are told as a map first (fineweb.py, "The toy text"). What
# stands where, by position:
#
#     position    0              1 ... 32                            33     34 ...
#     toy text    <|endoftext|>  the map, two words for a cell       \n     what it shows
#     linear      class token    32 averages of patches, two a cell  a      red circle is ...
#     qformer     query 1        queries 2 ... 32, at 1 ... 31; the caption begins at 32
#     cross       <|endoftext|>  a red circle is ...                 (it sees the picture inside)
#
# So linear's 4 x 8 averages stand exactly where the map's 4 x 4 x 2 words stood, and its class
# token where <|endoftext|> was. With cross the caption begins at position 1, where the toy decoder
# has only ever seen a map: the bridge has to make up for that.

# -----------------------------------------------------------------------------
# 1. The image encoder: what CLIP sees, as tokens


class ImageEncoder:
    """The frozen image half of CLIP, a vision transformer (Dosovitskiy et al. 2021).

    Its blocks have attention and an MLP, as GPT-2's, but every token may attend to every other. We
    take the tokens after the second-to-last block: in OpenAI's CLIP only the class token goes on
    from the last one into the loss, so nothing tells it what to make of the patches there. (The
    toy's CLIP averages its patches instead; its second-to-last block is better, too.)
    """

    def __init__(self, visual, preprocess, digest):
        self.visual = train_gpt2.freeze(visual, pick_device())
        for block in visual.transformer.resblocks:
            # PyTorch's attention on (B, T, D) copies its weights for each token: 40 times slower in
            # bf16 on a CPU
            block.attn.batch_first = False
        self.preprocess = preprocess  # Pillow picture to (3, H, W)
        self.digest = digest  # of what its tokens depend on

    @torch.no_grad()
    def __call__(self, images):
        """Prepared pictures (B, 3, H, W) to class token and patches in reading order, (B, S, D)."""
        visual = self.visual
        with autocast(pick_device()):
            patches = visual.conv1(images.to(pick_device()))  # (B, D, 16, 16) for ViT-L/14: each
            patches = patches.flatten(2).mT  # square of 14 x 14 pixels as D numbers, (B, 256, D)
            class_token = visual.class_embedding.expand(len(images), 1, -1)  # learned
            # what the blocks add to stays fp32: half the error of bf16 in the tokens (.4 %, not .8)
            x = torch.cat([class_token, patches.float()], dim=1)  # (B, 257, D)
            x = visual.ln_pre(x + visual.positional_embedding)
            x = x.transpose(0, 1)  # (257, B, D)
            for block in visual.transformer.resblocks[:-1]:
                x = block(x)  # x + attn(ln_1(x)), then x + mlp(ln_2(x)): GPT-2's, without a mask
        return x.transpose(0, 1)


def pool_tokens(tokens):
    """Average the square of patches to 4 x 8: (B, 1 + n * n, D) to (B, 1 + 32, D).

    ViT-L/14's 256 patches (the toy's 64, ViT-B/32's 49, whose averages overlap) become 32: a
    sequence eight times shorter, and for COCO a cache of 8 GB instead of 65.
    """
    B, S, D = tokens.shape
    side = math.isqrt(S - 1)
    square = tokens[:, 1:].transpose(1, 2).view(B, D, side, side)
    pooled = F.adaptive_avg_pool2d(square, (4, 8))  # (B, D, 4, 8)
    return torch.cat([tokens[:, :1], pooled.flatten(2).transpose(1, 2)], dim=1)


# -----------------------------------------------------------------------------
# 2. The three bridges, from vision tokens (B, S, D) to a decoder of width C
#
#             what the decoder gets                        where            trained
#   linear    S vectors, each vision token projected       before the text  projection, positions
#   qformer   32 vectors, gathered by learned queries      before the text  + queries, 1 to 4 layers
#   cross     attention to the vision tokens, per block    inside           + attention per block
#   blind     what linear makes of zeros, to compare with  before the text  as linear
#
# Each has the same two methods. prefix(vision) gives the vectors before the text, or None.
# look(vision) gives a function, which the captioner calls on the hidden states x before the
# decoder's block i: cross adds attention to the picture, the others give x back unchanged. A prefix
# begins at the scale of the decoder's own token vectors, so that it influences the decoder from the
# first step.


def token_scale(decoder):
    """The standard deviation of the decoder's token vectors."""
    return decoder.wte.weight.std().item()


def look_at_nothing(i, x):
    """What look() gives for a bridge whose prefix has all: x stays as it is."""
    return x


class Projection(nn.Module):
    """A linear map of each vision token to the decoder's width, and positions to tell them apart.

    All three bridges begin with it.
    """

    def __init__(self, S, D, decoder):
        super().__init__()
        C = decoder.config.n_embd
        self.norm = nn.LayerNorm(D)
        self.linear = nn.Linear(D, C)
        # a sum of D normed numbers has sqrt(D) times the scale of its weights
        nn.init.normal_(self.linear.weight, std=token_scale(decoder) / math.sqrt(D))
        self.positions = nn.Parameter(token_scale(decoder) * torch.randn(S, C))

    def forward(self, vision):
        return self.linear(self.norm(vision)) + self.positions  # (B, S, C)


class LinearBridge(nn.Module):
    """The projection alone, as in LiMBeR (Merullo et al. 2022).

    LiMBeR showed that a linear map is enough to read a frozen image encoder with a frozen language
    model. ClipCap (Mokady et al. 2021) maps one vector of a picture to a prefix: by a transformer
    where GPT-2 stays frozen, by an MLP where it is trained, too.
    """

    def __init__(self, S, D, decoder):
        super().__init__()
        self.P = S
        self.projection = Projection(S, D, decoder)
        nn.init.zeros_(self.projection.positions)  # a prefix gets the decoder's own in addition

    def prefix(self, vision):
        return self.projection(vision)  # (B, S, C)

    def look(self, vision):
        return look_at_nothing


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
        self.projection = Projection(S, D, decoder)
        self.ln = nn.LayerNorm(C)
        self.queries = nn.Parameter(0.02 * torch.randn(self.P, C))
        n_layer = max(1, min(4, decoder.config.n_layer // 3))  # 1 for the toy, 4 for the 124M
        self.layers = nn.ModuleList(QFormerLayer(decoder.config) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(C)
        self.linear = nn.Linear(C, C)
        nn.init.normal_(self.linear.weight, std=token_scale(decoder) / math.sqrt(C))

    def prefix(self, vision):
        vision = self.ln(self.projection(vision))  # (B, S, C)
        x = self.queries.expand(len(vision), -1, -1)  # (B, 32, C)
        for layer in self.layers:
            x = layer(x, vision)
        return self.linear(self.ln_f(x))  # (B, 32, C)

    def look(self, vision):
        return look_at_nothing


class QFormerLayer(nn.Module):
    """Queries attend to each other; an MLP; queries attend to the picture (pre-norm).

    In BLIP-2 the MLP comes last. With the MLP last, the toy Q-Former memorized which colors go with
    which shapes: it read a red cross, which no training picture has, as a red circle.
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
    for this, tanh(0)). One LayerNorm serves both sides: the vision tokens are mapped into the
    decoder's own space first, where x lives too.
    """

    def __init__(self, S, D, decoder):
        super().__init__()
        self.P = 1  # <|endoftext|> stands before the caption
        C = decoder.config.n_embd
        self.projection = Projection(S, D, decoder)
        self.ln = nn.ModuleList(nn.LayerNorm(C) for _ in decoder.h)
        self.cross_attn = nn.ModuleList(Attention(decoder.config) for _ in decoder.h)
        for cross_attn in self.cross_attn:
            nn.init.zeros_(cross_attn.c_proj.weight)
            nn.init.zeros_(cross_attn.c_proj.bias)

    def prefix(self, vision):
        return None

    def look(self, vision):
        vision = self.projection(vision)  # (B, S, C)
        keys_values = []  # once for all tokens
        for ln, cross_attn in zip(self.ln, self.cross_attn, strict=True):
            keys_values.append(cross_attn.keys_values(ln(vision)))

        def look_at_picture(i, x):
            return x + self.cross_attn[i](self.ln[i](x), *keys_values[i])  # (B, T, C)

        return look_at_picture


class Attention(nn.Module):
    """Attention from x (B, T, C) to another sequence, or to itself; its two halves by themselves.

    With cross, keys_values() is called once for a picture, forward() for each new token.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(C, 2 * C)
        self.c_proj = nn.Linear(C, C)

    def split_heads(self, x):
        return x.view(x.size(0), x.size(1), self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)

    def keys_values(self, source):
        k, v = self.kv(source).chunk(2, dim=2)  # each (B, S, C)
        return self.split_heads(k), self.split_heads(v)

    def forward(self, x, k, v):
        y = train_gpt2.attention(self.split_heads(self.q(x)), k, v)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


BRIDGES = {
    "linear": LinearBridge,
    "cross": CrossAttentionBridge,
    "qformer": QFormerBridge,
    "blind": BlindBridge,
}


def build(name, S, D, decoder):
    """A Captioner with a new bridge for S vision tokens of width D."""
    return Captioner(BRIDGES[name](S, D, decoder), decoder)


# -----------------------------------------------------------------------------
# 3. The captioner. What it reads, and what it has to predict there:
#
#     linear, qformer    reads     v1 ... vP       a     red      circle             P = 33, 32
#                        predicts         a        red   circle   <|endoftext|>
#     cross              reads     <|endoftext|>   a     red      circle             P = 1
#                        predicts  a               red   circle   <|endoftext|>
#
# The decoder's causal mask holds for the prefix, too: v1 cannot attend to v2.


class Captioner(nn.Module):
    """A bridge, and the frozen decoder that it feeds with a prefix or attends into."""

    def __init__(self, bridge, decoder):
        super().__init__()
        self.bridge = bridge
        self.decoder = decoder.eval().requires_grad_(False)
        self.eot = decoder.config.vocab_size - 1  # the last token of both tokenizers: <|endoftext|>
        # tokens of a caption that fit; val2017 has 57 at most, and an endless one would fill memory
        self.room = min(100, decoder.config.block_size - bridge.P)

    def beginning(self, vision):
        """What stands before the caption, (B, P, C), with the decoder's positions."""
        prefix = self.bridge.prefix(vision)
        if prefix is None:
            prefix = self.decoder.wte.weight[self.eot].expand(len(vision), 1, -1)
        return prefix + self.decoder.wpe.weight[: self.bridge.P]

    def hidden_states(self, x, look, mask=None, cache=None):
        """Vectors (B, T, C) through the decoder's blocks; before each a look at the picture."""
        for i, block in enumerate(self.decoder.h):
            x = look(i, x)
            x = block(x, mask, cache[i] if cache else None)
        return self.decoder.ln_f(x)

    def loss_of_one(self, vision, caption):
        """The mean loss of one caption, token ids (1, T), given vision tokens (1, S, D)."""
        P = self.bridge.P
        positions = P + torch.arange(caption.size(1), device=caption.device)
        words = self.decoder.embed(caption, positions)  # (1, T, C)
        x = torch.cat([self.beginning(vision), words], dim=1)  # (1, P + T, C)
        h = self.hidden_states(x, self.bridge.look(vision))
        targets = F.pad(caption, (0, 1), value=self.eot)  # (1, T + 1), the end is predicted, too
        return self.decoder.loss(h[:, P - 1 :], targets)

    def forward(self, vision, packed):
        """(None, mean loss) of packed captions, given vision tokens (B, S, D).

        It is loss_of_one() for all captions of B pictures, only faster: those of a picture are
        packed after one prefix (train_gpt2.py, chapter 7). One pass over P + 5 * 12 tokens does the
        work of five over P + 12 (tested by test_packed_captions_have_the_losses_of_separate_ones).
        """
        return None, self.decoder.loss(self.predict(vision, packed), packed.targets)

    def predict(self, vision, packed):
        """The hidden states (B, N, C) that predict the targets of packed captions."""
        words = self.decoder.embed(packed.idx, packed.positions)  # (B, T, C)
        x = torch.cat([self.beginning(vision), words], dim=1)  # (B, P + T, C)
        return packed.at_source(self.hidden_states(x, self.bridge.look(vision), packed.mask))

    def pack(self, captions):
        """Packed captions; captions: for each picture token lists, ended by <|endoftext|>."""
        # the prefix is the beginning: its last vector predicts the first word
        rows = [([], [ids[: self.room] for ids in group]) for group in captions]
        return train_gpt2.pack(rows, self.bridge.P)

    @torch.no_grad()
    def generate(self, vision, max_new_tokens=None, prompt=None, temperature=0.0, **sampling):
        """Token ids (B, new) for vision tokens (B, S, D); greedy without a temperature.

        max_new_tokens: by default as many as a caption may have in training. prompt: (B, n) ids
        with which the captions begin, which are not repeated.
        """
        look = self.bridge.look(vision)
        x = self.beginning(vision)  # (B, P, C): prefill
        if prompt is not None:
            positions = torch.arange(prompt.size(1), device=x.device) + x.size(1)
            x = torch.cat([x, self.decoder.embed(prompt, positions)], dim=1)  # (B, P + n, C)
        end = x.size(1)  # the position of the next token
        last = min(end + (max_new_tokens or self.room), self.bridge.P + self.room)
        cache = [KVCache() for _ in self.decoder.h]
        running = torch.ones(len(x), dtype=torch.bool, device=x.device)
        tokens = []
        for position in range(end, last):
            h = self.hidden_states(x, look, cache=cache)
            logits = self.decoder.logits(h[:, -1]).float()  # (B, V)
            token = train_gpt2.sample_token(logits, temperature, **sampling)  # (B,)
            token = torch.where(running, token, self.eot)
            tokens.append(token)
            running &= token != self.eot
            if not running.any():
                break
            positions = torch.arange(position, position + 1, device=x.device)
            x = self.decoder.embed(token[:, None], positions)  # (B, 1, C)
        return torch.stack(tokens, dim=1)


# -----------------------------------------------------------------------------
# 4. Training a bridge. As for GPT-2, but that only the bridge learns:
#
#     for step in range(max_steps):
#         vision, captions = 32 pictures, each with its five captions
#         _, loss = captioner(vision, captioner.pack(captions))        # of the captions' words
#         loss.backward()                          # through the frozen decoder, into the bridge
#         optimizer.step()                         # of the bridge's weights


@dataclass
class Setup:
    """The frozen parts and the pictures: their names, and, after open_setup(), they themselves."""

    toy: bool
    data: Path
    lm: str  # as train_gpt2.py --ckpt names it
    clip: str  # our own file, or open_clip's NAME/TAG or NAME/FILE
    seed: int  # in the toy setup also that of the decoder and of CLIP
    karpathy: bool = False  # COCO as Karpathy split it
    encoder: ImageEncoder = None
    decoder: train_gpt2.GPT = None
    tokenizer: object = None


@dataclass
class PictureSet:
    """Pictures, their vision tokens, and the token ids of their captions."""

    pictures: list  # as coco_eval.read_dataset() gives them
    captions: list  # for each picture its token lists, which end with <|endoftext|>
    features: np.ndarray  # (all pictures, S, D), float16, on disk
    rows: np.ndarray  # for each picture its row of the features

    def __len__(self):
        return len(self.pictures)

    def vision(self, chosen=slice(None)):
        """Vision tokens (B, S, D) of the chosen pictures, by default of all."""
        return torch.from_numpy(self.features[self.rows[chosen]].astype(np.float32))


def get_micro_batches(train_set, captioner, recipe, seed, step):
    """This rank's micro-batches of a step: [(vision, packed captions, share of the step), ...].

    The loss of a step is the mean over the tokens of all its captions, so the share of a
    micro-batch is that of its tokens.
    """
    chosen = train_gpt2.step_indices(seed, step, recipe.batch_size, len(train_set))

    def targets(pictures):  # the tokens of all their captions, as pack() cuts them
        captions = itertools.chain(*(train_set.captions[i] for i in pictures))
        return sum(min(len(ids), captioner.room) for ids in captions)

    batches = []
    for part in train_gpt2.share_out(chosen, recipe):
        packed = captioner.pack([train_set.captions[i] for i in part])
        batches.append((train_set.vision(part), packed, targets(part) / targets(chosen)))
    return batches


def train(name, setup, out, flags):
    """Train a bridge, or go on with the run in `out`; returns the Run. The loop is fit().

    Toy: 500 steps of 32 pictures, each with its five captions, by Muon, at rates of .01 to .04 for
    matrices. Full: four passes over COCO (on a CPU one and a half), by AdamW, at 2e-3 for linear
    and 4e-4 for the others. The rate is flat, then falls linearly (choose_recipe). flags: of the
    recipe, {name: value}.
    """
    device = pick_device()
    train_set = load_pictures(setup, "train")
    val_set = load_pictures(setup, "val")
    torch.manual_seed(setup.seed)
    captioner = build(name, *train_set.features.shape[1:], setup.decoder).to(device)
    recipe = choose_recipe(name, setup, len(train_set), flags)
    run = open_run(name, setup, out, captioner.bridge, train_set, recipe)
    with run:
        if not run.finished:
            sources = (train_set, captioner, recipe, setup.seed)
            get_batches = functools.partial(get_micro_batches, *sources)
            batches = train_gpt2.prefetch(get_batches, run.step, recipe.max_steps)
            fit(run, captioner, batches, lambda: validate(captioner, val_set), device)
    return run


def validate(captioner, val_set):
    """Print the validation loss, and return it for the log."""
    token, caption = caption_loss(captioner, val_set)
    print(f"           val {token:.4f} nats per token, {caption:.3f} per caption", flush=True)
    return {"val": token}


# -----------------------------------------------------------------------------
# 5. Self-critical training: captions that are trained on their score
#
# Cross-entropy teaches each word after the words that people wrote. What is scored are whole
# captions of the model's own; a score r has no gradient, but the probability p of a caption has
# one. REINFORCE (Williams 1992) follows the gradient of the expected score, summed over captions:
#
#     grad sum(p * r)  =  sum(r * grad p)  =  sum(p * r * grad log p)
#                      =  the mean of r * grad log p over captions that are sampled
#
# So samples that score well are made more probable. Rennie et al. (2017) compare each with the
# model's own greedy caption, hence "self-critical"; here with the other samples (Luo 2020):
#
#     samples = [sample(picture) for k in range(K)]                    # at temperature 1
#     rewards = [cider(sample) for sample in samples]
#     for k in range(K):
#         baseline = mean of the other rewards
#         loss -= (rewards[k] - baseline) * log_p(samples[k]) / K
#         loss -= ANCHOR * log_p(references[k]) / K
#
# The baseline does not depend on the sample, so on average it changes nothing (sum(grad p) is the
# gradient of 1); it takes away most of the noise: a caption that is as good as the others is left
# alone. The end counts as a word, or captions would end in "on a". The references' cross-entropy
# stays in the loss as an anchor: captions narrow to the kind that scores best, and without it the
# bridge forgets the other facts. The printed loss is no measure of quality; only its gradient is
# used.

SAMPLES = 5  # K captions of each picture
SAMPLE_TOKENS = 30  # a sample is cut there: few references are longer
ANCHOR = 0.5  # weight of the references' cross-entropy; rewards lie between 0 and 10
END = "<end>"  # a word of the reward


class ScoredCaptioner(nn.Module):
    """A captioner whose loss weighs captions one by one: the sum above, a mean over pictures."""

    def __init__(self, captioner):
        super().__init__()
        self.captioner = captioner

    def forward(self, vision, packed, weights):
        """weights: (B, captions), of the - log p of each."""
        h = self.captioner.predict(vision, packed)
        nats = self.captioner.decoder.losses(h, packed.targets)  # (B, N)
        # (B, N), of a token's caption; padding has no loss, so it may have any
        weight = weights.gather(1, packed.owner.clamp(min=0))
        return None, (nats * weight).sum() / len(weights)


def train_on_scores(name, setup, out, flags, base):
    """Train the bridge in the file `base` further, as train() does, but on CIDEr-D."""
    device = pick_device()
    train_set = load_pictures(setup, "train")
    val_set = load_pictures(setup, "val")
    if len(val_set) < 2:
        raise UserError("CIDEr-D of one validation picture is always 0", "add pictures for --scst")
    torch.manual_seed(setup.seed)
    captioner = load_captioner(base, setup)
    recipe = choose_recipe(name, setup, len(train_set), flags, scst=True)
    run = open_run(name, setup, out, captioner.bridge, train_set, recipe, base)

    def evaluate():
        row = validate(captioner, val_set)
        scores, _ = score_captions(captioner, val_set, setup.tokenizer)
        row["cider"] = scores["corpus"]["CIDEr"]
        print(f"           CIDEr-D of greedy captions {row['cider']:.4f}", flush=True)
        return row

    with run:
        if not run.finished:
            sources = (train_set, captioner, recipe, setup.seed)
            batches = sampled_batches(*sources, setup.tokenizer, run.step)
            fit(run, ScoredCaptioner(captioner), batches, evaluate, device)


def sampled_batches(train_set, captioner, recipe, seed, tokenizer, first_step):
    """Yield (step, [(vision, packed captions, their weights, share of the step's pictures)]).

    Samples have to come from the bridge as it is now, so nothing is prepared ahead. A picture's K
    samples and K of its references are packed together after its prefix, so one pass gives the log
    probabilities of all (tested by test_self_critical_gradient_equals_the_exact_one).
    """
    device = pick_device()
    references = []
    for picture in train_set.pictures:
        references.append([[*coco_eval.tokenize(text), END] for text in picture["captions"]])
    cider = coco_eval.CIDEr(references)
    for step in range(first_step, recipe.max_steps):
        generator = torch.Generator(device)
        generator.manual_seed((seed * 10**6 + step) * 1000 + train_gpt2.rank())
        chosen = train_gpt2.step_indices(seed, step, recipe.batch_size, len(train_set))
        batches = []
        for part in train_gpt2.share_out(chosen, recipe):
            vision = train_set.vision(part).to(device)
            drawn = draw_samples(captioner, vision, generator)
            groups = []
            rewards = []
            for i, samples in zip(part, drawn, strict=True):
                groups.append(samples + train_set.captions[i][:SAMPLES])
                rewards.append(rewards_of(samples, references[i], cider, tokenizer))
            advantages = advantages_of(torch.tensor(rewards))  # (B, K)
            # (B, 2 K), of the K samples and then the K references of each picture
            weights = torch.cat([advantages, torch.full_like(advantages, ANCHOR)], dim=1) / SAMPLES
            batches.append((vision, captioner.pack(groups), weights, len(part) / len(chosen)))
        yield step, batches


def draw_samples(captioner, vision, generator):
    """For each picture K sampled captions: lists of token ids, up to <|endoftext|>."""
    repeated = vision.repeat_interleave(SAMPLES, 0)  # (B * K, S, D)
    with autocast(vision.device):
        rows = captioner.generate(repeated, SAMPLE_TOKENS, temperature=1.0, generator=generator)
    eot = captioner.eot
    rows = [row[: row.index(eot) + 1] if eot in row else row for row in rows.tolist()]
    return [rows[i : i + SAMPLES] for i in range(0, len(rows), SAMPLES)]


def rewards_of(samples, references, cider, tokenizer):
    """The CIDEr-D of each sampled caption of a picture, whose references are lists of words."""
    references = [cider.weigh(words) for words in references]
    rewards = []
    for ids, text in zip(samples, train_gpt2.decode(samples, tokenizer), strict=True):
        words = coco_eval.tokenize(text)
        words += [END] * ids.count(tokenizer.eot_token)  # none, if it was cut
        rewards.append(cider.score(references, words))
    return rewards


def advantages_of(rewards):
    """Each reward (B, K) minus the mean of the picture's K - 1 others."""
    baselines = (rewards.sum(1, keepdim=True) - rewards) / (rewards.size(1) - 1)
    return rewards - baselines


# =============================================================================
# From here on: tooling, for reference
# =============================================================================
# Beam search


@torch.no_grad()
def beam_search(captioner, vision, beams, max_new_tokens=None, length_penalty=1.0):
    """Token ids (B, new) of the best caption, keeping W = `beams` beginnings at every step:

        for each step:
            candidates = [(beam + token, sum of log p) for beam in beams for token in tokens]
            beams = the W best of candidates

    A caption of n tokens is worth the sum of its log probabilities / n^length_penalty (Wu et
    al. 2016, section 7, in its simple form): 0 favors short captions, 1 compares means. One
    beam is greedy decoding (tested by test_beam_search_equals_greedy_and_brute_force).
    """
    decoder = captioner.decoder
    eot = captioner.eot
    B = len(vision)
    device = vision.device
    tokens = torch.zeros(B, 1, 0, dtype=torch.long, device=device)  # one beam at first, then W
    done = torch.zeros(B, 1, dtype=torch.bool, device=device)
    total = torch.zeros(B, 1, device=device)
    cache = [KVCache() for _ in decoder.h]
    look = captioner.bridge.look(vision)
    x = captioner.beginning(vision)  # (B, P, C): prefill, once a picture
    for step in range(min(max_new_tokens or captioner.room, captioner.room)):
        h = captioner.hidden_states(x, look, cache=cache)[:, -1]  # (B * W, C)
        W = tokens.size(1)
        log_p = decoder.logits(h).float().log_softmax(-1).view(B, W, -1)
        V = log_p.size(2)
        log_p[done] = -math.inf  # a finished beam is followed by <|endoftext|>, for free
        log_p[:, :, eot][done] = 0.0
        sums = total[:, :, None] + log_p  # (B, W, V)
        lengths = (tokens != eot).sum(2) + 1  # (B, W), with the next token, or the end
        worth = sums / lengths[:, :, None] ** length_penalty  # (B, W, V)
        best = worth.view(B, -1).topk(min(beams, W * V)).indices  # (B, W), the best first
        parent = best // V  # (B, W), the beam that goes on
        token = best % V  # (B, W), with this token
        total = sums.view(B, -1).gather(1, best)  # (B, W)
        tokens = tokens.gather(1, parent[:, :, None].expand(-1, -1, step))
        tokens = torch.cat([tokens, token[:, :, None]], dim=2)  # (B, W, step + 1)
        done = done.gather(1, parent) | (token == eot)
        if done.all():
            break
        rows = (W * torch.arange(B, device=device)[:, None] + parent).view(-1)
        for layer in cache:  # a beam takes over the cache of its parent
            layer.k = layer.k[rows]
            layer.v = layer.v[rows]
        if parent.size(1) > W:  # after the first step
            look = captioner.bridge.look(vision.repeat_interleave(parent.size(1), 0))
        position = torch.full((1,), captioner.bridge.P + step, device=device)
        x = decoder.embed(token.view(-1, 1), position)
    return tokens[:, 0]


# -----------------------------------------------------------------------------
# Evaluation and comparison


@torch.no_grad()
def caption_loss(captioner, pictures, batch=50):
    """(nats per token, nats per caption) over a PictureSet."""
    nats = 0.0
    tokens = 0
    for i in train_gpt2.progress(range(0, len(pictures), batch), "validation"):
        part = range(i, min(i + batch, len(pictures)))
        packed = captioner.pack([pictures.captions[j] for j in part])
        device = pick_device()
        with autocast(device):
            _, loss = captioner(pictures.vision(part).to(device), packed.to(device))
        count = (packed.targets >= 0).sum().item()
        nats += loss.item() * count
        tokens += count
    return nats / tokens, nats / sum(map(len, pictures.captions))


def write_captions(captioner, vision, tokenizer, prompts=None, beams=1, **options):
    """A caption for each picture of vision (B, S, D); options as of generate(), of one beam."""
    device = pick_device()
    rows = []
    batch = max(1, 250 // beams)
    for i in train_gpt2.progress(range(0, len(vision), batch), "captions"):
        part = vision[i : i + batch].to(device)
        prompt = None if prompts is None else prompts[i : i + batch].to(device)
        with autocast(device):
            if beams > 1:
                ids = beam_search(captioner, part, beams)
            else:
                ids = captioner.generate(part, prompt=prompt, **options)
        ids = ids if prompt is None else torch.cat([prompt, ids], dim=1)
        rows += ids.tolist()
    # a caption is one line, whatever the decoder writes
    return [" ".join(text.split()) for text in train_gpt2.decode(rows, tokenizer)]


def ask_facts(pictures, tokenizer, answer):
    """{fact: how often it is right} when answer() completes beginnings (B, n) that ask for it."""
    rng = random.Random(0)
    asked = [coco_eval.questions(picture["scene"], rng) for picture in pictures]
    shares = {}
    for fact in coco_eval.FACTS:
        texts = answer(torch.tensor([tokenizer.encode_ordinary(each[fact]) for each in asked]))
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
        return [tokenizer.decode(row[maps.size(1) :]) for row in out.tolist()]

    return ask_facts(pictures, tokenizer, answer)


def score_captions(captioner, pictures, tokenizer, beams=1):
    """(what coco_eval.evaluate() gives, the captions) of a PictureSet."""
    texts = write_captions(captioner, pictures.vision(), tokenizer, beams=beams)
    references = {picture["id"]: picture["captions"] for picture in pictures.pictures}
    return coco_eval.evaluate(references, dict(zip(references, texts, strict=True))), texts


def evaluate(out, setup, beam=None):
    """Score the best bridge of a run on the validation pictures: print, write files, return a dict.

    The files are results.json, in COCO's format, scores.json and grid.png. "shuffled": each caption
    with the vision tokens of another picture; what is right then was guessed.
    """
    out = Path(out)
    captioner = load_captioner(out / "best.safetensors", setup)
    val_set = load_pictures(setup, "test" if setup.karpathy else "val")
    shuffled = replace(val_set, rows=np.roll(val_set.rows, 1))
    decoding = f"beam {beam}" if beam else "greedy"
    scores, texts = score_captions(captioner, val_set, setup.tokenizer, beam or 1)
    row = {
        "parameters": sum(p.numel() for p in captioner.bridge.parameters()),
        "pictures": len(val_set),
        "decoding": decoding,
        **scores["corpus"],
        "nats per caption": caption_loss(captioner, val_set)[1],
        "shuffled": caption_loss(captioner, shuffled)[1],
    }
    lines = []
    if all(picture["scene"] for picture in val_set.pictures):  # the toy pictures
        facts, lines = scene_facts(captioner, setup, val_set, shuffled, texts)
        row |= facts
    if train_gpt2.rank() == 0:
        pairs = zip(val_set.pictures, texts, strict=True)
        results = [{"image_id": picture["id"], "caption": text} for picture, text in pairs]
        fineweb.write_json(out / "results.json", results)
        fineweb.write_json(out / "scores.json", row | {"per_image": scores["per_image"]})
        chosen = range(0, len(texts), max(len(texts) // 9, 1))[:9]
        draw_grid(out / "grid.png", [(val_set.pictures[i]["path"], texts[i]) for i in chosen])
    losses = f"{row['nats per caption']:.2f} nats per caption, shuffled {row['shuffled']:.2f}"
    print(f"{len(val_set)} validation pictures of {setup.data}, {decoding}: {losses}")
    print("\n".join([coco_eval.table(scores, len(val_set)), *lines]))
    if not setup.karpathy and coco_eval.find_layout(setup.data, "val")[2]:
        print("a tenth of the pictures was held out: not comparable with results on val2017")
    print(f"{out} has best.safetensors, results.json, scores.json, curves.png and grid.png")
    return row


def scene_facts(captioner, setup, val_set, shuffled, texts):
    """({fact: share}, lines to print) of toy pictures, whose scenes are known, with captions."""
    pairs = zip(texts, val_set.pictures, strict=True)
    wrong = [False in coco_eval.facts(text, p["scene"]).values() for text, p in pairs]
    row = {"captions true": 1 - sum(wrong) / len(wrong)}
    lines = []
    groups = {"": val_set, ", shuffled": shuffled}
    if (setup.data / "unseen").is_dir():
        groups[", unseen pairs"] = load_pictures(setup, "unseen")
    for kind, group in groups.items():
        parts = (captioner, group.vision(), setup.tokenizer)
        answer = functools.partial(write_captions, *parts, max_new_tokens=8)
        for fact, share in ask_facts(group.pictures, setup.tokenizer, answer).items():
            row[fact + kind] = share
        facts = [f"{fact} {row[fact + kind]:.2f}" for fact in coco_eval.FACTS]
        lines.append(f"{'facts' + kind:22} {'  '.join(facts)}")
    lines.append(f"captions without a false statement: {row['captions true']:.2f}")
    return row, lines


def draw_grid(path, cells, size=256, columns=3, below=96):
    """[(picture or its path, its caption), ...] as one PNG. below: pixels for the caption."""
    font = ImageFont.load_default(17)
    gap = 24
    height = math.ceil(len(cells) / columns) * (size + below) + gap
    sheet = Image.new("RGB", (columns * (size + gap) + gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(cells):
        x = gap + i % columns * (size + gap)
        y = gap + i // columns * (size + below)
        image = picture if isinstance(picture, Image.Image) else coco_eval.load_image(picture)
        sheet.paste(ImageOps.pad(image, (size, size), color="white"), (x, y))
        caption = caption.encode("latin-1", "replace").decode("latin-1")  # all that the font has
        lines = textwrap.wrap(caption, size // 8)[:4]
        draw.multiline_text((x, y + size + 6), "\n".join(lines), "#111827", font)
    with fineweb.atomic_write(path) as file:
        sheet.save(file, "PNG")


def compare(args):
    """Train and score all bridges under one budget: a table and a chart in a folder of its own."""
    setup = open_setup(choose_setup(args, args.seed))
    folder = run_folder(args, setup, "compare")
    columns = {}
    curves = {}
    for name in BRIDGES:
        out = run_folder(args, setup, name)
        run = train(name, setup, out, train_gpt2.recipe_flags(args))
        curves[name] = train_gpt2.curve(run.rows, "val")
        columns[name] = evaluate(out, setup) | {"steps": run.step, "seconds": run.seconds}
    pictures = load_pictures(setup, "val").pictures
    if setup.tokenizer.name == "tiny" and all(picture["scene"] for picture in pictures):
        columns["map in words"] = map_facts(setup, pictures)
    rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key in dict.fromkeys(itertools.chain(*columns.values())):
        cells = [row.get(key, "") for row in columns.values()]
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        rows.append(f"| {key} | {' | '.join(cells)} |")
    table = "\n".join(rows)
    if train_gpt2.rank() == 0:
        with fineweb.atomic_write(folder / "table.md", "w") as file:
            file.write(table + "\n")
        train_gpt2.draw_chart(folder / "curves.png", "validation loss, nats per token", curves)
    print(f"\n{table}\n\n{folder} has table.md and curves.png")


# -----------------------------------------------------------------------------
# What each word looks at (Xu et al. 2015, figure 2)


@contextlib.contextmanager
def recorded_attention():
    """Within this context attention() keeps its weights in this list."""
    weights = []
    usual = train_gpt2.attention

    def attention(q, k, v, mask=None, is_causal=False):
        weights.append(train_gpt2.attention_weights(q, k, mask, is_causal))
        return usual(q, k, v, mask, is_causal)

    train_gpt2.attention = attention
    yield weights
    train_gpt2.attention = usual


@torch.no_grad()
def word_attention(captioner, vision, text, tokenizer):
    """(the words of a caption, how much each sees of the vision tokens: (words, S)).

    It is the attention where a word is predicted, the mean over heads and layers, in a pass over
    the picture (1, S, D) and the text. With a Q-Former words see queries, and those the picture.
    """
    ids = tokenizer.encode_ordinary(text)[: captioner.room]
    with autocast(vision.device), recorded_attention() as weights:
        captioner.loss_of_one(vision, torch.tensor([ids], device=vision.device))
    weights = [layer.float().mean((0, 1)) for layer in weights]  # each (queries, keys)
    n_layer = len(captioner.decoder.h)
    if isinstance(captioner.bridge, CrossAttentionBridge):
        seen = torch.stack(weights[::2]).mean(0)  # (P + T, S), before each block's own
    else:
        seen = torch.stack(weights[-n_layer:]).mean(0)[:, : captioner.bridge.P]
    if isinstance(captioner.bridge, QFormerBridge):
        seen = seen @ torch.stack(weights[1:-n_layer:2]).mean(0)  # (P + T, 32) @ (32, S)
    seen = seen[captioner.bridge.P - 1 :][: len(ids)].cpu().numpy()  # where each is predicted
    pieces = [tokenizer.decode_single_token_bytes(token) for token in ids]
    starts = [k for k in range(1, len(ids)) if pieces[k].startswith(b" ")]
    words = [b"".join(part).decode(errors="replace") for part in np.split(pieces, starts)]
    return words, [part.mean(0) for part in np.split(seen, starts)]


def draw_attention(path, image, words, seen):
    """The picture once for each word, light where it looks, with the share of the class token."""
    image = ImageOps.fit(image, (160, 160))  # the square that CLIP sees
    dark = Image.blend(image, Image.new("RGB", image.size), 0.5)
    white = Image.new("RGB", image.size, "white")
    cells = []
    for word, weights in zip(words, seen, strict=True):
        light = np.uint8(170 * weights[1:].reshape(4, 8) / weights[1:].max())
        light = Image.fromarray(light).resize(image.size, Image.BILINEAR)
        share = weights[0] / weights.sum()
        cells.append((Image.composite(white, dark, light), f"{word.strip()}  {share:.0%}"))
    draw_grid(path, cells, size=160, columns=6, below=40)


# -----------------------------------------------------------------------------
# Your own pictures

BATCH = 32  # pictures that go through CLIP at once


def find_pictures(names):
    """Files, what Pillow can open in folders and their subfolders, and addresses as they are."""
    Image.init()
    kinds = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for name in names:
        path = Path(name)
        if name.startswith(("https://", "http://")):
            found.append(name)
        elif path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file()]
            # hidden ones are left out, and those in hidden folders
            files = [f for f in files if "/." not in f"/{f.relative_to(path).as_posix()}"]
            pictures = [file for file in files if file.suffix.lower() in kinds]
            print(f"{name}: {len(pictures)} pictures, {len(files) - len(pictures)} other files")
            found += pictures
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{name} is not there", "check the path")
    if not found:
        raise UserError(f"{names[0]} has no pictures that Pillow can open", "name another folder")
    return found


def read_picture(name):
    """The picture in a file, or at an address, which is downloaded and kept nowhere."""
    if not str(name).startswith(("https://", "http://")):
        return coco_eval.load_image(name)
    answer = requests.get(name, timeout=30)
    answer.raise_for_status()
    return coco_eval.load_image(io.BytesIO(answer.content), name)


def sample(args):
    """Caption your own pictures with the best bridge of a run, training first what is missing."""
    fineweb.refuse_existing(args.grid, args.attention)
    names = find_pictures(args.sample)
    if args.attention and len(names) > 1:
        raise UserError("--attention draws one picture", "name only one")
    if len(names) == 1:
        read_picture(names[0])  # fails here, before anything is trained
    captioner, setup = trained_captioner(args)
    options = {"beams": args.beam or 1}
    if args.num or args.temperature is not None:
        options = {
            "temperature": 0.8 if args.temperature is None else args.temperature,
            "top_p": 0.9,
            "generator": torch.Generator(pick_device()).manual_seed(args.seed),
        }
    cells = []
    image = None
    for name, image, texts in caption_pictures(captioner, setup, names, args.num or 1, options):
        for text in texts:
            print(f"{name}: {text}", flush=True)
        if args.grid:
            cells.append((ImageOps.pad(image, (256, 256), color="white"), texts[0]))
    if image is None:
        raise UserError("none of these pictures can be read", "name others")
    if args.grid and train_gpt2.rank() == 0:
        draw_grid(args.grid, cells)
        print(f"{args.grid} has the pictures with their captions")
    if args.attention and train_gpt2.rank() == 0:
        vision = pool_tokens(setup.encoder(setup.encoder.preprocess(image)[None]))
        words, seen = word_attention(captioner, vision, texts[0], setup.tokenizer)
        draw_attention(args.attention, image, words, seen)
        print(f"{args.attention} has what each word looks at, and the share of the class token")


def caption_pictures(captioner, setup, names, num, options):
    """Yield (name, picture, its captions) for pictures that can be read, in order."""
    for i in range(0, len(names), BATCH):
        batch = []
        for name in names[i : i + BATCH]:
            try:
                batch.append((name, read_picture(name)))
            except (UserError, requests.RequestException) as error:
                print(error, file=sys.stderr)
        if batch:
            images = torch.stack([setup.encoder.preprocess(image) for _, image in batch])
            vision = pool_tokens(setup.encoder(images)).repeat_interleave(num, 0)
            texts = write_captions(captioner, vision, setup.tokenizer, **options)
            for k, (name, image) in enumerate(batch):
                yield name, image, texts[k * num : (k + 1) * num]


def trained_captioner(args):
    """(captioner, setup) for the flags: of --ckpt, or of a run, which is trained if it must be."""
    if args.ckpt:
        file = Path(args.ckpt)
        file = file / "best.safetensors" if file.is_dir() else file
        setup = open_setup(choose_setup(args, about=read_bridge(file)[0]), make=False)
        return load_captioner(file, setup), setup
    out, names, base = choose_run(args, seed=0)
    setup = open_setup(names)
    if not train_gpt2.is_finished(out):
        print(f"missing    the bridge: training {args.bridge}")
        train_bridge(args, setup, out, base)
    elif train_gpt2.recipe_flags(args):
        print(f"{out} is trained: flags of training are not used")
    return load_captioner(out / "best.safetensors", setup), setup


def read_bridge(path):
    """(what a bridge's file says of itself, its tensors)."""
    if not Path(path).exists():
        raise UserError(f"{path} is not there", "train the bridge to its end, or name another")
    about, tensors = train_gpt2.read_weights(path)
    if about.get("bridge") not in BRIDGES:
        raise UserError(f"{path} is not a bridge of this version", "name another")
    return about, tensors


def load_captioner(path, setup):
    """The Captioner of a bridge's file; UserError if its decoder or CLIP were others."""
    about, tensors = read_bridge(path)
    for flag, digest in (("lm", setup.decoder.digest), ("clip", setup.encoder.digest)):
        if about[f"digest of weights of --{flag}"] != digest:
            problem = f"{path} was trained with other weights of --{flag} (from {about[flag]})"
            raise UserError(problem, "name those, or train a bridge in another --out")
    captioner = build(about["bridge"], about["S"], about["D"], setup.decoder)
    captioner.bridge.load_state_dict(tensors)
    print(f"bridge     {path}, step {about['step']:,}")
    return captioner.eval().to(pick_device())


# -----------------------------------------------------------------------------
# Vision tokens on disk. CLIP never changes, so each picture goes through it once


def load_pictures(setup, split):
    """The PictureSet of a split, without the pictures that cannot be read."""
    pictures = coco_eval.read_dataset(setup.data, split, setup.karpathy)
    with train_gpt2.first_of_node_first():
        features = cached_features(setup.encoder, pictures, setup.data, split, setup.karpathy)
    rows = np.flatnonzero(~np.isnan(features[:, 0, 0]))
    if len(rows) < len(pictures):
        print(f"left out   {len(pictures) - len(rows)} pictures ({split}) that cannot be read")
    pictures = [pictures[i] for i in rows]
    captions = []
    for picture in pictures:
        group = []
        for text in picture["captions"]:  # the scorer ignores case and the full stop, too
            text = " ".join(text.split()).lower().removesuffix(".").rstrip()
            group.append([*setup.tokenizer.encode_ordinary(text), setup.tokenizer.eot_token])
        captions.append(group)
    return PictureSet(pictures, captions, features, rows)


def cached_features(encoder, pictures, folder, split, karpathy=False):
    """Vision tokens (pictures, S, D) as a memory map of float16; NaN where one cannot be read.

    There is one file for a folder, split, CLIP and precision. Beside it stands a digest of the
    pictures (name, size, time of change): where that differs, it is made again. An interrupted pass
    resumes with its last whole batch. A picture replaced by one of the same size and time goes
    unnoticed.
    """
    precision = "bf16" if train_gpt2.uses_bf16(pick_device()) else "fp32"
    key = train_gpt2.short_hash([str(folder.resolve()), karpathy, encoder.digest, precision])
    path = Path("data/features") / f"{folder.resolve().name}-{split}-{key}.bin"
    states = []
    for file in [picture["path"] for picture in pictures]:
        stat = file.stat() if file.exists() else None
        states.append((file.name, stat and (stat.st_size, stat.st_mtime_ns)))
    digest = train_gpt2.short_hash(states)
    digest_file = path.with_suffix(".sha256")
    shape = (len(pictures), 33, encoder.visual.transformer.width)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):  # of two commands the second one waits
        if not digest_file.exists() or digest_file.read_text() != digest:
            path.unlink(missing_ok=True)
            digest_file.write_text(digest)
        encode_pictures(encoder, pictures, path, shape)
        return np.memmap(path, np.float16, "r", shape=shape)


def encode_pictures(encoder, pictures, path, shape):
    """Send pictures through CLIP, batch by batch, to the end of a file."""

    def get_batch(i):
        return [prepared(encoder, picture) for picture in pictures[i * BATCH : (i + 1) * BATCH]]

    with open(path, "ab") as file:
        batch_bytes = 2 * BATCH * shape[1] * shape[2]
        if file.tell() == 2 * math.prod(shape):
            return
        done = file.tell() // batch_bytes
        file.truncate(done * batch_bytes)
        batches = math.ceil(len(pictures) / BATCH)
        loader = train_gpt2.prefetch(get_batch, done, batches, min(os.cpu_count(), 16))
        bar = tqdm(loader, "vision tokens", batches, initial=done, unit_scale=BATCH, disable=None)
        for _, batch in bar:
            tokens = pool_tokens(encoder(torch.stack(batch)))  # (B, S, D)
            file.write(tokens.cpu().numpy().astype(np.float16).tobytes())


def prepared(encoder, picture):
    """A picture as CLIP wants it, (3, H, W); NaN, and a line that says why, if it is broken."""
    try:
        return encoder.preprocess(coco_eval.load_image(picture["path"]))
    except UserError as error:
        tqdm.write(f"left out: {error}", file=sys.stderr)
        return torch.full_like(encoder.preprocess(Image.new("RGB", (8, 8))), math.nan)


# -----------------------------------------------------------------------------
# The toy setup and the full one

CLIP_FOR_GPU = "ViT-L-14-quickgelu/openai"
CLIP_FOR_CPU = "ViT-B-32-quickgelu/openai"
TOY_VISION = {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32}
TOY_CLIP = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {**TOY_VISION, "pool_type": "avg"},
    "text_cfg": {"context_length": 32, "vocab_size": 431, "width": 64, "heads": 2, "layers": 2},
}


def choose_setup(args, seed=0, about=None):
    """The names of a Setup: by flag, else what a bridge says of itself (about), else usual."""
    about = about or {}
    has_gpu = pick_device().type == "cuda"
    toy = about.get("toy", not args.data and not (has_gpu and Path("data/coco").exists()))
    seed = seed or about.get("seed", 0)
    if toy:
        lm, clip = toy_parts(seed)
    else:
        lm = "runs/gpt2" if not args.lm and train_gpt2.is_finished("runs/gpt2") else "gpt2"
        clip = CLIP_FOR_GPU if has_gpu else CLIP_FOR_CPU
    usual = {"data": "data/shapes" if toy else "data/coco", "lm": lm, "clip": clip}
    given = {key: getattr(args, key) for key in usual if getattr(args, key)}
    names = {key: given.get(key, about.get(key, usual[key])) for key in usual}
    karpathy = args.karpathy or about.get("karpathy", False)
    if karpathy and toy:
        raise UserError("--karpathy is a split of COCO", "name its folder with --data")
    return Setup(toy, Path(names["data"]), names["lm"], names["clip"], seed, karpathy)


def open_setup(names, make=True):
    """Load the frozen parts that a Setup names; in the toy setup what is missing is made."""
    if make and names.toy:
        make_toy_parts(names)
    elif make:
        coco_eval.find_layout(names.data, "val")  # or an error, before anything is downloaded
    print(f"setup      decoder {names.lm}, pictures {names.data}, CLIP {names.clip}")
    with train_gpt2.first_of_node_first():
        try:
            decoder, tokenizer = train_gpt2.load_model(names.lm)
        except UserError as error:
            raise UserError(f"--lm {names.lm}: {error.problem}", "name the decoder") from error
        decoder.digest = train_gpt2.fingerprint(decoder)  # before freeze() rounds it
        encoder = load_clip(names.clip)
    train_gpt2.freeze(decoder, pick_device())
    return replace(names, encoder=encoder, decoder=decoder, tokenizer=tokenizer)


def toy_parts(seed):
    """Where the toy decoder and CLIP of a seed are."""
    suffix = f"-{seed}" if seed else ""
    return f"runs/tiny{suffix}", f"runs/toy-clip{suffix}.safetensors"


def make_toy_parts(names):
    """Train the toy decoder and CLIP, and draw the pictures, where they are missing."""
    print("setup      toy: its bridges know colored shapes only. For photographs on a laptop:")
    print("           python coco_eval.py --download --val-only   (1.1 GB)")
    print("           python caption.py --data data/coco --bridge linear --sample img.jpg")
    lm, clip = toy_parts(names.seed)
    if names.lm == lm and not train_gpt2.is_finished(names.lm):
        print(f"missing    the decoder: python train_gpt2.py --preset tiny --out {names.lm}")
        recipe = train_gpt2.RECIPES["tiny"]
        train_gpt2.train("tiny", Path("data/toy"), names.lm, recipe, names.seed)
    with train_gpt2.first_of_node_first():
        if names.data == Path("data/shapes") and not names.data.exists():
            print(f"missing    the pictures: drawing them in {names.data}")
            coco_eval.make_shapes(names.data)
        if names.clip == clip and not Path(names.clip).exists():
            print("missing    the image encoder: a tiny CLIP on these pictures")
            train_clip(names.data, names.clip, names.seed)


def load_clip(which):
    """The ImageEncoder of our own file, or of open_clip: NAME/TAG or NAME/FILE."""
    import open_clip  # here, because it takes five seconds

    if Path(which).is_file():
        about, tensors = train_gpt2.read_weights(which)
        with fineweb.reading(which, "a CLIP of this program", RuntimeError):
            model = open_clip.CLIP(**about["clip"])
            model.load_state_dict(tensors)
        preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
    else:
        name, _, tag = str(which).partition("/")
        tag = tag or "openai"  # without a tag open_clip takes random weights
        options = {"pretrained": tag, "force_quick_gelu": tag == "openai"}  # OpenAI's activation
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tags and not open_clip.get_pretrained_cfg(name, tag):
            # a FILE: prepare pictures as for the NAME's published weights
            published = open_clip.get_pretrained_cfg(name, tags[0])
            for key in ("mean", "std", "interpolation", "resize_mode"):
                options[f"image_{key}"] = published.get(key)
            if f"{name}-quickgelu" in open_clip.list_models():
                print(f"note       {name} has GELU; weights of OpenAI's want {name}-quickgelu")
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
        except Exception as error:  # the hub's client and torch.load raise many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0][:90]
            what_to_do = f"name a vision transformer as {CLIP_FOR_CPU}, or NAME/FILE"
            raise UserError(f"--clip {which} cannot be loaded ({reason})", what_to_do) from error
    kinds = {type(module).__name__ for module in model.visual.modules()}
    if not {"VisionTransformer", "ResidualAttentionBlock"} <= kinds:
        raise UserError(f"--clip {which} is no vision transformer", f"name one, as {CLIP_FOR_CPU}")
    activation = sorted(kind for kind in kinds if "GELU" in kind)
    preprocessing = sorted(open_clip.get_model_preprocess_cfg(model).items())
    parts = [train_gpt2.fingerprint(model.visual), activation, preprocessing]
    digest = train_gpt2.short_hash(parts)
    return ImageEncoder(model.visual, preprocess, digest)


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
    recipe = Recipe(500, 64, 64, 1.5e-3, 50, muon=7, weight_decay=0.05)
    optimizer = train_gpt2.configure_optimizer(model, recipe)
    contrastive_loss = open_clip.ClipLoss()
    for step in tqdm(range(recipe.max_steps), desc="toy CLIP", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, recipe) * group.get("lr_scale", 1)
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
    train_gpt2.save_weights(path, model, {"clip": TOY_CLIP})


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
    """Token ids (B, 32) for CLIP, of lists of words: a begin, the words, <|endoftext|>, zeros.

    CLIP reads a text at its largest id, which is <|endoftext|>.
    """
    tokenizer = fineweb.get_tokenizer(fineweb.TOY_VOCAB)
    begin = tokenizer.eot_token - 1  # " .", which no caption has
    texts = [tokenizer.encode_ordinary(" ".join(words)) for words in captions]  # 19 at most
    return train_gpt2.pad([[begin, *text, tokenizer.eot_token] for text in texts], 0, 32)


# -----------------------------------------------------------------------------
# Recipes and runs

# the highest learning rate, and Muon's as a multiple of it (0: AdamW alone)
TOY_RATES = {"linear": (2.8e-2, 1.4), "cross": (1e-2, 2), "qformer": (7e-3, 2)}
FULL_RATES = {"linear": (2e-3, 0), "cross": (4e-4, 0), "qformer": (4e-4, 0)}


def choose_recipe(name, setup, pictures, flags, scst=False):
    """All bridges share one budget; only the learning rates are each one's own."""
    lr, muon = (TOY_RATES if setup.toy else FULL_RATES)["linear" if name == "blind" else name]
    has_gpu = pick_device().type == "cuda"
    passes = 4 if has_gpu else 1.5  # over the photographs: est. half an hour or one on a laptop
    batch = flags.get("batch_size", 64 if has_gpu and not setup.toy else 32)
    steps = 500 if setup.toy else math.ceil(passes * pictures / batch)
    decay = 0.1
    if scst:  # a step samples captions, which takes longer, and only corrects
        steps = math.ceil(0.6 * steps)
        lr /= 10
        decay = 0.0
    steps = flags.get("max_steps", steps)
    evaluations = 10 if has_gpu or setup.toy else 4
    every = {"eval_every": max(1, steps // evaluations), "log_every": 20 if setup.toy else 5}
    rates = {"cooldown": 0.6, "muon": muon, "weight_decay": decay}
    recipe = Recipe(steps, batch, batch, lr, math.ceil(0.03 * steps), **rates, **every)
    recipe = train_gpt2.with_flags(recipe, flags)
    train_gpt2.check_batch_size(recipe)
    return recipe


def open_run(name, setup, out, bridge, train_set, recipe, base=None):
    """The Run of a bridge. base: the file of the bridge from which self-critical training began."""
    S, D = train_set.features.shape[1:]
    about = {  # what one has to know to use it
        "bridge": name,
        "S": S,
        "D": D,
        "toy": setup.toy,
        "seed": setup.seed,
        "data": str(setup.data),
        "karpathy": setup.karpathy,
        "lm": setup.lm,
        "clip": setup.clip,
        "digest of pictures or captions": pictures_digest(setup),
        "digest of weights of --lm": setup.decoder.digest,
        "digest of weights of --clip": setup.encoder.digest,
    }
    optimizer = train_gpt2.configure_optimizer(bridge, recipe)
    identity = {  # what must stay the same when it is continued
        **{key: about[key] for key in about if key in ("bridge", "seed") or "digest" in key},
        "pictures": len(train_set),
        "batch size": recipe.batch_size,
        "digest of first weights": train_gpt2.fingerprint(bridge) if base else "",
    }
    return Run(Path(out), bridge, optimizer, recipe, identity, about, unit="pictures")


def pictures_digest(setup):
    """Tells sets of pictures for training apart, by their names and captions."""
    pictures = coco_eval.read_dataset(setup.data, "train", setup.karpathy)
    return train_gpt2.short_hash([(each["path"].name, each["captions"]) for each in pictures])


def run_folder(args, setup, name, scst=False):
    """--out, or runs/<setup>-<bridge>[-<seed>], and -scst; --compare has a folder for each."""
    suffix = f"-{setup.seed}" if setup.seed else ""
    kind = "toy" if setup.toy else setup.data.resolve().name
    kind += "-karpathy" if setup.karpathy else ""
    out = Path(args.out or f"runs/{kind}-{name}{suffix}")
    if args.compare and args.out:
        out = out / f"{name}{suffix}"
    return out.with_name(f"{out.name}-scst") if scst else out


def choose_run(args, seed):
    """(folder, names of the Setup, folder from which --scst goes on, or None) for the flags."""
    names = choose_setup(args, seed)
    out = run_folder(args, names, args.bridge, args.scst)
    base = run_folder(args, names, args.bridge) if args.scst else None
    if base and not train_gpt2.is_finished(out) and not train_gpt2.is_finished(base):
        raise UserError(f"{base} has no trained bridge", "train it to its end first")
    file = out / "best.safetensors"
    if base and not file.exists():
        file = base / "best.safetensors"
    if args.eval or file.exists():
        about, _ = read_bridge(file)
        if about["bridge"] != args.bridge or (seed and seed != about["seed"]):
            problem = f"{file.parent} has a {about['bridge']} bridge, of seed {about['seed']}"
            raise UserError(problem, "choose another --out")
        names = choose_setup(args, seed, about)
        given = args.data or args.eval
        if given and pictures_digest(names) != about["digest of pictures or captions"]:
            problem = f"{file.parent} was trained on other pictures, captions or another split"
            raise UserError(problem, "name its own with --data, or choose another --out")
    return out, names, base


def train_bridge(args, setup, out, base):
    """Train a bridge, or that of the run `base` further on CIDEr-D, and score it."""
    flags = train_gpt2.recipe_flags(args)
    if base:
        train_on_scores(args.bridge, setup, out, flags, base / "best.safetensors")
    else:
        train(args.bridge, setup, out, flags)
    evaluate(out, setup, args.beam)


# -----------------------------------------------------------------------------
# Command line


def main():
    """The commands at the top of this file."""
    parser = fineweb.make_parser(__doc__)
    positive = number(int, 1)
    add = parser.add_argument
    add("--bridge", choices=BRIDGES, help="how the picture gets into the decoder")
    add("--scst", action="store_true", help="train it further, on CIDEr-D itself")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--sample", nargs="+", metavar="PICTURE", help="files, folders, https://…")
    task.add_argument("--eval", action="store_true", help="score the bridge of a run")
    task.add_argument("--compare", action="store_true", help="train and score all bridges")
    add("--data", metavar="DIR", help="pictures in COCO's layout (data/coco)")
    add("--karpathy", action="store_true", help="COCO as Karpathy split it")
    add("--lm", metavar="CKPT", help="the decoder, as train_gpt2.py --ckpt names it")
    add("--clip", help=f"NAME/TAG or NAME/FILE ({CLIP_FOR_GPU} or, on a CPU, B-32)")
    add("--steps", dest="max_steps", type=positive, help="updates of the bridge")
    add("--batch", dest="batch_size", type=positive, help="pictures a step")
    add("--micro-batch", type=positive, help="pictures at once, for less memory")
    add("--lr", type=number(float, 0, 1), help="the highest learning rate")
    add("--out", metavar="DIR", help="the run (default: runs/<setup>-<bridge>)")
    add("--seed", type=number(int, 0, 10**6), default=0, help="also of --num")
    add("--ckpt", metavar="FILE", help="the bridge (default: that of the run)")
    add("--beam", type=number(int, 2, 100), metavar="W", help="captions by beam search, not greedy")
    add("--num", type=number(int, 1, 1000), help="so many sampled captions for each picture")
    add("--temperature", type=number(float, 0, 100), help="of sampled captions (0.8)")
    add("--grid", metavar="FILE", help="draw the pictures with their captions")
    add("--attention", metavar="FILE", help="draw what each word looks at")
    args = parser.parse_args()
    if not args.bridge and not args.compare and not args.ckpt:
        parser.error("there is nothing to do: give --bridge linear, --compare, or --ckpt")
    train_gpt2.join_processes()
    names = "data karpathy lm clip"
    flags = f"{names} max_steps batch_size micro_batch lr out"
    if args.compare:
        fineweb.only(parser, args, "--compare", f"{flags} seed")
        compare(args)
    elif args.sample:
        which = "ckpt lm clip" if args.ckpt else f"bridge scst {flags}"
        how = "beam" if args.beam else "num temperature"
        how += " seed" if args.num or args.temperature is not None else ""
        fineweb.only(parser, args, "--sample", f"{which} {how} grid attention")
        sample(args)
    else:
        what = "--eval" if args.eval else "training"
        flags = f"{names} out" if args.eval else flags
        fineweb.only(parser, args, what, f"bridge scst beam seed {flags}")
        out, names, base = choose_run(args, args.seed)
        if args.eval:
            evaluate(out, open_setup(names), args.beam)
        else:
            train_bridge(args, open_setup(names), out, base)
    train_gpt2.leave_processes()


if __name__ == "__main__":
    fineweb.command_line(main)
