"""
Every test of the project: python test_all.py (or pytest test_all.py -k word). No network, no GPU, some minutes on two cores.

Where an oracle exists, it is the judge: transformers, a float64 or brute-force version, the same run without interruption.
REAL_DATA names a folder of real data; tests that need it, or a package that is not installed, are skipped by name.
"""
import contextlib
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.nn import functional as F

import caption
import coco_eval
import fineweb
import hellaswag
import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, GPTConfig

HERE = Path(__file__).parent
REAL = Path(os.environ.get("REAL_DATA", "nowhere"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs REAL_DATA, a folder of real data")
measured = pytest.mark.skipif("MEASURE" not in os.environ, reason="measures speed: set MEASURE=1, and -s to see it")
SMALL = GPTConfig(block_size=16, vocab_size=48, n_layer=3, n_head=2, n_embd=32, init_std=0.3, vocab_padding=5)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny world's shards."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    fineweb.make_tiny(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def bpe():
    """The GPT-2 vocabulary, where there is real data."""
    if REAL.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str((REAL / "gpt2-bpe/tiktoken_cache").absolute())


def small_model(seed=0, config=SMALL):
    torch.manual_seed(seed)
    return GPT(config).eval()


def run(script, *args, cwd=None, **options):
    """Run one of the scripts as a user would; returns the finished process with its text."""
    return subprocess.run([sys.executable, HERE / script, *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=300, **options)


def assert_error(process, *words):
    """One line on stderr that begins with "error:" and has the words, and exit code 2."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    assert all(word in lines[0] for word in words), lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


@pytest.mark.parametrize("preset, V, count", [("gpt2", 50257, 124_439_808), ("gpt2", 50304, 124_475_904), ("gpt2-medium", 50257, 354_823_168),
                                              ("gpt2-large", 50257, 774_030_080), ("gpt2-xl", 50257, 1_557_611_200)])
def test_number_of_parameters(preset, V, count):
    config = train_gpt2.PRESETS[preset]
    with torch.device("meta"):
        model = GPT(GPTConfig(config.block_size, V, config.n_layer, config.n_head, config.n_embd))
    assert sum(p.numel() for p in model.parameters()) == count


def test_initialisation_is_gpt2s():
    model = small_model(config=GPTConfig(64, 512, 4, 4, 128))
    for name, p in model.named_parameters():
        if ".ln_" in name or name.startswith("ln_"):
            assert torch.equal(p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p))
        elif name.endswith("bias"):
            assert not p.any()
        else:
            expected = 0.02 / math.sqrt(8) if "c_proj" in name else 0.02         # two residual additions in each of four layers
            assert p.std().item() == pytest.approx(expected, rel=0.05), name


def plain_decoder(model, idx):
    """GPT-2 written out in float64, head by head and position by position; only the weights come from the model."""
    w = {name: p.double() for name, p in model.state_dict().items()}
    c, T = model.config, len(idx)

    def norm(x, name):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x, hs = w["wte.weight"][idx] + w["wpe.weight"][:T], c.n_embd // c.n_head
    for i in range(c.n_layer):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(c.n_embd, -1)
        y = torch.zeros_like(x)
        for head in range(c.n_head):
            s = slice(head * hs, (head + 1) * hs)
            for t in range(T):
                y[t, s] = (k[:t + 1, s] @ q[t, s] / math.sqrt(hs)).softmax(0) @ v[:t + 1, s]
        x = x + linear(y, f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + linear(0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3))), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def test_decoder_equals_a_plain_float64_one():
    model, idx = small_model(), torch.randint(0, 43, (12,))
    assert torch.allclose(model(idx[None])[0][0].double(), plain_decoder(model, idx), atol=1e-4)


def test_mask_hides_what_it_hides():
    model, idx = small_model(), torch.randint(0, 43, (2, 10))
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    assert torch.allclose(model.decode(model.embed(idx), mask), model.decode(model.embed(idx)), atol=1e-5)
    mask[5:, :3] = False                                   # positions 5 … do not see the first three, whatever stands there
    other = idx.clone()
    other[:, :3] = (other[:, :3] + 1) % 43
    positions = torch.arange(10)
    mask[3:5, :3] = False
    a, b = (model.decode(model.embed(i, positions), mask) for i in (idx, other))
    assert torch.allclose(a[:, 3:], b[:, 3:], atol=1e-5) and not torch.allclose(a[:, :3], b[:, :3], atol=1e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_its_gradients_equal_float64(reduction, monkeypatch):
    monkeypatch.setattr(train_gpt2.ChunkedCrossEntropy, "ROWS", 7)               # several chunks, the last one partial
    model = small_model()
    h, targets = torch.randn(3, 9, 32, requires_grad=True), torch.randint(0, 43, (3, 9))
    targets[0, :4] = targets[2, 8] = -100
    model.loss(h, targets, reduction).sum().backward()
    h64, w64 = h.detach().double().requires_grad_(), model.wte.weight.detach().double().requires_grad_()
    expected = F.cross_entropy((h64 @ w64.T).view(-1, 48), targets.view(-1), reduction=reduction)
    expected.sum().backward()
    assert torch.allclose(model.loss(h, targets, reduction).double().view(-1), expected.view(-1), atol=1e-5)
    assert torch.allclose(h.grad.double(), h64.grad, atol=1e-5) and torch.allclose(model.wte.weight.grad.double(), w64.grad, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model.loss(h, targets, reduction).double().view(-1), expected.view(-1), atol=1e-5)


def test_forward_returns_logits_or_loss():
    model, idx = small_model(), torch.randint(0, 43, (2, 8))
    logits, none = model(idx)
    nothing, loss = model(idx, idx.roll(-1, 1))
    assert none is None and nothing is None and logits.shape == (2, 8, 48)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.view(-1, 48), idx.roll(-1, 1).view(-1)).item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def plain_greedy(model, idx, n):
    """Greedy continuation of one row without a cache; a full context drops its older half."""
    context = idx.tolist()
    out = []
    for _ in range(n):
        if len(context) > 16:
            context = context[-8:]
        out.append(model(torch.tensor([context]))[0][0, -1, :43].argmax().item())
        context.append(out[-1])
    return out


@torch.no_grad()
def test_cached_equals_uncached_beyond_the_context():
    model = small_model()
    for length in (1, 5, 16, 40):                          # 40: a prompt longer than the context
        idx = torch.randint(0, 43, (3, length))
        out = model.generate(idx, 30, temperature=0)
        assert torch.equal(out[:, :length], idx)
        for row, start in zip(out[:, length:], idx):
            assert row.tolist() == plain_greedy(model, start[-16:], 30)
        options = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
        cached = model.generate(idx, 30, generator=torch.Generator().manual_seed(1), **options)
        assert torch.equal(cached, model.generate(idx, 30, generator=torch.Generator().manual_seed(1), use_cache=False, **options))


@torch.no_grad()
def test_several_tokens_behind_a_cache():
    model, idx = small_model(), torch.randint(0, 43, (2, 12))
    cache = [train_gpt2.KeyValues() for _ in model.h]
    parts = [model.decode(model.embed(part, torch.arange(begin, begin + part.size(1))), cache=cache) for begin, part in ((0, idx[:, :5]), (5, idx[:, 5:]))]
    assert torch.allclose(torch.cat(parts, dim=1), model.decode(model.embed(idx)), atol=1e-5)


@torch.no_grad()
def test_prefix_stands_before_the_ids():
    model, prefix = small_model(), torch.randn(2, 6, 32)
    for idx in (torch.randint(0, 43, (2, 3)), torch.empty(2, 0, dtype=torch.long)):
        out = model.generate(idx, 5, temperature=0, prefix=prefix)
        for _ in range(5):                                 # the same, looked at anew each time
            x = torch.cat([prefix, model.embed(idx, torch.arange(6, 6 + idx.size(1)))], dim=1)
            idx = torch.cat([idx, model.logits(model.decode(x))[:, -1:, :43].argmax(-1)], dim=1)
        assert torch.equal(out, idx)


@torch.no_grad()
def test_a_stopped_row_stays_stopped_and_padding_is_never_emitted():
    model = small_model()
    model.wte.weight[43:] = 10 * model.wte.weight[:5].sum(0)                     # padded rows that would often win
    idx = torch.randint(0, 43, (8, 4))
    free = model.generate(idx, 20, temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert free.max() < 43
    stop = free[0, 10].item()
    out = model.generate(idx, 20, temperature=0.5, generator=torch.Generator().manual_seed(0), stop=stop)
    for row, other in zip(out[:, 4:].tolist(), free[:, 4:].tolist()):
        end = other.index(stop) if stop in other else 20
        assert row[:end] == other[:end] and set(row[end:]) <= {stop}
    only = model.generate(idx[:1], 20, temperature=0.5, generator=torch.Generator().manual_seed(0), stop=stop)
    assert only.size(1) < 24 or stop not in only           # when all rows have stopped it ends


def test_sampling_follows_temperature_top_k_and_top_p():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(20_000, 4)
    share = lambda **options: (torch.bincount(train_gpt2.sample_token(logits, generator=torch.Generator().manual_seed(0), **options), minlength=4) / 20_000).tolist()
    assert share() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.015)
    assert share(temperature=0) == [1, 0, 0, 0]
    squares = [p * p for p in (0.5, 0.25, 0.15, 0.1)]
    assert share(temperature=0.5) == pytest.approx([s / sum(squares) for s in squares], abs=0.015)
    assert share(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.015)
    assert share(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.015)    # .5 alone does not reach .6
    assert share(top_p=0.8) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.015)


# ---------------------------------------------------------------------------------------------------------------------
# transformers as the oracle


@torch.no_grad()
def test_from_pretrained_gives_transformers_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    for n_layer, n_head, n_embd, T, V in ((12, 12, 768, 1024, 50257), (2, 4, 32, 24, 61)):    # GPT-2's own shape, and a small one
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=n_embd, n_layer=n_layer, n_head=n_head, initializer_range=0.05)).eval()
        theirs.save_pretrained(tmp_path / str(V))
        ours, idx = GPT.from_pretrained(tmp_path / str(V)).eval(), torch.randint(0, V, (2, 20))
        assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)


@torch.no_grad()
def test_export_gives_transformers_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = fineweb.get_tokenizer("tiny")
    model = small_model(config=train_gpt2.PRESETS["tiny"])
    train_gpt2.export_hf(model, tokenizer, tmp_path / "hf")
    theirs, idx = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(), torch.randint(0, 431, (2, 64))
    assert theirs.get_input_embeddings().weight.shape == (tokenizer.n_vocab, 128)             # padding rows are gone
    assert torch.allclose(model(idx)[0][..., :tokenizer.n_vocab], theirs(idx).logits, atol=1e-4)
    assert torch.allclose(GPT.from_pretrained(tmp_path / "hf")(idx)[0], theirs(idx).logits, atol=1e-4)


def test_what_is_no_gpt2_is_refused(tmp_path):
    from safetensors.torch import save_file
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a whole safetensors"):
        GPT.from_pretrained(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not hold a GPT-2"):
        GPT.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


def test_schedule_is_warm_up_then_cosine():
    recipe = train_gpt2.RECIPES["gpt2"]
    assert (recipe.steps, recipe.batch_tokens, recipe.warmup, recipe.weight_decay, recipe.clip) == (19_073, 524_288, 715, 0.1, 1.0)
    rate = lambda step: train_gpt2.learning_rate(step, recipe)
    assert rate(0) == pytest.approx(6e-4 / 715) and rate(714) == pytest.approx(6e-4) and rate(715) == pytest.approx(6e-4)
    assert rate((715 + 19_073) // 2) == pytest.approx(3.3e-4, rel=1e-3) and rate(19_072) == pytest.approx(6e-5, rel=1e-3)


def test_weight_decay_is_on_matrices_only():
    model = small_model()
    optimizer = train_gpt2.make_optimizer(model, train_gpt2.RECIPES["gpt2"])
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name in names.values() if name.endswith("weight") and "ln_" not in name}
    assert all(group["betas"] == (0.9, 0.95) and group["weight_decay"] in (0.0, 0.1) for group in optimizer.param_groups)


def some_training(tmp_path, **changes):
    fineweb.write_shard(tmp_path / "a_train_000001.bin", np.random.default_rng(0).integers(0, 43, 700))
    recipe = train_gpt2.Recipe(**{"steps": 20, "batch_tokens": 8 * 16, "micro_batch": 4, "lr": 1e-2, "warmup": 2, **changes})
    return train_gpt2.Training(small_model(), recipe, train_gpt2.Tokens([tmp_path / "a_train_000001.bin"]), seed=0, device="cpu")


def test_a_step_is_one_clipped_adamw_update(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "autocast", lambda device: contextlib.nullcontext())
    training = some_training(tmp_path)
    twin = small_model()
    x, y = training.tokens.batch(train_gpt2.step_windows(0, 0, 8, training.tokens.windows(16)), 16, 43)
    norm = lambda grads: torch.stack([g.norm() for g in grads]).norm()
    loss = F.cross_entropy(twin(x)[0].view(-1, 48), y.view(-1))
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    total, measured = training.update()
    assert total.item() == pytest.approx(loss.item(), rel=1e-5) and measured.item() == pytest.approx(norm(grads).item(), rel=1e-4)
    assert measured > 1                                    # so clipping matters; after one step Adam's first moment is a tenth of the clipped gradient
    moments = [training.optimizer.state[p]["exp_avg"] for p in training.raw.parameters()]
    assert norm(moments).item() == pytest.approx(0.1, rel=1e-3)


def test_micro_batches_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "autocast", lambda device: contextlib.nullcontext())
    losses = []
    for micro in (8, 4, 1):
        training = some_training(tmp_path, micro_batch=micro)
        losses.append([training.update()[0].item() for _ in range(12)])          # 44 windows: the partial last one comes in step 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    training = some_training(tmp_path)
    training.update()
    net, before = training.net, [p.clone() for p in training.raw.parameters()]
    state = {k: v.clone() for k, v in training.optimizer.state[training.raw.wte.weight].items()}
    training.net = lambda x, y: (None, net(x, y)[1] * math.nan)
    for _ in range(3):
        training.update()
    assert all(torch.equal(a, b) for a, b in zip(before, training.raw.parameters()))
    assert all(torch.equal(v, training.optimizer.state[training.raw.wte.weight][k]) for k, v in state.items())
    training.net = net
    training.update()
    assert (training.skipped, training.streak, training.worst) == (3, 0, 3)
    assert not torch.equal(before[0], training.raw.wte.weight)


LOSS_OF_THE_HEAD = """
import resource, sys, time, torch, train_gpt2
from torch.nn import functional as F
rows, way = 16_384, sys.argv[1]
torch.manual_seed(0)
h, w, y = torch.randn(rows, 768, requires_grad=True), (torch.randn(50_304, 768) * 0.02).requires_grad_(), torch.randint(50_257, (rows,))
h.grad, w.grad = torch.zeros_like(h), torch.zeros_like(w)

def loss():
    if way.startswith("linear_cross_entropy"):
        return F.linear_cross_entropy(h, w, y, options=torch.nn.LinearCrossEntropyOptions())
    with train_gpt2.autocast("cpu"):
        return F.cross_entropy(F.linear(h, w).float(), y) if way == "plain" else train_gpt2.ChunkedCrossEntropy.apply(h, w, y, True) / rows

before, times = train_gpt2.peak_memory(), []
for _ in range(3):
    began = time.time()
    value = loss()
    value.backward()
    times.append(time.time() - began)
print(f"{way:28} {value.item():.4f} nats, {(train_gpt2.peak_memory() - before) / 1e9:5.2f} GB, {min(times):5.2f} s")
"""


@measured
def test_measured_parts_of_training():
    """The head's loss on 16,384 rows in three ways, attention in fp32 and bf16, and a compiled step beside one that is not."""
    print()
    for way in ("plain", "linear_cross_entropy, fp32", "ours"):                  # a process each: memory is counted by the process
        if hasattr(F, "linear_cross_entropy") or not way.startswith("linear"):
            subprocess.run([sys.executable, "-c", LOSS_OF_THE_HEAD, way], cwd=HERE, check=True)
    for B, nh, T, hs in ((24, 4, 64, 32), (8, 12, 256, 64), (4, 12, 512, 64), (2, 12, 1024, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(B, T, nh, hs, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
            seconds = best_time(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward())
            print(f"attention, {B} x {nh} heads x {T} tokens, {dtype}: {1000 * seconds:.1f} ms forward and backward")
    model = GPT(train_gpt2.PRESETS["gpt2"])
    x, model.loss = torch.randint(50_257, (2, 1024)), torch.compiler.disable(model.loss)       # as compiled() does
    for name, net in (("as it is", model), ("compiled", torch.compile(model))):
        def step():
            with train_gpt2.autocast("cpu"):
                net(x, x)[1].backward()
            model.zero_grad()
        print(f"forward and backward of the 124M, 2 x 1024 tokens, {name}: {best_time(step):.2f} s")


def best_time(function, tries=5):
    """Seconds of the fastest of some calls, after one to warm up."""
    function()
    times = []
    for _ in range(tries):
        began = time.time()
        function()
        times.append(time.time() - began)
    return min(times)


def test_many_such_losses_stop_the_run(tmp_path):
    training = some_training(tmp_path, steps=40, log_every=20)
    training.net = lambda x, y: (None, training.raw(x, y)[1] * math.inf)
    with pytest.raises(UserError, match="10 steps in a row.*ckpt.pt"):
        train_gpt2.loop(training, dict, [], tmp_path, {}, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Text, tokens, shards


def test_tiny_tokenizer_is_lossless_and_knows_the_words():
    tokenizer, rng = fineweb.get_tokenizer("tiny"), random.Random(0)
    for text in ("The cat.\n\n  x = {'a': 1}", "naïve 日本語 🎈 \x00\t", fineweb.scene_document(fineweb.random_scene(rng), rng), "<|endoftext|>", ""):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert len(tokenizer.encode_ordinary("a red circle is at the top left")) == 8
    assert tokenizer.eot_token == tokenizer.n_vocab - 1
    config = train_gpt2.PRESETS["tiny"]
    assert config.vocab_size - config.vocab_padding == tokenizer.n_vocab


def test_shards_keep_their_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 1000).astype(np.uint16)
    fineweb.write_shard(tmp_path / "x_train_000001.bin", tokens)
    np.save(tmp_path / "x_train_000002.npy", tokens)
    assert (fineweb.read_shard(tmp_path / "x_train_000001.bin") == tokens).all() and (fineweb.read_shard(tmp_path / "x_train_000002.npy") == tokens).all()
    raw = (tmp_path / "x_train_000001.bin").read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 1000] and len(raw) == 1024 + 2000       # llm.c's layout


@pytest.mark.parametrize("damage", [lambda raw: raw[:-2], lambda raw: raw + b"xx", lambda raw: b"\0" + raw[1:], lambda raw: raw[:100], lambda raw: b""])
def test_damaged_shards_are_refused(tmp_path, damage):
    fineweb.write_shard(tmp_path / "a.bin", np.arange(50))
    (tmp_path / "a.bin").write_bytes(damage((tmp_path / "a.bin").read_bytes()))
    with pytest.raises(UserError, match="a.bin"):
        fineweb.read_shard(tmp_path / "a.bin")
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="b.npy"):
        fineweb.read_shard(tmp_path / "b.npy")


def test_every_token_is_a_target_once_in_an_epoch(tmp_path):
    sizes, T, per_step = (50, 7, 1, 64), 8, 4
    row = np.arange(sum(sizes))
    for number, part in enumerate(np.split(row, np.cumsum(sizes)[:-1])):
        fineweb.write_shard(tmp_path / f"x_train_{number:06d}.bin", part)
    tokens = train_gpt2.Tokens(sorted(tmp_path.iterdir()))
    windows = tokens.windows(T)
    assert windows == 16                                   # 122 tokens are 121 targets: 15 windows and one target
    seen, orders = [], []
    for step in range(3 * windows // per_step):
        x, y = tokens.batch(train_gpt2.step_windows(5, step, per_step, windows), T, 1000)
        assert ((y == x + 1) | (y == -100)).all()          # these tokens count upwards
        seen.append(y[y >= 0].tolist())
        orders.append(y[:, 0].tolist())
    epoch = windows // per_step
    for e in range(3):
        assert sorted(sum(seen[e * epoch:(e + 1) * epoch], [])) == list(range(1, len(row)))
    assert orders[:epoch] != orders[epoch:2 * epoch]       # each epoch in an order of its own
    straddling = np.concatenate([train_gpt2.step_windows(5, step, 5, windows) for step in range(10)])       # 5 does not divide 16
    assert sorted(straddling[:16].tolist()) == list(range(16)) == sorted(straddling[16:32].tolist())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_divide_an_epoch_among_them(size, tmp_path, monkeypatch):
    for number, part in enumerate(np.split(np.arange(1022), [400, 407, 900])):
        fineweb.write_shard(tmp_path / f"x_train_{number:06d}.bin", part)
    tokens, recipe = train_gpt2.Tokens(sorted(tmp_path.iterdir())), train_gpt2.Recipe(16, 8 * 16, 2, 1e-3, 1)
    config = GPTConfig(16, 1024, 1, 1, 8)
    training = [train_gpt2.Training(GPT(config), recipe, tokens, 7, "cpu") for _ in range(size)]
    monkeypatch.setattr(train_gpt2, "processes", lambda: size)
    seen, shares = [[], []], []
    for step in range(16):                                 # 1,022 tokens are 64 windows, eight steps make an epoch
        for r in range(size):
            monkeypatch.setattr(train_gpt2, "rank", lambda: r)
            for x, y, share in training[r].load(step):
                assert len(x) == 2 and ((y == x + 1) | (y == -100)).all()
                seen[step // 8] += y[y >= 0].tolist()
                shares.append(share)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(1, 1022)) and seen[0] != seen[1]
    assert sum(shares) == pytest.approx(16)                # the micro-batches of all processes make one mean


def test_batches_that_processes_cannot_divide_are_refused(monkeypatch):
    monkeypatch.setattr(train_gpt2, "processes", lambda: 4)
    for batch, micro, words in ((12 * 64, 2, "no multiple of 2 windows of 64 tokens on 4 processes: take 512 or 1,024"), (10 * 64, None, "4 processes cannot share the 10 windows .* take 2 or 5,")):
        args = train_gpt2.argparse.Namespace(steps=None, batch_tokens=batch, micro_batch=micro, lr=None, eval_every=None)
        with pytest.raises(UserError, match=words):
            train_gpt2.choose_recipe(args, train_gpt2.PRESETS["tiny"], "tiny")


def test_many_shards_are_mapped_and_not_read(tmp_path):
    for number in range(100):
        fineweb.write_shard(tmp_path / f"x_train_{number:06d}.bin", np.full(10_000, number))
    tokens = train_gpt2.Tokens(sorted(tmp_path.iterdir()))
    assert all(isinstance(shard, np.memmap) for shard in tokens.shards) and len(tokens) == 1_000_000
    assert tokens.read(9_999, 20_001).tolist() == [0] + [1] * 10_000 + [2]


def test_scenes_say_what_is_true():
    rng, seen = random.Random(0), set()
    for _ in range(500):
        scene, other = fineweb.random_scene(rng), fineweb.random_scene(rng)
        told = fineweb.captions(scene, rng)
        assert len(set(told)) == 5
        for caption in told:
            stated = fineweb.facts(caption, scene)
            assert False not in stated.values(), (caption, scene)
            seen |= {(fact, value) for fact, value in stated.items()}
        for caption in told:
            seen |= {(fact, value) for fact, value in fineweb.facts(caption, other).items()}
    assert seen == {(fact, value) for fact in ("count", "objects", "place", "relation") for value in (True, False, None)}
    assert all(not {(o["colour"], o["shape"]) for o in fineweb.random_scene(rng, unseen=False)["objects"]} & fineweb.UNSEEN for _ in range(200))
    assert all({(o["colour"], o["shape"]) for o in fineweb.random_scene(rng, unseen=True)["objects"]} & fineweb.UNSEEN for _ in range(50))


SCENE = {"objects": [{"colour": "red", "shape": "circle", "size": "small", "row": 0, "col": 1}, {"colour": "blue", "shape": "square", "size": "large", "row": 0, "col": 3}]}


@pytest.mark.parametrize("caption, stated", [
    ("there are two objects", {"count": True}), ("four objects in a picture", {"count": False}),
    ("a picture of a red circle and a blue square", {"objects": True}), ("a picture of a red square and a blue square", {"objects": False}),
    ("a small red circle and a large blue square", {"objects": True}), ("a large red circle and a large blue square", {"objects": False}),
    ("the red circle is at the top left", {"objects": True, "place": True}), ("at the bottom left there is a red circle", {"objects": True, "place": False}),
    ("the pink circle is at the top left", {"objects": False, "place": False}),
    ("a blue square with a red circle to its left", {"objects": True, "relation": True}), ("a blue square with a red circle to its right", {"objects": True, "relation": False}),
    ("a red circle is to the left of a blue square", {"objects": True, "relation": True}), ("a red circle is above a blue square", {"objects": True, "relation": False}),
    ("the weather is fine", {})])
def test_facts(caption, stated):
    assert fineweb.facts(caption, SCENE) == {**dict.fromkeys(("count", "objects", "place", "relation")), **stated}


def test_tiny_world_is_the_same_every_time(tiny, tmp_path):
    fineweb.make_tiny(tmp_path)
    assert {p.name: p.read_bytes() for p in tiny.iterdir()} == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    tokens = fineweb.read_shard(tiny / "tiny_train_000001.bin")
    scenes, eot = fineweb.TINY_SCENES * fineweb.TINY_BLOCK, fineweb.get_tokenizer("tiny").eot_token
    assert (tokens[:scenes:fineweb.TINY_BLOCK] == eot).all()                     # each block begins with a scene
    assert scenes / len(tokens) == pytest.approx(0.8, abs=0.04)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine that does what servers do


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the dict `files`; `behave` is a list of things to do wrong, one for each request."""
    class Handler(http.server.BaseHTTPRequestHandler):
        files, behave, ranges = {}, [], []

        def do_GET(self):
            wrong, body = self.behave.pop(0) if self.behave else "", self.files.get(self.path)
            begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.ranges.append(begin)
            if wrong == "503" or body is None:
                return self.send_error(503 if wrong else 404)
            if wrong == "no ranges":
                begin = 0
            if begin >= len(body):
                return self.send_error(416)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            self.wfile.write(body[begin:begin + 100_000] if wrong == "break off" else body[begin:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        monkeypatch.setenv(fineweb.MIRROR, f"http://127.0.0.1:{service.server_port}")
        monkeypatch.setattr(fineweb.time, "sleep", lambda seconds: None)
        yield Handler
        service.shutdown()


BODY = random.Random(0).randbytes(400_000)


def test_download_goes_on_where_it_broke_off(server, tmp_path):
    server.files, server.behave = {"/a/b": BODY}, ["break off", "503", "break off", "no ranges"]
    path = fineweb.download("https://example.org/a/b", tmp_path / "b", len(BODY), hashlib.sha256(BODY).hexdigest())
    assert path.read_bytes() == BODY and server.ranges == [0, 65536, 65536, 131072]          # whole pieces of 64 KiB are kept
    assert list(tmp_path.iterdir()) == [path]
    fineweb.download("https://example.org/a/b", path, len(BODY))
    assert len(server.ranges) == 4                         # what is there is not fetched again


def test_download_refuses_what_is_wrong(server, tmp_path):
    server.files = {"/a": BODY}
    for size, digest in ((len(BODY) - 1, None), (len(BODY), hashlib.md5(b"").hexdigest()), (None, hashlib.sha256(b"").hexdigest())):
        with pytest.raises(UserError, match="not the expected one"):
            fineweb.download("https://example.org/a", tmp_path / "a", size, digest)
        assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="404"):
        fineweb.download("https://example.org/nothing", tmp_path / "a")
    server.behave = ["503"] * 5
    with pytest.raises(UserError, match="cannot be reached"):
        fineweb.download("https://example.org/a", tmp_path / "a")


def test_fineweb_shards_are_fetched_checked_and_skipped(server, tmp_path, capsys):
    bodies = {}
    for name, count in (("val_000000", 50_000), ("train_000001", 80_000), ("train_000002", 70_000), ("train_000003", 60_000)):
        fineweb.write_shard(tmp_path / "made.bin", np.arange(count) % 50_000)
        bodies[f"finewebedu_{name}.bin"] = (tmp_path / "made.bin").read_bytes()
    (tmp_path / "made.bin").unlink()
    listing = [{"path": name, "size": len(body), "lfs": {"oid": hashlib.sha256(body).hexdigest()}} for name, body in bodies.items()] + [{"path": "README.md", "size": 5}]
    place = f"/datasets/{fineweb.FINEWEB}"
    server.files = {f"/api{place}/tree/main": json.dumps(listing).encode(), **{f"{place}/resolve/main/{name}": body for name, body in bodies.items()}}
    server.behave = ["", "break off", "503", "no ranges", "", "break off"]
    fineweb.fetch_fineweb(150_000_000, tmp_path)           # the validation shard, and as many of 100 M as hold 150 M
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {name: body for name, body in bodies.items() if "000003" not in name}
    asked = len(server.ranges)
    fineweb.fetch_fineweb(150_000_000, tmp_path)
    assert len(server.ranges) == asked + 1 and "3 of 3 shards" in capsys.readouterr().out          # the list only
    server.files[f"{place}/resolve/main/finewebedu_train_000003.bin"] = bodies["finewebedu_train_000003.bin"][:8] + bytes(4) + bodies["finewebedu_train_000003.bin"][12:]
    with pytest.raises(UserError, match="is not the expected one"):              # by its SHA-256; where the hub tells none, by its header
        fineweb.fetch_fineweb(300_000_000, tmp_path)
    server.files[f"/api{place}/tree/main"] = json.dumps([{"path": name, "size": len(body)} for name, body in bodies.items()]).encode()
    with pytest.raises(UserError, match="where its header says"):
        fineweb.fetch_fineweb(300_000_000, tmp_path)
    assert not (tmp_path / "finewebedu_train_000003.bin").exists()


def test_no_network_is_one_line(tmp_path):
    env = {**os.environ, fineweb.MIRROR: "http://127.0.0.1:9"}
    assert_error(run("fineweb.py", "--out", tmp_path / "x", env=env), "gives no list of shards", str(tmp_path / "x"))


def test_no_room_is_said_before(tmp_path):
    with pytest.raises(UserError, match="MB are needed"):
        fineweb.require_space(tmp_path / "not" / "there", 10 ** 18)


# ---------------------------------------------------------------------------------------------------------------------
# A run: interrupted, damaged, finished


def train(tiny, cwd, *more, **options):
    return run("train_gpt2.py", "--preset", "tiny", "--data", tiny, "--out", "run", "--steps", 40, "--batch-tokens", 256, "--eval-every", 10, *more, cwd=cwd, **options)


def interrupted(tiny, cwd, after, number):
    """The same run, sent the signal `number` when the line of step `after` is on the screen."""
    process = subprocess.Popen([sys.executable, "-u", HERE / "train_gpt2.py", "--preset", "tiny", "--data", tiny, "--out", "run", "--steps", "40", "--batch-tokens", "256",
                                "--eval-every", "10"], cwd=cwd, stdout=subprocess.PIPE, text=True)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(f"step {after:>6}"):
            process.send_signal(number)
    return process.wait(timeout=60), output


def outcome(folder):
    """Weights, optimizer and log of a run; the log without its columns of time."""
    checkpoint = torch.load(folder / "run/ckpt.pt", weights_only=True)
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in train_gpt2.read_log(folder / "run/log.csv")]
    moments = {(i, k): v for i, state in checkpoint["optimizer"]["state"].items() for k, v in state.items()}
    return {**checkpoint["model"], **moments}, rows


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """A run of 40 steps that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = train(tiny, folder)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_a_run_says_what_it_does_and_leaves_its_folder(whole):
    folder, output = whole
    assert {p.name for p in (folder / "run").iterdir()} == {"ckpt.pt", "ckpt.prev.pt", "log.csv", "curves.png", "samples.txt"}
    for word in ("data  ", "device  ", "precision  ", "858,880 parameters", "256 tokens = 1 micro-batches of 4 × 64", "english", "scenes", "bits a byte", "--sample"):
        assert word in output
    rows = train_gpt2.read_log(folder / "run/log.csv")
    assert [row["step"] for row in rows] == [1, 10, 20, 30, 40] and all("val_scenes" in row and "val_english" in row for row in rows[1:])
    assert rows[-1]["loss"] < 3 < rows[0]["loss"]


@pytest.mark.parametrize("after, number", [(20, signal.SIGKILL), (1, signal.SIGKILL), (20, signal.SIGTERM), (20, signal.SIGINT)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny, whole, tmp_path, after, number):
    code, output = interrupted(tiny, tmp_path, after, number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "goes on from there" in output
    if number == signal.SIGTERM:
        with open(tmp_path / "run/log.csv", "a") as log:
            log.write("99,1.0,2.0,3.0\n20,half a li")      # rows from behind the checkpoint, and one that was cut off
    process = train(tiny, tmp_path)
    assert process.returncode == 0, process.stderr
    (a, log_a), (b, log_b) = outcome(whole[0]), outcome(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    stopped = {row["step"] for row in log_b} - {row["step"] for row in log_a}    # the row of a stop that was asked for is one more
    assert len(stopped) <= 1 and max(stopped, default=0) < 40
    assert [row for row in log_b if row["step"] not in stopped] == log_a


def test_a_finished_run_says_so_and_refuses_another_recipe(tiny, whole):
    folder, _ = whole
    again = train(tiny, folder)
    assert again.returncode == 0 and "finished" in again.stdout and "--restart" in again.stdout
    assert_error(train(tiny, folder, "--seed", 1), "seed 0, not 1")


def test_two_runs_into_one_folder_are_refused(tiny, tmp_path):
    pytest.importorskip("fcntl", reason="needs a system with locks")
    (tmp_path / "run").mkdir()
    with fineweb.only_one(tmp_path / "run"):
        assert_error(train(tiny, tmp_path, "--out", "run"), "another process is at work in run")
    assert train(tiny, tmp_path, "--out", "run").returncode == 0


def test_checkpoints_that_cannot_be_read(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(UserError, match="train first"):
        train_gpt2.load_checkpoint(path)
    torch.save({"format": 0}, path)
    with pytest.raises(UserError, match="format 0"):
        train_gpt2.load_checkpoint(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="remove it"):
        train_gpt2.load_checkpoint(path)
    (tmp_path / "ckpt.prev.pt").write_bytes(b"")
    with pytest.raises(UserError, match="ckpt.prev.pt"):
        train_gpt2.load_checkpoint(path)


def test_a_flipped_bit_or_a_torn_checkpoint_is_noticed(tmp_path):
    path, rng = tmp_path / "ckpt.pt", random.Random(0)
    train_gpt2.save_checkpoint(path, {"format": 1, "run": {"seed": 1}, "x": torch.arange(500.0)})
    whole = path.read_bytes()
    for _ in range(300):
        place, body = rng.randrange(len(whole)), bytearray(whole)
        body[place] ^= 1 << rng.randrange(8)
        path.write_bytes(body if rng.random() < 0.7 else body[:place])
        with contextlib.suppress(UserError):               # or it does not matter: a date, padding
            assert torch.equal(train_gpt2.read_checkpoint(path)["x"], torch.arange(500.0))


def test_a_damaged_log_gives_what_it_can(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"step,loss\n1,2.5\n2,\xff\x00\n3,1.5\n4")
    assert train_gpt2.read_log(tmp_path / "log.csv") == [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 1.5}, {"step": 4}]
    (tmp_path / "log.csv").write_bytes(random.Random(0).randbytes(3000))
    assert train_gpt2.read_log(tmp_path / "log.csv") == []


def test_checkpoints_of_another_kind_are_refused(tmp_path, eye):
    for load in (train_gpt2.load_checkpoint, lambda path: train_gpt2.read_checkpoint(path)):
        with pytest.raises(UserError, match="another kind"):
            load(eye)
    train_gpt2.save_checkpoint(tmp_path / "ckpt.pt", {"format": 1, "run": {}})
    with pytest.raises(UserError, match="another kind"):
        caption.load_clip(tmp_path / "ckpt.pt")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    train_gpt2.save_checkpoint(path, {"format": 1, "x": torch.zeros(10)})
    code = f"""if True:
        import resource, signal, torch, train_gpt2
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        train_gpt2.fineweb.command_line(lambda: train_gpt2.save_checkpoint({str(path)!r}, {{"format": 1, "x": torch.zeros(10 ** 6)}}))"""
    assert_error(subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True), "make room")
    assert len(train_gpt2.read_checkpoint(path, holds="x")["x"]) == 10 and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_sampling_from_the_command_line(whole):
    folder, _ = whole
    for prompt in ("", "Ünïcode 日本語 🎈", "a red circle " * 100):
        process = run("train_gpt2.py", "--sample", prompt, "--ckpt", "run/ckpt.pt", "--num", 2, "--max-new-tokens", 80, "--top-k", 20, "--top-p", 0.9, cwd=folder)
        assert process.returncode == 0 and process.stdout.count(prompt or "\n---\n") >= 1 and "\n---\n" in process.stdout, process.stderr
    process = run("train_gpt2.py", "--eval", "--ckpt", "run/ckpt.pt", "--data", "nowhere", cwd=folder)
    assert_error(process, "nowhere")


@pytest.mark.parametrize("args, words", [
    (["--data", "nowhere"], ["nowhere has no shards", "fineweb.py"]), (["--data", "bare"], ["bare has shards without text"]), (["--lr", "nan"], ["--lr"]),
    (["--preset", "tiny", "--batch-tokens", 1000, "--micro-batch", 4], ["768 or 1,024"]),
    (["--preset", "small", "--data", "beyond", "--steps", 2, "--batch-tokens", 256], ["beyond the vocabulary of 50,257"]),
    (["--sample", "x", "--ckpt", "nothing.pt"], ["nothing.pt is not there", "train first"])])
def test_a_mistake_is_one_line(args, words, tmp_path):
    if "beyond" in args and not REAL.is_dir():
        pytest.skip("needs REAL_DATA, for the GPT-2 vocabulary")
    for folder, tokens in (("beyond", np.full(600, 60_000)), ("bare", [])):
        for file in ("x_train_000001.bin", "x_val_000000.bin"):
            fineweb.write_shard(tmp_path / folder / file, tokens)
    assert_error(run("train_gpt2.py", *args, cwd=tmp_path), *words)


def test_curves_of_a_run_that_was_stopped_have_their_validation(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text("step,loss,val_val\n1,3.0,\n10,2.0,2.5\n13,1.9,\n")
    drawn = []
    monkeypatch.setattr(train_gpt2, "draw_curves", lambda path, panels: drawn.append(panels))
    train_gpt2.draw_run(tmp_path)
    assert drawn[0][0][2] == {"training": ([1, 10, 13], [3.0, 2.0, 1.9]), "validation": ([10], [2.5])}


def test_curves_are_drawn(tmp_path):
    lines = {"a": ([0, 100, 200], [3.0, 2.0, 1.5]), "b": ([0, 200], [2.5, math.nan])}
    train_gpt2.draw_curves(tmp_path / "c.png", [("loss", "step", lines), ("accuracy", "step", {"c": ([0, 10], [0.25, 0.30])})])
    picture = Image.open(tmp_path / "c.png")
    assert picture.size == (1800, 480)
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {(255, 255, 255), (0x94, 0xa3, 0xb8)} <= colours
    assert train_gpt2.nice_ticks([3, 97]) == (0, 100, 20) and train_gpt2.nice_ticks([0.251, 0.309]) == pytest.approx((0.25, 0.31, 0.01))
    assert train_gpt2.nice_ticks([5, 5])[1] > 5


# ---------------------------------------------------------------------------------------------------------------------
# HellaSwag


def made_items(number, seed=0):
    """Items of the shapes world: a caption, cut, with four endings of different lengths."""
    rng, items = random.Random(seed), []
    for _ in range(number):
        words = " ".join(fineweb.captions(fineweb.random_scene(rng), rng)).split()
        cut = rng.randint(3, 20)
        items.append({"ctx": " ".join(words[:cut]), "ctx_a": "a", "ctx_b": "b [x] c", "activity_label": "Shapes",
                      "endings": [" ".join(rng.sample(words, rng.randint(1, 9))) for _ in range(4)], "label": rng.randrange(4)})
    return items


def plain_losses(model, item):
    """The summed loss of each ending: one sequence at a time, logits everywhere."""
    losses = []
    for ending in item.endings:
        context = item.context[-(model.config.block_size - len(max(item.endings, key=len))):]
        idx = torch.tensor([context + ending])
        log_p = model(idx)[0].log_softmax(-1)[0]
        losses.append(-sum(log_p[len(context) - 1 + i, token].item() for i, token in enumerate(ending)))
    return losses


def assert_losses_are_plain_ones(model, items):
    ours, plain = hellaswag.ending_losses(model, items, "cpu"), np.array([plain_losses(model, item) for item in items])
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    margin = np.sort(plain, 1)[:, 1] - np.sort(plain, 1)[:, 0] > 1e-4 * plain.max(1)
    assert margin.sum() > len(items) / 2 and (ours.argmin(1) == plain.argmin(1))[margin].all()


def test_endings_have_the_losses_of_one_at_a_time(monkeypatch):
    tokenizer = fineweb.get_tokenizer("tiny")
    model = small_model(config=GPTConfig(40, 448, 2, 2, 32, init_std=0.3, vocab_padding=17))
    items = [hellaswag.render(example, tokenizer) for example in made_items(30)]
    assert any(len(item.context) + max(map(len, item.endings)) < 25 for item in items)
    items[3].context *= 9                                  # too long: cut from the left
    with torch.no_grad():
        assert_losses_are_plain_ones(model, items)
        losses = hellaswag.ending_losses(model, items, "cpu")
        monkeypatch.setattr(hellaswag, "CPU_BATCH", 1)
        np.testing.assert_allclose(hellaswag.ending_losses(model, items[::-1], "cpu")[::-1], losses, rtol=1e-5)


def test_accuracies_are_those_of_the_losses():
    tokenizer, examples = fineweb.get_tokenizer("tiny"), made_items(40)
    model = small_model(config=GPTConfig(64, 448, 2, 2, 32, init_std=0.3, vocab_padding=17))
    examples[5]["endings"][2] = "a long ending " * 60      # cannot be scored
    scores, right = hellaswag.evaluate(model, tokenizer, examples, "cpu", harness=True), np.zeros(4)
    for harness in (0, 1):
        for example in examples[:5] + examples[6:]:
            item = hellaswag.render(example, tokenizer, bool(harness))
            losses = np.array(plain_losses(model, item))
            lengths = [len(ending) for ending in (example["endings"] if harness else item.endings)]
            right[2 * harness:2 * harness + 2] += [losses.argmin() == example["label"], (losses / lengths).argmin() == example["label"]]
    assert [scores[key] * 39 for key in ("acc", "acc_norm", "harness_acc", "harness_acc_norm")] == pytest.approx(right) and (scores["n"], scores["skipped"]) == (39, 1)
    text = hellaswag.report(scores, "a note")
    assert f"({round(right[1])} of 39)" in text and "1 items left out" in text and "a note" in text and "harness_acc_norm" in text


def one_of_two(rank, port, folder):
    """A process of test_two_processes_share_the_items."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = small_model(config=GPTConfig(64, 448, 2, 2, 32, init_std=0.3, vocab_padding=17))
    scores = hellaswag.evaluate(model, fineweb.get_tokenizer("tiny"), made_items(41), "cpu")
    Path(folder, f"{rank}.json").write_text(json.dumps(scores))
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_items(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (free_port(), str(tmp_path)), nprocs=2)
    model = small_model(config=GPTConfig(64, 448, 2, 2, 32, init_std=0.3, vocab_padding=17))
    alone = hellaswag.evaluate(model, fineweb.get_tokenizer("tiny"), made_items(41), "cpu")
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [alone, alone]


def test_items_that_are_not_right(server, tmp_path, monkeypatch):
    good = json.dumps(made_items(1)[0])
    for bad in ("{", "[]", '{"ctx": "a"}', json.dumps({**made_items(1)[0], "label": 4}), json.dumps({**made_items(1)[0], "endings": ["a"] * 3})):
        (tmp_path / "items.jsonl").write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(UserError, match="items.jsonl line 3"):
            hellaswag.load_examples(tmp_path / "items.jsonl")
    (tmp_path / "items.jsonl").write_text(good + "\n" + good)
    examples, note = hellaswag.load_examples(tmp_path / "items.jsonl")
    assert len(examples) == 2 and "not the published file" in note
    monkeypatch.chdir(tmp_path)
    server.files = {"/rowanz/hellaswag/master/data/hellaswag_val.jsonl": good.encode()}
    with pytest.raises(UserError, match="not the expected one"):                 # another file than the published one is not taken
        hellaswag.load_examples()
    hellaswag.FILE.parent.mkdir(parents=True, exist_ok=True)
    hellaswag.FILE.write_text(good)
    with pytest.raises(UserError, match="not the published file.*--hellaswag"):
        hellaswag.load_examples()
    hellaswag.FILE.unlink()
    monkeypatch.setenv(fineweb.MIRROR, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hellaswag_val.jsonl.*cannot be reached.*put the file at data/hellaswag"):
        hellaswag.load_examples()
    assert hellaswag.subset(examples * 50, 7) == hellaswag.subset(examples * 50, 7) and len(hellaswag.subset(examples, 7)) == 2


def test_hellaswag_has_its_panel_and_the_tiny_world_says_why_it_has_none(whole, tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,val_val,hellaswag\n250,4,4,.26\n500,3,3,.28\n")
    train_gpt2.draw_run(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (1800, 480)
    process = run("train_gpt2.py", "--eval", "--ckpt", whole[0] / "run/ckpt.pt", cwd=tmp_path)
    assert "HellaSwag  not measured" in process.stdout and "context of 64" in process.stdout, process.stderr


@real_data
def test_rendering_of_the_first_original_items():
    tokenizer = fineweb.get_tokenizer("gpt2")
    for line in (REAL / "hellaswag/hellaswag_val_first10_original.jsonl").read_bytes().splitlines():
        example = hellaswag.parse(line, "")
        item = hellaswag.render(example, tokenizer)
        assert tokenizer.decode(item.context) == example["ctx"] and [tokenizer.decode(e) for e in item.endings] == [" " + e for e in example["endings"]]
        item = hellaswag.render(example, tokenizer, harness=True)
        texts = [f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'][:1].upper()}{example['ctx_b'][1:].lower()}", *example["endings"]]
        for i, text in enumerate(texts):                   # the harness's cleaning, spelled out
            text = ". ".join(text.strip().split(" [title]"))
            while "[" in text and "]" in text[text.index("["):]:
                text = text[:text.index("[")] + text[text.index("]", text.index("[")) + 1:]
            texts[i] = text.replace("  ", " ")
        assert tokenizer.decode(item.context) == texts[0] and [tokenizer.decode(e) for e in item.endings] == [" " + t for t in texts[1:]]
        whole_text = [tokenizer.encode_ordinary(texts[0] + " " + ending) for ending in texts[1:]]        # as the harness tokenises: together
        assert [item.context + ending for ending in item.endings] == whole_text
        assert item.characters == [len(t) for t in texts[1:]] and item.label == example["label"]


@real_data
def test_real_items_have_the_losses_of_one_at_a_time(tmp_path):
    tokenizer, (examples, note) = fineweb.get_tokenizer("gpt2"), hellaswag.load_examples(REAL / "hellaswag/hellaswag_val.jsonl")
    assert len(examples) == 10_042 and "not the published file" in note
    by_length = sorted(examples, key=lambda e: len(e["ctx"]) + sum(map(len, e["endings"])))
    odd = [e for e in examples if not (e["ctx"] + "".join(e["endings"])).isascii()]
    items = [hellaswag.render(e, tokenizer, harness) for harness in (False, True) for e in by_length[:6] + by_length[-4:] + odd[:6]]
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 50304, 2, 2, 32, init_std=0.3, vocab_padding=47))
    with torch.no_grad():
        assert_losses_are_plain_ones(model, items)
    text = (json.loads(line)["text"] for line in open(next((REAL / "text/openstax-ccby").glob("*.jsonl")), encoding="utf-8"))
    tokens = np.concatenate([fineweb.encode_document(t, tokenizer) for t, _ in zip(text, range(40))])
    fineweb.write_shard(tmp_path / "x_train_000001.bin", tokens)
    model = GPT(GPTConfig(256, 50304, 2, 2, 32, init_std=0.05, vocab_padding=47))
    recipe = train_gpt2.Recipe(12, 1024, 4, 1e-2, 2)
    training = train_gpt2.Training(model, recipe, train_gpt2.Tokens([tmp_path / "x_train_000001.bin"]), 0, "cpu")
    for _ in range(12):
        training.update()
    with torch.no_grad():
        assert_losses_are_plain_ones(model.eval(), items)
    checkpoint = {"format": train_gpt2.FORMAT, "config": vars(model.config), "run": {"preset": "gpt2", "tokenizer": "gpt2"}, "model": model.state_dict()}
    train_gpt2.save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    process = run("train_gpt2.py", "--eval", "--ckpt", tmp_path / "ckpt.pt", "--hellaswag", REAL / "hellaswag/hellaswag_val.jsonl", "--limit", 20, cwd=tmp_path)
    assert process.returncode == 0 and "of 20)" in process.stdout and "a fixed random subset" in process.stdout and "not the published file" in process.stdout, process.stderr


@real_data
@measured
def test_measured_hellaswag_beside_one_at_a_time():
    """The 124M on 48 items: four padded rows with all logits an item, in fp32, beside ours in fp32 and with bf16 products."""
    tokenizer, examples = fineweb.get_tokenizer("gpt2"), hellaswag.subset(hellaswag.load_examples(REAL / "hellaswag/hellaswag_val.jsonl")[0], 48)
    torch.manual_seed(0)
    model, items = GPT(train_gpt2.PRESETS["gpt2"]).eval(), [hellaswag.render(example, tokenizer) for example in examples]

    def one_at_a_time():
        losses = []
        for item in items:
            width = len(item.context) + max(map(len, item.endings))
            rows, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width)
            for row, ending in enumerate(item.endings):
                rows[row, :len(item.context) + len(ending)] = torch.tensor(item.context + ending)
                mask[row, len(item.context):len(item.context) + len(ending)] = 1
            logits = model(rows)[0]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(4, -1)
            losses.append((loss * mask[:, 1:]).sum(1).tolist())
        return np.array(losses)

    def batched(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return hellaswag.ending_losses(model, items, "cpu")

    ways, seconds = {"one at a time, fp32": one_at_a_time, "ours, fp32": lambda: batched(False), "ours, bf16": lambda: batched(True)}, {}
    with torch.no_grad():
        losses = {name: way() for name, way in ways.items()}
        for name, way in [*ways.items(), *reversed(ways.items())]:               # there and back: the best of two
            began = time.time()
            way()
            seconds[name] = min(seconds.get(name, math.inf), time.time() - began)
    np.testing.assert_allclose(losses["ours, fp32"], losses["one at a time, fp32"], rtol=1e-5)
    first = seconds["one at a time, fp32"]
    print("\n" + "\n".join(f"{name:20} {1000 * s / len(items):6.0f} ms an item, {first / s:.2f} times" for name, s in seconds.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Scores of captions

CANDIDATE, REFERENCES = "a red circle and a blue square", ["a red circle above a blue square", "a blue square"]
ODD_CAPTIONS = ["", "A", "two dogs", "A dog's t-shirt, isn't it?", "I cannot; they're gonna (maybe) [go] {now}!", "line\none\rtwo\vthree\ffour\x85five\u2028six\u2029seven",
                "a ||| b", "caf\u00e9 na\u00efve \u732b\u304c\u5ea7\u308b \U0001f600 cat", "\u201cquoted\u201d and \u2018single\u2019", "B & W, AT&T &amp; co", "$5 for 50% at 3:30pm", "a--b - c ... d..",
                "1,000 birds over 3.5 miles at 10:30", "w/ milk half-full/half-empty 1/2", "Mr. Smith of St. Paul, U.S., at 5 a.m.", "the dogs' o'clock 1950s 12th"]


@pytest.fixture(scope="session")
def official():
    """The official scorer's parts: its tokeniser, its scores, METEOR 1.5 as it is, and METEOR 1.5 without tables."""
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("needs Java, which pycocoevalcap runs")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(captions):
        clean = {i: [{"caption": " ".join(caption.split())}] for i, caption in enumerate(captions)}
        return [words[0].replace("\xa0", " ").split() for words in PTBTokenizer().tokenize(clean).values()]

    def joined(references, candidates):
        return {id: [" ".join(r) for r in references[id]] for id in candidates}, {id: [" ".join(c)] for id, c in candidates.items()}

    def scores(references, candidates):
        with contextlib.redirect_stdout(None):
            pair = joined(references, candidates)
            (b, bs), (c, cs), (r, rs) = Bleu(4).compute_score(*pair, verbose=0), Cider().compute_score(*pair), Rouge().compute_score(*pair)
        return dict(zip(METRICS, [c, *b, r])), dict(zip(METRICS, [cs, *bs, rs]))

    def start_meteor(*options):
        popen = subprocess.Popen
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", lambda command, **more: popen([*command, *options], **more))
            jar = Meteor()
        return lambda references, candidates: jar.compute_score(*joined(references, candidates))

    return {"tokens": tokens, "scores": scores, "full METEOR": start_meteor(),
            "METEOR": start_meteor("-m", "exact stem", "-w", "1.0 0.6", "-p", "0.85 0.2 0.6 0.75")}


METRICS = ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]


def leave_one_out():
    """COCO val2017's captions: each picture's first as a candidate, the others as references."""
    captions = coco_eval.read_references(REAL / "coco/captions_val2017.json")
    return {id: c[1:] for id, c in captions.items()}, {id: c[0] for id, c in captions.items()}


def assert_equals_official(official, references, candidates):
    ours, (corpus, pictures) = coco_eval.score_tokens(references, candidates), official["scores"](references, candidates)
    for metric in METRICS:
        assert ours["corpus"][metric] == pytest.approx(corpus[metric], abs=1e-8), metric
        np.testing.assert_allclose([p[metric] for p in ours["per_image"].values()], pictures[metric], atol=1e-8, err_msg=metric)
    return ours


@real_data
def test_scores_equal_the_official_ones_on_all_of_val2017(official):
    references, candidates = leave_one_out()
    captions = [c for id in candidates for c in (candidates[id], *references[id])]
    theirs = official["tokens"](captions)
    different = sum(coco_eval.tokenize(c) != t for c, t in zip(captions, theirs))
    assert len(captions) == 25_014 and different <= 25     # 99.9 %
    words = iter(theirs)
    tokens = {id: [next(words) for _ in range(1 + len(references[id]))] for id in candidates}
    ours = assert_equals_official(official, {id: t[1:] for id, t in tokens.items()}, {id: t[0] for id, t in tokens.items()})
    meteor, meteors = official["METEOR"]({id: t[1:] for id, t in tokens.items()}, {id: t[0] for id, t in tokens.items()})
    assert abs(ours["corpus"]["METEOR"] - meteor) < 5e-4
    assert np.corrcoef([p["METEOR"] for p in ours["per_image"].values()], meteors)[0, 1] > 0.999
    raw = coco_eval.evaluate(references, candidates)["corpus"]                   # from raw captions, with our own tokens
    gaps = {metric: abs(raw[metric] - ours["corpus"][metric]) for metric in METRICS}
    full, fulls = official["full METEOR"]({id: t[1:] for id, t in tokens.items()}, {id: t[0] for id, t in tokens.items()})
    meteors_here = [p["METEOR"] for p in ours["per_image"].values()]
    print(f"\n{different} of {len(captions):,} captions have other tokens; from raw captions: "
          + ", ".join(f"{metric} {raw[metric]:.4f} (gap {gap:.1e})" for metric, gap in gaps.items())
          + f"\nMETEOR {ours['corpus']['METEOR']:.4f}, without tables {meteor:.4f} (r {np.corrcoef(meteors_here, meteors)[0, 1]:.4f}), "
          f"full {full:.4f} (r {np.corrcoef(meteors_here, fulls)[0, 1]:.3f}; of the one without tables {np.corrcoef(meteors, fulls)[0, 1]:.3f})")
    assert gaps.pop("CIDEr") < 1e-3 and max(gaps.values()) < 3e-4


OFFICIAL_SCORES = """
import json, sys
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
references, results = {}, {}
for entry in json.load(open(sys.argv[1]))["annotations"]:
    references.setdefault(entry["image_id"], []).append(entry)
for entry in json.load(open(sys.argv[2])):
    results[entry["image_id"]] = [entry]
pair = PTBTokenizer().tokenize(references), PTBTokenizer().tokenize(results)
for metric in (Bleu(4), Cider(), Rouge(), Meteor()):
    metric.compute_score(*pair)
"""


@real_data
@measured
def test_measured_scoring_beside_the_official_one(official, tmp_path):
    """The whole process from raw captions in files, ours and the official tokeniser with its four metrics, in turns."""
    references, candidates = leave_one_out()
    for pictures in (1_000, 5_000):
        ids = list(candidates)[:pictures]
        write_json(tmp_path / "references.json", {"annotations": [{"image_id": id, "caption": c} for id in ids for c in references[id]]})
        write_json(tmp_path / "results.json", [{"image_id": id, "caption": candidates[id]} for id in ids])
        files = ["references.json", "results.json"]
        ways = {"ours": [HERE / "coco_eval.py", "--references", files[0], "--results", files[1]], "official": ["-c", OFFICIAL_SCORES, *files]}
        seconds = {}
        for name, command in 2 * list(ways.items()):
            began = time.time()
            subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
            seconds[name] = min(seconds.get(name, math.inf), time.time() - began)
        print(f"\n{pictures:,} pictures: ours {seconds['ours']:.2f} s, official {seconds['official']:.2f} s ({seconds['ours'] / seconds['official']:.2f})")


@real_data
def test_meteor_equals_the_one_without_tables_and_orders_systems_as_the_full_one(official):
    references, people = leave_one_out()
    systems = [coco_eval.read_results(path) for path in sorted((REAL / "coco").glob("*_results.json"))]
    ids = sorted(set.intersection(*map(set, systems)))
    rng = random.Random(0)
    made = [lambda words: words, lambda words: words[:6], lambda words: rng.sample(words, len(words)), lambda words: words[:4] * 3]
    systems += [{id: " ".join(change(people[id].split())) for id in ids} for change in made] + [dict(zip(ids, (people[id] for id in ids[1:] + ids[:1])))]
    captions = list(dict.fromkeys(c for id in ids for c in (*references[id], *(system[id] for system in systems))))
    words = dict(zip(captions, official["tokens"](captions)))
    rows = []
    for system in systems:
        pair = {id: [words[c] for c in references[id]] for id in ids}, {id: words[system[id]] for id in ids}
        scores = assert_equals_official(official, *pair)
        ours = scores["corpus"]["METEOR"], [p["METEOR"] for p in scores["per_image"].values()]
        without, full = official["METEOR"](*pair), official["full METEOR"](*pair)
        assert abs(ours[0] - without[0]) < 1e-3 and np.corrcoef(ours[1], without[1])[0, 1] > 0.99
        rows.append([[ours[0], *ours[1]], [full[0], *full[1]]])
    ours, full = np.array(rows).transpose(1, 0, 2)
    gaps = ours[:, 0] - full[:, 0]
    print(f"\nMETEOR over {len(systems)} systems: r {np.corrcoef(ours[:, 0], full[:, 0])[0, 1]:.4f} with the full one, {gaps.min():.3f} to {gaps.max():.3f} lower; "
          f"over all their captions r {np.corrcoef(ours[:, 1:].ravel(), full[:, 1:].ravel())[0, 1]:.3f}")
    assert np.corrcoef(ours[:, 0], full[:, 0])[0, 1] > 0.99 and (ours[:, 0] < full[:, 0]).all()
    assert np.corrcoef(ours[:, 1:].ravel(), full[:, 1:].ravel())[0, 1] > 0.95


def test_odd_captions_equal_the_official_ones(official):
    theirs = official["tokens"](ODD_CAPTIONS)
    assert [coco_eval.tokenize(c) for c in ODD_CAPTIONS] == theirs
    references = {i: [theirs[i] or ["a"], ["two", "dogs"], theirs[i - 1]] for i in range(len(theirs))}
    assert_equals_official(official, references, dict(enumerate(theirs)))
    for one in ({0: [["two", "dogs"]]}, {0: [["a"]], 1: [["a"]]}):               # a single picture; all with the same references
        assert_equals_official(official, one, {id: ["a", "dog"] for id in one})
        assert_equals_official(official, one, {id: one[id][0] for id in one})
        assert_equals_official(official, one, {id: [] for id in one})


def test_tokens_by_hand():
    assert coco_eval.tokenize("A dog's t-shirt, isn't it?") == ["a", "dog", "'s", "t-shirt", "is", "n't", "it"]
    assert coco_eval.tokenize("I cannot (go)\u2028at 10:30 a.m.\nB & W &amp; \u201c1,000\u201d -- 50%!") == "i can not -lrb- go -rrb- at 10:30 a.m. b & w & 1,000 50 %".split()
    assert coco_eval.tokenize("") == coco_eval.tokenize(" ...\n") == []


def test_the_worked_examples_of_the_docstrings():
    references, candidate = [[r.split() for r in REFERENCES]], [CANDIDATE.split()]
    assert coco_eval.bleu(references, candidate)["BLEU-2"][0] == pytest.approx(0.756, abs=5e-4)
    assert coco_eval.rouge_l(references, candidate)["ROUGE-L"][0] == pytest.approx(0.936, abs=5e-4)
    assert coco_eval.meteor([references[0][:1]], candidate)["METEOR"][0] == pytest.approx(0.4345, abs=5e-4)
    assert coco_eval.meteor(references, candidate)["METEOR"][0] == pytest.approx(0.442, abs=5e-4)
    cider = coco_eval.cider([["a blue square".split()], ["a red circle".split()]], [["a", "square"], ["a"]])["CIDEr"]
    assert cider[1][0] == pytest.approx(1.743, abs=5e-4) and cider[0] == np.mean(cider[1])


def test_saying_a_word_again_gains_nothing():
    references, clipped = [["two", "dogs"]], coco_eval.bleu([[["two", "dogs"]]], [["dogs"] * 4])
    assert clipped["BLEU-1"][0] == pytest.approx(1 / 4)
    assert coco_eval.bleu([[["dogs"] * 2]], [["dogs", "cat"]])["BLEU-1"][0] == pytest.approx(1 / 2)
    once, thrice = (coco_eval.cider([*[references], [["a", "cat"]]], [words, ["a"]])["CIDEr"][1][0] for words in (["dogs", "x", "y"], ["dogs"] * 3))
    assert once == pytest.approx(10 / 4 * 1 / math.sqrt(3) / math.sqrt(2) * math.exp(-1 / 72))
    assert thrice == pytest.approx(10 / 4 * 1 / 3 / math.sqrt(2) * math.exp(-1 / 72))


def shapes_captions(number, seed=0):
    rng = random.Random(seed)
    told = [fineweb.captions(fineweb.random_scene(rng), rng) for _ in range(number)]
    return {i: t[1:] for i, t in enumerate(told)}, {i: t[0] for i, t in enumerate(told)}


def test_scores_do_not_depend_on_order_or_the_type_of_ids():
    references, candidates = shapes_captions(40)
    scores = coco_eval.evaluate(references, candidates)
    other = coco_eval.evaluate({str(id): references[id][::-1] for id in reversed(references)}, {id: candidates[id] for id in sorted(candidates, reverse=True)})
    assert all(other["corpus"][m] == pytest.approx(value, abs=1e-12) for m, value in scores["corpus"].items())
    assert all(other["per_image"][id][m] == pytest.approx(value, abs=1e-12) for id, picture in scores["per_image"].items() for m, value in picture.items())
    half = coco_eval.evaluate(references, {id: candidates[id] for id in range(20)})          # other pictures' references do not matter
    assert half == coco_eval.evaluate({id: references[id] for id in range(20)}, {id: candidates[id] for id in range(20)})


def test_a_perfect_candidate_has_full_marks():
    references, _ = shapes_captions(40)
    scores = coco_eval.evaluate({id: r[3:] for id, r in references.items()}, {id: r[3] for id, r in references.items()})
    assert scores["corpus"].pop("CIDEr") == pytest.approx(10) and all(picture["METEOR"] == 1 for picture in scores["per_image"].values())
    del scores["corpus"]["METEOR"]                         # the corpus has more chunks than one, so the official formula does not give 1
    assert all(value == pytest.approx(1) for value in scores["corpus"].values())
    assert not any(coco_eval.evaluate({1: ["a red cross"], 2: ["two dogs"]}, {1: "", 2: "zebra"})["per_image"][id]["METEOR"] for id in (1, 2))


def test_alignment_equals_brute_force():
    rng = random.Random(0)

    def all_ways(reference, candidate, i=0, used=()):
        if i == len(candidate):
            return [()]
        ways = all_ways(reference, candidate, i + 1, used)
        for j, word in enumerate(reference):
            if j not in used and coco_eval.stem(word) == coco_eval.stem(candidate[i]):
                ways = ways + [((i, j), *rest) for rest in all_ways(reference, candidate, i + 1, (*used, j))]
        return ways

    for _ in range(150):
        reference, candidate = (rng.choices(["a", "dog", "dogs", "the", "on"], k=rng.randint(0, 6)) for _ in range(2))
        key = lambda pairs: (-len(pairs), coco_eval.count_chunks(list(pairs)), sum(abs(i - j) for i, j in pairs))
        best = min(all_ways(reference, candidate), key=key)
        assert key(coco_eval.align(reference, candidate)) == key(best), (reference, candidate)
    assert len(coco_eval.align(["a"] * 500, ["a"] * 200)) == 200                # a caption that never stops does not take for ever


def test_common_subsequence_equals_brute_force():
    from itertools import combinations
    rng = random.Random(0)
    for _ in range(50):
        a, b = (rng.choices("abc", k=rng.randint(0, 7)) for _ in range(2))
        longest = max(n for n in range(8) if set(combinations(a, n)) & set(combinations(b, n)))
        assert coco_eval._common_subsequence(a, b) == longest


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_scoring_from_the_command_line(tmp_path):
    references, candidates = shapes_captions(12)
    told = write_json(tmp_path / "references.json", {"annotations": [{"image_id": id, "caption": c} for id, captions in references.items() for c in captions]})
    good = write_json(tmp_path / "good.json", [{"image_id": id, "caption": references[id][0]} for id in range(10)])
    poor = write_json(tmp_path / "poor.json", [{"image_id": id, "caption": candidates[id]} for id in range(9)])
    process = run("coco_eval.py", "--references", told, "--results", good, cwd=tmp_path)
    expected = coco_eval.evaluate(references, {id: references[id][0] for id in range(10)})
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert process.returncode == 0 and "10 of 12 pictures scored" in process.stdout and f"{expected['corpus']['METEOR']:.4f}" in process.stdout, process.stderr
    assert "METEOR (exact + stem)" in process.stdout and scores == json.loads(json.dumps(expected))
    process = run("coco_eval.py", "--references", told, "--results", poor, good, "--out", tmp_path / "two.json", cwd=tmp_path)
    assert process.stdout.index("good.json") < process.stdout.index("poor.json") and "cannot be compared" in process.stdout


@pytest.mark.parametrize("results, words", [
    ("[]", "no caption"), ("{", "JSON"), ('{"a": 1}', "list of captions"), ('[{"image_id": 1}]', "entry 1"), ('[{"image_id": 1, "caption": 3}]', "entry 1"),
    ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', "two captions for picture 1"),
    ('[{"image_id": 7, "caption": "a"}]', "picture 7"), ('[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]', "type")])
def test_wrong_results_are_one_line(results, words, tmp_path, capsys):
    references = write_json(tmp_path / "references.json", {"annotations": [{"image_id": 1, "caption": "a dog"}]})
    with pytest.raises(UserError, match=words):
        coco_eval.score_files(references, [write_json(tmp_path / "results.json", results)], tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures with captions


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small shapes world on disk."""
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    coco_eval.make_shapes(folder, images=300)
    return folder


def test_the_shapes_world_is_drawn_as_it_is_told(shapes, tmp_path):
    train, val = (coco_eval.read_dataset(shapes, split) for split in ("train", "val"))
    pairs = [{(o["colour"], o["shape"]) in fineweb.UNSEEN for o in p["scene"]["objects"]} for p in train + val]
    assert len(train) == 300 and len(val) == 750 and not any(True in p for p in pairs[:800]) and all(True in p for p in pairs[800:])
    for picture in train[:100]:
        assert len(set(picture["captions"])) == 5
        assert all(fact is not False for c in picture["captions"] for fact in fineweb.facts(c, picture["scene"]).values())
        pixels = np.asarray(coco_eval.load_image(picture["path"]), dtype=int)
        for thing in picture["scene"]["objects"]:          # its colour is in its cell
            cell = pixels[16 * thing["row"]:16 * thing["row"] + 16, 16 * thing["col"]:16 * thing["col"] + 16]
            near = np.abs(cell - coco_eval.PAINT[thing["colour"]]).max(-1) < 6
            assert near.sum() > 20, thing
    coco_eval.make_shapes(tmp_path / "again", images=300)
    files = sorted(p.relative_to(shapes) for p in shapes.rglob("*") if p.is_file())
    assert len(files) == 1052 and all((shapes / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    with pytest.raises(UserError, match="not empty"):
        coco_eval.make_shapes(shapes)


def test_a_folder_of_own_pictures(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(20)]
    content = {"images": images + [{"id": 99, "file_name": "silent.png"}], "annotations": [{"image_id": i, "caption": f"number {i}"} for i in range(20)]}
    path = write_json(tmp_path / "annotations/captions.json", content)
    train, val = (coco_eval.read_dataset(tmp_path, split) for split in ("train", "val"))
    assert [p["id"] for p in val] == [9, 19] and len(train) == 18 and val[0] == {"id": 9, "path": tmp_path / "images/9.png", "captions": ["number 9"], "scene": None}
    for wrong, words in (({"annotations": []}, "images"), ({**content, "images": images[:1] * 2}, "twice"), ({**content, "images": images[1:]}, "picture 0"),
                         ({"images": images, "annotations": []}, "no captions"), ({"images": [{"id": 1}]}, "file_name"),
                         ({"images": [{"id": 1, "file_name": "../../etc/passwd"}], "annotations": []}, "leads out")):
        write_json(path, wrong)
        with pytest.raises(UserError, match=words):
            coco_eval.read_dataset(tmp_path, "train")
    with pytest.raises(UserError, match="COCO's layout"):
        coco_eval.read_dataset(tmp_path / "images", "train")


def archive(files):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return body.getvalue()


def test_coco_is_fetched_unpacked_and_left_alone(server, tmp_path, monkeypatch):
    body = {"annotations": archive({"annotations/captions_val2017.json": "{}", "annotations/instances_val2017.json": "{}"}),
            "val2017": archive({f"val2017/{i}.jpg": BODY[:3000] for i in range(50)}), "train2017": archive({"train2017/1.jpg": BODY[:100]})}
    archives = [(name, address, len(body[name]), hashlib.md5(body[name]).hexdigest()) for name, address, _, _ in coco_eval.ARCHIVES]
    monkeypatch.setattr(coco_eval, "ARCHIVES", archives)
    server.files = {f"/images.cocodataset.org/{address}": body[name] for name, address, _, _ in archives}
    server.behave = ["", "break off", "503"]
    coco_eval.download_coco(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["annotations", "train2017", "val2017"] and len(list((tmp_path / "val2017").iterdir())) == 50
    asked = len(server.ranges)
    coco_eval.download_coco(tmp_path)
    assert len(server.ranges) == asked                     # what is there is not fetched again
    monkeypatch.setattr(coco_eval, "ARCHIVES", [("train2017", "zips/train2017.zip", 10 ** 15, "0" * 32)])
    with pytest.raises(UserError, match="MB are needed"):
        coco_eval.download_coco(tmp_path / "other")
    (tmp_path / "half/train2017.tmp").mkdir(parents=True)                        # interrupted: 700 of 1,000 bytes are here, so 300 are to come, and 1,000 unpacked
    (tmp_path / "half/train2017.zip.part").write_bytes(bytes(700))
    monkeypatch.setattr(coco_eval, "ARCHIVES", [("train2017", "zips/train2017.zip", 1_000, "0" * 32)])
    asked = []
    monkeypatch.setattr(coco_eval, "require_space", lambda folder, size: asked.append(size))
    monkeypatch.setattr(coco_eval, "download", lambda *args: None)
    monkeypatch.setattr(coco_eval, "unpack", lambda *args: None)
    coco_eval.download_coco(tmp_path / "half")
    assert asked == [1_300] and not (tmp_path / "half/train2017.tmp").exists()


@pytest.mark.parametrize("body, words", [(archive({"val2017/../../out.txt": "x"}), "leads out"), (archive({"/etc/out.txt": "x"}), "leads out"),
                                         (archive({"other/1.jpg": "x"}), "no folder val2017"), (b"PK no archive", "cannot be unpacked")])
def test_archives_that_are_not_right(body, words, tmp_path):
    (tmp_path / "a.zip").write_bytes(body)
    with pytest.raises(UserError, match=words):
        coco_eval.unpack(tmp_path / "a.zip", tmp_path / "coco", "val2017")
    assert not (tmp_path / "coco/val2017").exists() and not (tmp_path / "out.txt").exists()


def test_pictures_of_every_kind_are_read_right(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(1, 64).repeat(4, 0)
    left_red = Image.new("RGB", (8, 4), "white")
    left_red.paste((255, 0, 0), (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6                                       # shown turned by 90° clockwise: left becomes top
    half = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 4))
    Image.fromarray(ramp).save(tmp_path / "16.png")
    left_red.save(tmp_path / "turned.png", exif=exif)
    left_red.convert("CMYK").save(tmp_path / "cmyk.tif")
    half.save(tmp_path / "half.png")
    half.convert("RGB").quantize(4).save(tmp_path / "palette.png", transparency=0)
    left_red.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 4), "black")])
    image = {path.stem: np.asarray(coco_eval.load_image(path)) for path in tmp_path.iterdir()}
    assert all(i.dtype == np.uint8 and i.shape[2] == 3 for i in image.values())
    assert np.abs(image["16"][0, :, 0] - np.linspace(0, 255, 64)).max() <= 1     # scaled, not clipped
    assert image["turned"].shape == (8, 4, 3) and (image["turned"][0] == (255, 0, 0)).all() and (image["turned"][-1] == 255).all()
    assert (image["half"][:, 0] == (0, 0, 255)).all() and (image["half"][:, 3] == 255).all()
    assert (image["cmyk"][0, 0] == (255, 0, 0)).all() and (image["moving"][0, -1] > 250).all() and (image["palette"] == 255).all(-1).any()


@real_data
def test_odd_pictures_are_read_or_refused_by_name():
    for entry in json.loads((REAL / "odd-images/manifest.json").read_text()):
        path = REAL / "odd-images" / entry["file"]
        if entry["decodes"]:
            width, height = entry["size"][::-1] if entry["exif_orientation"] in (5, 6, 7, 8) else entry["size"]
            image = coco_eval.load_image(path)
            assert image.mode == "RGB" and image.size == (width, height), entry
        else:
            with pytest.raises(UserError, match=entry["file"]):
                coco_eval.load_image(path)
    upright, turned = (np.asarray(coco_eval.load_image(REAL / "odd-images" / f"hopper{name}.jpg"), dtype=float) for name in ("", "_orientation_6"))
    assert np.abs(upright - turned).mean() < 12            # the same person, whichever way the file is turned
    ramp = np.asarray(coco_eval.load_image(REAL / "odd-images/pngsuite_basn0g16.png"))
    assert len(np.unique(ramp)) > 30                       # clipping would leave white


# ---------------------------------------------------------------------------------------------------------------------
# Bridges

WIDE = GPTConfig(block_size=48, vocab_size=48, n_layer=2, n_head=2, n_embd=32, init_std=0.3, vocab_padding=5)


def captioner(name, seed=0, S=5, D=12):
    model = caption.build(name, S, D, small_model(config=WIDE))
    for gates in [p for n, p in model.named_parameters() if n == "bridge.gates"]:
        nn.init.constant_(gates, 0.5)
    return model.eval()


def some_captions(number, seed=0):
    """For each picture one to three captions of different lengths."""
    rng = random.Random(seed)
    return [[[rng.randrange(42) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 3))] for _ in range(number)]


def plain_caption_loss(model, vision, tokens):
    """The summed loss of one caption: its own sequence, no packing, the whole distribution at each place."""
    start, inputs = model.begin(vision[None]), torch.tensor([tokens], dtype=torch.long)
    x = torch.cat([start, model.decoder.embed(inputs, torch.arange(start.size(1), start.size(1) + len(tokens)))], 1)
    with model.looking_at(vision[None]):
        log_p = model.decoder.logits(model.decoder.decode(x)).log_softmax(-1)[0]
    return -sum(log_p[start.size(1) - 1 + i, token] for i, token in enumerate([*tokens, model.eot]))


@pytest.mark.parametrize("name", caption.BRIDGES)
def test_packed_captions_have_the_losses_of_separate_ones(name):
    model, captions, vision = captioner(name), some_captions(4), torch.randn(4, 5, 12)
    packed = caption.pack(captions, model.bridge.P, model.eot)
    each = model.loss(vision, packed, "none")
    for b, picture in enumerate(captions):
        for k, tokens in enumerate(picture):               # first token and end are in it, padding is not
            assert each[b][packed.caption[b] == k].sum().item() == pytest.approx(plain_caption_loss(model, vision[b], tokens).item(), rel=1e-5)
    assert each[packed.caption < 0].abs().sum() == 0 and (packed.targets >= 0).sum() == sum(len(t) + 1 for p in captions for t in p)
    assert model.loss(vision, packed).item() == pytest.approx(each.sum().item() / (packed.targets >= 0).sum().item(), rel=1e-5)
    alone = model.loss(vision[:1], caption.pack(captions[:1], model.bridge.P, model.eot), "sum")                       # who else is in the batch does not matter
    assert alone.item() == pytest.approx(each[0].sum().item(), rel=1e-5)


def test_padding_is_by_length_and_not_by_value():
    packed = caption.pack([[[0, 42, 0]], [[1]]], 1, 42)    # ids that could be taken for padding are targets all the same
    assert packed.targets.tolist() == [[0, 42, 0, 42], [1, 42, -100, -100]]
    assert packed.source.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]] and packed.positions.tolist() == [[1, 2, 3], [1, 1, 1]]


@pytest.mark.parametrize("name", caption.BRIDGES)
def test_only_the_bridge_learns(name):
    model, captions = captioner(name), some_captions(6)
    recipe = caption.Recipe(steps=4, batch=4, micro_batch=2, lr=1e-2, warmup=1, eval_every=4)
    training = caption.BridgeTraining(model, recipe, np.random.RandomState(0).randn(6, 5, 12).astype(np.float16), captions, 0, "cpu")
    frozen = {n: p.clone() for n, p in model.decoder.state_dict().items()}
    before = {n: p.clone() for n, p in model.bridge.state_dict().items()}
    training.update()
    assert all(torch.equal(p, model.decoder.state_dict()[n]) and model.decoder.get_parameter(n).grad is None for n, p in frozen.items())
    assert all(not torch.equal(p, model.bridge.state_dict()[n]) for n, p in before.items() if ".bias" not in n)
    assert all(p.dtype == torch.float32 for p in model.bridge.parameters()) and set(training.state()["model"]) == set(before)
    if name == "cross":
        assert [g["lr"] / training.optimizer.param_groups[0]["lr"] for g in training.optimizer.param_groups if len(g["params"]) == 1] == [caption.GATES]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    updates = []
    for micro in (6, 2):
        recipe = caption.Recipe(steps=3, batch=6, micro_batch=micro, lr=1e-2, warmup=1, eval_every=4)
        training = caption.BridgeTraining(captioner("linear"), recipe, np.random.RandomState(0).randn(6, 5, 12).astype(np.float16), some_captions(6), 0, "cpu")
        with torch.autocast("cpu", enabled=False), pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt2, "autocast", lambda device: contextlib.nullcontext())
            updates.append([x.item() for _ in range(3) for x in training.update()])
    assert updates[0] == pytest.approx(updates[1], rel=1e-4)


@pytest.mark.parametrize("name", caption.BRIDGES)
def test_captions_are_the_same_with_and_without_cache(name):
    model, vision = captioner(name), torch.randn(5, 5, 12)
    prompt = [[7, 8]] * 5
    for begun in ((), prompt):
        cached, plain = (model.generate(vision, 12, prompt=begun, use_cache=use).tolist() for use in (True, False))
        assert cached == plain and len({tuple(row) for row in cached}) > 1
    one = model.generate(vision[2:3], 12).tolist()[0]      # alone it says the same
    together = model.generate(vision, 12).tolist()[2]
    assert together[:len(one)] == one and all(token == 42 for token in together[len(one):])
    assert not list(model.decoder.h[0]._forward_pre_hooks)                       # the decoder is left as it was


@pytest.mark.parametrize("name", caption.BRIDGES)
def test_beam_search_equals_greedy_and_brute_force(name):
    model, vision = captioner(name), torch.randn(3, 5, 12)
    greedy = model.generate(vision, 7).tolist()
    for row, other in zip(model.beam_search(vision, 1, 7).tolist(), greedy):
        assert row[:len(other)] == other[:len(row)]
    few = caption.build(name, 5, 12, small_model(config=GPTConfig(48, 4, 2, 2, 32, init_std=0.3)))
    for vision, penalty in ((torch.randn(1, 5, 12), 0.0), (torch.randn(1, 5, 12), 1.0)):
        worth = {}
        for n in range(4):                                 # all captions of up to three tokens and an end, and those of four without one
            for tokens in itertools.product(range(3), repeat=n):
                worth[tokens] = -plain_caption_loss(few, vision[0], list(tokens)).item() / (n + 1) ** penalty
        for tokens in itertools.product(range(3), repeat=4):
            packed = caption.pack([[list(tokens)]], few.bridge.P, 3)
            worth[tokens] = -few.loss(vision, packed, "none")[0, :4].sum().item() / 4 ** penalty
        found = few.beam_search(vision, 4 ** 4, 4, penalty)[0].tolist()
        assert tuple(t for t in found if t != 3) == max(worth, key=worth.get), (found, penalty)
        both = few.beam_search(torch.cat([vision, vision + 1]), 5, 4, penalty)[0].tolist()       # a picture's beams do not mix with another's
        assert [t for t in both if t != 3] == [t for t in few.beam_search(vision, 5, 4, penalty)[0].tolist() if t != 3]


def test_closed_gates_leave_the_decoder_as_it_is():
    model, idx = captioner("cross"), torch.randint(0, 42, (3, 9))
    nn.init.zeros_(model.bridge.gates)
    with model.looking_at(torch.randn(3, 5, 12)):
        assert torch.equal(model.decoder(idx)[0], small_model(config=WIDE)(idx)[0])
    nn.init.constant_(model.bridge.gates, 0.5)
    with model.looking_at(torch.randn(3, 5, 12)):
        assert not torch.allclose(model.decoder(idx)[0], small_model(config=WIDE)(idx)[0], atol=1e-2)


def plain_attention(layer, x, source):
    """caption.Attention for one row in float64, head by head and place by place."""
    w = {n: p.double() for n, p in layer.state_dict().items()}
    q, kv = x @ w["q.weight"].T + w["q.bias"], source @ w["kv.weight"].T + w["kv.bias"]
    C, hs = x.size(1), x.size(1) // layer.n_head
    y = torch.zeros_like(q)
    for h in range(layer.n_head):
        s = slice(h * hs, (h + 1) * hs)
        for t in range(len(x)):
            y[t, s] = (kv[:, :C][:, s] @ q[t, s] / math.sqrt(hs)).softmax(0) @ kv[:, C:][:, s]
    return y @ w["out.weight"].T + w["out.bias"]


def plain_norm(norm, x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def test_bridges_equal_plain_float64_ones():
    torch.manual_seed(1)
    x, vision = torch.randn(7, 32), torch.randn(5, 12)
    layer = captioner("qformer").bridge.layers[0]
    y = x.double() + plain_attention(layer.attend, plain_norm(layer.ln_1, x.double()), plain_norm(layer.ln_1, x.double()))
    y = y + plain_attention(layer.look, plain_norm(layer.ln_2, y), vision.double())
    w = {n: p.double() for n, p in layer.mlp.state_dict().items()}
    u = plain_norm(layer.ln_3, y) @ w["c_fc.weight"].T + w["c_fc.bias"]
    y = y + 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3))) @ w["c_proj.weight"].T + w["c_proj.bias"]
    assert torch.allclose(layer(x[None], vision[None])[0].double(), y, atol=1e-5)
    model = captioner("cross")
    bridge, block = model.bridge, model.decoder.h[1]
    seen = plain_norm(bridge.norm, vision.double()) + bridge.positions.double()
    expected = x.double() + math.tanh(0.5) * plain_attention(bridge.look[1], plain_norm(bridge.ln[1], x.double()), seen)
    with model.looking_at(vision[None]):
        with_a_look = block(x[None])
    assert torch.allclose(with_a_look, block(expected.float()[None]), atol=1e-4)
    bridge = captioner("linear").bridge
    expected = plain_norm(bridge.norm, vision.double()) @ bridge.project.weight.double().T + bridge.project.bias.double() + bridge.positions.double()
    assert torch.allclose(bridge(vision[None])[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("side, grid", [(8, (4, 8)), (16, (4, 8)), (16, (8, 8)), (16, (16, 16))])
def test_pooling_equals_a_plain_loop(side, grid):
    tokens = torch.randn(2, 1 + side * side, 6)
    pooled = caption.pool_tokens(tokens, grid)
    square, h, w = tokens[:, 1:].view(2, side, side, 6), side // grid[0], side // grid[1]
    for r in range(grid[0]):
        for c in range(grid[1]):
            assert torch.allclose(pooled[:, 1 + r * grid[1] + c], square[:, r * h:(r + 1) * h, c * w:(c + 1) * w].mean((1, 2)), atol=1e-6)
    assert torch.equal(pooled[:, 0], tokens[:, 0])
    with pytest.raises(UserError, match="does not divide"):
        caption.pool_tokens(tokens, (3, 5))


def test_a_prefix_has_to_fit_into_the_context():
    with pytest.raises(UserError, match="a prefix of 65 leaves no room.*--grid-size 4x8"):
        caption.build("linear", 65, 12, small_model(config=train_gpt2.PRESETS["tiny"]))
    assert caption.build("cross", 65, 12, small_model(config=train_gpt2.PRESETS["tiny"])).bridge.P == 1      # tokens that are looked at take none


@pytest.fixture(scope="session")
def eye(tmp_path_factory):
    """A tiny CLIP with random weights, as a checkpoint."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("eye") / "clip.pt"
    train_gpt2.save_checkpoint(path, {"format": train_gpt2.FORMAT, "clip": caption.TINY_CLIP, "model": caption.open_clip.CLIP(**caption.TINY_CLIP).state_dict()})
    return path


def test_features_are_computed_once_and_gone_on_with(eye, shapes, tmp_path, monkeypatch):
    vision, pictures = caption.load_clip(eye), coco_eval.read_dataset(shapes, "train")[:150]
    whole, good = caption.cached_features(vision, pictures, tmp_path / "a", "train", (4, 8), "cpu")
    assert whole.shape == (150, 33, 96) and whole.dtype == np.float16 and all(good)
    assert not any(p.requires_grad for p in vision.visual.parameters()) and caption.fingerprint(vision.visual) in vision.name     # CLIP stays as it is
    one = caption.pool_tokens(vision(caption.prepare(vision, [coco_eval.load_image(pictures[70]["path"])])))
    assert np.allclose(whole[70], one[0].numpy(), atol=2e-2)
    read = caption.readable
    monkeypatch.setattr(caption, "readable", lambda *args: pytest.fail("what is on disk is computed again"))
    again, _ = caption.cached_features(vision, pictures, tmp_path / "a", "train", (4, 8), "cpu")
    assert np.array_equal(whole, again)
    header = json.loads((tmp_path / "a/train.json").read_text())                 # as a kill after the first 64 leaves it
    (tmp_path / "a/train.json").write_text(json.dumps({**header, "done": 64}))
    seen = []
    monkeypatch.setattr(caption, "readable", lambda path, *rest: seen.append(path) or read(path, *rest))
    again, _ = caption.cached_features(vision, pictures, tmp_path / "a", "train", (4, 8), "cpu")
    assert np.array_equal(whole, again) and len(seen) == 86
    for wrong in ((vision, pictures[:9], (4, 8)), (vision, pictures, (8, 8)), (caption.Vision(vision.visual, vision.preprocess, "other"), pictures, (4, 8))):
        with pytest.raises(UserError, match="other pictures, another CLIP"):
            caption.cached_features(wrong[0], wrong[1], tmp_path / "a", "train", wrong[2], "cpu")
    for damage in ("", "[]", "{}", '{"format": 1'):
        (tmp_path / "a/train.json").write_text(damage)
        with pytest.raises(UserError, match="damaged: remove it"):
            caption.cached_features(vision, pictures, tmp_path / "a", "train", (4, 8), "cpu")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    _, good = caption.cached_features(vision, [*pictures[:3], {"id": 77, "path": broken}], tmp_path / "b", "train", (4, 8), "cpu")
    assert good == [True, True, True, False]


EXTRACTION = """
import sys, time, caption, coco_eval
caption.SAVE_EVERY, read = 0, caption.readable
caption.readable = lambda *args: (time.sleep(0.01), read(*args))[1]
caption.cached_features(caption.load_clip(sys.argv[1]), coco_eval.read_dataset(sys.argv[2], "train"), sys.argv[3], "train", (4, 8), "cpu")
"""


def test_an_extraction_that_is_killed_goes_on(eye, shapes, tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", EXTRACTION, eye, shapes, tmp_path / "a"], cwd=HERE, stdout=subprocess.DEVNULL)
    while not (tmp_path / "a/train.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = json.loads((tmp_path / "a/train.json").read_text())["done"]
    assert 0 < done < len(pictures := coco_eval.read_dataset(shapes, "train"))
    vision, pictures, read, seen = caption.load_clip(eye), coco_eval.read_dataset(shapes, "train"), caption.readable, []
    monkeypatch.setattr(caption, "readable", lambda path, *rest: seen.append(path) or read(path, *rest))
    (again, _), counted = caption.cached_features(vision, pictures, tmp_path / "a", "train", (4, 8), "cpu"), len(seen)
    assert counted == len(pictures) - done
    assert np.array_equal(again, caption.cached_features(vision, pictures, tmp_path / "b", "train", (4, 8), "cpu")[0])


@pytest.fixture(scope="session")
def captions_run(eye, shapes, whole, tmp_path_factory):
    """The flags of a short run, and the folder in which one was made without interruption."""
    flags = ["--data", shapes, "--lm", whole[0] / "run/ckpt.pt", "--clip", eye, "--bridge", "cross", "--steps", 30, "--batch", 8, "--micro-batch", 4]
    folder = tmp_path_factory.mktemp("captions")
    process = run("caption.py", *flags, cwd=folder)
    assert process.returncode == 0, process.stderr
    return flags, folder, process.stdout


def test_a_caption_run_leaves_its_folder(captions_run, shapes):
    _, folder, output = captions_run
    out = folder / "runs/shapes-cross"
    assert {p.name for p in out.iterdir()} >= {"ckpt.pt", "best.pt", "log.csv", "curves.png", "grid.png", "results.json", "scores.json"}
    assert "trainable parameters" in output and "METEOR (exact + stem)" in output and "facts, unseen pairs" in output and "left" in output
    results = coco_eval.read_results(out / "results.json")
    again = coco_eval.evaluate(coco_eval.read_references(shapes / "annotations/captions_val.json"), results)["corpus"]
    scores = json.loads((out / "scores.json").read_text())
    assert len(results) == 500 and all(scores[metric] == pytest.approx(again[metric]) for metric in again)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert not any("wte" in name or "visual" in name for name in checkpoint["model"]) and (out / "ckpt.pt").stat().st_size < 4_000_000
    assert Image.open(out / "grid.png").size[0] > 700
    process = run("caption.py", *captions_run[0], cwd=folder)                    # a finished run is only scored again
    assert process.returncode == 0 and "step" not in process.stdout.split("METEOR")[0].replace("steps", ""), process.stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_caption_run_ends_as_if_it_had_not_been(captions_run, tmp_path, number):
    flags, folder, _ = captions_run
    process = subprocess.Popen([sys.executable, "-u", HERE / "caption.py", *map(str, flags)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(f"step {20:>6}"):
            process.send_signal(number)
            break
    process.stdout.read()
    assert process.wait(timeout=60) != 0
    assert run("caption.py", *flags, cwd=tmp_path).returncode == 0
    one, other = (torch.load(f / "runs/shapes-cross/ckpt.pt", weights_only=True) for f in (folder, tmp_path))
    assert all(torch.equal(t, other["model"][n]) for n, t in one["model"].items()) and one["best"] == other["best"]
    logs = [[{k: v for k, v in row.items() if "second" not in k} for row in train_gpt2.read_log(f / "runs/shapes-cross/log.csv")] for f in (folder, tmp_path)]
    other = {row["step"]: row for row in logs[1]}          # where it stopped, the interrupted one tells more
    assert logs[0] and all(row.items() <= other[row["step"]].items() for row in logs[0])


def test_sampling_pictures(captions_run, shapes, tmp_path):
    flags, folder, _ = captions_run
    (tmp_path / "my pictures").mkdir()
    for i, suffix in enumerate((".png", ".jpg", ".webp")):
        coco_eval.load_image(shapes / "val/000001.png").resize((90 + 40 * i, 70)).save(tmp_path / f"my pictures/{i}{suffix}")
    (tmp_path / "my pictures/3.gif").write_bytes(b"GIF no")
    flags = [*flags[:8], "--sample", tmp_path / "my pictures", "--ckpt", folder / "runs/shapes-cross/best.pt"]
    process = run("caption.py", *flags, "--grid", tmp_path / "out.png", cwd=folder)
    assert process.returncode == 0 and process.stdout.count("my pictures") == 3 and "3.gif cannot be read" in process.stderr, process.stderr
    assert Image.open(tmp_path / "out.png").size[0] > 700
    process = run("caption.py", *flags, "--num", 4, cwd=folder)
    assert process.stdout.count("0.png:") == 4
    (tmp_path / "my pictures/3.gif").unlink()
    other = tmp_path / "other.pt"
    train_gpt2.save_checkpoint(other, {**train_gpt2.read_checkpoint(flags[3]), "model": {n: p + 1e-3 for n, p in train_gpt2.read_checkpoint(flags[3])["model"].items()}})
    assert_error(run("caption.py", *flags[:2], "--lm", other, *flags[4:], cwd=folder), "another decoder", "--lm")


@pytest.mark.parametrize("args, words", [
    (["--bridge", "gate"], ["invalid choice", "linear"]), ([], ["--bridge"]), (["--bridge", "cross", "--sample", "nothing.png"], ["nothing.png is not there"]),
    (["--bridge", "cross", "--sample", "empty"], ["no pictures"]), (["--bridge", "cross", "--sample", "1.png", "1.png"], ["named twice"]),
    (["--bridge", "cross", "--sample", "text.png"], ["text.png cannot be read"]), (["--bridge", "cross", "--data", "empty", "--lm", "ckpt", "--clip", "x/y"], ["--clip x/y"]),
    (["--bridge", "cross", "--data", "empty", "--lm", "ckpt", "--clip", "clip"], ["COCO's layout"])])
def test_mistakes_in_captioning_are_one_line(args, words, tmp_path, whole, eye):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    (tmp_path / "text.png").write_text("no picture")
    given = {"ckpt": whole[0] / "run/ckpt.pt", "clip": eye}
    process = run("caption.py", *(given.get(a, a) for a in args), cwd=tmp_path)
    assert_error(process, *words)
    assert not (tmp_path / "runs").exists()                # the pictures are looked at before anything is trained


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_together(rank, size, port, tiny, out):
    """One of `size` processes: three steps of a decoder, its validation, and three of a bridge, in fp32; the first one writes what came."""
    train_gpt2.autocast = caption.autocast = lambda device: torch.autocast("cpu", enabled=False)
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        train_gpt2.join_processes()
    tokens, val = train_gpt2.find_shards(tiny)
    recipe = train_gpt2.Recipe(steps=3, batch_tokens=8 * 64, micro_batch=8 // size if size < 4 else 1, lr=1e-3, warmup=1)
    training = train_gpt2.Training(small_model(config=train_gpt2.PRESETS["tiny"]), recipe, tokens, 0, "cpu")
    training.step = tokens.windows(64) // 8 - 1            # over the border of an epoch: the last window is not full
    losses = [x.item() for _ in range(3) for x in training.update()]
    losses.append(train_gpt2.validation_loss(training.raw.eval(), val["scenes"], fineweb.get_tokenizer("tiny"), 64 * 21, 4, "cpu")["loss"])
    captions, features = some_captions(9), np.random.RandomState(0).randn(9, 5, 12).astype(np.float16)
    training = caption.BridgeTraining(captioner("cross"), caption.Recipe(3, 8, 8, 1e-2, 1, 3), features, captions, 0, "cpu")
    losses += [x.item() for _ in range(3) for x in training.update()]
    losses.append(caption.caption_loss(training.net, features, captions, "cpu")[0])
    texts = caption.write_captions(training.net, features, fineweb.get_tokenizer("tiny"), max_new_tokens=6)
    train_gpt2.require_same_step(training)
    if size > 1:                                           # as when a machine does not see the checkpoint that the others go on from
        training.step += rank
        with pytest.raises(UserError, match="all machines share"):
            train_gpt2.require_same_step(training)
    if rank == 0:
        Path(out).write_text(json.dumps([losses, texts]))


def test_one_two_and_four_processes_have_the_same_losses(tiny, tmp_path):
    results = []
    for size in (1, 2, 4):
        torch.multiprocessing.spawn(train_together, (size, free_port(), tiny, str(tmp_path / "out.json")), nprocs=size)
        results.append(json.loads((tmp_path / "out.json").read_text()))
    for losses, texts in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5) and texts == results[0][1]


def torchrun(script, *args, cwd, size=2, **options):
    return [sys.executable, "-u", "-m", "torch.distributed.run", "--nproc_per_node", str(size), "--master_port", str(free_port()), str(HERE / script), *map(str, args)]


def test_a_signal_to_one_process_stops_all_and_one_goes_on(tiny, tmp_path):
    flags = ["--preset", "tiny", "--data", tiny, "--out", "run", "--steps", 400, "--batch-tokens", 1024, "--micro-batch", 4, "--eval-every", 200]
    process = subprocess.Popen(torchrun("train_gpt2.py", *flags, cwd=tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step     20"):
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(children[1]), signal.SIGTERM)
    assert process.wait(timeout=90) != 0 and "2 processes" in output and "saved in run/ckpt.pt" in output, output
    stopped = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"]
    assert 20 < stopped < 200
    flags[flags.index(400)] = stopped + 3
    process = run("train_gpt2.py", *flags, cwd=tmp_path)   # one process goes on with what two began
    assert process.returncode == 0 and f"going on after step {stopped}" in process.stdout, process.stderr
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == stopped + 3


def test_benches_measure_what_they_print(eye, shapes, whole, tmp_path, monkeypatch, capsys):
    steps, update = [], train_gpt2.Updates.update
    monkeypatch.setattr(train_gpt2.Updates, "update", lambda self: steps.append(self) or update(self))
    rate, memory = train_gpt2.measure(SMALL, train_gpt2.RECIPES["tiny"], 2, 64, "cpu", seconds=0)
    assert rate > 0 and memory > 1e7 and len(steps) == 6   # three to warm up, three that count
    monkeypatch.chdir(tmp_path)
    args = train_gpt2.argparse.Namespace(data=shapes, clip=eye, lm=whole[0] / "run/ckpt.pt", grid_size="4x8", batch=4, steps=1, epochs=None, micro_batch=None, lr=None, seed=0,
                                         bridge=None, sample=None)
    caption.bench(caption.open_world(args), args, seconds=0)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "captions/s" in line]
    assert len(lines) == 9 and len(steps) == 6 + 9 * 4
    for words in lines:                                    # five captions of a picture where they are packed, one otherwise
        pictures, captions = (float(words[words.index(unit) - 1].replace(",", "")) for unit in ("pictures/s", "captions/s"))
        assert captions / pictures == pytest.approx(5 if "packed" in words else 1, rel=0.02)


def test_steps_per_second_counts_steps_and_seconds(monkeypatch):
    class Counting:
        device, steps = "cpu", 0

        def update(self):
            self.steps += 1
            return torch.zeros(()), None

    training = Counting()
    monkeypatch.setattr(train_gpt2, "time", train_gpt2.argparse.Namespace(time=itertools.count().__next__))           # a second for each look at the clock
    assert train_gpt2.steps_per_second(training, 2) == training.steps / 3 == 2


def test_torchrun_trains_and_scores_a_bridge_as_one_process_does(captions_run, tmp_path):
    flags, folder, _ = captions_run
    process = subprocess.run(torchrun("caption.py", *flags, cwd=tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0 and process.stdout.count("METEOR (exact + stem)") == 1, process.stderr
    one, two = (json.loads((f / "runs/shapes-cross/scores.json").read_text()) for f in (folder, tmp_path))
    assert two["nats a caption"] == pytest.approx(one["nats a caption"], rel=0.01) and two["shuffled"] == pytest.approx(one["shuffled"], rel=0.01)
    assert len(two["per_image"]) == 500 and two["facts"].keys() == one["facts"].keys()


# ---------------------------------------------------------------------------------------------------------------------
# Real text


@real_data
def test_own_text_becomes_shards_byte_for_byte(tmp_path, monkeypatch):
    source = REAL / "text/fineweb_edu_150_docs.jsonl"
    (tmp_path / "odd.txt").write_text("日本語 <|endoftext|> is plain text here\r\n", encoding="utf-8", newline="")
    counts = fineweb.text_to_shards([source, tmp_path / "odd.txt"], tmp_path / "own", val_fraction=0.1, shard_tokens=20_000)
    documents = [json.loads(line)["text"] for line in open(source, encoding="utf-8")] + ["日本語 <|endoftext|> is plain text here\r\n"]
    tokenizer = fineweb.get_tokenizer("gpt2")
    for split, expected in (("train", [d for i, d in enumerate(documents) if i % 10 != 1]), ("val", [d for i, d in enumerate(documents) if i % 10 == 1])):
        shards = [fineweb.read_shard(path) for path in sorted((tmp_path / "own").glob(f"own_{split}_*"))]
        assert all(len(shard) == 20_000 for shard in shards[:-1]) and sum(map(len, shards)) == counts[split]
        pieces = " ".join(map(str, np.concatenate(shards))).split("50256")[1:]
        assert [tokenizer.decode(list(map(int, piece.split()))) for piece in pieces] == expected
    with pytest.raises(UserError, match="not empty"):
        fineweb.text_to_shards([source], tmp_path / "own")
    spawned = "import multiprocessing, fineweb; multiprocessing.set_start_method('spawn'); fineweb.main()"       # as on macOS and Windows
    subprocess.run([sys.executable, "-c", spawned, "--text", source, tmp_path / "odd.txt", "--val-fraction", "0.1", "--out", tmp_path / "spawned"], cwd=HERE, check=True, timeout=120)
    assert np.array_equal(fineweb.read_shard(tmp_path / "spawned/spawned_train_000001.bin"), np.concatenate([fineweb.read_shard(path) for path in sorted((tmp_path / "own").glob("*train*"))]))


@real_data
def test_parquet_and_lines_give_the_same_shards(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow.parquet
    source = REAL / "text/fineweb_edu_150_docs.jsonl"
    texts = [json.loads(line)["text"] for line in open(source, encoding="utf-8")]
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), tmp_path / "docs.parquet")
    for kind, path in (("lines", source), ("parquet", tmp_path / "docs.parquet")):
        fineweb.text_to_shards([path], tmp_path / kind)
    for split in ("train_000001", "val_000000"):
        assert np.array_equal(*(fineweb.read_shard(tmp_path / kind / f"{kind}_{split}.bin") for kind in ("lines", "parquet")))


@real_data
@pytest.mark.parametrize("books", [1, 3])
def test_a_few_texts_are_split_near_their_ends(books, tmp_path):
    texts = ["".join(f"line {i} of book {book}\n" for i in range(1000)) for book in range(books)]
    for book, text in enumerate(texts):
        (tmp_path / f"{book}.txt").write_text(text)
    fineweb.text_to_shards(sorted(tmp_path.glob("*.txt")), tmp_path / "own_train", val_fraction=0.1)
    train, val = train_gpt2.find_shards(tmp_path / "own_train")                  # a folder's name does not make its shards training shards
    assert [path.name for path in train.paths + val["val"].paths] == ["own_train_train_000001.bin", "own_train_val_000000.bin"]
    parts = [fineweb.get_tokenizer("gpt2").decode(tokens.read(1, len(tokens)).tolist()).split(fineweb.EOT) for tokens in (train, val["val"])]
    assert [head + end for head, end in zip(*parts)] == texts and all(head.endswith("\n") for head in parts[0])
    assert [len(end) for end in parts[1]] == pytest.approx([len(text) / 10 for text in texts], rel=0.02)


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"\xff\xfe no utf-8", "not UTF-8"), ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "line 2"), ("a.jsonl", b"{torn", "line 1"),
    ("a.pdf", b"", "neither"), ("a.jsonl", b"\n", "no document"),
    ("a.txt", b"", "no document")])
def test_unreadable_text_is_refused(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(fineweb._split_few(fineweb.read_documents([tmp_path / name]), 10)[0])


@real_data
def test_the_124m_trains_on_real_text(tmp_path):
    fineweb.text_to_shards([REAL / "text/fineweb_edu_150_docs.jsonl"], tmp_path / "own", val_fraction=0.02)
    model = GPT(train_gpt2.PRESETS["gpt2"])
    recipe = train_gpt2.Recipe(steps=3, batch_tokens=1024, micro_batch=1, lr=6e-4, warmup=1)
    training = train_gpt2.Training(model, recipe, train_gpt2.Tokens(sorted((tmp_path / "own").glob("*train*"))), 0, "cpu")
    losses = [training.update()[0].item() for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(50304), abs=0.3) and losses[2] < losses[0] - 0.5


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
