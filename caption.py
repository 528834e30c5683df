"""
Pictures in words: a frozen CLIP and a frozen GPT-2, joined by a small bridge that is trained.

    python caption.py --bridge linear --sample img.jpg     caption pictures; trains what is missing
    python caption.py --bridge {linear,cross,qformer}      train and score a bridge, draw a grid
    python caption.py --bridge linear --eval [--beam 5]    results.json and scores.json
    python caption.py --bridge linear --scst [--sample]    train it further, on CIDEr-D; use that
    python caption.py --bridge linear --export FILE        the bridge alone, to share; --ckpt FILE
    python caption.py --compare                            all three, and a blind one, in one table

Without a GPU and COCO this is the toy setup: drawn pictures of colored shapes, a CLIP of 64 x 64
pixels that is trained here, and the decoder of `python train_gpt2.py`. With --data FOLDER (COCO
2017, or your own pictures in its layout) the same code joins OpenAI's CLIP to GPT-2 124M. A run
lives in runs/<setup>-<bridge>/: ckpt.pt, best.pt, log.csv, curves.png; its evaluation adds
results.json, scores.json, grid.png.

To read, in an evening: 0 why it works, 1 the image encoder, 2 the three bridges, 3 the captioner,
4 training a bridge, 5 self-critical training. For reference, after the banner: beam search,
evaluation and comparison, your own pictures, vision tokens on disk, the two setups, the command
line.

Letters beside the code: B batch, T time (tokens), C width of the decoder, P prefix, S vision
tokens, D their width, N targets of a row, V vocabulary, W beams, K samples.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import random
import shlex
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
# 0. Why it works
#
# CLIP (Radford et al. 2021) is two encoders, of pictures and of texts, that were trained on 400 M
# pictures from the web with their captions. In a batch of them each picture has to find its own
# caption among all, and each caption its picture (the contrastive loss: see train_clip()). So the
# image encoder knows what people say of a picture, but cannot say it. GPT-2, the decoder, can talk,
# but sees nothing. A bridge, small beside both, turns what the one sees into something that the
# other can read.
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
# token where <|endoftext|> was. The Q-Former has no class token: its first query stands at position
# 0, and its caption begins at 32, one place before linear's. No newline follows either of them.
# With cross the caption stands where the decoder has always seen a map: the bridge has to make up
# for that.

# -----------------------------------------------------------------------------
# 1. The image encoder: what CLIP sees, as tokens


class ImageEncoder:
    """The frozen image half of CLIP.

    It is a vision transformer (Dosovitskiy et al. 2021): the picture is cut into square patches, of
    14 x 14 pixels for ViT-L/14, and each is a token; one more, the class token, comes to describe
    the whole. We take the tokens after the second-to-last block: in OpenAI's CLIP no loss reaches
    what the last block makes of the patches. (The toy's are better there, too.)
    """

    def __init__(self, visual, preprocess, digest):
        self.visual = train_gpt2.freeze(visual, pick_device())
        self.preprocess = preprocess  # Pillow picture to (3, H, W)
        self.digest = digest  # of what its tokens depend on
        # PyTorch's attention on (B, T, C) copies its weights for each token: 40 times slower in
        # bf16 on a CPU than on (T, B, C), which open_clip can have too
        blocks = visual.transformer.resblocks
        if all(isinstance(block.attn, nn.MultiheadAttention) for block in blocks):
            for module in (visual.transformer, *(block.attn for block in blocks)):
                module.batch_first = False

    def prepare(self, path):
        """A picture as CLIP wants it, (3, H, W); UserError if it cannot be read."""
        image = coco_eval.load_image(path)
        try:
            return self.preprocess(image)
        except (ValueError, MemoryError) as error:
            raise UserError(f"{path} cannot be resized ({error})", "replace it") from error

    @torch.no_grad()
    def __call__(self, images):
        """Prepared pictures (B, 3, H, W) to class token and patches in reading order, (B, S, D)."""
        second_to_last = len(self.visual.transformer.resblocks) - 2
        with autocast(pick_device()):
            out = self.visual.forward_intermediates(
                images.to(pick_device()), indices=[second_to_last], stop_early=True,
                intermediates_only=True, output_fmt="NLC", output_extra_tokens=True)
        class_token = out["image_intermediates_prefix"][0]
        return torch.cat([class_token, out["image_intermediates"][0]], dim=1).float()


def pool_tokens(tokens):
    """Average the square of patches to 4 x 8: (B, 1 + n * n, D) to (B, 1 + 32, D).

    ViT-L/14's 256 patches (the toy's 64) become 32: a sequence eight times shorter, and for COCO a
    cache of 8 GB instead of 65.
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
#   qformer   32 vectors, gathered by learned queries      before the text  these, 1 to 4 layers
#   cross     attention to the vision tokens, per block    inside           these, attention
#   blind     what linear makes of zeros, to compare with  before the text  as linear
#
# Each has the same two methods: prefix(vision) gives the vectors before the text, or None;
# hook(vision) gives the function (i, x) -> x that the decoder calls before its block i, or None.
# A prefix begins at the scale of the decoder's own token vectors, so that it influences the decoder
# from the first step.


class LinearBridge(nn.Module):
    """A linear map of each vision token, as in LiMBeR (Merullo et al. 2022), and positions.

    LiMBeR showed that a linear map is enough to read a frozen image encoder with a frozen language
    model. ClipCap (Mokady et al. 2021) maps one vector of a picture to a prefix, with an MLP. The
    other two bridges begin with this map too.
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

    def hook(self, vision):
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

    def hook(self, vision):
        return None


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
        self.linear = LinearBridge(S, D, decoder)
        nn.init.normal_(self.linear.positions, std=token_scale(decoder))
        self.ln = nn.ModuleList(nn.LayerNorm(C) for _ in decoder.h)
        self.cross_attn = nn.ModuleList(Attention(decoder.config) for _ in decoder.h)
        for cross_attn in self.cross_attn:
            nn.init.zeros_(cross_attn.c_proj.weight)
            nn.init.zeros_(cross_attn.c_proj.bias)

    def prefix(self, vision):
        return None

    def hook(self, vision):
        vision = self.linear.prefix(vision)  # (B, S, C)
        keys_values = []  # once for all tokens
        for ln, cross_attn in zip(self.ln, self.cross_attn, strict=True):
            keys_values.append(cross_attn.keys_values(ln(vision)))

        def look(i, x):
            return x + self.cross_attn[i](self.ln[i](x), *keys_values[i])  # (B, T, C)

        return look


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
        y = attention(self.split_heads(self.q(x)), k, v)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


def token_scale(decoder):
    """The standard deviation of the decoder's token vectors."""
    return (decoder.wte.weight.float() + decoder.center).std().item()


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
        problem = f"{S} vision tokens leave no room in a context of {room}"
        raise UserError(problem, "use another --lm")
    return Captioner(BRIDGES[name](S, D, decoder), decoder)


