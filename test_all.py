"""
Every test of the project: python test_all.py (or pytest test_all.py -k word). No network, no GPU, some minutes on two cores.

Where an oracle exists, it is the judge: transformers, a float64 or brute-force version, the same run without interruption.
REAL_DATA names a folder of real data; tests that need it, or a package that is not installed, are skipped by name.
"""
import contextlib
import http.server
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import fineweb
import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, GPTConfig

HERE = Path(__file__).parent
REAL = Path(os.environ.get("REAL_DATA", "nowhere"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs REAL_DATA, a folder of real data")
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


def test_many_such_losses_stop_the_run(tmp_path):
    training = some_training(tmp_path, steps=40, log_every=20)
    training.net = lambda x, y: (None, training.raw(x, y)[1] * math.inf)
    with pytest.raises(UserError, match="10 steps in a row.*ckpt.pt"):
        train_gpt2.loop(training, {}, fineweb.get_tokenizer("tiny"), tmp_path, {})


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
    import hashlib
    server.files, server.behave = {"/a/b": BODY}, ["break off", "503", "break off", "no ranges"]
    path = fineweb.download("https://example.org/a/b", tmp_path / "b", len(BODY), hashlib.sha256(BODY).hexdigest())
    assert path.read_bytes() == BODY and server.ranges == [0, 65536, 65536, 131072]          # whole pieces of 64 KiB are kept
    assert list(tmp_path.iterdir()) == [path]
    fineweb.download("https://example.org/a/b", path, len(BODY))
    assert len(server.ranges) == 4                         # what is there is not fetched again


def test_download_refuses_what_is_wrong(server, tmp_path):
    import hashlib
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


def test_no_network_is_one_line(tmp_path):
    env = {**os.environ, fineweb.MIRROR: "http://127.0.0.1:9"}
    assert_error(run("fineweb.py", "--out", tmp_path / "x", env=env), "gives no list of shards", str(tmp_path / "x"))


def test_no_room_is_said_before(tmp_path):
    with pytest.raises(UserError, match="GB are needed"):
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


def test_checkpoints_that_cannot_be_read(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(UserError, match="train first"):
        train_gpt2.load_checkpoint(path)
    torch.save({"format": 0}, path)
    with pytest.raises(UserError, match="format 0"):
        train_gpt2.load_checkpoint(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="--restart"):
        train_gpt2.load_checkpoint(path)
    (tmp_path / "ckpt.prev.pt").write_bytes(b"")
    with pytest.raises(UserError, match="ckpt.prev.pt"):
        train_gpt2.load_checkpoint(path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    train_gpt2.save_checkpoint(path, {"format": 1, "x": torch.zeros(10)})
    code = f"""if True:
        import resource, signal, torch, train_gpt2
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        train_gpt2.fineweb.command_line(lambda: train_gpt2.save_checkpoint({str(path)!r}, {{"format": 1, "x": torch.zeros(10 ** 6)}}))"""
    assert_error(subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True), "make room")
    assert len(train_gpt2.read_checkpoint(path)["x"]) == 10 and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_sampling_from_the_command_line(whole):
    folder, _ = whole
    for prompt in ("", "Ünïcode 日本語 🎈", "a red circle " * 100):
        process = run("train_gpt2.py", "--sample", prompt, "--ckpt", "run/ckpt.pt", "--num", 2, "--max-new-tokens", 80, "--top-k", 20, "--top-p", 0.9, cwd=folder)
        assert process.returncode == 0 and process.stdout.count(prompt or "\n---\n") >= 1 and "\n---\n" in process.stdout, process.stderr
    process = run("train_gpt2.py", "--eval", "--ckpt", "run/ckpt.pt", "--data", "nowhere", cwd=folder)
    assert_error(process, "nowhere")


@pytest.mark.parametrize("args, words", [
    (["--data", "nowhere"], ["nowhere has no shards", "fineweb.py"]),
    (["--preset", "tiny", "--batch-tokens", 1000, "--micro-batch", 4], ["768 or 1,024"]),
    (["--preset", "small", "--data", "beyond", "--steps", 2, "--batch-tokens", 256], ["beyond the vocabulary of 50,257"]),
    (["--sample", "x", "--ckpt", "nothing.pt"], ["nothing.pt is not there", "train first"])])
def test_a_mistake_is_one_line(args, words, tmp_path):
    if "beyond" in args and not REAL.is_dir():
        pytest.skip("needs REAL_DATA, for the GPT-2 vocabulary")
    (tmp_path / "beyond").mkdir()
    for file in ("x_train_000001.bin", "x_val_000000.bin"):
        fineweb.write_shard(tmp_path / "beyond" / file, np.full(600, 60_000))
    assert_error(run("train_gpt2.py", *args, cwd=tmp_path), *words)


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


@real_data
def test_a_single_text_is_split_near_its_end(tmp_path):
    text = "".join(f"line {i} of a book\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    fineweb.text_to_shards([tmp_path / "book.txt"], tmp_path / "own", val_fraction=0.1)
    train, val = (fineweb.get_tokenizer("gpt2").decode(fineweb.read_shard(next((tmp_path / "own").glob(f"own_{s}_*")))[1:].tolist()) for s in ("train", "val"))
    assert train + val == text and train.endswith("\n") and len(val) == pytest.approx(len(text) / 10, rel=0.02)


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"\xff\xfe no utf-8", "not UTF-8"), ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "line 2"), ("a.jsonl", b"{torn", "line 1"),
    ("a.pdf", b"", "neither"), ("a.jsonl", b"\n", "no document")])
def test_unreadable_text_is_refused(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(fineweb._split_single(fineweb.read_documents([tmp_path / name]), 0.1))


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