# -----------------------------------------------------------------------------
# 3. The captioner. What it reads, and what it has to predict there:
#
#     linear, qformer    reads     v1 ... vP       a     red      circle             P = 33, 32
#                        predicts         a        red   circle   <|endoftext|>
#     cross              reads     <|endoftext|>   a     red      circle             P = 1
#                        predicts  a               red   circle   <|endoftext|>
#
# All captions of a picture are packed after one prefix (train_gpt2.py, chapter 6), where each
# attends to the prefix and to itself: one pass over P + 5 * 12 tokens does the work of five over
# P + 12.


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
        positions = self.decoder.wpe.weight[: self.bridge.P]
        prefix = self.bridge.prefix(vision)
        if prefix is None:
            return self.decoder.wte.weight[self.eot].expand(len(vision), 1, -1) + positions
        # freeze() moved the mean row of wte, center, into wpe: wte + wpe is what it was. A prefix
        # is not made of wte, so it needs wpe as it was
        return prefix + (positions - self.decoder.center)

    def pack(self, captions):
        """Packed captions; captions: for each picture token lists, ended by <|endoftext|>."""
        rows = [([], [ids[: self.room] for ids in group]) for group in captions]
        return train_gpt2.pack(rows, self.bridge.P)

    def forward(self, vision, packed, weights=None):
        """(None, mean loss), as GPT has it with targets.

        weights (B, captions): of each caption's loss, which is then summed and divided by B
        (chapter 5: K samples and K references).
        """
        if weights is None:
            return None, self.loss(vision, packed)
        nats = self.loss(vision, packed, "none")  # (B, N)
        weight = weights.gather(1, packed.owner.clamp(min=0))  # (B, N), of a token's caption
        return None, (nats * weight).sum() / len(weights)

    def loss(self, vision, packed, reduction="mean"):
        """Cross-entropy in nats of captions, given vision tokens (B, S, D); see GPT.loss."""
        words = self.decoder.embed(packed.idx, packed.positions)  # (B, T, C)
        x = torch.cat([self.beginning(vision), words], dim=1)  # (B, P + T, C)
        look = self.bridge.hook(vision)
        h = self.decoder.hidden_states(x, packed.mask, before_block=look)
        return self.decoder.loss(packed.at_source(h), packed.targets, reduction)

    @torch.no_grad()
    def generate(self, vision, max_new_tokens=None, prompt=None, temperature=0.0, **sampling):
        """Token ids (B, n + new) for vision tokens (B, S, D); greedy without a temperature.

        max_new_tokens: by default as many as a caption may have in training. prompt: (B, n) ids
        with which the captions begin.
        """
        if prompt is None:
            prompt = torch.empty(len(vision), 0, dtype=torch.long, device=vision.device)
        room = self.room - prompt.size(1)
        return train_gpt2.generate(
            self.decoder, prompt, min(max_new_tokens or room, room),
            prefix=self.beginning(vision), stop=self.eot, before_block=self.bridge.hook(vision),
            temperature=temperature, **sampling)


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

    batches = []
    for part in train_gpt2.share_out(chosen, recipe):
        packed = captioner.pack([train_set.captions[i] for i in part])
        vision, packed = train_gpt2.pin(train_set.vision(part), packed)
        batches.append((vision, packed, targets(part) / targets(chosen)))
    return batches


def train(name, setup, out, flags, restart=False, base=None):
    """Train a bridge, or go on with the run in `out`; returns the Run. The loop of train_gpt2.py.

    The toy recipe is 500 steps of 32 pictures, each with its five captions; the full one, four
    passes over COCO (on a CPU one and a half). flags: of the recipe, {name: value}. base: None, or
    the file of a trained bridge from which self-critical training begins (chapter 5; until there
    its branches can be skipped).
    """
    device = pick_device()
    train_set = load_pictures(setup, "train")
    val_set = load_pictures(setup, "val")
    torch.manual_seed(setup.seed)
    sizes = train_set.features.shape[1:]
    captioner = load_captioner(base, setup) if base else build(name, *sizes, setup.decoder)
    bridge = captioner.to(device).bridge
    recipe = choose_recipe(name, setup, len(train_set), flags, scst=bool(base))
    optimizer = train_gpt2.configure_optimizer(bridge, recipe)
    identity = run_identity(name, setup, train_set, recipe, bridge if base else None)
    names = {"lm": setup.lm, "clip": setup.clip, "data": str(setup.data)}
    run = Run(out, identity, recipe, "pictures", restart, names)
    run.resume(bridge, optimizer)
    if run.finished:
        return run
    parameters = sum(p.numel() for p in bridge.parameters())
    print(f"bridge     {out}: {parameters:,} trainable parameters")
    parallel = train_gpt2.parallelize(captioner, compile=False)
    sources = (train_set, captioner, recipe, setup.seed)
    if base:
        batches = sampled_batches(*sources, setup.tokenizer, run.step)
    else:
        get_batches = functools.partial(get_micro_batches, *sources)
        batches = train_gpt2.prefetch(get_batches, run.step, recipe.max_steps)
    tokenizer = setup.tokenizer if base else None
    with run:
        for step, parts in batches:
            if step % recipe.eval_every == 0 and (step or base):  # --scst: step 0, too
                run.record(validate(captioner, val_set, run, tokenizer), bridge, optimizer)
            lr = get_lr(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss, norm = train_gpt2.train_step(parallel, optimizer, parts, recipe, device)
            run.count_step(loss, norm)
            stop = run.stop_requested()
            if stop or run.step % recipe.log_every == 0 or run.step in (1, recipe.max_steps):
                run.progress(loss, lr, norm)
            if stop:
                run.save_and_exit(bridge, optimizer)
        run.record(validate(captioner, val_set, run, tokenizer), bridge, optimizer)
    return run


def validate(captioner, val_set, run, tokenizer=None):
    """Print the validation loss and return it for the log; the best bridge so far is in best.pt.

    tokenizer: given in self-critical training, where the best is that with the highest CIDEr-D.
    """
    token, caption = caption_loss(captioner, val_set, pick_device())
    print(f"           val {token:.4f} nats per token, {caption:.3f} per caption")
    row = {"val_val": token}
    score = token  # the lower the better
    if tokenizer:
        scores, _ = score_captions(captioner, val_set, tokenizer)
        row["cider"] = scores["corpus"]["CIDEr"]
        print(f"           CIDEr-D of greedy captions {row['cider']:.4f}")
        score = -row["cider"]
    if score < run.best and rank() == 0:
        run.best = score
        content = {"run": run.identity | run.names, "model": captioner.bridge.state_dict()}
        train_gpt2.save_checkpoint(run.out / "best.pt", content)
    return row


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
# So samples that score well are made more probable (Rennie et al. 2017):
#
#     samples = [sample(picture) for k in range(K)]                    # at temperature 1
#     rewards = [cider(sample) for sample in samples]
#     for k in range(K):
#         baseline = mean of the other rewards                         # Luo 2020
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
ANCHOR = 0.5  # weight of the references' cross-entropy; rewards lie between 0 and 10
END = "<end>"  # a word of the reward


def sampled_batches(train_set, captioner, recipe, seed, tokenizer, first_step):
    """Yield (step, [(vision, packed captions, their weights, share of the step's pictures)]).

    A picture's K samples and K of its references are packed together after its prefix, so one pass
    gives the log probabilities of all (tested by test_self_critical_gradient_equals_the_exact_one).
    """
    device = pick_device()
    references = []
    for picture in train_set.pictures:
        references.append([[*coco_eval.tokenize(text), END] for text in picture["captions"]])
    cider = coco_eval.CIDEr(references)
    for step in range(first_step, recipe.max_steps):
        generator = torch.Generator(device)
        generator.manual_seed((seed * 10**6 + step) * 1000 + rank())
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


def rewards_of(samples, references, cider, tokenizer):
    """The CIDEr-D of each sampled caption of a picture, whose references are lists of words."""
    references = [cider.weigh(words) for words in references]
    rewards = []
    for ids, text in zip(samples, train_gpt2.decode(samples, tokenizer), strict=True):
        words = coco_eval.tokenize(text) + [END] * ids.count(tokenizer.eot_token)
        rewards.append(cider.score(references, words))
    return rewards


def advantages_of(rewards):
    """Each reward (B, K) less the mean of the picture's K - 1 others."""
    baselines = (rewards.sum(1, keepdim=True) - rewards) / (rewards.size(1) - 1)
    return rewards - baselines


# =============================================================================
# From here on: tooling, for reference
# =============================================================================
# Beam search


def prefill(captioner, vision, W):
    """(cache, hidden states (B * W, C) of the last position): once a picture, then W rows of it."""
    decoder = captioner.decoder
    cache = [KVCache() for _ in decoder.h]
    look = captioner.bridge.hook(vision)
    h = decoder.hidden_states(captioner.beginning(vision), cache=cache, before_block=look)
    for layer in cache:
        layer.k = layer.k.repeat_interleave(W, 0)
        layer.v = layer.v.repeat_interleave(W, 0)
    return cache, h[:, -1].repeat_interleave(W, 0)


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
    W = beams
    device = vision.device
    first_row = W * torch.arange(B, device=device)[:, None]  # of the cache, for each picture
    tokens = torch.zeros(B, W, 0, dtype=torch.long, device=device)
    done = torch.zeros(B, W, dtype=torch.bool, device=device)
    total = torch.full((B, W), -math.inf, device=device)
    total[:, 0] = 0  # the beams are alike at first: only one may go on
    cache, h = prefill(captioner, vision, W)
    look = captioner.bridge.hook(vision.repeat_interleave(W, 0))
    for step in range(min(max_new_tokens or captioner.room, captioner.room)):
        log_p = decoder.logits(h).float().log_softmax(-1).view(B, W, -1)
        V = log_p.size(2)
        log_p[done] = -math.inf  # a finished beam is followed by <|endoftext|>, for free
        log_p[:, :, eot][done] = 0.0
        sums = total[:, :, None] + log_p  # (B, W, V)
        lengths = (tokens != eot).sum(2) + 1  # (B, W), with the next token, or the end
        worth = sums / lengths[:, :, None] ** length_penalty  # (B, W, V)
        best = worth.view(B, -1).topk(W).indices  # (B, W) of W * V, the best first
        parent = best // V  # (B, W), the beam that goes on
        token = best % V  # (B, W), with this token
        total = sums.view(B, -1).gather(1, best)  # (B, W)
        tokens = tokens.gather(1, parent[:, :, None].expand_as(tokens))
        tokens = torch.cat([tokens, token[:, :, None]], dim=2)  # (B, W, step + 1)
        done = done.gather(1, parent) | (token == eot)
        if done.all():
            break
        rows = (first_row + parent).view(-1)  # a beam takes over the cache of its parent
        for layer in cache:
            layer.k = layer.k[rows]
            layer.v = layer.v[rows]
        position = torch.full((1,), captioner.bridge.P + step, device=device)
        x = decoder.embed(token.view(-1, 1), position)
        h = decoder.hidden_states(x, cache=cache, before_block=look)[:, -1]
    return tokens[:, 0]


# -----------------------------------------------------------------------------
# Evaluation and comparison


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
                ids = beam_search(captioner, part, beams)
            else:
                ids = captioner.generate(part, prompt=prompt, **options)
        rows += ids.tolist()
    return [text.strip() for text in train_gpt2.decode(rows, tokenizer)]


def ask_facts(pictures, tokenizer, answer):
    """{fact: how often it is right} when answer() completes beginnings (B, n) that ask for it.

    Prints the first question about a place with its answer, as an example.
    """
    rng = random.Random(0)
    asked = [coco_eval.questions(picture["scene"], rng) for picture in pictures]
    shares = {}
    for fact in coco_eval.FACTS:
        texts = answer(torch.tensor([tokenizer.encode_ordinary(each[fact]) for each in asked]))
        pairs = zip(texts, pictures, strict=True)
        correct = [coco_eval.facts(text, p["scene"])[fact] is True for text, p in pairs]
        shares[fact] = sum(correct) / len(correct)
        if fact == "place":
            verdict = "right" if correct[0] else "wrong"
            print(f'asked      "{asked[0][fact]} ...", for example: "{texts[0]}" is {verdict}')
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


def evaluate(out, setup, beam=None):
    """Score the best bridge of a run on the validation pictures: print, write files, return a dict.

    The files are results.json, scores.json, grid.png (of beam search: results_beam.json ...).
    "shuffled": each caption with the tokens of another picture; what is right then was guessed.
    """
    device = pick_device()
    captioner = load_captioner(Path(out) / "best.pt", setup)
    val_set = load_pictures(setup, "val")
    decoding = f"beam {beam}" if beam else "greedy"
    scores, texts = score_captions(captioner, val_set, setup.tokenizer, beam or 1)
    row = {
        "parameters": sum(p.numel() for p in captioner.bridge.parameters()),
        "pictures": len(val_set),
        "decoding": decoding,
        **scores["corpus"],
        "nats per caption": caption_loss(captioner, val_set, device)[1],
        "shuffled": caption_loss(captioner, val_set.shuffled(), device)[1],
    }
    lines = []
    if all(picture["scene"] for picture in val_set.pictures):  # the toy pictures
        facts, lines = scene_facts(captioner, setup, val_set, texts)
        row |= facts
    if rank() == 0:
        write_scores(Path(out), val_set.pictures, texts, row | scores, "_beam" if beam else "")
    losses = f"{row['nats per caption']:.2f} nats per caption, shuffled {row['shuffled']:.2f}"
    print(f"{len(val_set)} validation pictures of {setup.data}, {decoding}: {losses}")
    print("\n".join([coco_eval.table(scores, len(val_set)), *lines]))
    if coco_eval.find_layout(setup.data, "val")[2]:
        print("a tenth of the pictures was held out: not comparable with results on val2017")
    print(f"{out} has best.pt, results, scores, curves.png and grid.png")
    return row


def scene_facts(captioner, setup, val_set, texts):
    """({fact: share}, lines to print) of toy pictures, whose scenes are known, and their captions.

    Also of pictures with pairs of color and shape that no training picture has ("unseen pairs").
    """
    pairs = zip(texts, val_set.pictures, strict=True)
    wrong = [False in coco_eval.facts(text, p["scene"]).values() for text, p in pairs]
    row = {"captions true": 1 - sum(wrong) / len(wrong)}
    unseen = load_pictures(setup, "unseen")
    lines = []
    groups = {"": val_set, ", unseen pairs": unseen, ", shuffled": val_set.shuffled()}
    for kind, group in groups.items():
        parts = (captioner, group.vision(), setup.tokenizer)
        answer = functools.partial(write_captions, *parts, max_new_tokens=8)
        for fact, share in ask_facts(group.pictures, setup.tokenizer, answer).items():
            row[fact + kind] = share
        facts = [f"{fact} {row[fact + kind]:.2f}" for fact in coco_eval.FACTS]
        lines.append(f"{'facts' + kind:22} {'  '.join(facts)}")
    lines.append(f"captions without a false statement: {row['captions true']:.2f}")
    return row, lines


def write_scores(out, pictures, texts, scores, suffix):
    """results.json in COCO's format, scores.json and grid.png; the suffix is for beam search."""
    results = [{"image_id": p["id"], "caption": t} for p, t in zip(pictures, texts, strict=True)]
    fineweb.write_json(out / f"results{suffix}.json", results)
    fineweb.write_json(out / f"scores{suffix}.json", scores)
    chosen = range(0, len(pictures), max(len(pictures) // 9, 1))[:9]
    draw_grid(out / f"grid{suffix}.png", [(pictures[i]["path"], texts[i]) for i in chosen])


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
    """Train and score all bridges under one budget, with one seed or more: a table and a chart."""
    results = []
    for seed in range(args.seed, args.seed + args.seeds):
        parts = choose_parts(args, seed=seed)  # in the toy setup the decoder's and CLIP's seed too
        results.append(compare_bridges(args, open_setup(parts)))
    folder = run_folder(args, choose_parts(args, seed=args.seed), "compare")
    table = "\n".join(comparison(results))
    if rank() == 0:
        with fineweb.atomic_write(folder / "table.md", "w") as file:
            file.write(table + "\n")
    print(f"\n{table}\n\n{folder} has table.md and curves.png")


def compare_bridges(args, setup):
    """{bridge: its numbers} for one seed, also of the map in words."""
    columns = {}
    curves = {}
    for name in BRIDGES:
        out = run_folder(args, setup, name)
        run = train(name, setup, out, train_gpt2.recipe_flags(args), args.restart)
        curves[name] = train_gpt2.curve(run.rows, "val_val")
        columns[name] = evaluate(out, setup) | {"seconds": run.seconds}
    pictures = load_pictures(setup, "val").pictures
    if setup.tokenizer.name == "tiny" and all(picture["scene"] for picture in pictures):
        columns["map in words"] = map_facts(setup, pictures)
    if rank() == 0:
        path = run_folder(args, setup, "compare") / "curves.png"
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
# What each word looks at (Xu et al. 2015, figure 2)


@torch.no_grad()
def look(captioner, vision, text, tokenizer):
    """(the words of a caption, how much each sees of the vision tokens: (words, S)).

    It is the attention where a word is predicted, the mean over heads and layers, in a pass over
    the picture (1, S, D) and the text. Behind a Q-Former words see queries, and those the picture.
    """
    ids = tokenizer.encode_ordinary(text)[: captioner.room]
    packed = captioner.pack([[[*ids, captioner.eot]]]).to(vision.device)
    train_gpt2.recorded = weights = []
    try:
        with autocast(vision.device):
            captioner.loss(vision, packed)
    finally:
        train_gpt2.recorded = None
    weights = [layer.float().mean((0, 1)) for layer in weights]  # each (queries, keys)
    n_layer = len(captioner.decoder.h)
    if isinstance(captioner.bridge, CrossAttentionBridge):
        seen = torch.stack(weights[::2]).mean(0)  # (P + T, S), before each block's own
    else:
        seen = torch.stack(weights[-n_layer:]).mean(0)[:, : captioner.bridge.P]
    if isinstance(captioner.bridge, QFormerBridge):
        seen = seen @ torch.stack(weights[1:-n_layer:2]).mean(0)  # (P + T, 32) @ (32, S)
    seen = seen[packed.source[0, : len(ids)]].cpu().numpy()
    pieces = [tokenizer.decode_single_token_bytes(token) for token in ids]
    starts = [k for k in range(1, len(ids)) if pieces[k].startswith(b" ")]
    words = [b"".join(part).decode(errors="replace") for part in np.split(pieces, starts)]
    return words, [part.mean(0) for part in np.split(seen, starts)]


def draw_attention(path, picture, words, seen):
    """The picture once for each word, light where it looks, with the share of the class token."""
    image = ImageOps.fit(coco_eval.load_image(picture), (160, 160))  # the square that CLIP sees
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

PICTURE_SUFFIXES = ".jpg .jpeg .jfif .png .gif .webp .avif .bmp .tif .tiff".split()


def find_pictures(names):
    """The paths of files, of the pictures in folders, and of addresses, which are downloaded."""
    paths = []
    for name in names:
        if name.startswith(("https://", "http://")):
            file = hashlib.sha256(name.encode()).hexdigest()[:8] + Path(name.split("?")[0]).suffix
            path = Path("data/pictures") / file
            with train_gpt2.rank_zero_first():
                name = fineweb.download(name, path, anew=rank() == 0)  # it may have changed
        name = Path(name)
        inside = [name]
        if not name.exists():
            raise UserError(f"{name} is not there", "check the path")
        if name.is_dir():
            inside = [path for path in sorted(name.iterdir())
                      if path.suffix.lower() in PICTURE_SUFFIXES]
        if not inside:
            kinds = " ".join(PICTURE_SUFFIXES)
            raise UserError(f"{name} has no pictures ({kinds})", "name another folder")
        paths += inside
    return paths


def sample(args):
    """Caption your own pictures with the best bridge of a run, training first what is missing."""
    paths = find_pictures(args.sample)
    if args.attention and len(paths) > 1:
        raise UserError("--attention draws one picture", "name only one")
    for file in filter(None, (args.grid, args.results, args.attention)):
        if Path(file).is_dir() or Path(file).resolve() in [path.resolve() for path in paths]:
            raise UserError(f"{file} cannot be written to", "name another file")
    if len(paths) == 1:
        coco_eval.load_image(paths[0])  # fails here, before anything is trained
    bridge, setup = trained_captioner(args)
    captioner = load_captioner(bridge, setup)
    options = {"beams": args.beam or 1}
    if args.num or args.temperature is not None or args.top_p:
        options = {
            "temperature": 0.8 if args.temperature is None else args.temperature,
            "top_p": args.top_p or 0.9,
            "generator": torch.Generator(pick_device()).manual_seed(args.seed),
        }
    captions = {}
    for path, texts in caption_pictures(captioner, setup, paths, args.num or 1, options):
        for text in texts:
            print(f"{path}: {text}")
        captions[path] = texts[0]
    if not captions:
        raise UserError("none of these pictures can be read", "name others")
    if args.grid:
        draw_grid(args.grid, captions.items())
        print(f"{args.grid} has the pictures with their captions")
    if args.attention and not captions[paths[0]]:
        raise UserError("the caption is empty", "there is no word whose attention could be drawn")
    if args.attention:
        vision = pool_tokens(setup.encoder(setup.encoder.prepare(paths[0])[None]))
        words, seen = look(captioner, vision, captions[paths[0]], setup.tokenizer)
        draw_attention(args.attention, paths[0], words, seen)
        print(f"{args.attention} has what each word looks at, and the share of the class token")
    if args.results:
        results = [{"image_id": str(path), "caption": text} for path, text in captions.items()]
        fineweb.write_json(args.results, results)
        print(f"{args.results} has the captions")


def caption_pictures(captioner, setup, paths, num, options):
    """Yield (path, its captions) for pictures that can be read, in order; threads read ahead."""

    def get_batch(i):
        batch = []
        for path in paths[i * CLIP_BATCH : (i + 1) * CLIP_BATCH]:
            try:
                batch.append((path, setup.encoder.prepare(path)))
            except UserError as error:
                tqdm.write(f"error: {error}", file=sys.stderr)
        return batch

    for _, batch in train_gpt2.prefetch(get_batch, 0, math.ceil(len(paths) / CLIP_BATCH), ahead=2):
        if batch:
            vision = pool_tokens(setup.encoder(torch.stack([image for _, image in batch])))
            size = max(1, len(batch) // num)  # pictures whose captions are written at once
            texts = []
            for part in vision.split(size):
                part = part.repeat_interleave(num, 0)  # (pictures * num, S, D)
                texts += write_captions(captioner, part, setup.tokenizer, **options)
            for k, (path, _) in enumerate(batch):
                yield path, texts[k * num : (k + 1) * num]


def trained_captioner(args):
    """(file of a bridge, Setup) for the flags: --ckpt, or a run, which is trained if it must be."""
    if args.ckpt:
        parts = choose_parts(args, run=read_bridge(args.ckpt)[0])
        return args.ckpt, open_setup(parts, needs_pictures=False)
    out, parts, base = choose_run(args, seed=0)
    flags = train_gpt2.recipe_flags(args)
    is_missing = args.restart or flags or not train_gpt2.is_finished(out / "ckpt.pt")
    base = trained_bridge(base) if base and is_missing else None
    setup = open_setup(parts, needs_pictures=is_missing)
    if is_missing:
        print(f"missing    the bridge: training {args.bridge}")
        train(args.bridge, setup, out, flags, args.restart, base)
        evaluate(out, setup)
    return out / "best.pt", setup


def load_captioner(path, setup):
    """The Captioner of a bridge's file; UserError if its decoder or CLIP was another."""
    run, tensors = read_bridge(path)
    here = {"lm": setup.decoder_digest, "clip": setup.encoder.digest}
    for part, digest in here.items():
        if run[f"{part}_digest"] != digest:
            problem = f"{path} was trained with other weights of --{part} (from {run[part]})"
            raise UserError(problem, "name those, or train the bridge anew (--restart)")
    captioner = build(run["bridge"], run["S"], run["D"], setup.decoder)
    with fineweb.reading(path, "a bridge of this version", RuntimeError, what_to_do="train anew"):
        captioner.bridge.load_state_dict(tensors)
    return captioner.eval().to(pick_device())


def read_bridge(path):
    """(what a bridge needs: decoder, CLIP ..., its tensors), from a checkpoint or an export."""
    if Path(path).suffix != ".safetensors":
        checkpoint = train_gpt2.read_checkpoint(path)
        run, tensors = checkpoint["run"], checkpoint["model"]
    else:
        what = "a bridge that --export wrote"
        with fineweb.reading(path, what, SafetensorError, FileNotFoundError):
            with safe_open(path, "pt") as file:
                run = dict(json.loads(file.metadata()["run"]))
                tensors = {key: file.get_tensor(key) for key in file.keys()}
    needed = {"bridge", "toy", "seed", "lm", "lm_digest", "clip", "clip_digest", "S", "D"}
    if not needed <= run.keys() or run["bridge"] not in BRIDGES:
        raise UserError(f"{path} is not a bridge of this version", "name another, or --restart")
    if not all(type(run[key]) is int and 0 < run[key] < 10**5 for key in ("S", "D")):
        raise UserError(f"{path} has impossible sizes", "get it again")
    return run, tensors


def export(args):
    """Write a trained bridge alone as a safetensors file, with what it needs in its metadata."""
    path = Path(args.export.removesuffix(".safetensors") + ".safetensors")
    if args.export.endswith("/") or Path(args.export).is_dir():
        raise UserError(f"{args.export} is a folder", "name a file")
    run, tensors = read_bridge(trained_bridge(choose_run(args, args.seed)[0]))
    run.pop("data", None)  # nobody else has this folder
    with fineweb.atomic_write(path) as file:
        file.write(save(tensors, metadata={"run": json.dumps(run)}))
    name = shlex.quote(str(path))
    print(f"{path} has the bridge: python caption.py --ckpt {name} --sample img.jpg")


# -----------------------------------------------------------------------------
# Vision tokens on disk. CLIP never changes, so each picture goes through it once

CLIP_BATCH = 64


def load_pictures(setup, split):
    """The PictureSet of a split, without the pictures that cannot be read."""
    pictures = coco_eval.read_dataset(setup.data, split)
    with train_gpt2.rank_zero_first():
        features, left_out = cached_features(setup.encoder, pictures, setup.data.name)
    rows = np.setdiff1d(np.arange(len(pictures)), left_out)
    if len(left_out):
        print(f"left out   {len(left_out)} of {len(pictures)} pictures ({split}) cannot be read")
    if not len(rows):
        raise UserError(f"no picture of {setup.data} ({split}) can be read", "check the folder")
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
    """(vision tokens (pictures, S, D) as a memory map of float16, indices of unreadable pictures).

    The file is named after a digest of CLIP, the precision and the pictures (path, size, time of
    change). An interrupted pass resumes with its last whole batch. A picture that cannot be read is
    NaN; it is listed beside the file, and tried again each time.
    """
    precision = "bf16" if train_gpt2.uses_bf16(pick_device()) else "fp32"
    digest = hashlib.sha256(f"{encoder.digest} {precision} 4x8".encode())
    for picture in pictures:
        path = os.path.abspath(picture["path"])
        change = None
        if os.path.exists(path):  # which has no quarrel with odd names
            change = (os.stat(path).st_size, os.stat(path).st_mtime_ns)
        digest.update(f"{picture['id']} {path} {change}\n".encode("utf-8", "surrogatepass"))
    path = Path("data/features") / f"{name}-{digest.hexdigest()[:16]}.bin"
    shape = (len(pictures), 33, encoder.visual.transformer.width)
    list_file = path.with_suffix(".json")  # of what was left out
    whole = path.exists() and path.stat().st_size == 2 * math.prod(shape)
    if not whole:
        encode_pictures(encoder, pictures, path, shape)
    features = np.memmap(path, np.float16, "r+", shape=shape)
    if whole and list_file.exists():
        left_out = json.loads(list_file.read_bytes())
        for i in left_out:
            image = prepared(encoder, pictures[i])[None]
            if not image.isnan().any():
                features[i] = encode(encoder, image)[0]
        left_out = [i for i in left_out if np.isnan(features[i, 0, 0])]
    else:
        left_out = np.flatnonzero(np.isnan(features[:, 0, 0])).tolist()
    fineweb.write_json(list_file, left_out)
    return features, left_out


def encode(encoder, images):
    """Vision tokens (B, S, D), float16, of prepared pictures."""
    return pool_tokens(encoder(images)).cpu().numpy().astype(np.float16)


def encode_pictures(encoder, pictures, path, shape):
    """Send pictures through CLIP, batch by batch, to a file that appears when it is whole."""

    def get_batch(i):
        batch = pictures[i * CLIP_BATCH : (i + 1) * CLIP_BATCH]
        return torch.stack([prepared(encoder, picture) for picture in batch])

    part = path.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    batch_bytes = 2 * CLIP_BATCH * shape[1] * shape[2]
    with fineweb.lock(part), open(part, "ab") as file:
        done = file.tell() // batch_bytes
        file.truncate(done * batch_bytes)
        batches = math.ceil(len(pictures) / CLIP_BATCH)
        loader = train_gpt2.prefetch(get_batch, done, batches, min(os.cpu_count(), 16))
        bar = tqdm(loader, "vision tokens", initial=done, total=batches, unit_scale=CLIP_BATCH,
                   unit=" pictures", disable=None)
        for _, batch in bar:
            file.write(encode(encoder, batch).tobytes())
        file.flush()
        os.replace(part, path)


def prepared(encoder, picture):
    """A picture as CLIP wants it, (3, H, W); NaN, and a line that says why, if it is broken."""
    try:
        return encoder.prepare(picture["path"])
    except UserError as error:
        tqdm.write(f"left out: {error}")
        return torch.full_like(encoder.preprocess(Image.new("RGB", (8, 8))), math.nan)


# -----------------------------------------------------------------------------
# The toy setup and the full one

CLIP_FOR_GPU = "ViT-L-14-quickgelu/openai"
CLIP_FOR_CPU = "ViT-B-32-quickgelu/openai"
TOY_CLIP = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32,
                   "pool_type": "avg"},
    "text_cfg": {"context_length": 32, "vocab_size": 431, "width": 64, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Parts:
    """Which frozen parts and pictures the command line, or a run, asks for."""

    toy: bool
    data: Path
    lm: str  # as train_gpt2.py --ckpt names it
    clip: str  # our own checkpoint, or open_clip's NAME/TAG or NAME/FILE
    seed: int  # in the toy setup also that of the decoder and of CLIP


@dataclass(frozen=True)
class Setup(Parts):
    """The frozen parts, loaded."""

    encoder: ImageEncoder
    decoder: train_gpt2.GPT
    tokenizer: object
    decoder_digest: str


def choose_parts(args, seed=0, run=None):
    """The Parts for the flags, or else those of the bridge whose `run` is given.

    UserError, before anything is loaded, for a flag that names another part than the run has. What
    lies on this disk may be the same under another name: load_captioner() looks.
    """
    has_gpu = pick_device().type == "cuda"
    toy = not args.data and not (has_gpu and Path("data/coco").exists())
    suffix = f"-{seed}" if seed else ""
    if run:
        given = {"seed": seed, "bridge": args.bridge, "lm": args.lm, "clip": args.clip}
        for flag, value in given.items():
            if not value or value == run[flag]:
                continue
            on_disk = Path(str(value)).exists() or Path(str(value).partition("/")[2]).is_file()
            if not (on_disk and flag in ("lm", "clip")):
                problem = f"the bridge was trained with --{flag} {run[flag]}, not {value}"
                raise UserError(problem, "leave the flag out, or choose another --out")
        toy, seed = run["toy"], run["seed"]
        lm, clip = run["lm"], run["clip"]
    elif toy:
        lm, clip = f"runs/tiny{suffix}/ckpt.pt", f"runs/toy-clip{suffix}/ckpt.pt"
    else:
        lm = "runs/gpt2/ckpt.pt" if train_gpt2.is_finished("runs/gpt2/ckpt.pt") else "gpt2"
        clip = CLIP_FOR_GPU if has_gpu else CLIP_FOR_CPU
    usual = "data/shapes" if toy else "data/coco"
    data = Path(args.data or (run or {}).get("data", usual))
    return Parts(toy, data, args.lm or lm, args.clip or clip, seed)


def open_setup(parts, needs_pictures=True):
    """Load the frozen parts; in the toy setup what is missing is made."""
    if parts.toy:
        make_toy_parts(parts)
    else:
        if needs_pictures:
            coco_eval.find_layout(parts.data, "val")  # or an error, before all is downloaded
        print(f"setup      decoder {parts.lm}, pictures {parts.data}, CLIP {parts.clip}")
        if parts.clip == CLIP_FOR_CPU and pick_device().type == "cpu":
            print(f"           (there is no GPU: {CLIP_FOR_GPU} is 18 times as much work)")
    with train_gpt2.rank_zero_first():
        decoder, tokenizer, _ = train_gpt2.load_model(parts.lm)
        decoder_digest = fingerprint(decoder)
        encoder = load_clip(parts.clip)
    train_gpt2.freeze(decoder, pick_device())
    return Setup(*vars(parts).values(), encoder, decoder, tokenizer, decoder_digest)


def make_toy_parts(parts):
    """Train the toy decoder and CLIP, and draw the pictures, where they are missing."""
    print("setup      toy: its bridges know colored shapes only. For photographs on a laptop:")
    print("           python coco_eval.py --download --val-only   (1.1 GB)")
    print("           python caption.py --data data/coco --bridge linear --sample img.jpg")
    suffix = f"-{parts.seed}" if parts.seed else ""
    out = f"runs/tiny{suffix}"
    if parts.lm == f"{out}/ckpt.pt" and not train_gpt2.is_finished(parts.lm):
        print(f"missing    the decoder: python train_gpt2.py --preset tiny --out {out}")
        data = train_gpt2.default_data("tiny")
        with train_gpt2.rank_zero_first():
            fineweb.make_toy_text(data)
        try:
            train_gpt2.train("tiny", data, out, train_gpt2.RECIPES["tiny"], parts.seed)
        except UserError as error:
            raise UserError(f"the decoder: {error.args[0]}", f"finish or remove {out}") from error
    with train_gpt2.rank_zero_first():
        if parts.data == Path("data/shapes") and not (parts.data / "unseen").exists():
            print(f"missing    the pictures: drawing them in {parts.data}")
            coco_eval.make_shapes(parts.data)
        if parts.clip == f"runs/toy-clip{suffix}/ckpt.pt" and not Path(parts.clip).exists():
            print("missing    the image encoder: a tiny CLIP on these pictures")
            train_clip(parts.data, parts.clip, parts.seed)


def fingerprint(module):
    """A short digest of a module's weights, from the first numbers of each tensor."""
    digest = hashlib.sha256()
    for name, t in module.state_dict().items():
        sample = t.flatten()[:16].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(t.shape)}".encode() + sample)
    return digest.hexdigest()[:16]


def load_clip(which):
    """The ImageEncoder of our own checkpoint, or of open_clip: NAME/TAG or NAME/FILE.

    Its digest is that of the weights, the activation and the preprocessing.
    """
    import open_clip  # here, because it takes five seconds

    if Path(which).suffix == ".pt" and Path(which).exists():
        checkpoint = train_gpt2.read_checkpoint(which, holds="clip")
        model = open_clip.CLIP(**checkpoint["clip"])
        model.load_state_dict(checkpoint["model"])
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
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
        except Exception as error:  # the hub's client and torch.load raise many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0][:90]
            what_to_do = f"name a vision transformer as {CLIP_FOR_CPU}, or NAME/FILE"
            raise UserError(f"--clip {which} cannot be loaded ({reason})", what_to_do) from error
    if not isinstance(model.visual, open_clip.transformer.VisionTransformer):
        raise UserError(f"--clip {which} is no vision transformer", f"name one, as {CLIP_FOR_CPU}")
    kinds = {type(module).__name__ for module in model.visual.modules()}
    activation = sorted(kind for kind in kinds if "GELU" in kind)
    preprocessing = sorted(open_clip.get_model_preprocess_cfg(model).items())
    identity = f"{fingerprint(model.visual)} {activation} {preprocessing}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
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
    """Token ids (B, 32) for CLIP, of lists of words: a begin, the words, <|endoftext|>, zeros.

    CLIP reads a text at its largest id, which is <|endoftext|>.
    """
    tokenizer = fineweb.get_tokenizer("tiny")
    begin = tokenizer.eot_token - 1  # " .", which no caption has
    rows = []
    for words in captions:  # 21 tokens at most
        tokens = [begin, *tokenizer.encode_ordinary(" ".join(words)), tokenizer.eot_token]
        rows.append(tokens + [0] * (32 - len(tokens)))
    return torch.tensor(rows)


# -----------------------------------------------------------------------------
# Recipes and runs

# the highest learning rate, and Muon's as a multiple of it (0: AdamW alone)
TOY_RATES = {"linear": (2.8e-2, 1.4), "cross": (1e-2, 2), "qformer": (7e-3, 2)}
FULL_RATES = {"linear": (2e-3, 0), "cross": (4e-4, 0), "qformer": (4e-4, 0)}


def choose_recipe(name, setup, pictures, flags, scst=False):
    """All bridges share one budget; only the learning rates are each one's own."""
    rates = TOY_RATES if setup.toy else FULL_RATES
    lr, muon = rates["linear" if name == "blind" else name]
    has_gpu = pick_device().type == "cuda"
    passes = 4 if has_gpu else 1.5  # over the photographs: an hour on a laptop
    batch = flags.get("batch_size", 64 if has_gpu and not setup.toy else 32)
    steps = 500 if setup.toy else math.ceil(passes * pictures / batch)
    decay = 0.1
    if scst:  # a step samples captions, which takes longer, and only corrects
        steps = math.ceil(0.6 * steps)
        lr /= 10
        decay = 0.0
    steps = flags.get("max_steps", steps)
    warmup = max(1, round(0.03 * steps))
    evaluations = 10 if has_gpu or setup.toy else 4
    recipe = Recipe(steps, batch, batch, lr, warmup, cooldown=0.6, muon=muon, weight_decay=decay,
                    eval_every=max(1, steps // evaluations), log_every=20 if setup.toy else 5)
    return train_gpt2.with_flags(recipe, flags)


def run_identity(name, setup, train_set, recipe, base=None):
    """What has to stay the same when a run is continued, and what its bridge needs to be used."""
    S, D = train_set.features.shape[1:]
    identity = {
        "toy": setup.toy,
        "bridge": name,
        "S": S,
        "D": D,
        "captions": hashlib.sha256(json.dumps(train_set.captions).encode()).hexdigest()[:16],
        "lm_digest": setup.decoder_digest,
        "clip_digest": setup.encoder.digest,
        "seed": setup.seed,
        "batch_size": recipe.batch_size,
    }
    return identity | ({"base": fingerprint(base)} if base else {})


def run_folder(args, parts, name, scst=False):
    """--out, or runs/<setup>-<bridge>[-<seed>], and -scst; --compare has a folder for each."""
    suffix = f"-{parts.seed}" if parts.seed else ""
    setup = "toy" if parts.toy else parts.data.resolve().name
    out = Path(args.out or f"runs/{setup}-{name}{suffix}")
    if not out.name:
        raise UserError(f"--out {out} has no name", "name a folder in it")
    if args.compare and args.out:
        out = out / f"{name}{suffix}"
    return out.with_name(f"{out.name}-scst") if scst else out


def choose_run(args, seed):
    """(folder, Parts, base) for the flags; the Parts are a run's own, unless it restarts.

    base: the folder of the run from which --scst goes on, else None.
    """
    parts = choose_parts(args, seed)
    out = run_folder(args, parts, args.bridge, args.scst)
    train_gpt2.refuse_other_files(out, "pictures")
    base = run_folder(args, parts, args.bridge) if args.scst else None
    bridge = (base or out) / "best.pt"
    if bridge.exists() and (base or not args.restart):
        parts = choose_parts(args, seed, read_bridge(bridge)[0])
    return out, parts, base


def trained_bridge(folder):
    """The best bridge of a run that has come to its end."""
    if not train_gpt2.is_finished(folder / "ckpt.pt"):
        raise UserError(f"{folder} has no trained bridge", "train it to its end first")
    return folder / "best.pt"


# -----------------------------------------------------------------------------
# Command line


def main():
    """The commands at the top of this file."""
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
    parts = parser.add_argument_group("the frozen parts and the pictures")
    parts.add_argument("--data", metavar="DIR", help="pictures in COCO's layout (data/coco)")
    parts.add_argument("--lm", metavar="CKPT", help="the decoder, as train_gpt2.py --ckpt names it")
    parts.add_argument("--clip", help=f"NAME/TAG or NAME/FILE ({CLIP_FOR_GPU} or, on a CPU, B-32)")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", dest="max_steps", type=positive, help="updates of the bridge")
    training.add_argument("--batch", dest="batch_size", type=positive, help="pictures a step")
    training.add_argument("--micro-batch", type=positive, help="pictures at once, for less memory")
    training.add_argument("--lr", type=number(float, 0, 1), help="the highest learning rate")
    training.add_argument("--restart", action="store_true", help="forget the run in the folder")
    group = parser.add_argument_group("runs")
    group.add_argument("--out", metavar="DIR", help="the run (default: runs/<setup>-<bridge>)")
    group.add_argument("--seed", type=number(int, 0, 10**6), default=0, help="also of --num")
    group.add_argument("--seeds", type=number(int, 1, 100), default=1, help="how many to --compare")
    captions = parser.add_argument_group("captions")
    captions.add_argument("--ckpt", metavar="FILE", help="the bridge (default: best.pt of the run)")
    captions.add_argument("--beam", type=number(int, 2, 100), metavar="W", help="else greedy")
    captions.add_argument("--grid", metavar="FILE", help="draw the pictures with their captions")
    captions.add_argument("--results", metavar="FILE", help="write the captions as COCO's results")
    captions.add_argument("--attention", metavar="FILE", help="draw what each word looks at")
    sampling = parser.add_argument_group("sampling, instead of the most probable caption")
    sampling.add_argument("--num", type=number(int, 1, 1000), help="captions for each picture")
    sampling.add_argument("--temperature", type=number(float, 0, 100), help="(0.8)")
    sampling.add_argument("--top-p", type=number(float, 0.001, 1), help="(0.9)")
    args = parser.parse_args()
    if not args.bridge and not args.compare and not args.ckpt:
        raise UserError("there is nothing to do", "give --bridge linear, --compare, or --ckpt")
    train_gpt2.join_processes()
    if args.compare:
        parser.only("--compare", "--out", "--seed", "--seeds", parts, training)
        compare(args)
    elif args.sample:
        groups = [captions] if args.beam else [captions, sampling]
        if args.num or args.temperature is not None or args.top_p:
            groups.append("--seed")
        groups += ["--lm", "--clip"] if args.ckpt else [parts, training, "--scst", "--out"]
        task = "--sample" + (" with --beam" if args.beam else "")
        parser.only(task, "--bridge", *groups)
        sample(args)
    elif args.export:
        parser.only("--export", "--bridge", "--scst", "--out", "--seed", parts)
        export(args)
    else:
        what = "--eval" if args.eval else "training"
        parser.only(what, "--beam", "--bridge", "--scst", "--out", "--seed", parts,
                    *([] if args.eval else [training]))
        out, chosen, base = choose_run(args, args.seed)
        folder = out if args.eval else base
        bridge = trained_bridge(folder) if folder else None  # or an error, before all is loaded
        setup = open_setup(chosen)
        if not args.eval:
            train(args.bridge, setup, out, train_gpt2.recipe_flags(args), args.restart, bridge)
        evaluate(out, setup, args.beam)
    train_gpt2.leave_processes()


if __name__ == "__main__":
    fineweb.command_line(main)
