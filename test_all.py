"""
Every test of the project: python test_all.py (or pytest test_all.py -k word). No network, no GPU,
some minutes on two cores.

Where an oracle exists, it is the judge: transformers, pycocoevalcap, a float64 or brute-force
version, the same run without interruption or on other numbers of processes. REAL_DATA names a
folder of real data; tests that need it, or a package that is not installed, are skipped by name.
MEASURE=1 adds those that measure for half an hour or more (-s shows it), some beside a peer: PEER
names the folder of nanoGPT's model.py; others need transformers, or pycocoevalcap and Java.

Chapters in the order of the files: fineweb.py, hellaswag.py, train_gpt2.py, coco_eval.py,
caption.py. The first line of a test says what would be broken.
"""
import contextlib
import copy
import csv
import dataclasses
import doctest
import functools
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path
from statistics import correlation

import filelock
import numpy as np
import open_clip
import pytest
import torch
import torch.nn as nn
from PIL import Image, ImageColor
from torch.nn import functional as F

import caption
import coco_eval
import fineweb
import hellaswag
import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, GPTConfig, Recipe, TokenDataset, generate

HERE = Path(__file__).parent
REAL = Path(os.environ.get("REAL_DATA", "nowhere"))
CPU = torch.device("cpu")
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs REAL_DATA, a folder of real data")
measured = pytest.mark.skipif("MEASURE" not in os.environ, reason="measures: set MEASURE=1")
SMALL = GPTConfig(16, 43, n_layer=3, n_head=2, n_embd=32, init_std=0.3)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The toy text's shards."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    fineweb.make_toy_text(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def signals():
    """The usual handlers, also where the tests themselves run under nohup or with "&"."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def bpe():
    """The GPT-2 vocabulary, where there is real data."""
    if REAL.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str((REAL / "gpt2-bpe/tiktoken_cache").absolute())


def write_text(folder, tokens, n_vocab=431, names=("x_train_000001", "x_val_000000")):
    """The same tokens as a shard for training and one for validation; returns the folder."""
    for name in names:
        fineweb.write_shard(folder / f"{name}.bin", tokens, n_vocab)
    return folder


def small_model(seed=0, config=SMALL):
    torch.manual_seed(seed)
    return GPT(config).eval()


def run(script, *args, cwd=None, env=None):
    """Run one of the scripts as a user would; returns its exit code and what it printed.

    It runs in this process, which has loaded PyTorch already, or, given an env, in one of its own.
    """
    args = [str(arg) for arg in args]
    if env:
        command = [sys.executable, HERE / script, *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=99)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.chdir(cwd or os.getcwd()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *args])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            fineweb.command_line(importlib.import_module(Path(script).stem).main)
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # Python prints it, and leaves with 1
                err.write(f"{code}\n")
                code = 1
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def read_log(path):
    """The rows of a log.csv, as dicts of floats without what is empty."""
    rows = csv.DictReader(Path(path).read_text().splitlines())
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def real_items():
    """HellaSwag's items from the real data."""
    lines = (REAL / "hellaswag/hellaswag_val.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def assert_error(process, *words):
    """One line on stderr with "error:" and the words, exit code 1; or 2, after argparse's usage."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode in (1, 2) and "error: " in lines[-1], process.stderr
    assert len(lines) == 1 or process.returncode == 2, process.stderr
    assert all(word in lines[-1] for word in words), lines[-1]


def steps(model, recipe, get_batches, first=0, trained=None):
    """Yield (loss, norm) of training steps without end; `trained` is what the optimizer changes."""
    optimizer = train_gpt2.configure_optimizer(trained or model, recipe)
    for step in itertools.count(first):
        for group in optimizer.param_groups:
            group["lr"] = train_gpt2.get_lr(step, recipe) * group.get("lr_scale", 1)
        batches = get_batches(step)
        yield train_gpt2.train_step(model, optimizer, batches, recipe, CPU)[:2]


def text_steps(model, recipe, dataset, seed=0, first=0):
    """steps() of a GPT on a TokenDataset."""
    get = functools.partial(train_gpt2.get_micro_batches, dataset, recipe, seed)
    return steps(model, recipe, get, first)


@pytest.fixture
def fp32(monkeypatch):
    """Products in fp32, so that results can be compared closely."""
    monkeypatch.setattr(train_gpt2, "uses_bf16", lambda device: False)


@pytest.fixture(params=["fp32", "bf16"])
def precision(request, monkeypatch):
    """Products in both, whatever this machine has: bf16 is emulated where it is missing."""
    monkeypatch.setattr(train_gpt2, "uses_bf16", lambda device: request.param == "bf16")


# -----------------------------------------------------------------------------
# fineweb.py


def test_tiny_tokenizer_is_lossless_and_knows_the_words():
    """Text that does not come back from its tokens; words of the scenes that are several tokens."""
    tokenizer = fineweb.get_tokenizer(431)
    rng = random.Random(0)
    scene = fineweb.scene_document(fineweb.random_scene(rng), rng)
    code = "The cat.\n\n  x = {'a': 1}"
    for text in (code, "naïve 日本語 🎈 \x00\t", scene, "<|endoftext|>", ""):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert len(tokenizer.encode_ordinary("a red circle is at the top left")) == 8
    assert tokenizer.eot_token == tokenizer.n_vocab - 1
    assert train_gpt2.PRESETS["tiny"].vocab_size == tokenizer.n_vocab


def test_scene_documents_are_true_and_tell_sizes():
    """Documents that say something false, or that leave out places, sizes or numbers."""
    rng = random.Random(0)
    numbers = 0
    pairs = 0
    for _ in range(300):
        scene = fineweb.random_scene(rng)
        told = {f"{fineweb.object_name(thing)} {fineweb.place(thing)} {thing['size']}": thing
                for thing in scene["objects"]}
        first, *lines = fineweb.scene_document(scene, rng).split("\n")
        assert first == fineweb.scene_map(scene)
        numbers += lines[0].startswith("there are")
        for line in lines:
            assert False not in coco_eval.facts(line, scene).values()
            *pair, sides = line.split(", ")
            if len(pair) == 2 and set(pair) <= set(told):
                a, b = map(told.get, pair)
                assert sides.split() == fineweb.relations(b, a)
                pairs += 1
    assert 40 < numbers < 130 and 210 < pairs < 270


def test_shards_keep_their_tokens(tmp_path):
    """Shards that llm.c would not read, lose tokens, are damaged, or pass for another tokenizer's.
    """
    tokens = np.random.default_rng(0).integers(0, 65536, 1000).astype(np.uint16)
    path = tmp_path / "x_train_000001.bin"
    fineweb.write_shard(path, tokens, 431)
    assert (fineweb.read_shard(path, 431) == tokens).all()
    raw = path.read_bytes()
    assert np.frombuffer(raw[:16], "<i4").tolist() == [20240520, 1, 1000, 431]
    assert len(raw) == 1024 + 2000
    with pytest.raises(UserError, match="tokens of 431, and the model knows 50,257"):
        fineweb.read_shard(path, 50257)
    path.write_bytes(raw[:12] + bytes(4) + raw[16:])  # shards of others say nothing: GPT-2's
    assert (fineweb.read_shard(path, 50257) == tokens).all()
    for damaged in (raw[:-2], raw + b"xx", b"\0" + raw[1:], raw[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="x_train_000001.bin"):
            fineweb.read_shard(path, 431)


def test_scenes_say_what_is_true():
    """Captions that are not true of their scene, or facts that are judged wrongly."""
    rng = random.Random(0)
    seen = set()
    for _ in range(500):
        scene = fineweb.random_scene(rng)
        other = fineweb.random_scene(rng)
        captions = fineweb.captions(scene, rng)
        assert len(set(captions)) == 5
        for text in captions:
            stated = coco_eval.facts(text, scene)
            assert False not in stated.values(), (text, scene)
            seen |= set(stated.items()) | set(coco_eval.facts(text, other).items())
    assert seen == set(itertools.product(coco_eval.FACTS, (True, False, None)))
    for unseen in (False, True):
        for _ in range(100):
            objects = fineweb.random_scene(rng, unseen)["objects"]
            assert fineweb.has_unseen_pair(objects) == unseen


SCENE = {"objects": [{"color": "red", "shape": "circle", "size": "small", "row": 0, "col": 1},
                     {"color": "blue", "shape": "square", "size": "large", "row": 0, "col": 3}]}


@pytest.mark.parametrize(
    "caption, stated",
    [
        ("there are two objects", {"count": True}),
        ("a picture of a red circle and a blue square", {"objects": True}),
        ("the red circle is large and the blue square is large", {"objects": False}),
        ("a red circle with a blue square below it", {"objects": True, "relation": False}),
        ("the red circle is at the top left", {"objects": True, "place": True}),
        ("at the bottom left there is a red circle", {"objects": True, "place": False}),
        ("the pink circle is at the top left", {"objects": False, "place": False}),
        ("a blue square with a red circle to its left", {"objects": True, "relation": True}),
        ("a blue square with a red circle to its right", {"objects": True, "relation": False}),
        ("the weather is fine", {}),
    ],
)
def test_facts(caption, stated):
    assert coco_eval.facts(caption, SCENE) == {
        **dict.fromkeys(("count", "objects", "place", "relation")),
        **stated,
    }


def test_toy_text_is_the_same_every_time(tiny, tmp_path):
    """Toy text that differs between machines, or whose maps stand somewhere else."""
    fineweb.make_toy_text(tmp_path / "again")
    for path in tiny.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    tokens = fineweb.read_shard(tiny / "tiny_train_000001.bin", 431)
    scenes = fineweb.TOY_SCENE_BLOCKS * fineweb.TOY_BLOCK
    eot = fineweb.get_tokenizer(431).eot_token
    assert (tokens[: scenes : fineweb.TOY_BLOCK] == eot).all()  # each block begins with a scene
    assert scenes / len(tokens) == pytest.approx(5 / 6, abs=0.03)
    assert len(tokens) % fineweb.TOY_BLOCK == 1  # every token but the first is a target


@pytest.fixture
def server():
    """A server of the dict `files`; `behave` lists what to do wrong, one entry a request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        files = {}
        behave = []
        ranges = []
        address = ""

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            wrong = self.behave.pop(0) if self.behave else ""
            body = self.files.get(self.path)
            begin = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            self.ranges.append(begin)
            if body is None:
                return self.send_error(404)
            if wrong == "no ranges":
                begin = 0
            if begin >= len(body):
                return self.send_error(416)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body) - begin))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                end = begin + 100_000 if wrong == "break off" else None
                self.wfile.write(body[begin:end])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        Handler.address = f"http://127.0.0.1:{service.server_port}"
        yield Handler
        service.shutdown()


def test_fineweb_shards_come_from_the_hub(server, tmp_path):
    """Shards that are not downloaded through HF_ENDPOINT, or downloaded twice."""
    names = ["val_000000", "train_000001", "train_000002"]
    address = f"/datasets/{fineweb.FINEWEB_REPO}/resolve/main/finewebedu_%s.bin"
    for name in names:
        path = tmp_path / "made.bin"
        fineweb.write_shard(path, np.arange(len(name) * 1000) % 50_000, 50257)
        server.files[address % name] = path.read_bytes()
    env = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
    env["HF_HUB_OFFLINE"] = "0"
    command = ("fineweb.py", "--tokens", "150M", "--out", tmp_path / "edu")
    process = run(*command, env=env)
    assert process.returncode == 0 and "3 shards" in process.stdout, process.stderr
    for name in names:
        found = (tmp_path / f"edu/finewebedu_{name}.bin").read_bytes()
        assert found == server.files[address % name]
    asked = len(server.ranges)
    assert run(*command, env=env).returncode == 0 and len(server.ranges) == asked
    process = run("fineweb.py", "--tokens", "300M", "--out", tmp_path / "edu", env=env)
    assert process.returncode == 1
    assert "finewebedu_train_000003.bin cannot be downloaded" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA ..."), "--micro-batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (PermissionError(13, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'")])
def test_what_the_system_refuses_is_one_line(error, words, monkeypatch):
    """A traceback at the end of memory, or advice that does not fit the system's reason."""

    def main():
        raise error

    with pytest.raises(SystemExit, match="error: ") as end:
        fineweb.command_line(main)
    assert words in end.value.code
    monkeypatch.setenv("TRACEBACK", "1")  # shows where
    with pytest.raises(type(error)):
        fineweb.command_line(main)
    with pytest.raises(ZeroDivisionError):  # our own mistakes are not the system's
        fineweb.command_line(lambda: 1 / 0)


def test_nothing_that_is_there_is_overwritten(tmp_path, monkeypatch):
    """A file or folder of somebody's replaced by an output; a link replaced by a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books.tmp").write_text("mine")
    (tmp_path / "big").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "big/target.txt")
    with fineweb.new_folder("books") as building:
        (building / "a").write_text("a")
    with pytest.raises(UserError, match="there already"), fineweb.new_folder("books"):
        pass
    with pytest.raises(KeyError), fineweb.new_folder("failed"):
        raise KeyError
    with fineweb.atomic_write("link.txt", "w") as file:
        file.write("new")
    assert {path.name for path in tmp_path.iterdir()} == {"books", "books.tmp", "big", "link.txt"}
    assert (tmp_path / "books.tmp").read_text() == "mine"
    assert (tmp_path / "link.txt").is_symlink() and Path("big/target.txt").read_text() == "new"
    fineweb.refuse_existing("new.png", None, "other.png")
    for names in (("books",), ("new.png", "new.png"), (None, "big")):
        with pytest.raises(UserError, match="name another"):
            fineweb.refuse_existing(*names)


@real_data
def test_own_text_becomes_shards_byte_for_byte(tmp_path, monkeypatch):
    """Own text that is lost, changed or split otherwise than told."""
    source = REAL / "text/fineweb_edu_150_docs.jsonl"
    odd = "日本語 <|endoftext|> is plain text here\r\n"
    (tmp_path / "odd.txt").write_bytes(b"\xef\xbb\xbf" + odd.encode())  # a byte order mark
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 20_000)
    fineweb.text_to_shards([source, tmp_path / "odd.txt"], tmp_path / "own")
    paths = sorted((tmp_path / "own").glob("own_train_*")) + [tmp_path / "own/own_val_000000.bin"]
    shards = [fineweb.read_shard(path, 50257) for path in paths]
    assert all(len(shard) == 20_000 for shard in shards[:-2])
    assert len(shards[-1]) == max(sum(map(len, shards)) // 100, 4097)
    tokenizer = fineweb.get_tokenizer(50257)
    pieces = " ".join(map(str, np.concatenate(shards))).split("50256")[1:]
    documents = [tokenizer.decode(list(map(int, piece.split()))) for piece in pieces]
    expected = [json.loads(line)["text"] for line in open(source, encoding="utf-8")] + [odd]
    assert documents == expected
    with pytest.raises(UserError, match="there already"):
        fineweb.text_to_shards([source], tmp_path / "own")
    with pytest.raises(UserError, match="too little text"):  # no window for validation
        fineweb.text_to_shards([tmp_path / "odd.txt"], tmp_path / "short")
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"\xff\xfe no utf-8", "not text in UTF-8"),
    ("a.jsonl", b'{"text": "\xff"}', "line 1"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "line 2"),
    ("a.jsonl", b'{"text": null}', "line 1"),
    ("a.jsonl", b"{torn", "line 1"),
    ("a.parquet", b"", "not .txt or .jsonl")])
def test_unreadable_text_is_refused(name, content, words, tmp_path):
    """A file that is no text, tokenized all the same."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(fineweb.read_documents([tmp_path / name]))


@pytest.mark.parametrize("script, args, words", [
    ("fineweb.py", ["--tokens", "11B"], ["11B"]),
    ("fineweb.py", ["--text", "a.txt", "--tokens", "1B"], ["--tokens", "--text"]),
    ("fineweb.py", ["--text", "a.txt"], ["--out"]),
    ("train_gpt2.py", ["--seed", "-1"], ["--seed"]),
    ("train_gpt2.py", ["--lr", "nan"], ["--lr"]),
    ("train_gpt2.py", ["--temperature=0.9"], ["--temperature", "training"]),
    ("train_gpt2.py", ["--eval", "--steps", "5"], ["--steps"]),
    ("train_gpt2.py", ["--init", "gpt2", "--preset", "tiny"], ["--preset"]),
    ("caption.py", ["--bridge", "gate"], ["invalid choice", "linear"]),
    ("caption.py", [], ["--bridge linear"]),
    ("caption.py", ["--compare", "--beam", "5"], ["--beam"]),
    ("caption.py", ["--bridge", "cross", "--sample", "x", "--num", "2", "--beam", "3"], ["--num"]),
    ("caption.py", ["--bridge", "cross", "--num", "2"], ["--num", "training"])])
def test_flags_that_do_nothing_are_refused(script, args, words, tmp_path):
    """A flag that is silently ignored, or a number out of bounds that is taken."""
    assert_error(run(script, *args, cwd=tmp_path), *words)


def test_documents_are_read_as_they_are_and_in_order(tmp_path, monkeypatch):
    """A blank line that becomes a document, line ends that are lost, threads that mix up texts."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n  \n{"text": ""}\n{"text": " y "}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    assert list(fineweb.read_documents(paths)) == ["x", " y ", "one\r\ntwo\n"]
    tokenizer = fineweb.get_tokenizer(431)
    monkeypatch.setattr(fineweb, "get_tokenizer", lambda n_vocab: tokenizer)
    texts = [f"{i} " * (1 + i * 7919 % 50) for i in range(2_500)]
    paths[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fineweb.text_to_shards(paths[:1], tmp_path / "own")
    shards = [fineweb.read_shard(path, 431) for path in sorted((tmp_path / "own").iterdir())]
    text = tokenizer.decode(np.concatenate(shards).tolist())
    assert text.split("<|endoftext|>")[1:] == texts


def test_importing_runs_nothing():
    """A program that trains, or parses flags, where a notebook only imports it."""
    script = "import sys; sys.argv.append('--nonsense'); import caption"
    process = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True)
    assert process.returncode == 0 and not process.stdout


# -----------------------------------------------------------------------------
# hellaswag.py


def test_items_that_are_not_right(server, tmp_path, monkeypatch, capsys):
    """Another file than the published one, taken without a word; training that stops for it."""
    item = made_items(1)[0]
    body = f"{json.dumps(item)}\n".encode() * 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", f"{server.address}/hellaswag_val.jsonl")
    tokenizer = fineweb.get_tokenizer(431)
    assert train_gpt2.load_hellaswag(tokenizer) == []  # 404
    server.files = {"/hellaswag_val.jsonl": body}
    assert train_gpt2.load_hellaswag(tokenizer) == []
    errors = capsys.readouterr().err
    assert "404" in errors and "not the published file" in errors
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(body).hexdigest())
    assert len(train_gpt2.load_hellaswag(tokenizer)) == 2
    server.files = {}
    examples = hellaswag.load_examples()  # kept
    assert examples == [item, item]
    assert hellaswag.subset(examples * 50, 7) == hellaswag.subset(examples * 50, 7)
    assert len(hellaswag.subset(examples, 7)) == 2


@real_data
def test_rendering_of_the_first_original_items():
    """Contexts and endings that are not those of build-nanogpt and of the harness."""
    tokenizer = fineweb.get_tokenizer(50257)
    path = REAL / "hellaswag/hellaswag_val_first10_original.jsonl"
    for line in path.read_bytes().splitlines():
        example = json.loads(line)
        item = hellaswag.render(example, tokenizer)
        assert tokenizer.decode(item.context) == example["ctx"]
        endings = [tokenizer.decode(ending) for ending in item.endings]
        assert endings == [" " + ending for ending in example["endings"]]
        assert item.lengths == [len(ending) for ending in item.endings]
        item = hellaswag.render(example, tokenizer, "harness")
        b = example["ctx_b"]
        context = f"{example['activity_label']}: {example['ctx_a']} {b[:1].upper()}{b[1:].lower()}"
        texts = [plain_clean(text) for text in [context, *example["endings"]]]
        # the harness tokenizes a context and its ending together
        expected = [tokenizer.encode_ordinary(f"{texts[0]} {text}") for text in texts[1:]]
        assert [item.context + ending for ending in item.endings] == expected
        assert item.lengths == [len(text) for text in texts[1:]]
        assert item.label == example["label"]


def plain_clean(text):
    """The harness's cleaning, spelled out."""
    text = ". ".join(text.strip().split(" [title]"))
    while "[" in text and "]" in text[text.index("[") :]:
        end = text.index("]", text.index("["))
        text = text[: text.index("[")] + text[end + 1 :]
    return text.replace("  ", " ")


# -----------------------------------------------------------------------------
# train_gpt2.py: the model


def test_presets_have_gpt2s_parameters_and_their_first_scale():
    """A preset that is not the GPT-2 whose name it has; residual projections at another scale."""
    counts = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
              "gpt2-xl": 1_557_611_200}
    for preset, count in counts.items():
        c = train_gpt2.PRESETS[preset]
        with torch.device("meta"):
            model = GPT(c)
        unused = (len(model.wte.weight) - 50257) * c.n_embd
        assert c.vocab_size == 50257
        assert sum(p.numel() for p in model.parameters()) == count + unused
    for name, p in small_model(config=GPTConfig(64, 512, 4, 4, 128)).named_parameters():
        if name.endswith("bias") or "ln_" in name:
            assert (p == float("ln_" in name and name.endswith("weight"))).all()
        else:
            expected = 0.02 / math.sqrt(8) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name


def plain_decoder(model, idx):
    """GPT-2 written out in float64, head by head and position by position: logits (T, V)."""
    w = {name: p.double() for name, p in model.state_dict().items()}
    c = model.config
    hs = c.n_embd // c.n_head

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        variance = x.var(-1, unbiased=False, keepdim=True)
        return centered / (variance + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][: len(idx)]
    for i in range(c.n_layer):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(c.n_embd, -1)
        y = torch.zeros_like(x)
        for head in range(c.n_head):
            s = slice(head * hs, (head + 1) * hs)
            for t in range(len(idx)):
                y[t, s] = (k[: t + 1, s] @ q[t, s] / math.sqrt(hs)).softmax(0) @ v[: t + 1, s]
        x = x + linear(y, f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + linear(plain_gelu(u), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T[:, : c.vocab_size]


def plain_gelu(u):
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


@pytest.mark.filterwarnings("ignore")
def test_what_readme_tells_to_try():
    """A line that gives something else."""
    text = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    tried = doctest.DocTestParser().get_doctest(text, {}, "README.md", None, 0)
    assert doctest.DocTestRunner().run(tried) == (0, len(tried.examples))


@pytest.mark.parametrize("fast", [True, False])
def test_decoder_equals_a_plain_float64_one(fast, monkeypatch):
    """Attention, in both forms; LayerNorm, GELU, weight tying or the causal mask."""
    monkeypatch.setattr(train_gpt2, "FAST", fast)
    model = small_model()
    idx = torch.randint(0, 43, (12,))
    assert torch.allclose(model(idx[None])[0][0].double(), plain_decoder(model, idx), atol=1e-4)


@pytest.mark.parametrize("rows", [300, 3000, 0])
def test_loss_and_its_gradients_equal_float64(rows, monkeypatch):
    """The chunked cross-entropy: several chunks, the last one partial; padded rows of the table."""
    monkeypatch.setattr(train_gpt2, "FAST", rows > 0)
    rows = rows or 30  # of the plain form
    model = small_model()
    h = torch.randn(3, rows, 32, requires_grad=True)
    targets = torch.randint(0, 43, (3, rows))
    targets[0, :4] = targets[2, 8] = -100
    model.loss(h, targets).backward()
    h64 = h.detach().double().requires_grad_()
    w64 = model.wte.weight.detach().double().requires_grad_()
    logits = (h64 @ w64[:43].T).view(-1, 43)  # rows that are no tokens have no probability
    each = F.cross_entropy(logits, targets.view(-1), reduction="none")
    expected = each.sum() / (targets >= 0).sum()
    expected.backward()
    assert torch.allclose(h.grad.double(), h64.grad, atol=1e-6)
    assert torch.allclose(model.wte.weight.grad.double(), w64.grad, atol=1e-5)
    with torch.no_grad():
        assert model.loss(h, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(model.losses(h, targets).double().view(-1), each, atol=1e-5)
    loss = model.loss(h, targets)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):  # gradients that were given away
        loss.backward()


def test_a_compiled_model_trains_as_the_plain_one(monkeypatch, fp32):
    """torch.compile of the whole model: other losses or gradients, or a head left out of it."""
    model = small_model()
    twin = small_model()
    idx = torch.randint(0, 43, (4, 8))
    head = []
    softmax = torch.compile(train_gpt2.softmax_minus_one_hot, backend="aot_eager")

    def loss_and_gradient(*args):
        head.append(args)
        return softmax(*args)

    monkeypatch.setattr(train_gpt2, "loss_and_gradient", loss_and_gradient)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        loss = compiled(idx, idx.roll(-1, 1))[1]
        loss.backward()
    expected = twin(idx, idx.roll(-1, 1))[1]
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and len(head) == 3
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, other.grad, atol=1e-5)
    with torch.no_grad():
        assert compiled(idx, idx.roll(-1, 1))[1].item() == pytest.approx(loss.item(), rel=1e-5)


# -----------------------------------------------------------------------------
# train_gpt2.py: generation


def plain_generate(model, idx, n, sampling):
    """Continue one row (1, T) without a cache; a full context drops its older half."""
    room = model.config.block_size
    context = idx[:, -room:]
    new = []
    for _ in range(n):
        if context.size(1) > room:
            context = context[:, -(room // 2) :]
        logits = model.logits(model.hidden_states(model.embed(context))[:, -1]).float()
        token = train_gpt2.sample_token(logits, **sampling)
        new.append(token.item())
        context = torch.cat([context, token[:, None]], dim=1)
    return new


def test_cached_equals_uncached_beyond_the_context():
    """The KV cache, positions, or what happens when the context is full."""
    model = small_model()
    for length in (1, 5, 16, 40):  # 40: a prompt longer than the context
        idx = torch.randint(0, 43, (1, length))
        for options in ({"temperature": 0}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}):
            cached = options | {"generator": torch.Generator().manual_seed(1)}
            plain = options | {"generator": torch.Generator().manual_seed(1)}
            out = generate(model, idx, 30, **cached)[0].tolist()
            assert out == idx[0].tolist() + plain_generate(model, idx, 30, plain)
    rows = torch.randint(0, 43, (3, 5))  # a row does not depend on the others
    together = generate(model, rows, 30, temperature=0)
    for row, alone in zip(together, rows, strict=True):
        assert row.tolist() == generate(model, alone[None], 30, temperature=0)[0].tolist()


@torch.no_grad()
def test_a_stopped_row_stays_stopped_and_padding_is_never_emitted():
    """Text after the end token, or ids that are no tokens."""
    model = small_model()
    model.wte.weight[43:] = 10 * model.wte.weight[:5].sum(0)  # padded rows that would often win
    idx = torch.randint(0, 43, (8, 4))

    def draw(rows, **options):
        generator = torch.Generator().manual_seed(0)
        return generate(model, rows, 20, temperature=0.5, generator=generator, **options)

    free = draw(idx)
    assert free.max() < 43
    stop = free[0, 10].item()
    for row, other in zip(draw(idx, stop=stop)[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = other.index(stop) if stop in other else 20
        assert row[:end] == other[:end] and set(row[end:]) <= {stop}
    only = draw(idx[:1], stop=stop)
    assert only.size(1) < 24 or stop not in only  # it ends when all rows have stopped


def test_sampling_follows_temperature_top_k_and_top_p():
    """Frequencies of tokens that are not those of the definitions."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = p.log().expand(20_000, 4)

    def shares(**options):
        generator = torch.Generator().manual_seed(0)
        tokens = train_gpt2.sample_token(logits, generator=generator, **options)
        return torch.bincount(tokens, minlength=4) / 20_000

    expected = {
        (("temperature", 1.0),): p,
        (("temperature", 0),): torch.tensor([1.0, 0, 0, 0]),
        (("temperature", 1e-40),): torch.tensor([1.0, 0, 0, 0]),
        (("temperature", 0.5),): p**2 / (p**2).sum(),
        (("top_k", 2),): torch.tensor([2 / 3, 1 / 3, 0, 0]),
        (("top_p", 0.6),): torch.tensor([2 / 3, 1 / 3, 0, 0]),  # .5 alone does not reach .6
        (("top_p", 0.8),): torch.tensor([0.5, 0.25, 0.15, 0]) / 0.9,
    }
    for options, share in expected.items():
        assert torch.allclose(shares(**dict(options)), share, atol=0.015), options


# -----------------------------------------------------------------------------
# train_gpt2.py: data


def test_every_window_is_read_once_in_an_epoch(tmp_path):
    """Windows that are skipped or read twice, at borders of shards, steps or epochs."""
    sizes = (50, 7, 1, 64)
    row = np.arange(sum(sizes))
    expected = []
    for i, part in enumerate(np.split(row, np.cumsum(sizes)[:-1])):
        fineweb.write_shard(tmp_path / f"x_train_{i:06d}.bin", part, 1000)
        windows = (len(part) - 1) // 8  # none in two of them; what is left over is not used
        expected += part[1 : 1 + 8 * windows].tolist()
    dataset = TokenDataset(sorted(tmp_path.iterdir()), GPTConfig(8, 1000))
    assert all(isinstance(shard, np.memmap) for shard in dataset.shards)
    assert len(dataset) == 6 + 7
    seen = []
    for step in range(13):  # of four windows: four epochs
        x, y = dataset.get_batch(train_gpt2.step_indices(5, step, 4, len(dataset)))
        assert (y == x + 1).all() and x.shape == (4, 8)  # these tokens count upwards
        seen += y.tolist()
    epochs = [sum(seen[e : e + 13], []) for e in (0, 13, 26, 39)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1]  # each epoch in an order of its own
    fineweb.write_shard(tmp_path / "x_train_000000.bin", np.arange(8), 1000)
    with pytest.raises(UserError, match="less than a window of 8 tokens"):
        TokenDataset([tmp_path / "x_train_000000.bin"], GPTConfig(8, 1000))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_divide_an_epoch_among_them(size, tmp_path, monkeypatch):
    """Windows that two ranks read, or none; shares of the loss that are not a mean."""
    fineweb.write_shard(tmp_path / "x.bin", np.arange(1025), 1025)
    dataset = TokenDataset([tmp_path / "x.bin"], GPTConfig(16, 1025))
    recipe = Recipe(16, 8 * 16, 2, 1e-3, 1)
    monkeypatch.setattr(train_gpt2, "world_size", lambda: size)
    seen = [[], []]
    shares = []
    for step, r in itertools.product(range(16), range(size)):  # 64 windows: 8 steps are an epoch
        monkeypatch.setattr(train_gpt2, "rank", lambda r=r: r)
        for x, y, share in train_gpt2.get_micro_batches(dataset, recipe, 7, step):
            assert len(x) == 2 and (y == x + 1).all()
            seen[step // 8] += y.flatten().tolist()
            shares.append(share)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(1, 1025)) and seen[0] != seen[1]
    assert sum(shares) == pytest.approx(16)  # the micro-batches of a step make one mean


def test_batches_that_cannot_be_divided_are_refused(monkeypatch):
    """A step that is silently larger or smaller than --batch-tokens; a flag of 0 that is lost."""
    monkeypatch.setattr(train_gpt2, "world_size", lambda: 4)
    recipe = train_gpt2.RECIPES["tiny"]
    for batch in (64, 1000):
        with pytest.raises(UserError, match=f"{batch:,} cannot .* a multiple of 64, at least 256"):
            train_gpt2.check_batch_size(dataclasses.replace(recipe, batch_size=batch), 64)
    chosen = train_gpt2.with_flags(recipe, {"batch_size": 16 * 64, "lr": 0.0, "max_steps": 50})
    assert (chosen.batch_size, chosen.lr, chosen.warmup_steps) == (1024, 0.0, 5)
    train_gpt2.check_batch_size(chosen, 64)


def test_shards_are_found_and_told_apart(tmp_path):
    """Shards that are missed, or exchanged for others without being noticed."""
    config = GPTConfig(8, 500)
    with pytest.raises(UserError, match="has no shards NAME_train"):
        train_gpt2.open_data(tmp_path, config)
    names = ("a_train_000001", "a_val_000000", "a_val_000001", "b_train_x_val_000000")
    write_text(tmp_path, np.arange(500), 500, names)
    train, val = train_gpt2.open_data(tmp_path, config)
    assert len(train) == 499 // 8 and list(val) == ["a", "b_train_x"]
    assert len(val["a"]) == 2 * (499 // 8)
    model = small_model(config=config)
    parts = (model, torch.optim.AdamW(model.parameters()), Recipe(1, 8, 1, 1e-3, 1))
    before = train_gpt2.open_run(tmp_path, *parts, train, 0, None).identity
    fineweb.write_shard(tmp_path / "a_train_000001.bin", np.arange(500)[::-1], 500)
    train, _ = train_gpt2.open_data(tmp_path, config)
    assert train_gpt2.open_run(tmp_path, *parts, train, 0, None).identity != before


def test_validation_is_the_mean_over_all_its_tokens(tmp_path, fp32):
    """Windows that are left out, or a last batch that counts as much as the others."""
    model = small_model(config=train_gpt2.PRESETS["tiny"])
    tokenizer = fineweb.get_tokenizer(431)
    tokens = np.random.default_rng(0).integers(0, 431, 5 * 64 + 1)
    fineweb.write_shard(tmp_path / "a.bin", tokens, 431)
    dataset = TokenDataset([tmp_path / "a.bin"], model.config)
    losses = []
    for i in range(5):
        idx = torch.from_numpy(tokens[i * 64 : i * 64 + 65])
        losses.append(F.cross_entropy(model(idx[None, :-1])[0][0], idx[1:]).item())
    for count, size in ((5, 6 * 64), (2, 2 * 64)):  # all of it, or the first two windows
        row = train_gpt2.validate(model, {"val": dataset}, tokenizer, size, 4, CPU)
        assert row["val_val"] == pytest.approx(np.mean(losses[:count]), rel=1e-5)


def test_the_next_steps_are_prepared_ahead():
    """Batches that are made only when they are needed, or twice, or without end."""
    asked = []
    steps = train_gpt2.prefetch(lambda step: asked.append(step) or step**2, 3, 9, ahead=4)
    assert next(steps) == (3, 9)
    deadline = time.time() + 10
    while len(asked) < 4 and time.time() < deadline:
        time.sleep(0.01)
    assert sorted(asked) == [3, 4, 5, 6]
    assert [*steps] == [(step, step**2) for step in range(4, 9)] and sorted(asked) == [*range(3, 9)]


# -----------------------------------------------------------------------------
# train_gpt2.py: the recipe and training


def test_schedules():
    """GPT-3's recipe, which the preset gpt2 is to the letter; a rate that falls too early."""
    recipe = train_gpt2.RECIPES["gpt2"]
    assert (recipe.max_steps, recipe.batch_size, recipe.warmup_steps) == (19_073, 524_288, 715)
    assert (recipe.weight_decay, recipe.grad_clip, recipe.lr) == (0.1, 1.0, 6e-4)
    cosine = {0: 6e-4 / 715, 714: 6e-4, 715: 6e-4, (715 + 19_073) // 2: 3.3e-4, 19_072: 6e-5}
    fast = dataclasses.replace(train_gpt2.RECIPES["gpt2-fast"], max_steps=1000, cooldown=0.25)
    linear = {0: 1.8e-3 / 250, 249: 1.8e-3, 749: 1.8e-3, 875: 0.9e-3, 999: 1.8e-3 / 250}
    for each, expected in ((recipe, cosine), (fast, linear)):
        for step, lr in expected.items():
            assert train_gpt2.get_lr(step, each) == pytest.approx(lr, rel=1e-3)


def small_setup(tmp_path, **changes):
    """(model, recipe, dataset) of 705 random tokens: 44 windows."""
    tokens = np.random.default_rng(0).integers(0, 43, 705)
    fineweb.write_shard(tmp_path / "a_train_000001.bin", tokens, 43)
    recipe = {"max_steps": 20, "batch_size": 8 * 16, "micro_batch": 4, "lr": 1e-2}
    recipe = Recipe(**recipe | {"warmup_steps": 2} | changes)
    return small_model(), recipe, TokenDataset([tmp_path / "a_train_000001.bin"], SMALL)


def test_a_step_is_one_clipped_adamw_update(tmp_path, fp32):
    """The loss, the gradient's norm or its clipping."""
    model, recipe, dataset = small_setup(tmp_path)
    twin = small_model()
    x, y = dataset.get_batch(train_gpt2.step_indices(0, 0, 8, 44))
    loss = F.cross_entropy(twin(x)[0].view(-1, 43), y.flatten())
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    optimizer = train_gpt2.configure_optimizer(model, recipe)
    batches = train_gpt2.get_micro_batches(dataset, recipe, 0, 0)
    measured = train_gpt2.train_step(model, optimizer, batches, recipe, CPU)
    assert measured == pytest.approx((loss.item(), norm), rel=1e-4) and norm > 1
    # Adam's first moment is a tenth of the gradient, which was clipped to 1
    moments = torch.stack([optimizer.state[p]["exp_avg"].norm() for p in model.parameters()])
    assert moments.norm().item() == pytest.approx(0.1, rel=1e-3)


def test_micro_batches_add_up(tmp_path, fp32):
    """Gradient accumulation: other losses with smaller micro-batches."""
    losses = []
    for micro_batch in (8, 3, 1):  # 3: micro-batches of 3, 3 and 2
        run_steps = text_steps(*small_setup(tmp_path, micro_batch=micro_batch))
        losses.append([loss for loss, _ in itertools.islice(run_steps, 12)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    """A step with a NaN that reaches the weights or AdamW's moments."""
    model, recipe, dataset = small_setup(tmp_path)
    optimizer = train_gpt2.configure_optimizer(model, recipe)
    batches = train_gpt2.get_micro_batches(dataset, recipe, 0, 0)
    train_gpt2.train_step(model, optimizer, batches, recipe, CPU)
    before = [p.clone() for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    loss = GPT.loss
    monkeypatch.setattr(GPT, "loss", lambda *args: loss(*args) * math.nan)
    assert math.isnan(train_gpt2.train_step(model, optimizer, batches, recipe, CPU)[0])
    for p, old, moment in zip(model.parameters(), before, moments, strict=True):
        assert torch.equal(p, old) and torch.equal(optimizer.state[p]["exp_avg"], moment)


def small_run(out, recipe=None, **options):
    """A Run of a model with one weight."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = recipe or Recipe(2, 64, 1, 1e-3, 1)
    return train_gpt2.Run(out, model, optimizer, recipe, {}, {}, **options)


def test_seconds_are_those_of_training(tmp_path, monkeypatch, capsys):
    """A run's time that counts its evaluations; a loss that is not finite, without a word."""
    clock = iter(itertools.count())
    monkeypatch.setattr(train_gpt2.time, "perf_counter", lambda: next(clock))
    with small_run(tmp_path / "run") as run:
        run.end_step(1.0, 1.0, 1e-3)
        for _ in range(50):  # an evaluation; each look at the clock takes a second
            train_gpt2.time.perf_counter()
        run.record({"val_val": 1.0})
        assert not train_gpt2.is_finished(tmp_path / "run")
        run.end_step(math.nan, 1.0, 1e-3)
        assert run.seconds < 6 and run.rows[-1]["seconds"] == run.seconds
        assert "not finite: step 2 changed nothing" in capsys.readouterr().out
        run.finish()
    assert train_gpt2.is_finished(tmp_path / "run")


def test_a_stop_saves_before_anything_is_printed(tmp_path, monkeypatch):
    """A last step that is lost, because nobody reads the line about it any more."""

    def closed(*args, **options):
        raise BrokenPipeError

    recipe = Recipe(9, 64, 1, 1e-3, 1)
    with pytest.raises(BrokenPipeError), small_run(tmp_path / "run", recipe) as run:
        run.end_step(1.0, 1.0, 1e-3)
        monkeypatch.setattr("builtins.print", closed)
        run.stop = True
        run.end_step(1.0, 1.0, 1e-3)
    saved = train_gpt2.read_checkpoint(tmp_path / "run/ckpt.pt")
    assert saved["step"] == saved["rows"][-1]["step"] == 2


def test_the_best_weights_are_kept(tmp_path):
    """The last weights of a run whose validation loss has turned up again; a resumed best."""
    for _ in range(2):
        with small_run(tmp_path / "run", Recipe(9, 64, 1, 1e-3, 1)) as run:
            first = run.step
            for step, loss in list(enumerate((5.0, 3.0, math.nan, 4.0)))[first:]:
                run.model.weight.data.fill_(step)
                run.end_step(1.0, 1.0, 1e-3)
                run.record({"val_a": loss, "val_b": loss + 1})
                if step == 1:
                    run.save()
                    break  # killed
            if first:
                run.finish()
    about, tensors = train_gpt2.read_weights(tmp_path / "run/best.safetensors")
    assert about["step"] == 2 and tensors["weight"].item() == 1.0
    model, recipe, dataset = small_setup(tmp_path, max_steps=1)
    run = train_gpt2.open_run(tmp_path / "run", model, None, recipe, dataset, 0, None)
    assert run.keep_best  # older best weights would pass for those of this run
    assert train_gpt2.quality({"cider": 0.7, "val_val": 1.0}) == 0.7  # self-critical training


def test_rates_of_a_resumed_run_are_those_of_its_recipe(tmp_path):
    """A weight decay that was edited, written into the checkpoint while the old one trains."""
    decays = []
    for decay in (0.1, 0.5):
        recipe = Recipe(9, 64, 1, 1e-3, 1, weight_decay=decay)
        model = small_model()
        optimizer = train_gpt2.configure_optimizer(model, recipe)
        identity = {"optimizer": type(optimizer).__name__}
        with train_gpt2.Run(tmp_path / "run", model, optimizer, recipe, identity, {}) as run:
            idx = torch.zeros(1, 4, dtype=torch.long)
            model(idx, idx)[1].backward()
            optimizer.step()
            run.step += 1
            run.save()
        decays.append(optimizer.param_groups[0]["weight_decay"])
    assert decays == [0.1, 0.5] and run.step == 2
    run.identity = {"optimizer": "Muon"}
    with pytest.raises(UserError, match="with other optimizer .AdamW, not Muon."), run:
        pass


def test_muon_is_its_formula(fp32):
    """Singular values far from 1; momentum, decay, scale; q, k and v apart; AdamW for the rest."""
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 32, 128), (2, 128, 32)):
        G = torch.randn(shape)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        update = train_gpt2.orthogonalize(G)
        S = torch.linalg.svdvals(update)
        assert S.min() > 0.3 and S.max() < 1.3
        assert F.cosine_similarity(update.flatten(1), (U @ Vh).flatten(1)).min() > 0.95
    recipe = Recipe(10, 64, 1, lr=1e-2, warmup_steps=0, muon=5, weight_decay=0.1)
    model = small_model()
    twin = small_model()
    optimizer = train_gpt2.configure_optimizer(model, recipe)
    adamw = train_gpt2.configure_optimizer(twin, dataclasses.replace(recipe, muon=0.0))
    block = model.h[0]
    scales = {block.attn.c_attn.weight: 1, block.mlp.c_fc.weight: 2, block.mlp.c_proj.weight: 2}
    expected = {weight: weight.detach().clone() for weight in scales}
    momentum = {weight: torch.zeros_like(weight) for weight in scales}
    for step in range(3):
        for net, opt in ((model, optimizer), (twin, adamw)):
            torch.manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            for group in opt.param_groups:
                group["lr"] = 1e-2 * group.get("lr_scale", 1)
            for weight, scale in scales.items() if net is model else ():
                momentum[weight] = 0.95 * momentum[weight] + weight.grad
                update = weight.grad + 0.95 * momentum[weight]
                parts = update.chunk(3 if scale == 1 else 1)  # q, k and v
                update = torch.cat([train_gpt2.orthogonalize(part[None])[0] for part in parts])
                expected[weight] = 0.995 * expected[weight] - 0.05 * scale * update
            opt.step()
    for weight in scales:
        assert torch.allclose(weight, expected[weight], atol=1e-5)
    for (name, p), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        hidden = name.startswith("h.") and p.dim() == 2
        assert torch.allclose(p, other, atol=1e-6) != hidden, name


# -----------------------------------------------------------------------------
# train_gpt2.py: evaluation


def test_packed_continuations_have_the_losses_of_separate_ones():
    """pack(): continuations that see each other, wrong positions, targets or owners."""
    model = small_model(config=GPTConfig(40, 43, 2, 2, 32, init_std=0.3))
    rng = random.Random(0)

    def tokens(low, high):
        return [rng.randrange(43) for _ in range(rng.randint(low, high))]

    rows = [(tokens(1, 12), [tokens(1, 9) for _ in range(rng.randint(1, 4))]) for _ in range(6)]
    packed = train_gpt2.pack(rows)
    h = model.hidden_states(model.embed(packed.idx, packed.positions), packed.mask)
    each = model.losses(packed.at_source(h), packed.targets)
    for b, (beginning, continuations) in enumerate(rows):
        for k, continuation in enumerate(continuations):
            log_p = model(torch.tensor([beginning + continuation]))[0][0].log_softmax(-1)
            loss = 0
            for i, token in enumerate(continuation):
                loss -= log_p[len(beginning) - 1 + i, token].item()
            assert each[b][packed.owner[b] == k].sum().item() == pytest.approx(loss, rel=1e-5)
    assert each[packed.owner < 0].abs().sum() == 0
    assert (packed.targets >= 0).sum() == sum(len(c) for _, rest in rows for c in rest)
    assert packed.idx.size(1) % 8 == packed.targets.size(1) % 8 == 0  # few shapes
    packed = train_gpt2.pack([([], [[5]])], P=32)  # captions without a word, after a prefix
    assert packed.idx.dtype == torch.long and packed.idx.numel() == 0
    assert packed.targets[0, :2].tolist() == [5, -100] and packed.source[0, 0] == 31


def made_items(number, seed=0):
    """Items of toy captions: one caption, cut, with four endings of different lengths."""
    rng = random.Random(seed)
    items = []
    for _ in range(number):
        words = " ".join(fineweb.captions(fineweb.random_scene(rng), rng)).split()
        item = {"ctx": " ".join(words[: rng.randint(3, 20)])}
        item |= {"ctx_a": "a", "ctx_b": "b [x] c", "activity_label": "Shapes"}
        endings = [" ".join(rng.sample(words, rng.randint(1, 9))) for _ in range(4)]
        items.append(item | {"endings": endings, "label": rng.randrange(4)})
    return items


def plain_losses(model, item):
    """The summed loss of each ending: one sequence at a time, logits everywhere."""
    losses = []
    for ending in item.endings:
        room = model.config.block_size - max(map(len, item.endings))
        context = item.context[-room:]
        log_p = model(torch.tensor([context + ending]))[0].log_softmax(-1)[0]
        places = range(len(context) - 1, len(context) + len(ending) - 1)
        losses.append(-log_p[places, ending].sum().item())
    return losses


@torch.no_grad()
def assert_losses_are_plain_ones(model, items):
    losses = train_gpt2.ending_losses(model, items, CPU)
    plain = np.array([plain_losses(model, item) for item in items])
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    ordered = np.sort(plain, 1)
    clear = ordered[:, 1] - ordered[:, 0] > 1e-4 * plain.max(1)
    assert clear.sum() > len(items) / 2
    assert (losses.argmin(1) == plain.argmin(1))[clear].all()


def test_endings_have_the_losses_of_one_at_a_time():
    """HellaSwag's losses: the order of items, long contexts, or what else is in the batch."""
    tokenizer = fineweb.get_tokenizer(431)
    config = GPTConfig(40, 431, 2, 2, 32, init_std=0.3)
    model = small_model(config=config)
    items = [hellaswag.render(example, tokenizer) for example in made_items(30)]
    items[3].context *= 9  # too long: cut from the left
    assert_losses_are_plain_ones(model, items)


def test_accuracies_are_those_of_the_losses(capsys, precision):
    """Both HellaSwag metrics: what they divide by, and spaces that the harness moves to endings."""
    tokenizer = fineweb.get_tokenizer(431)
    examples = made_items(40)
    spaces = {**examples[0], "ctx_a": "a b", "ctx_b": "[header]", "endings": ["x"] * 4}
    item = hellaswag.render(spaces, tokenizer, "harness")
    assert tokenizer.decode(item.endings[0]) == "  x"
    model = small_model(config=GPTConfig(64, 431, 2, 2, 32, init_std=0.3))
    for method in ("token mean", "harness"):
        right = {"acc": 0, "acc_norm": 0}
        items = [hellaswag.render(example, tokenizer, method) for example in examples]
        acc_norm = train_gpt2.evaluate_hellaswag(model, items, CPU, method)
        for example, item in zip(examples, items, strict=True):
            losses = np.array(plain_losses(model, item))
            endings = example["endings"] if method == "harness" else item.endings
            right["acc"] += losses.argmin() == example["label"]
            right["acc_norm"] += (losses / [*map(len, endings)]).argmin() == example["label"]
        assert acc_norm * 40 == pytest.approx(right["acc_norm"])
        line = capsys.readouterr().out
        prefix = "harness_" if method == "harness" else ""
        assert f"{prefix}acc {right['acc'] / 40:.4f}, {prefix}acc_norm {acc_norm:.4f}" in line


@real_data
def test_real_items_have_the_losses_of_one_at_a_time(tmp_path, monkeypatch):
    """HellaSwag on real items: short, long and odd ones; the command that evaluates a model."""
    tokenizer = fineweb.get_tokenizer(50257)
    examples = real_items()
    assert len(examples) == 10_042
    examples.sort(key=lambda e: len(e["ctx"]) + sum(map(len, e["endings"])))
    odd = [e for e in examples if not (e["ctx"] + "".join(e["endings"])).isascii()]
    chosen = examples[:6] + examples[-4:] + odd[:6]
    items = [hellaswag.render(example, tokenizer) for example in chosen]
    items += [hellaswag.render(example, tokenizer, "harness") for example in chosen]
    model = small_model(config=GPTConfig(256, 50257, 2, 2, 32, init_std=0.3))
    assert_losses_are_plain_ones(model, items)
    train_gpt2.export_hf(model, tokenizer, tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "load_examples", lambda: examples)
    printed = run("train_gpt2.py", "--eval", "--ckpt", "hf", "--limit", "20").stdout
    assert printed.count("of 20 items") == 2 and "no validation loss" in printed


def in_turns(*functions, rounds=3):
    """The median seconds of each function; they are called in turns, after one call each."""
    times = [[] for _ in functions]
    for i in range(rounds + 1):
        for seconds, function in zip(times, functions, strict=True):
            began = time.time()
            function()
            if i:
                seconds.append(time.time() - began)
    return [sorted(seconds)[len(seconds) // 2] for seconds in times]


# -----------------------------------------------------------------------------
# train_gpt2.py: using a model, with transformers as the oracle


@torch.no_grad()
@pytest.mark.parametrize("shape", [(12, 12, 768, 1024, 50257), (2, 4, 32, 24, 431)])
def test_weights_of_transformers_give_its_logits_and_losses(shape, tmp_path):
    """Reading weights in OpenAI's layout, at GPT-2's own shape and a small one."""
    transformers = pytest.importorskip("transformers")
    n_layer, n_head, n_embd, T, V = shape
    config = transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=n_embd, n_layer=n_layer,
                                     n_head=n_head, initializer_range=0.05)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    if V > 431 and not REAL.is_dir():
        pytest.skip("needs REAL_DATA, for the GPT-2 vocabulary")
    model, tokenizer = train_gpt2.load_model(tmp_path)
    idx = torch.randint(0, V, (2, 20))
    assert tokenizer.n_vocab == V
    assert torch.allclose(model(idx)[0], theirs(idx).logits, atol=1e-4)
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert loss == pytest.approx(theirs(idx, labels=idx).loss.item(), rel=1e-5)


@pytest.mark.parametrize("muon", [False, True])
def test_fine_tuning_begins_with_the_given_weights(muon, tmp_path, capsys, fp32):
    """--init: other losses than transformers has with the same batches; a forgotten start."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=431, n_positions=24, n_embd=32, n_layer=2, n_head=4,
                                     resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path / "hf")
    data = write_text(tmp_path / "data", np.random.default_rng(0).integers(0, 431, 4000))
    recipe = Recipe(6, 8 * 24, 4, 1e-3, 2, eval_every=3, eval_tokens=2000, log_every=1)
    if muon:
        recipe = dataclasses.replace(recipe, muon=5.0)
    train_gpt2.train("fine-tune", data, tmp_path / "run", recipe, seed=3, init=tmp_path / "hf")
    output = capsys.readouterr().out
    rows = read_log(tmp_path / "run/log.csv")
    assert [row["step"] for row in rows if "val_x" in row] == [0, 3, 6]  # the start, too
    assert f"{rows[0]['val_x']:.4f} nats" in output.split("step ")[0]
    if not muon:  # AdamW and the schedule, by transformers and PyTorch alone
        matrices = [p for p in theirs.parameters() if p.dim() > 1]
        vectors = [p for p in theirs.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        train_set, _ = train_gpt2.open_data(data, GPTConfig(24, 431))
        for step, row in enumerate(row for row in rows if "loss" in row):
            x, y = train_set.get_batch(train_gpt2.step_indices(3, step, 8, len(train_set)))
            loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
            assert row["loss"] == pytest.approx(loss.item(), rel=1e-5), step
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = train_gpt2.get_lr(step, recipe)
            optimizer.step()
    tensors = dict(theirs.state_dict())
    theirs.load_state_dict({name: t + 0.01 for name, t in tensors.items()})
    theirs.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="with other first weights"):
        train_gpt2.train("fine-tune", data, tmp_path / "run", recipe, 3, tmp_path / "other")


@torch.no_grad()
def test_export_gives_transformers_the_same_logits(tmp_path):
    """--export-hf, and its way back; a model that it overwrites."""
    transformers = pytest.importorskip("transformers")
    tokenizer = fineweb.get_tokenizer(431)
    model = small_model(config=train_gpt2.PRESETS["tiny"])
    train_gpt2.export_hf(model, tokenizer, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    idx = torch.randint(0, 431, (2, 64))
    assert theirs.get_input_embeddings().weight.shape == (tokenizer.n_vocab, 128)
    assert torch.allclose(model(idx)[0], theirs(idx).logits, atol=1e-4)
    again, same_tokenizer = train_gpt2.load_model(tmp_path / "hf")
    assert torch.allclose(again(idx)[0], theirs(idx).logits, atol=1e-4)
    assert same_tokenizer.name == "tiny"
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()  # padded rows count nowhere
    assert loss == pytest.approx(again(idx[:, :-1], idx[:, 1:])[1].item(), rel=1e-6)
    with pytest.raises(UserError, match="there already"):
        train_gpt2.export_hf(model, tokenizer, tmp_path / "hf")


@pytest.mark.parametrize("change, words", [
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ({"model_type": "gpt_neo"}, "model_type"), ({"lm_head": 1}, "its head is not its token table"),
    ({"rows": 300}, "no tokenizer of 300 tokens"), ({"torn": 1}, "not a file of weights")])
def test_a_gpt2_that_is_not_gpt2_is_refused(change, words, tmp_path):
    """Weights of another model, an untied head, a torn file, read all the same."""
    from safetensors.torch import load_file, save_file

    model = small_model(config=train_gpt2.PRESETS["tiny"])
    train_gpt2.export_hf(model, fineweb.get_tokenizer(431), tmp_path / "hf")
    config, path = tmp_path / "hf/config.json", tmp_path / "hf/model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    tensors = load_file(path)
    table = tensors["transformer.wte.weight"]
    if "lm_head" in change:
        save_file(tensors | {"lm_head.weight": table + 1}, path)
    if "rows" in change:
        save_file(tensors | {"transformer.wte.weight": table[:300].clone()}, path)
    if "torn" in change:
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=words):
        train_gpt2.load_model(tmp_path / "hf")


def test_names_of_models(server, tmp_path, monkeypatch):
    """Names on the hub that are taken for files, or the other way round."""
    asked = []

    def hub_download(repo, name):
        asked.append(f"{repo}/{name}")
        return tmp_path / "hf" / name

    model = small_model(config=train_gpt2.PRESETS["tiny"])
    train_gpt2.export_hf(model, fineweb.get_tokenizer(431), tmp_path / "hf")
    monkeypatch.setattr(fineweb, "hub_download", hub_download)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "distilgpt2", "somebody/gpt2"):
        train_gpt2.load_model(name)
    repos = ["openai-community/gpt2", "distilgpt2", "somebody/gpt2"]
    files = ("config.json", "vocab.json", "model.safetensors")
    assert asked == [f"{repo}/{file}" for repo in repos for file in files]
    (tmp_path / "gpt2").mkdir()  # what is on disk comes first
    for name in ("gpt2", "runs/tiny", "a.safetensors"):
        with pytest.raises(UserError, match="has no model: train first"):
            train_gpt2.load_model(name)


# -----------------------------------------------------------------------------
# train_gpt2.py: the folder of a run


RUN_FLAGS = ("--preset", "tiny", "--out", "run", "--steps", 40, "--batch-tokens", 256,
             "--eval-every", 10)


def train(tiny, cwd, *more):
    return run("train_gpt2.py", *RUN_FLAGS, "--data", tiny, *more, cwd=cwd)


def start(script, *args, cwd):
    """A script in the background, whose lines can be read as they come."""
    command = [sys.executable, "-u", HERE / script, *args]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def interrupt(process, after, number):
    """Send a signal when the line of step `after` is on the screen: (exit code, output)."""
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(f"step {after:>6}"):
            process.send_signal(number)
    return process.wait(timeout=60), output


def outcome(out):
    """Weights, moments and log of a run; the log without its columns of time."""
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    tensors = dict(checkpoint["model"])
    for i, state in checkpoint["optimizer"]["state"].items():
        tensors |= {(i, key): value for key, value in state.items()}
    rows = []
    for row in read_log(out / "log.csv"):
        rows.append({key: value for key, value in row.items() if "second" not in key})
    return tensors, rows


def assert_same_outcome(whole, interrupted):
    """The interrupted run has the same weights, and the rows of the whole one plus one at most."""
    expected, expected_log = outcome(whole)
    tensors, log = outcome(interrupted)
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(expected[key], tensors[key]) for key in expected)
    steps_of_stops = {row["step"] for row in log} - {row["step"] for row in expected_log}
    assert len(steps_of_stops) <= 1
    assert [row for row in log if row["step"] not in steps_of_stops] == expected_log


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """A run of 40 steps that nobody interrupted: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    process = train(tiny, folder)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_a_run_says_what_it_does_and_leaves_its_folder(whole):
    """The files of a run, its log, and what a user reads first."""
    folder, output = whole
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {".lock", "ckpt.pt", "log.csv", "curves.png"}  # each text once: no best
    for words in ("data  ", "model  ", "858,880 parameters", "256 tokens a step", "english",
                  "scenes", "bits per byte", "tokens/s", "left", "ckpt.pt, step 40", "--sample"):
        assert words in output
    rows = read_log(folder / "run/log.csv")
    assert [row["step"] for row in rows if "loss" in row] == [1, 20, 40]
    assert [row["step"] for row in rows if "val_scenes" in row] == [0, 10, 20, 30, 40]
    assert rows[-1]["loss"] < 3 < rows[1]["loss"]
    assert rows[-1]["tokens_per_second"] > 0 and rows[-1]["seconds"] > rows[1]["seconds"]


@pytest.mark.parametrize("after, number", [
    (20, signal.SIGKILL), (20, signal.SIGTERM), (1, signal.SIGHUP)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny, whole, tmp_path, after, number):
    """Exact resume, bit for bit, after any kind of end, twice."""
    process = start("train_gpt2.py", *RUN_FLAGS, "--data", tiny, cwd=tmp_path)
    code, output = interrupt(process, after, number)
    assert code == (-number if number == signal.SIGKILL else 130)
    if number == signal.SIGTERM:
        assert "the same command resumes" in output
        with open(tmp_path / "run/log.csv", "a") as log:
            log.write("99,1.0,2.0,3.0\n")  # rows after the checkpoint
    if number == signal.SIGKILL:
        process = start("train_gpt2.py", *RUN_FLAGS, "--data", tiny, cwd=tmp_path)
        interrupt(process, 30, number)
    process = train(tiny, tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_outcome(whole[0] / "run", tmp_path / "run")


def test_a_finished_run_is_used_and_refuses_what_it_is_not(tiny, whole, tmp_path):
    """A finished run that trains again, or a run that goes on with another seed, shape or data."""
    folder = tmp_path
    shutil.copytree(whole[0] / "run", folder / "run")
    for more in ([], ["--micro-batch", 3]):
        again = train(tiny, folder, *more)
        assert again.returncode == 0 and "40 of 40 steps are done" in again.stdout
        assert "step     " not in again.stdout
        assert ("flags of training are not used" in again.stdout) == bool(more)
    assert_error(train(tiny, folder, "--seed", 1), "other seed (0, not 1)")
    shape = {"tiny": dataclasses.replace(train_gpt2.PRESETS["tiny"], n_head=8)}
    with pytest.MonkeyPatch.context() as patch:  # the preset was edited
        patch.setattr(train_gpt2, "PRESETS", shape)
        assert_error(train(tiny, folder), "other shape", "n_head=4")
    shutil.copytree(tiny, folder / "other")
    tokens = fineweb.read_shard(tiny / "tiny_train_000001.bin", 431)[::-1]
    fineweb.write_shard(folder / "other/tiny_train_000001.bin", tokens, 431)  # as many, but others
    assert_error(train(folder / "other", folder), "run was trained with other data")


def test_a_run_that_is_in_use_or_has_not_begun(tiny, tmp_path):
    """Two commands in one folder; a first batch that did not fit, and another that is refused."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used/ckpt.pt").write_bytes(b"half of it")
    with filelock.FileLock(tmp_path / "used/.lock"):
        assert_error(train(tiny, tmp_path, "--out", "used"), "used/.lock", "not be acquired")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, "train_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny, tmp_path)
    process = run("train_gpt2.py", "--sample", "x", "--ckpt", "run", cwd=tmp_path)
    assert_error(process, "in run nothing is trained yet")
    process = train(tiny, tmp_path, "--batch-tokens", 128, "--steps", 3)
    assert process.returncode == 0 and "3 of 3 steps are done" not in process.stdout


def test_checkpoints_that_cannot_be_read(tmp_path):
    """Damaged or foreign checkpoints: no line that names the file; bits that PyTorch reads over."""
    path = tmp_path / "ckpt.pt"
    with pytest.raises(UserError, match="has no model: train first"):
        train_gpt2.load_model(path)
    torch.save({"model_args": {}, "model": {}}, path)  # nanoGPT's
    for body in (path.read_bytes(), b"PK\x03\x04 torn"):
        path.write_bytes(body)
        for read in (train_gpt2.load_model, lambda path: train_gpt2.is_finished(path.parent)):
            with pytest.raises(UserError, match="ckpt.pt is not a whole checkpoint of this prog"):
                read(path)
    rng = random.Random(0)
    torch.save({"about": {"step": 1}, "x": torch.arange(500.0)}, path)
    intact = path.read_bytes()
    for _ in range(300):
        place = rng.randrange(len(intact))
        body = bytearray(intact)
        body[place] ^= 1 << rng.randrange(8)
        path.write_bytes(body if rng.random() < 0.7 else body[:place])
        with contextlib.suppress(UserError, OSError):  # or it does not matter: a date, padding
            assert torch.equal(train_gpt2.read_checkpoint(path)["x"], torch.arange(500.0))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """A checkpoint that is lost while the next one is written."""

    def full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with small_run(tmp_path / "run") as run, pytest.raises(OSError):
        monkeypatch.setattr(torch, "save", full)
        run.save()
    assert train_gpt2.read_checkpoint(tmp_path / "run/ckpt.pt")["step"] == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"ckpt.pt", ".lock"}


def test_sampling_from_the_command_line(whole, precision):
    """--sample with odd prompts; a run's folder as --ckpt; validation data that is not there."""
    folder, _ = whole
    for prompt in ("Ünïcode 日本語 🎈", "a red circle " * 100):
        process = run("train_gpt2.py", "--sample", prompt, "--ckpt", "run", "--num", 2,
                      "--max-new-tokens", 80, "--top-k", 20, "--top-p", 0.9, cwd=folder)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count(prompt) >= 2 and process.stdout.count("\n---\n") == 2
    process = run("train_gpt2.py", "--eval", "--ckpt", "run", "--data", "nowhere", cwd=folder)
    assert_error(process, "nowhere has no shards")
    process = run("train_gpt2.py", "--eval", "--ckpt", "run", cwd=folder)
    assert "scenes" in process.stdout and "no HellaSwag" in process.stdout, process.stderr


@pytest.mark.parametrize("args, words", [
    (["--data", "nowhere"], ["nowhere has no shards", "fineweb.py"]),
    (["--preset", "tiny", "--data", "bare"], ["less than a window of 64"]),
    (["--preset", "small", "--data", "bare"], ["tokens of 431", "50,257"]),
    (["--eval", "--preset", "small"], ["runs/small has no model: train first"]),
    (["--eval", "--preset", "small", "--ckpt", "x"], ["--preset", "--eval"]),
    (["--sample", "x"], ["runs/tiny has no model: train first"])])
def test_a_mistake_is_one_line(args, words, tmp_path):
    """A traceback where the user made a mistake; a hub that is asked for runs/tiny."""
    if "small" in args and "--data" in args and not REAL.is_dir():
        pytest.skip("needs REAL_DATA, for the GPT-2 vocabulary")
    write_text(tmp_path / "bare", np.arange(9))
    assert_error(run("train_gpt2.py", *args, cwd=tmp_path), *words)


def test_curves_are_drawn(tmp_path):
    """Curves without their validation, without HellaSwag, or without a point."""
    rows = [{"step": 1, "loss": 3.0}, {"step": 10, "loss": 2.0, "val_val": 2.5, "hellaswag": 0.26}]
    rows.append({"step": 13, "loss": 1.9, "val_val": math.nan})
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, "draw_chart", lambda path, title, lines: drawn.update(lines))
        train_gpt2.draw_run(tmp_path, rows)
    expected = {"loss": [(1, 3.0), (10, 2.0), (13, 1.9)], "val_val": [(10, 2.5)]}
    assert drawn == expected | {"hellaswag": [(10, 0.26)]}
    train_gpt2.draw_run(tmp_path, rows)
    image = Image.open(tmp_path / "curves.png")
    chart = image.crop((0, 0, 900, 440))  # without its legend: a single point, too, is seen
    colors = {color for _, color in chart.getcolors(1 << 20)}
    assert {(255, 255, 255), (0x94, 0xA3, 0xB8), (0x25, 0x63, 0xEB)} <= colors
    assert (tmp_path / "hellaswag.png").exists()
    train_gpt2.draw_chart(tmp_path / "empty.png", "none of it is finite", {"loss": []})


def small_export(folder):
    """A GPT-2 of GPT-2's vocabulary in transformers' layout."""
    model = small_model(config=GPTConfig(64, 50257, 1, 2, 32, init_std=0.3))
    train_gpt2.export_hf(model, fineweb.get_tokenizer(50257), folder)
    return model


@torch.no_grad()
def test_a_frozen_head_changes_no_probability(monkeypatch):
    """Logits near -100, which bf16 rounds to steps of .5: other words than in fp32."""
    monkeypatch.setattr(train_gpt2, "uses_bf16", lambda device: True)
    config = GPTConfig(32, 507, 2, 4, 64, init_std=0.3)
    idx = torch.randint(0, 507, (4, 32))
    exact = small_model(config=config)(idx)[0].log_softmax(-1)
    errors = {}
    for offset in (0, -100):
        for centered in (False, True):
            model = small_model(config=config)
            mean = model.hidden_states(model.embed(idx)).flatten(0, 1).mean(0)
            shift = offset * mean / (mean @ mean)  # lowers the logits of a mean state by `offset`
            model.wte.weight += shift
            model.wpe.weight -= shift  # as OpenAI's: the embeddings are what they were
            h = model.hidden_states(model.embed(idx)).bfloat16()
            if centered:
                train_gpt2.center_head(model)
            else:
                model.head = lambda model=model: model.wte.weight.bfloat16()
            log_p = model.logits(h).float().log_softmax(-1)
            errors[offset, centered] = (log_p - exact).abs().mean().item()
    assert errors[-100, False] > 2 * errors[0, False]
    assert errors[-100, True] < 1.1 * errors[0, False]
    train_gpt2.freeze(model, CPU)
    assert model.head().dtype == torch.bfloat16 and model.wte.weight.dtype == torch.float32
    model = small_model(config=config)
    with train_gpt2.centered_head(model):
        assert model.head().dtype == torch.bfloat16
    assert model.head() is model.wte.weight


@real_data
@torch.no_grad()
def test_an_export_works_alone_in_transformers(tmp_path):
    """--export-hf without a tokenizer; a vocabulary of its own that is read as GPT-2's."""
    transformers = pytest.importorskip("transformers")
    model = small_export(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Once upon a time, naïve 日本"
    ours = fineweb.get_tokenizer(50257).encode_ordinary(text)
    assert tokenizer(text)["input_ids"] == ours and tokenizer.eos_token_id == 50256
    pipe = transformers.pipeline("text-generation", str(tmp_path / "hf"))
    out = pipe("Once upon", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    idx = torch.tensor([fineweb.get_tokenizer(50257).encode_ordinary("Once upon")])
    expected = generate(model, idx, 4, temperature=0)[0].tolist()
    assert out == fineweb.get_tokenizer(50257).decode(expected)
    again, _ = train_gpt2.load_model(tmp_path / "hf")
    assert again.config.vocab_size == 50_257 and len(again.wte.weight) == 50_304
    words = json.loads((tmp_path / "hf/vocab.json").read_text())
    for name, content in (("vocab.json", words), ("tokenizer.json", {"model": {"vocab": words}})):
        (tmp_path / "hf" / name).write_text(json.dumps(content))
        train_gpt2.load_model(tmp_path / "hf")
    (tmp_path / "hf/vocab.json").write_text(json.dumps(words | {"Ġthe": 7}))
    with pytest.raises(UserError, match="vocab.json is not GPT-2's"):
        train_gpt2.load_model(tmp_path / "hf")


@pytest.mark.parametrize("name", ["log.csv", "curves.png", "notes.txt", "ckpt.pt"])
def test_other_peoples_files_stay(name, tiny, tmp_path):
    """A folder with something else, into which a run is written."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    path.write_text("mine")
    if name == "ckpt.pt":  # nanoGPT's
        torch.save({"model": {}, "model_args": {}, "iter_num": 3}, path)
    body = path.read_bytes()
    assert_error(train(tiny, tmp_path), "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {name, ".lock"}
    assert path.read_bytes() == body


IN_EVALUATION = """
import os, signal, sys, train_gpt2
validate = train_gpt2.validate
how, step = sys.argv.pop(1), int(sys.argv.pop(1))
def stop(at, number=None):
    if at == step:
        if number is None:
            os._exit(9)
        os.kill(os.getpid(), number)
def interrupted(model, *args):
    stop(int(how == "kill" and run.step))
    row = validate(model, *args)
    stop(int(how == "signal" and run.step), signal.SIGTERM)
    return row
def fit(self, *args):
    global run
    run = self
    return usual_fit(self, *args)
usual_fit = train_gpt2.fit
train_gpt2.fit = fit
train_gpt2.validate = interrupted
train_gpt2.fineweb.command_line(train_gpt2.main)
"""


@pytest.mark.parametrize("how, step", [("kill", 20), ("signal", 20), ("signal", 40), ("kill", 40)])
def test_a_stop_in_an_evaluation_loses_nothing(how, step, tiny, whole, tmp_path):
    """Steps since the last checkpoint, an evaluation, or a row of the log, lost by a stop there."""
    command = [sys.executable, "-c", IN_EVALUATION, how, step, *RUN_FLAGS, "--data", tiny]
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True)
    assert process.returncode == (9 if how == "kill" else 130), process.stderr
    saved = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert saved["step"] == (21 if (how, step) == ("signal", 20) else step)
    assert saved["finished"] == ((how, step) == ("signal", 40))
    assert train(tiny, tmp_path).returncode == 0
    assert_same_outcome(whole[0] / "run", tmp_path / "run")


def test_a_run_without_a_reader_is_saved(tiny, whole, tmp_path):
    """`| tee log` and Ctrl-C, which ends tee first: a run that ends unsaved."""
    process = start("train_gpt2.py", *RUN_FLAGS, "--data", tiny, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("step     20"):
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            break
    assert process.wait(timeout=60) != 0
    saved = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert 20 <= saved["step"] < 40 and saved["rows"][-1]["step"] == saved["step"]
    assert train(tiny, tmp_path).returncode == 0
    assert_same_outcome(whole[0] / "run", tmp_path / "run")


# -----------------------------------------------------------------------------
# Several processes


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_together(rank, size, port, tiny, out):
    """One of `size` processes: three steps of a decoder over the border of an epoch, validation,
    HellaSwag, three steps of a bridge, its captions; in fp32. Rank 0 writes what came."""
    train_gpt2.uses_bf16 = lambda device: False
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, size, rank, "127.0.0.1", port)
    if size > 1:
        os.environ.update(zip(names, map(str, values), strict=True))
        train_gpt2.join_processes()
    model = small_model(config=train_gpt2.PRESETS["tiny"])
    train_set, val_sets = train_gpt2.open_data(tiny, model.config)
    recipe = Recipe(3, 8 * 64, max(1, 4 // size), 1e-3, 1, muon=20, eval_tokens=64 * 21)
    get = functools.partial(train_gpt2.get_micro_batches, train_set, recipe, 0)
    border = len(train_set) // 8 - 1
    results = []
    for loss, norm in itertools.islice(steps(model, recipe, get, first=border), 3):
        results += [loss, norm]
    results.append(model.h[0].attn.c_attn.weight.double().sum().item())
    tokenizer = fineweb.get_tokenizer(431)
    results += train_gpt2.validate(model, val_sets, tokenizer, 64 * 21, 4, CPU).values()
    items = [hellaswag.render(example, tokenizer) for example in made_items(41)]
    results.append(train_gpt2.evaluate_hellaswag(model, items, CPU))
    pictures = some_pictures(9)
    captioner = small_captioner("cross")
    recipe = Recipe(3, 7, 8, 1e-2, 1)  # 4 pictures and 3
    get = functools.partial(caption.get_micro_batches, pictures, captioner, recipe, 0)
    for loss, norm in itertools.islice(steps(captioner, recipe, get), 3):
        results += [loss, norm]
    results += caption.caption_loss(captioner, pictures)
    texts = caption.write_captions(captioner, pictures.vision(), tokenizer, max_new_tokens=6)
    if size > 1:
        torch.manual_seed(rank)  # ranks that do not begin with the same weights are noticed
        with pytest.raises(UserError, match="different weights"):
            small_run(Path(out).with_name(f"run{size}")).__enter__()
    if rank == 0:
        Path(out).write_text(json.dumps([results, texts]))
    if size > 1:
        train_gpt2.leave_processes()


def test_one_two_and_four_processes_have_the_same_losses(tiny, tmp_path):
    """Other losses on several ranks: gradients that are not summed, or not over all of them."""
    results = []
    for size in (1, 2, 4):
        args = (size, free_port(), tiny, str(tmp_path / "out.json"))
        torch.multiprocessing.spawn(train_together, args, nprocs=size)
        results.append(json.loads((tmp_path / "out.json").read_text()))
    (expected, texts), *others = results
    for losses, other_texts in others:
        assert losses == pytest.approx(expected, rel=1e-4) and other_texts == texts


def test_the_first_signal_asks_and_the_second_ends(tmp_path):
    """A Ctrl-C that is not noted, a second one that is caught too, a nohup that is undone."""
    before = signal.getsignal(signal.SIGINT)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with pytest.raises(SystemExit) as stop:  # at the end, too: --compare would go on
        with small_run(tmp_path / "run") as run:
            assert not run.stop and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            assert run.stop and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
            run.finish()
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) == before
    assert train_gpt2.is_finished(tmp_path / "run")
    signal.signal(signal.SIGHUP, hangup)


def torchrun(script, *args, cwd, size=2):
    module = ["-m", "torch.distributed.run", "--nproc_per_node", size, "--master_port", free_port()]
    command = [sys.executable, "-u", *module, HERE / script, *args]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_a_signal_to_one_process_stops_all_and_one_goes_on(tiny, tmp_path):
    """Ranks that wait for each other after a signal; a run that one process cannot go on with."""
    flags = ["--preset", "tiny", "--data", tiny, "--out", "run", "--batch-tokens", 1024,
             "--micro-batch", 4, "--eval-every", 200, "--steps"]
    process = torchrun("train_gpt2.py", *flags, 400, cwd=tmp_path)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step     20"):
            command = ["pgrep", "-P", str(process.pid)]
            children = subprocess.run(command, capture_output=True, text=True).stdout.split()
            os.kill(int(children[1]), signal.SIGTERM)
    assert process.wait(timeout=90) != 0 and "2 x CPU" in output, output
    assert "the same command resumes" in output
    stopped = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"]
    assert 20 < stopped < 200
    process = run("train_gpt2.py", *flags, stopped + 3, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert f"{stopped} of {stopped + 3} steps are done" in process.stdout
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == stopped + 3


def test_torchrun_trains_and_scores_a_bridge_as_one_process_does(captions_run, tmp_path):
    """Captions and scores of several ranks that are not those of one."""
    flags, folder, _ = captions_run
    process = torchrun("caption.py", *flags, cwd=tmp_path)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0 and output.count("METEOR (exact + stem)") == 1, errors
    paths = [f / "runs/shapes-cross/scores.json" for f in (folder, tmp_path)]
    one, two = (json.loads(path.read_text()) for path in paths)
    for key in ("nats per caption", "shuffled"):
        assert two[key] == pytest.approx(one[key], rel=0.01)
    assert len(two["per_image"]) == 100 and two.keys() == one.keys()


@measured
def test_measured_steps_beside_nanogpt():
    """Our training step and that of nanoGPT's model.py, which lies in the folder PEER."""
    if "PEER" not in os.environ:
        pytest.skip("needs PEER, the folder of nanoGPT's model.py")
    sys.path.insert(0, os.environ["PEER"])
    peer = importlib.import_module("model")
    print()
    for preset, T, B in (("tiny", 64, 24), ("gpt2", 1024, 2)):
        c = dataclasses.replace(train_gpt2.PRESETS[preset], sinusoids=False)
        ours = GPT(c)
        shape = {"block_size": T, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
        theirs = peer.GPT(peer.GPTConfig(vocab_size=c.vocab_size, dropout=0.0, **shape))
        x, y = torch.randint(0, c.vocab_size, (2, B, T))
        recipe = Recipe(10, B * T, B, 1e-4, 1)
        optimizer = train_gpt2.configure_optimizer(ours, recipe)
        their_optimizer = theirs.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")

        def our_step(ours=ours, optimizer=optimizer, recipe=recipe, x=x, y=y):
            train_gpt2.train_step(ours, optimizer, [(x, y, 1.0)], recipe, CPU)

        def their_step(net, theirs=theirs, optimizer=their_optimizer, x=x, y=y):
            with train_gpt2.autocast(CPU):
                _, loss = net(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        times = in_turns(our_step, functools.partial(their_step, theirs),
                         functools.partial(their_step, torch.compile(theirs)), rounds=5)
        rates = [f"{name} {B * T / seconds:,.0f} tokens/s ({seconds / times[0]:.2f})" for
                 name, seconds in zip(("ours", "nanoGPT", "compiled"), times, strict=True)]
        print(f"step, {preset}, {B} x {T}: {', '.join(rates)}")


@measured
def test_measured_generation(tmp_path):
    """Tokens of the 124M beside transformers' generate()."""
    transformers = pytest.importorskip("transformers")
    print()
    model = GPT(train_gpt2.PRESETS["gpt2"])
    train_gpt2.export_hf(model, fineweb.get_tokenizer(50257), tmp_path / "hf")
    train_gpt2.freeze(model, CPU)
    dtype = torch.bfloat16 if train_gpt2.uses_bf16(CPU) else torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype).eval()
    for B in (1, 16):
        idx = torch.randint(0, 50257, (B, 32))
        options = {"max_new_tokens": 96, "min_new_tokens": 96, "do_sample": False}

        def ours(idx=idx):
            with train_gpt2.autocast(CPU):
                generate(model, idx, 96, temperature=0)

        def generate_theirs(idx=idx, options=options):
            theirs.generate(idx, attention_mask=torch.ones_like(idx), pad_token_id=0, **options)

        a, b = in_turns(ours, generate_theirs)
        print(f"generation, batch {B:2}: ours {96 * B / a:.0f} tokens/s, transformers "
              f"{96 * B / b:.0f} ({b / a:.2f})")


# -----------------------------------------------------------------------------
# coco_eval.py: scores


CANDIDATE = "a red circle and a blue square"
REFERENCES = ["a red circle above a blue square", "a blue square"]
METRICS = ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
ODD_CAPTIONS = [
    "", "A", "two dogs", "A dog's t-shirt, isn't it?",
    "I cannot; they're gonna (maybe) [go] {now}!",
    "line\none\rtwo\vthree\ffour\x85five\u2028six\u2029seven",
    "a ||| b", "café naïve 猫が座る \U0001f600 cat", "“quoted” and ‘single’ «guillemets» …",
    "B & W, AT&T &amp; co", "$5 for 50% at 3:30pm, €5 £6 ½", "a--b - c ... d..",
    "1,000 birds over 3.5 miles at 10:30", "w/ milk half-full/half-empty 1/2",
    "Mr. Smith of St. Paul, U.S., at 5 a.m.", "the dogs' o'clock 1950s 12th",
    "एक आदमी घोड़े की सवारी करता है।", "ผู้ชายขี่ม้า", "رَجُلٌ يَرْكَبُ حِصَانًا",
    "cafe\u0301 noe\u0308l",
    "a dog 🐕\u200d🦺 runs", "I ❤\ufe0f dogs 1\ufe0f\u20e3", "soft\xadhyphen", "고양이가 앉아 있다",
    "кошка сидит", "η γάτα κάθεται", "חתול יושב", "গরু ঘাস খায়", "தமிழ் மொழி", "ქართული ენა",
    "a\u200bb\ufeffc\u2060d", "مرحبا\u200cدنیا", "日本語。テスト、です！"]


@pytest.fixture(scope="session")
def official():
    """The official scorer: tokenizer, scores, METEOR 1.5 as it is and without its tables."""
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("needs Java, which pycocoevalcap runs")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(captions):
        clean = {i: [{"caption": " ".join(text.split())}] for i, text in enumerate(captions)}
        tokenized = PTBTokenizer().tokenize(clean).values()
        return [words[0].replace("\xa0", " ").split() for words in tokenized]

    def joined(references, candidates):
        texts = {id: [" ".join(reference) for reference in references[id]] for id in candidates}
        return texts, {id: [" ".join(candidate)] for id, candidate in candidates.items()}

    def scores(references, candidates):
        pair = joined(references, candidates)
        with contextlib.redirect_stdout(None):
            bleu, bleus = Bleu(4).compute_score(*pair, verbose=0)
            cider, ciders = Cider().compute_score(*pair)
            rouge, rouges = Rouge().compute_score(*pair)
        corpus = dict(zip(METRICS, [cider, *bleu, rouge], strict=True))
        return corpus, dict(zip(METRICS, [ciders, *bleus, rouges], strict=True))

    def start_meteor(*options):
        popen = subprocess.Popen
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", lambda c, **more: popen([*c, *options], **more))
            jar = Meteor()
        return lambda references, candidates: jar.compute_score(*joined(references, candidates))

    parameters = ("-m", "exact stem", "-w", "1.0 0.6", "-p", "0.85 0.2 0.6 0.75")
    return {"tokens": tokens, "scores": scores, "full METEOR": start_meteor(),
            "METEOR": start_meteor(*parameters)}


def leave_one_out():
    """COCO val2017's captions: each picture's first is the candidate, the others are references."""
    captions = coco_eval.read_references(REAL / "coco/captions_val2017.json")
    references = {id: texts[1:] for id, texts in captions.items()}
    return references, {id: texts[0] for id, texts in captions.items()}


def assert_equals_official(official, references, candidates):
    """BLEU, ROUGE-L and CIDEr-D, for the corpus and each picture; returns ours."""
    ours = coco_eval.evaluate(references, candidates, list)
    corpus, pictures = official["scores"](references, candidates)
    for metric in METRICS:
        assert ours["corpus"][metric] == pytest.approx(corpus[metric], abs=1e-8), metric
        each = [picture[metric] for picture in ours["per_image"].values()]
        np.testing.assert_allclose(each, pictures[metric], atol=1e-8, err_msg=metric)
    return ours


def meteors(scores):
    """Our METEOR: (corpus, [each picture])."""
    each = [picture["METEOR"] for picture in scores["per_image"].values()]
    return scores["corpus"]["METEOR"], each


@measured
@real_data
def test_scores_equal_the_official_ones_on_all_of_val2017(official):
    """Tokens and all metrics on 25,014 captions of people."""
    references, candidates = leave_one_out()
    captions = [text for id in candidates for text in (candidates[id], *references[id])]
    theirs = official["tokens"](captions)
    pairs = zip(captions, theirs, strict=True)
    different = sum(coco_eval.tokenize(text) != tokens for text, tokens in pairs)
    assert len(captions) == 25_014 and different <= 25  # 99.9 %
    words = iter(theirs)
    tokens = {id: [next(words) for _ in range(1 + len(references[id]))] for id in candidates}
    pair = {id: t[1:] for id, t in tokens.items()}, {id: t[0] for id, t in tokens.items()}
    ours = assert_equals_official(official, *pair)
    corpus, each = meteors(ours)
    without, each_without = official["METEOR"](*pair)
    full, each_full = official["full METEOR"](*pair)
    assert abs(corpus - without) < 5e-4 and correlation(each, each_without) > 0.999
    raw = coco_eval.evaluate(references, candidates)["corpus"]  # from raw captions, our own tokens
    gaps = {metric: abs(raw[metric] - ours["corpus"][metric]) for metric in METRICS}
    print(f"\n{different} of {len(captions):,} captions have other tokens; from raw captions:")
    print(", ".join(f"{metric} {raw[metric]:.4f} (gap {gap:.1e})" for metric, gap in gaps.items()))
    r = (correlation(each, each_without), correlation(each, each_full))
    print(f"METEOR {corpus:.4f}; without tables {without:.4f}, r {r[0]:.4f}; full {full:.4f}, "
          f"r {r[1]:.3f} ({correlation(each_without, each_full):.3f} for the one without tables)")
    assert gaps.pop("CIDEr") < 1e-3 and max(gaps.values()) < 3e-4


@real_data
def test_meteor_equals_the_one_without_tables_and_orders_systems_as_the_full_one(official):
    """METEOR on six real systems and five made ones; the other metrics on all of them."""
    references, people = leave_one_out()
    paths = sorted((REAL / "coco").glob("*_results.json"))
    systems = [coco_eval.read_results(path) for path in paths]
    ids = sorted(set.intersection(*map(set, systems)))
    rng = random.Random(0)
    made = [lambda w: w, lambda w: w[:6], lambda w: rng.sample(w, len(w)), lambda w: w[:4] * 3]
    systems += [{id: " ".join(change(people[id].split())) for id in ids} for change in made]
    systems.append(dict(zip(ids, [people[id] for id in ids[1:] + ids[:1]], strict=True)))
    captions = [text for id in ids for text in (*references[id], *(s[id] for s in systems))]
    captions = list(dict.fromkeys(captions))
    words = dict(zip(captions, official["tokens"](captions), strict=True))
    ours = []
    full = []
    for i, system in enumerate(systems):
        targets = {id: [words[text] for text in references[id]] for id in ids}
        pair = targets, {id: words[system[id]] for id in ids}
        corpus, each = meteors(assert_equals_official(official, *pair))
        without, each_without = official["METEOR"](*pair)
        assert abs(corpus - without) < (5e-4 if i < len(paths) else 1e-3)
        assert correlation(each, each_without) > 0.995
        ours.append([corpus, *each])
        full_corpus, each_full = official["full METEOR"](*pair)
        full.append([full_corpus, *each_full])
    ours = np.array(ours)
    full = np.array(full)
    gaps = ours[:, 0] - full[:, 0]
    over_systems = correlation(ours[:, 0], full[:, 0])
    over_captions = correlation(ours[:, 1:].ravel(), full[:, 1:].ravel())
    print(f"\nMETEOR over {len(systems)} systems: r {over_systems:.4f} with the full one, "
          f"{gaps.min():.3f} to {gaps.max():.3f} lower; over all captions r {over_captions:.3f}")
    assert over_systems > 0.99 and over_captions > 0.95 and gaps.max() < 0


def test_odd_captions_equal_the_official_ones(official):
    """Tokens of odd captions and a dozen scripts; scores of corner cases."""
    theirs = official["tokens"](ODD_CAPTIONS)
    for text, tokens in zip(ODD_CAPTIONS, theirs, strict=True):
        assert coco_eval.tokenize(text) == tokens
    two_dogs = ["two", "dogs"]
    references = {i: [theirs[i] or ["a"], two_dogs, theirs[i - 1]] for i in range(len(theirs))}
    assert_equals_official(official, references, dict(enumerate(theirs)))
    for one in ({0: [two_dogs]}, {0: [["a"]], 1: [["a"]]}):  # one picture; all alike
        for candidate in (["a", "dog"], one[0][0], []):
            assert_equals_official(official, one, dict.fromkeys(one, candidate))


def test_tokens_and_stems_by_hand():
    """Tokens without Java: contractions, punctuation, brackets, times, other scripts; stems."""
    stems = {"quickly": "quick", "nearly": "near", "only": "onli", "family": "famili",
             "cities": "citi", "sitting": "sit", "riding": "ride", "dogs": "dog", "sky": "sky",
             "colorful": "color", "happily": "happili", "skies": "sky", "hill": "hill"}
    assert {word: coco_eval.stem(word) for word in stems} == stems
    tokens = coco_eval.tokenize("A dog's t-shirt, isn't it?")
    assert tokens == ["a", "dog", "'s", "t-shirt", "is", "n't", "it"]
    text = "I cannot (go)\u2028at 10:30 a.m.\nB & W &amp; “1,000” -- 50%!"
    expected = "i can not -lrb- go -rrb- at 10:30 a.m. b & w & 1,000 50 %"
    assert coco_eval.tokenize(text) == expected.split()
    assert coco_eval.tokenize("") == coco_eval.tokenize(" ...\n") == []
    assert len(coco_eval.tokenize("एक आदमी घोड़े की सवारी करता है")) == 7
    assert coco_eval.tokenize("a dog 🐕\u200d🦺 runs ❤\ufe0f") == ["a", "dog", "runs", "❤"]


@pytest.mark.parametrize("expected, pairs", [
    (1.0, [("a man rides a horse", ["a man rides a horse"]), ("two dogs run", ["two dogs run"])]),
    (0.5175, [("a man rides a horse", ["a man rides a horse"]), (CANDIDATE, REFERENCES[:1])]),
    (0.4572, [("two dogs run fast", ["two dog runs fast"]), (CANDIDATE, REFERENCES[:1])]),
    (0.719, [("a man rides a horse", ["a man rides a horse"]),
             ("nothing here", ["two cats", "one very long sentence about cats"])]),
    (0.1489, [("a dog 's bone", ["a cat 's milk"])]),
    (0.1333, [("my red dog", ["my blue cat"])]),
    (0.4, [("a horse near horses", ["a horses near horse"])])])
def test_meteor_of_the_jar(expected, pairs):
    """Values of the METEOR 1.5 jar: whole matches, ties, contractions, function words."""
    references = {i: [text.split() for text in texts] for i, (_, texts) in enumerate(pairs)}
    candidates = {i: text.split() for i, (text, _) in enumerate(pairs)}
    scores = coco_eval.evaluate(references, candidates, list)
    assert scores["corpus"]["METEOR"] == pytest.approx(expected, abs=5e-5 if expected < 1 else 0)


def test_the_worked_examples_of_the_docstrings():
    """An example whose numbers are not those of the code."""
    references = [[text.split() for text in REFERENCES]]
    candidate = [CANDIDATE.split()]
    bleu = coco_eval.bleu(references, candidate)["BLEU-2"][0]
    rouge_l = coco_eval.rouge_l(references, candidate)["ROUGE-L"][0]
    first = coco_eval.meteor([references[0][:1]], candidate)["METEOR"][0]
    both = coco_eval.meteor(references, candidate)["METEOR"][0]
    two = [["a blue square".split()], ["a red circle".split()]]
    cider, each = coco_eval.cider(two, [["a", "square"], ["a"]])["CIDEr"]
    expected = (0.756, 0.936, 0.4345, 0.442, 1.743)
    assert (bleu, rouge_l, first, both, each[0]) == pytest.approx(expected, abs=5e-4)
    assert cider == np.mean(each)


def shapes_captions(number, seed=0):
    """References and candidates of toy scenes."""
    rng = random.Random(seed)
    captions = [fineweb.captions(fineweb.random_scene(rng), rng) for _ in range(number)]
    references = {i: texts[1:] for i, texts in enumerate(captions)}
    return references, {i: texts[0] for i, texts in enumerate(captions)}


def test_alignment_equals_brute_force():
    """METEOR's alignment: fewer matches, or more chunks, than can be had."""
    rng = random.Random(0)

    def all_ways(reference, candidate, i=0, used=()):
        if i == len(candidate):
            return [()]
        ways = all_ways(reference, candidate, i + 1, used)
        for j, word in enumerate(reference):
            if j not in used and coco_eval.stem(word) == coco_eval.stem(candidate[i]):
                rest = all_ways(reference, candidate, i + 1, (*used, j))
                ways = ways + [((i, j), *way) for way in rest]
        return ways

    words = ["a", "dog", "dogs", "the", "on"]
    for _ in range(150):
        reference = rng.choices(words, k=rng.randint(0, 6))
        candidate = rng.choices(words, k=rng.randint(0, 6))

        def cost(pairs, reference=reference, candidate=candidate):
            unequal = sum(candidate[i] != reference[j] for i, j in pairs)
            distance = sum(abs(i - j) for i, j in pairs)
            return -len(pairs), unequal, coco_eval.count_chunks(pairs), distance

        best = min(map(cost, all_ways(reference, candidate)))
        assert cost(coco_eval.align(reference, candidate)) == best, (reference, candidate)
    assert len(coco_eval.align(["a"] * 500, ["a"] * 200)) == 200  # and not for ever


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def test_scoring_from_the_command_line(tmp_path):
    """Printed and written scores that are not those of evaluate()."""
    references, _ = shapes_captions(12)
    annotations = []
    for id, texts in references.items():
        annotations += [{"image_id": id, "caption": text} for text in texts]
    truth = write_json(tmp_path / "references.json", {"annotations": annotations})
    perfect = {id: references[id][0] for id in range(10)}
    results = [{"image_id": float(id), "caption": text} for id, text in perfect.items()]
    good = write_json(tmp_path / "good.json", results)
    command = ["coco_eval.py", "--references", truth, "--results", good, "--out"]
    process = run(*command, "scores.json", cwd=tmp_path)
    expected = coco_eval.evaluate(references, perfect)
    assert process.returncode == 0 and "10 of 12 pictures scored" in process.stdout
    assert f"{expected['corpus']['METEOR']:.4f}" in process.stdout
    assert "METEOR (exact + stem)" in process.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == json.loads(json.dumps(expected))
    for out in (truth, good, tmp_path):  # which it would overwrite
        assert_error(run(*command, out, cwd=tmp_path), "there already")
    write_json(good, results[:1])
    process = run(*command[:5], cwd=tmp_path)
    assert "CIDEr of fewer than two pictures is always 0" in process.stdout


@pytest.mark.parametrize("results, words", [
    ("[]", "no caption"), ("{", "JSON"), ('{"a": 1}', "'annotations'"),
    ('[{"image_id": 1}]', "'caption'"), ('[{"image_id": 1, "caption": null}]', "TypeError"),
    ('[{"image_id": 1, "caption": "a"}, {"image_id": 1.0, "caption": "b"}]', "of picture 1"),
    ('[{"image_id": 7, "caption": "a"}]', "picture 7"),
    ('[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]', "two captions")])
def test_wrong_results_are_one_line(results, words, tmp_path):
    """Results that are wrong, scored all the same."""
    annotations = {"annotations": [{"image_id": 1, "caption": "a dog"}]}
    references = write_json(tmp_path / "references.json", annotations)
    path = write_json(tmp_path / "results.json", results)
    process = run("coco_eval.py", "--references", references, "--results", path, cwd=tmp_path)
    assert_error(process, words)


# -----------------------------------------------------------------------------
# coco_eval.py: pictures and datasets


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small set of toy pictures on disk: 300 for training, 100 and 50 for validation."""
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_eval, "VAL_IMAGES", 100)
        patch.setattr(coco_eval, "UNSEEN_IMAGES", 50)
        coco_eval.make_shapes(folder, images=300)
    return folder


def test_toy_pictures_show_what_their_captions_say(shapes, tmp_path):
    """Pictures that do not fit their captions, unseen pairs in training, files by the seed."""
    train = coco_eval.read_dataset(shapes, "train")
    val = coco_eval.read_dataset(shapes, "val")
    unseen = coco_eval.read_dataset(shapes, "unseen")
    pictures = train + val + unseen
    has_unseen = [fineweb.has_unseen_pair(p["scene"]["objects"]) for p in pictures]
    assert (len(train), len(val), len(unseen)) == (300, 100, 50)
    assert not any(has_unseen[:400]) and all(has_unseen[400:])
    for picture in train[:100]:
        assert len(set(picture["captions"])) == 5
        for text in picture["captions"]:
            assert False not in coco_eval.facts(text, picture["scene"]).values()
        pixels = np.asarray(coco_eval.load_image(picture["path"]), dtype=int)
        for thing in picture["scene"]["objects"]:  # its color is in its cell
            y = 16 * thing["row"]
            x = 16 * thing["col"]
            paint = ImageColor.getrgb(coco_eval.PAINT[thing["color"]])
            distance = np.abs(pixels[y : y + 16, x : x + 16] - paint)
            assert (distance.max(-1) < 6).sum() > 20, thing
    coco_eval.make_shapes(tmp_path / "again", images=300)
    files = [path.relative_to(shapes) for path in (shapes / "train").iterdir()]
    assert len(files) == 300
    assert all((shapes / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_a_folder_of_own_pictures(tmp_path):
    """Your own pictures: how they are split, and what is wrong with their annotations."""
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(20)]
    annotations = [{"image_id": str(i), "caption": f"number {i}"} for i in range(20)]
    silent = [{"id": 99, "file_name": "silent.png"}]
    blank = [{"image_id": 99, "caption": " \n"}]  # as good as none
    content = {"images": images + silent, "annotations": annotations + blank}
    path = write_json(tmp_path / "annotations/captions.json", content)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="0.png is not there: file names .* looked for in .*images"):
        coco_eval.read_dataset(tmp_path, "train")
    (tmp_path / "images/0.png").write_bytes(b"")
    train = coco_eval.read_dataset(tmp_path, "train")
    val = coco_eval.read_dataset(tmp_path, "val")
    assert [p["id"] for p in val] == [0, 10] and len(train) == 18
    expected = {"id": 0, "path": tmp_path / "images/0.png", "captions": ["number 0"]}
    assert val[0] == expected | {"scene": None}
    write_json(path, {"images": images[:9], "annotations": annotations[:9]})
    assert [p["id"] for p in coco_eval.read_dataset(tmp_path, "val")] == [0]  # nine are enough
    each = [{"id": i, "file_name": f"{i // 5}.png"} for i in range(20)]  # an entry for each caption
    write_json(path, {"images": each, "annotations": annotations})
    val = coco_eval.read_dataset(tmp_path, "val")
    assert [p["captions"] for p in val] == [[f"number {i}" for i in range(5)]]
    assert len(coco_eval.read_dataset(tmp_path, "train")) == 3
    wrong = [
        ({"annotations": []}, "images"), ({**content, "images": images[:1] * 2}, "the same id"),
        ({**content, "images": images[1:]}, "picture 0"),
        ({"images": images, "annotations": annotations[:1]}, "too few pictures"),
        ({"images": images, "annotations": [{"image_id": 0, "caption": None}]}, "TypeError"),
        ({"images": [{"id": 1}], "annotations": []}, "file_name")]
    for content, words in wrong:
        write_json(path, content)
        with pytest.raises(UserError, match=words):
            coco_eval.read_dataset(tmp_path, "train")
    with pytest.raises(UserError, match="COCO's layout"):
        coco_eval.read_dataset(tmp_path / "images", "train")


def archive(files, compression=zipfile.ZIP_STORED):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", compression) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return body.getvalue()


BODY = random.Random(0).randbytes(400_000)


def test_coco_is_fetched_unpacked_and_left_alone(server, tmp_path, monkeypatch):
    """COCO's archives: downloads that break off, kills in the middle, what is there already."""
    pictures = {f"val2017/{i}.jpg": BODY[:3000] for i in range(50)}
    annotations = {"annotations/captions_val2017.json": "{}"}
    bodies = [archive(annotations), archive(pictures), archive({"train2017/1.jpg": BODY[:100]})]
    archives = []
    for (address, _), body in zip(coco_eval.ARCHIVES, bodies, strict=True):
        archives.append((address, hashlib.md5(body).hexdigest()))
        server.files[f"/{address}"] = body
    monkeypatch.setattr(coco_eval, "HOST", server.address)
    monkeypatch.setattr(coco_eval, "ARCHIVES", archives)
    server.behave = ["", "break off"]
    coco = tmp_path / "coco"
    command = ("coco_eval.py", "--download", coco, "--val-only")
    assert_error(run(*command))
    (coco / ".unpacked/val2017").mkdir(parents=True)
    (coco / ".unpacked/val2017/0.jpg").write_bytes(b"half of it")  # of a kill
    (coco / "val2017.zip").write_bytes(b"of somebody")
    (coco / ".unpacked/val2017.zip.part").write_bytes(bodies[1][:70_000])
    (coco / ".unpacked/annotations_trainval2017.zip").write_bytes(bodies[0])  # of a kill, too
    assert run(*command).returncode == 0
    assert server.ranges[-1] == 70_000  # what had come is kept
    assert {p.name for p in (coco / ".unpacked").iterdir()} == {".lock"}
    assert (coco / "val2017.zip").read_bytes() == b"of somebody"
    assert all(p.read_bytes() == BODY[:3000] for p in (coco / "val2017").iterdir())
    assert len(list((coco / "val2017").iterdir())) == 50
    asked = len(server.ranges)
    server.files[f"/{archives[2][0]}"] = b"a login page"
    assert_error(run("coco_eval.py", "--download", coco), "is not the expected file")
    server.files[f"/{archives[2][0]}"] = bodies[2]
    (coco / ".unpacked/train2017.zip.part").write_bytes(bodies[2][:50])
    server.behave = ["no ranges"]
    assert run("coco_eval.py", "--download", coco).returncode == 0
    assert (coco / "train2017/1.jpg").read_bytes() == BODY[:100]
    assert len(server.ranges) == asked + 2  # what is there is not downloaded again


def test_pictures_of_every_kind_are_read_right(tmp_path):
    """EXIF orientation, transparency, palettes, CMYK, animations; 16 bits that would be clipped."""
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(1, 64).repeat(4, 0)
    left_red = Image.new("RGB", (8, 4), "white")
    left_red.paste((255, 0, 0), (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    half = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 4))
    left_red.save(tmp_path / "turned.png", exif=exif)
    left_red.convert("CMYK").save(tmp_path / "cmyk.tif")
    half.save(tmp_path / "half.png")
    half.convert("RGB").quantize(4).save(tmp_path / "palette.png", transparency=0)
    black = Image.new("RGB", (8, 4), "black")
    left_red.save(tmp_path / "moving.gif", save_all=True, append_images=[black])
    image = {path.stem: np.asarray(coco_eval.load_image(path)) for path in tmp_path.iterdir()}
    assert all(i.dtype == np.uint8 and i.shape[2] == 3 for i in image.values())
    assert image["turned"].shape == (8, 4, 3)
    assert (image["turned"][0] == (255, 0, 0)).all() and (image["turned"][-1] == 255).all()
    assert (image["half"][:, 0] == (0, 0, 255)).all() and (image["half"][:, 3] == 255).all()
    assert (image["cmyk"][0, 0] == (255, 0, 0)).all() and (image["moving"][0, -1] > 250).all()
    assert (image["palette"] == 255).all(-1).any()
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((ramp // 257).astype(np.int32)).save(tmp_path / "32.tif")
    Image.new("L", (1, 1_000_000)).save(tmp_path / "strip.png")
    words = {"16.png": "16 or 32 bits", "float.tif": "16 or 32", "32.tif": "16 or 32",
             "strip.png": "1 x 1000000 pixels", "nothing.png": "No such file"}
    for name, reason in words.items():
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture .*{reason}"):
            coco_eval.load_image(tmp_path / name)


# -----------------------------------------------------------------------------
# caption.py


WIDE = GPTConfig(48, 43, n_layer=4, n_head=2, n_embd=32, init_std=0.3)


def small_captioner(name, seed=0, S=5, D=12, config=WIDE):
    """A captioner over a small decoder; nothing in its bridge is zero, as it is at first."""
    model = caption.build(name, S, D, small_model(seed, config))
    for p in model.bridge.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return model.eval()


def some_pictures(number, seed=0):
    """A PictureSet of random vision tokens, with one to three captions of different lengths."""
    rng = random.Random(seed)
    captions = []
    for _ in range(number):
        lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
        captions.append([[*(rng.randrange(42) for _ in range(n)), 42] for n in lengths])
    features = np.random.RandomState(0).randn(number, 5, 12).astype(np.float16)
    return caption.PictureSet([{}] * number, captions, features, np.arange(number))


def bridge_steps(model, pictures, recipe):
    """steps() of a bridge."""
    get = functools.partial(caption.get_micro_batches, pictures, model, recipe, 0)
    return steps(model, recipe, get, trained=model.bridge)


def plain_caption_loss(model, vision, tokens):
    """The losses of one caption: its own sequence, no packing, the whole distribution."""
    start = model.beginning(vision[None])
    P = start.size(1)
    inputs = torch.tensor([tokens[:-1]], dtype=torch.long)
    positions = torch.arange(P, P + len(tokens) - 1)
    x = torch.cat([start, model.decoder.embed(inputs, positions)], 1)
    h = model.hidden_states(x, model.bridge.look(vision[None]))
    log_p = model.decoder.logits(h).log_softmax(-1)[0]
    return -log_p[range(P - 1, P - 1 + len(tokens)), tokens]


@torch.no_grad()
@pytest.mark.parametrize("name", caption.BRIDGES)
def test_packed_captions_have_the_losses_of_separate_ones(name, precision):
    """The layout of captions after a prefix: first token, end token, what each attends to."""
    model = small_captioner(name)
    pictures = some_pictures(4)
    vision = pictures.vision(range(4))
    packed = model.pack(pictures.captions)
    each = model.decoder.losses(model.predict(vision, packed), packed.targets)
    for b, captions in enumerate(pictures.captions):
        for k, tokens in enumerate(captions):
            loss = plain_caption_loss(model, vision[b], tokens).sum().item()
            caption_ids = torch.tensor([tokens[:-1]], dtype=torch.long)
            alone = model.loss_of_one(vision[b : b + 1], caption_ids)
            assert alone.item() * len(tokens) == pytest.approx(loss, rel=1e-5)
            assert each[b][packed.owner[b] == k].sum().item() == pytest.approx(loss, rel=1e-5)
    count = (packed.targets >= 0).sum().item()
    assert count == sum(map(len, itertools.chain(*pictures.captions)))
    mean = each.sum().item() / count
    assert model(vision, packed)[1].item() == pytest.approx(mean, rel=1e-5)
    alone = model.pack(pictures.captions[:1])  # whoever else is in the batch
    nats = model(vision[:1], alone)[1].item() * (alone.targets >= 0).sum().item()
    assert nats == pytest.approx(each[0].sum().item(), rel=1e-5)
    token, whole = caption.caption_loss(model, pictures, batch=3)
    captions = sum(map(len, pictures.captions))
    assert (token, whole * captions) == pytest.approx((mean, mean * count), rel=1e-2)


@pytest.mark.parametrize("name", caption.BRIDGES)
def test_only_the_bridge_learns(name, precision):
    """A decoder that changes, or a part of the bridge that does not."""
    model = small_captioner(name)
    recipe = Recipe(4, 4, 2, lr=1e-2, warmup_steps=1)
    frozen = {n: p.clone() for n, p in model.decoder.state_dict().items()}
    before = {n: p.clone() for n, p in model.bridge.state_dict().items()}
    list(itertools.islice(bridge_steps(model, some_pictures(6), recipe), 3))
    assert all(torch.equal(p, frozen[n]) for n, p in model.decoder.state_dict().items())
    assert not any(p.requires_grad for p in model.decoder.parameters())
    for n, p in model.bridge.state_dict().items():
        still = ".bias" in n or (name == "blind" and "norm" in n)  # it multiplies zeros
        assert still or not torch.equal(p, before[n]), n
    assert all(p.dtype == torch.float32 for p in model.bridge.parameters())


def test_accumulated_gradients_of_a_bridge_are_those_of_the_whole_batch(fp32):
    """The weight of micro-batches whose captions have different lengths."""
    losses = []
    pictures = some_pictures(6)
    pictures.captions[2].append([7] * 500)  # much longer than the context: cut
    for micro_batch in (6, 2, 4):  # 4: a micro-batch of 3 and another of 3
        recipe = Recipe(3, 6, micro_batch, lr=1e-2, warmup_steps=1)
        run_steps = bridge_steps(small_captioner("linear"), pictures, recipe)
        losses.append([x for pair in itertools.islice(run_steps, 3) for x in pair])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", caption.BRIDGES)
def test_captions_are_the_same_with_and_without_cache(name):
    """Greedy captions: the cache, the prompt, the end token, other pictures in the batch."""
    model = small_captioner(name)
    vision = torch.randn(5, 5, 12)
    for prompt in ([], [7, 8]):
        rows = model.generate(vision, 12, prompt=torch.tensor([prompt] * 5, dtype=torch.long))
        for b, row in enumerate(rows.tolist()):
            tokens = list(prompt)
            while len(tokens) < len(prompt) + len(row) and model.eot not in tokens:
                losses = plain_next(model, vision[b], tokens)
                tokens.append(losses.argmax().item())
            new = tokens[len(prompt) :]
            assert row[: len(new)] == new and set(row[len(new) :]) <= {model.eot}
    assert torch.equal(model.generate(vision, 12), rows) == (prompt == [])
    alone = model.generate(vision[2:3], 12).tolist()[0]
    together = model.generate(vision, 12).tolist()[2]
    assert together[: len(alone)] == alone and set(together[len(alone) :]) <= {model.eot}


def plain_next(model, vision, tokens):
    """Logits of the token after `tokens`, computed again."""
    start = model.beginning(vision[None])
    P = start.size(1)
    inputs = torch.tensor([tokens], dtype=torch.long)
    x = torch.cat([start, model.decoder.embed(inputs, torch.arange(P, P + len(tokens)))], 1)
    return model.decoder.logits(model.hidden_states(x, model.bridge.look(vision[None])))[0, -1]


def plain_beam_search(model, vision, beams, length):
    """The best caption of one picture; each step computes all beams again from the beginning."""
    best = [([], 0.0)]
    for _ in range(length):
        candidates = []
        for tokens, total in best:
            if model.eot in tokens:
                candidates.append((tokens, total))
                continue
            log_p = plain_next(model, vision, tokens).log_softmax(-1).tolist()
            candidates += [([*tokens, token], total + p) for token, p in enumerate(log_p)]
        candidates.sort(key=lambda item: -item[1] / len(item[0]))
        best = candidates[:beams]
    return best[0][0]


@torch.no_grad()
@pytest.mark.parametrize("name", caption.BRIDGES)
def test_beam_search_equals_greedy_and_brute_force(name):
    """Beam search: one beam is greedy; so many that nothing is pruned find the best caption."""
    model = small_captioner(name)
    vision = torch.randn(3, 5, 12)
    greedy = model.generate(vision, 7).tolist()
    for row, other in zip(caption.beam_search(model, vision, 1, 7).tolist(), greedy, strict=True):
        assert row[: len(other)] == other[: len(row)]
    for block in model.decoder.h:  # random attention hardly changes a word: louder
        block.attn.c_proj.weight.mul_(10)
    for row, seen in zip(caption.beam_search(model, vision, 5, 7).tolist(), vision, strict=True):
        plain = plain_beam_search(model, seen, 5, 7)
        assert row[: len(plain)] == plain and set(row[len(plain) :]) <= {model.eot}
    few = caption.build(name, 5, 12, small_model(config=GPTConfig(48, 4, 4, 2, 32, init_std=0.3)))
    for penalty in (0.0, 1.0):
        vision = torch.randn(1, 5, 12)
        worth = {}
        for n in range(5):  # captions of up to three tokens and an end, or of four without an end
            for tokens in itertools.product(range(3), repeat=n):
                losses = plain_caption_loss(few, vision[0], [*tokens, 3][:4])
                worth[tokens] = -losses.sum().item() / len(losses) ** penalty
        found = caption.beam_search(few, vision, 4**4, 4, penalty)[0].tolist()
        assert tuple(t for t in found if t != 3) == max(worth, key=worth.get), (found, penalty)


def test_self_critical_gradient_equals_the_exact_one():
    """Samples with the advantage of another, a baseline that biases, a gradient that climbs down.

    With three words and captions of two tokens there are 13 captions: the expected reward and its
    gradient can be summed up, and so can the step over all pairs of samples.
    """
    model = caption.build("linear", 5, 12, small_model(config=GPTConfig(48, 4, 2, 2, 32)))
    pairs = itertools.product(range(3), range(4))
    captions = [[3], *([a, b] for a, b in pairs)]  # 3 ends a caption
    rewards = torch.rand(13)
    vision = torch.randn(1, 5, 12)

    def gradient(value):
        return torch.autograd.grad(value, [*model.bridge.parameters()])

    log_p = torch.stack([-plain_caption_loss(model, vision[0], c).sum() for c in captions])
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    exact = gradient((log_p.exp() * rewards).sum())
    indices = list(itertools.product(range(13), repeat=2))
    packed = model.pack([[captions[i], captions[j]] for i, j in indices])
    rewards = rewards[torch.tensor(indices)]  # (169, 2)
    advantages = rewards - rewards.flip(1)
    chance = log_p.detach().exp()[torch.tensor(indices)].prod(1, keepdim=True)
    scored = caption.ScoredCaptioner(model)
    _, loss = scored(vision.expand(169, -1, -1), packed, advantages * chance * 169 / 2)
    for ours, theirs in zip(gradient(loss), exact, strict=True):
        assert torch.allclose(ours, -theirs, atol=1e-6)
    assert max(g.abs().max() for g in exact) > 1e-4


def test_samples_have_the_rewards_of_their_own_picture(precision, monkeypatch):
    """A sample that is scored for another picture, or packed behind it."""
    tokenizer = fineweb.get_tokenizer(431)
    model = caption.build("linear", 5, 12, small_model(config=train_gpt2.PRESETS["tiny"]))
    pictures = some_pictures(8)
    scenes = [fineweb.random_scene(random.Random(i)) for i in range(8)]
    texts = [fineweb.captions(scene, random.Random(0)) for scene in scenes]
    pictures.pictures = [{"captions": captions} for captions in texts]
    words = [[[*coco_eval.tokenize(text), "<end>"] for text in captions] for captions in texts]
    cider = coco_eval.CIDEr(words)
    recipe = Recipe(1, 4, 2, 1e-3, 1)
    eot = tokenizer.eot_token
    rows = [[*tokenizer.encode_ordinary(text), eot] for group in texts for text in group]
    drawn = iter([rows[i : i + 5] for i in (0, 13, 22, 31)])  # some have the words of their picture
    monkeypatch.setattr(caption, "draw_samples", lambda *args: [next(drawn), next(drawn)])
    [(_, batches)] = caption.sampled_batches(pictures, model, recipe, 0, tokenizer, 0)
    chosen = train_gpt2.step_indices(0, 0, 4, 8)
    for part, batch in zip(chosen.reshape(2, 2), batches, strict=True):
        vision, packed, weights, share = batch
        assert torch.equal(vision, pictures.vision(part)) and share == 0.5
        for b, picture in enumerate(part):
            samples = [packed.targets[b][packed.owner[b] == k].tolist() for k in range(5)]
            ends = [["<end>"] if tokenizer.eot_token in ids else [] for ids in samples]
            tokens = map(coco_eval.tokenize, train_gpt2.decode(samples, tokenizer))
            tokens = [text + end for text, end in zip(tokens, ends, strict=True)]
            references = list(map(cider.weigh, words[picture]))
            scores = [cider.score(references, text) for text in tokens]
            others = [np.mean(scores[:k] + scores[k + 1 :]) for k in range(5)]
            advantages = np.subtract(scores, others)
            assert 5 * weights[b, :5].numpy() == pytest.approx(advantages, abs=1e-6)
            references = [packed.targets[b][packed.owner[b] == k].tolist() for k in range(5, 10)]
            assert references == [*pictures.captions[picture], *[[]] * 5][:5]
    assert weights[:, :5].abs().max() > 0 and (weights[:, 5:] == caption.ANCHOR / 5).all()


def float64(module, *inputs):
    """A module on rows (T, C) in float64; caption.Attention by PyTorch's own attention."""
    inputs = [x.double()[None] for x in inputs]
    if isinstance(module, caption.Attention):
        w = module.state_dict()
        theirs = nn.MultiheadAttention(inputs[0].size(2), module.n_head, batch_first=True)
        theirs.load_state_dict({
            "in_proj_weight": torch.cat([w["q.weight"], w["kv.weight"]]),
            "in_proj_bias": torch.cat([w["q.bias"], w["kv.bias"]]),
            "out_proj.weight": w["c_proj.weight"], "out_proj.bias": w["c_proj.bias"]})
        return theirs.double()(inputs[0], inputs[1], inputs[1])[0][0]
    return copy.deepcopy(module).double()(*inputs)[0]


@torch.no_grad()
def test_bridges_equal_plain_float64_ones():
    """A layer of the Q-Former, cross-attention, the linear map."""
    torch.manual_seed(1)
    x = torch.randn(7, 32)
    vision = torch.randn(5, 12)
    wide = torch.randn(5, 32)
    layer = small_captioner("qformer").bridge.layers[0]
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    normed = float64(layer.ln_self, x)
    y = x.double() + float64(layer.self_attn, normed, normed)
    y = y + float64(layer.mlp, float64(layer.ln_mlp, y))
    y = y + float64(layer.cross_attn, float64(layer.ln_cross, y), wide)
    assert torch.allclose(layer(x[None], wide[None])[0].double(), y, atol=1e-4)
    bridge = small_captioner("cross").bridge
    seen = float64(bridge.ln[1], bridge.projection(vision))
    expected = x.double() + float64(bridge.cross_attn[1], float64(bridge.ln[1], x), seen)
    assert torch.allclose(bridge.look(vision[None])(1, x[None])[0].double(), expected, atol=1e-4)
    bridge = small_captioner("linear").bridge
    projection = bridge.projection
    y = float64(projection.linear, float64(projection.norm, vision)) + projection.positions
    assert torch.allclose(bridge.prefix(vision[None])[0].double(), y, atol=1e-5)


@pytest.mark.parametrize("side", [8, 16, 24])
def test_pooling_equals_a_plain_loop(side):
    """Patches that are averaged into another cell."""
    tokens = torch.randn(2, 1 + side * side, 6)
    pooled = caption.pool_tokens(tokens)
    square = tokens[:, 1:].view(2, side, side, 6)
    h = side // 4
    w = side // 8
    for r, c in itertools.product(range(4), range(8)):
        mean = square[:, r * h : r * h + h, c * w : c * w + w].mean((1, 2))
        assert torch.allclose(pooled[:, 1 + r * 8 + c], mean, atol=1e-6)
    assert torch.equal(pooled[:, 0], tokens[:, 0])


@pytest.mark.parametrize("name", caption.BRIDGES)
def test_frozen_parts_have_the_weights_that_products_need(name, monkeypatch):
    """Weights cast to bf16 at each call; or losses that differ more than bf16 does."""
    pictures = some_pictures(3)
    vision = pictures.vision(range(3))
    model = small_captioner(name)
    packed = model.pack(pictures.captions)
    exact = model(vision, packed)[1].item()
    monkeypatch.setattr(train_gpt2, "uses_bf16", lambda device: True)
    train_gpt2.freeze(model.decoder, CPU)
    assert model.decoder.h[0].ln_1.weight.dtype == model.decoder.wpe.weight.dtype == torch.float32
    assert model.decoder.head().dtype == torch.bfloat16
    weights = {(96, 32)}  # c_attn, whose shape nothing in a bridge has
    with train_gpt2.autocast(CPU), torch.profiler.profile(record_shapes=True) as profile:
        _, loss = model(vision, packed)
        model.generate(vision, 5)
    assert loss.item() == pytest.approx(exact, abs=0.1, rel=2e-2)
    casts = [e for e in profile.events() if e.name == "aten::_to_copy" and e.input_shapes[0]]
    assert casts and not weights & {tuple(event.input_shapes[0]) for event in casts}


@pytest.fixture(scope="session")
def toy_clip(tmp_path_factory):
    """A tiny CLIP with random weights, in a file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    train_gpt2.save_weights(path, open_clip.CLIP(**caption.TOY_CLIP), {"clip": caption.TOY_CLIP})
    return path


def test_the_toy_clip_is_trained(shapes, tmp_path, monkeypatch):
    """A first run that stops at the toy CLIP, or leaves parts of it as they were."""
    def short(steps, *args, **options):
        return Recipe(6, *args, **options)

    monkeypatch.setattr(caption, "Recipe", short)
    path = tmp_path / "clip.safetensors"
    caption.train_clip(shapes, path)
    encoder = caption.load_clip(path)
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 65, 96)
    torch.manual_seed(0)
    before = open_clip.CLIP(**caption.TOY_CLIP).state_dict()
    after = train_gpt2.read_weights(path)[1]
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert len(same) < len(before) / 10, same


def test_batches_for_clip_have_hard_negatives():
    """Batches in which colors alone tell pictures apart, or pictures that are left out."""
    rng = random.Random(0)
    colors = [" ".join(sorted(rng.sample(fineweb.COLORS, rng.randint(2, 4)))) for _ in range(800)]
    epoch = [caption.similar_pictures(colors, 3, step, 64) for step in range(12)]
    assert len(set(np.concatenate(epoch).tolist())) == 12 * 64
    same = 0
    for batch in epoch:
        for group in batch.reshape(-1, 8):
            same += len({colors[i] for i in group}) == 1
    assert same > 0.5 * 12 * 8  # 50 sets of colors: some groups stand across a border
    assert not np.array_equal(epoch[0], caption.similar_pictures(colors, 3, 12, 64))


def test_vision_tokens_are_computed_once_and_gone_on_with(
        toy_clip, shapes, tmp_path, monkeypatch, precision, capsys):
    """Vision tokens of another picture or CLIP; work that is done twice; files that pile up."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    shutil.copytree(shapes / "train", own)
    encoder = caption.load_clip(toy_clip)
    pictures = coco_eval.read_dataset(shapes, "train")[:150]
    pictures = [picture | {"path": own / picture["path"].name} for picture in pictures]
    seen = []
    prepared = caption.prepared
    monkeypatch.setattr(caption, "prepared", lambda *args: seen.append(args) or prepared(*args))

    def features(pictures=pictures, encoder=encoder, folder=own):
        """(vision tokens, how many pictures were read for them)"""
        seen.clear()
        return np.array(caption.cached_features(encoder, pictures, folder, "train")), len(seen)

    first, count = features()
    assert first.shape == (150, 33, 96) and first.dtype == np.float16 and count == 150
    assert not any(p.requires_grad for p in encoder.visual.parameters())
    image = encoder.preprocess(coco_eval.load_image(pictures[70]["path"]))[None]
    tokens = caption.pool_tokens(encoder(image))[0].numpy()
    assert np.allclose(first[70], tokens, atol=2e-2)
    again, count = features()
    assert np.array_equal(first, again) and count == 0
    (path,) = Path("data/features").glob("own-train-*.bin")
    os.truncate(path, 100 * 33 * 96 * 2 + 7)  # as a kill leaves it
    again, count = features()
    assert np.array_equal(first, again) and count == 150 - 96
    other = caption.ImageEncoder(encoder.visual, encoder.preprocess, "other")
    assert features(encoder=other)[1] == 150 and features()[1] == 0
    (own / "link").symlink_to(own)
    assert features(folder=own / "link")[1] == 0  # the same folder
    own.joinpath(pictures[3]["path"].name).write_bytes(b"no picture")
    changed, count = features()
    assert count == 150 and "000004.png cannot be read" in capsys.readouterr().err
    assert np.isnan(changed).any((1, 2)).tolist() == [i == 3 for i in range(150)]
    tokenizer = fineweb.get_tokenizer(431)
    setup = caption.Setup(True, own, "", "", 0, encoder=encoder, tokenizer=tokenizer)
    monkeypatch.setattr(coco_eval, "read_dataset", lambda *args: pictures)
    train_set = caption.load_pictures(setup, "train")
    assert len(train_set) == 149 and not np.isnan(train_set.vision()).any()
    assert "left out   1 pictures" in capsys.readouterr().out
    assert len(list(Path("data/features").glob("*.bin"))) == 2  # of two CLIPs


TOGETHER = """
import sys, time, caption, coco_eval, pathlib
pool_tokens = caption.pool_tokens
caption.pool_tokens = lambda *args: (time.sleep(0.3), pool_tokens(*args))[1]
folder = pathlib.Path(sys.argv[2])
pictures = coco_eval.read_dataset(folder, "train")
caption.cached_features(caption.load_clip(sys.argv[1]), pictures, folder, "train")
"""


def test_two_commands_and_a_kill_make_one_file_of_vision_tokens(toy_clip, shapes, tmp_path,
                                                               monkeypatch):
    """Vision tokens that two commands write at once, or that are lost by a kill."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", TOGETHER, toy_clip, shapes]
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    killed = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    while not any(p.stat().st_size for p in tmp_path.glob("data/features/*.bin")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    both = [subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    (path,) = Path("data/features").glob("*.bin")
    made = path.read_bytes()
    path.unlink()
    pictures = coco_eval.read_dataset(shapes, "train")
    whole = caption.cached_features(caption.load_clip(toy_clip), pictures, shapes, "train")
    assert made == whole.tobytes()


@pytest.fixture(scope="session")
def captions_run(toy_clip, shapes, whole, tmp_path_factory):
    """(flags of a short run, the folder in which one was made without interruption, its output)."""
    flags = ["--data", shapes, "--lm", whole[0] / "run", "--clip", toy_clip]
    flags += ["--bridge", "cross", "--steps", 30, "--batch", 8, "--micro-batch", 4]
    folder = tmp_path_factory.mktemp("captions")
    process = run("caption.py", *flags, cwd=folder)
    assert process.returncode == 0, process.stderr
    return flags, folder, process.stdout


def test_a_caption_run_leaves_its_folder(captions_run, shapes):
    """The files of a bridge's run; scores that are not those of its results."""
    flags, folder, output = captions_run
    out = folder / "runs/shapes-cross"
    names = {"ckpt.pt", "best.safetensors", "log.csv", "curves.png", "grid.png", "results.json"}
    assert {path.name for path in out.iterdir()} >= names | {"scores.json"}
    for words in ("METEOR (exact + stem)", "facts, unseen pairs", "left", "best.safetensors, step",
                  "without a false statement", "pictures/s"):
        assert words in output
    results = coco_eval.read_results(out / "results.json")
    references = coco_eval.read_references(shapes / "annotations/captions_val.json")
    again = coco_eval.evaluate(references, results)["corpus"]
    scores = json.loads((out / "scores.json").read_text())
    assert len(results) == 100
    assert {metric: scores[metric] for metric in again} == pytest.approx(again)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert not any("wte" in name or "visual" in name for name in checkpoint["model"])
    assert (out / "ckpt.pt").stat().st_size < 4_000_000
    assert Image.open(out / "grid.png").size[0] > 700
    process = run("caption.py", *flags, cwd=folder)  # a finished run is scored again, no more
    assert process.returncode == 0 and "pictures/s" not in process.stdout
    # without --data on its own pictures, not on data/coco
    command = ["--bridge", "cross", "--out", out, "--eval", "--beam", 3]
    process = run("caption.py", *command, cwd=folder)
    assert f"100 validation pictures of {shapes}, beam 3" in process.stdout, process.stderr
    assert len(coco_eval.read_results(out / "results.json")) == 100


def test_an_interrupted_caption_run_ends_as_if_it_had_not_been(captions_run, tmp_path):
    """Exact resume of a bridge, and its best weights."""
    flags, folder, _ = captions_run
    process = start("caption.py", *flags, cwd=tmp_path)
    code, _ = interrupt(process, 20, signal.SIGKILL)
    assert code != 0
    assert run("caption.py", *flags, cwd=tmp_path).returncode == 0
    out = "runs/shapes-cross"
    assert_same_outcome(folder / out, tmp_path / out)
    one, other = (f / out / "best.safetensors" for f in (folder, tmp_path))
    assert one.read_bytes() == other.read_bytes()


def test_a_comparison_of_all_bridges(captions_run):
    """A bridge, the blind one or a row that is left out of --compare's table."""
    flags, folder, _ = captions_run
    options = ["--compare", "--steps", 3, "--batch", 4, "--out", "all"]
    process = run("caption.py", *flags[:6], *options, cwd=folder)
    assert process.returncode == 0, process.stderr
    table = (folder / "all/compare/table.md").read_text()
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert header == ["linear", "cross", "qformer", "blind", "map in words"]
    rows = {row[0]: row[1:] for row in rows}
    assert rows.keys() > {"nats per caption", "place", "objects, unseen pairs", "captions true"}
    scores = json.loads((folder / "all/cross/scores.json").read_text())
    assert rows["place"][1] == f"{scores['place']:.3f}" and len(rows["nats per caption"]) == 4
    assert (folder / "all/compare/curves.png").exists()


def test_self_critical_training(captions_run, shapes):
    """--scst that does not go on from the bridge, or begins where CIDEr-D says nothing."""
    flags, folder, _ = captions_run
    picture = shapes / "val/000001.png"
    unfinished = folder / "unfinished"
    shutil.copytree(folder / "runs/shapes-cross", unfinished)
    checkpoint = torch.load(unfinished / "ckpt.pt", weights_only=True)
    torch.save(checkpoint | {"finished": False}, unfinished / "ckpt.pt")  # it was interrupted
    for task in (["--scst"], ["--scst", "--sample", picture]):
        process = run("caption.py", *flags[:8], *task, "--out", unfinished, cwd=folder)
        assert_error(process, "no trained bridge")
    process = run("caption.py", *flags[:8], "--scst", "--steps", 3, "--batch", 4, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert "CIDEr-D of greedy captions" in process.stdout
    (folder / "runs/shapes-cross/ckpt.pt").rename(folder / "hidden.pt")  # it is no longer needed
    process = run("caption.py", *flags[:8], "--scst", "--sample", picture, cwd=folder)
    (folder / "hidden.pt").rename(folder / "runs/shapes-cross/ckpt.pt")
    assert process.returncode == 0 and "missing" not in process.stdout, process.stderr
    out = folder / "runs/shapes-cross-scst"
    rows = read_log(out / "log.csv")
    assert [row["step"] for row in rows if "cider" in row] == [0, 1, 2, 3]
    _, first = train_gpt2.read_weights(folder / "runs/shapes-cross/best.safetensors")
    changed = train_gpt2.read_checkpoint(out / "ckpt.pt")["model"]
    distance = {name: (p - changed[name]).abs().max().item() for name, p in first.items()}
    assert 0 < max(distance.values()) < 0.05  # three small steps from there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption.PictureSet, "__len__", lambda self: 1)
        out = ["--out", folder / "runs/shapes-cross", "--batch", 5]
        process = run("caption.py", *flags[:8], *out, "--scst", cwd=folder)
        assert_error(process, "one validation picture is always 0")


def test_one_set_of_pictures_trains_and_scores(captions_run, shapes, tmp_path, precision):
    """COCO's validation pictures alone: one in both splits, scores that pass for val2017's."""
    shutil.copytree(shapes / "val", tmp_path / "coco/val2017")
    (tmp_path / "coco/annotations").mkdir()
    content = json.loads((shapes / "annotations/captions_val.json").read_text())
    for entry in content["images"][1:]:  # only scenes of all pictures have facts
        del entry["scene"]
    (tmp_path / "coco/annotations/captions_val2017.json").write_text(json.dumps(content))
    flags = ["--data", "coco", *captions_run[0][2:6], "--bridge", "linear", "--steps", 4]
    process = run("caption.py", *flags, "--batch", 8, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "10 validation pictures of coco" in process.stdout and "facts" not in process.stdout
    assert "not comparable with results on val2017" in process.stdout
    results = coco_eval.read_results(tmp_path / "runs/coco-linear/results.json")
    train = {str(p["id"]) for p in coco_eval.read_dataset(tmp_path / "coco", "train")}
    assert len(train) == 90 and not train & set(results)


def test_a_run_on_other_pictures_is_not_taken_for_this_one(captions_run, shapes, tmp_path):
    """--data of another folder of the same name, or with captions rewritten, without a word."""
    flags, folder, _ = captions_run
    shutil.copytree(shapes, tmp_path / "shapes")
    moved = ["--data", tmp_path / "shapes", *flags[2:8], "--out", folder / "runs/shapes-cross"]
    process = run("caption.py", *moved, "--eval", cwd=folder)  # the same pictures elsewhere
    assert process.returncode == 0, process.stderr
    path = tmp_path / "shapes/annotations/captions_train.json"
    path.write_text(path.read_text().replace("picture", "image"))
    picture = shapes / "val/000001.png"
    for task in (["--eval"], ["--sample", picture], flags[8:]):
        process = run("caption.py", *moved, *task, cwd=folder)
        assert_error(process, "trained on other pictures, captions or another split")
    shutil.copytree(folder / "runs/shapes-cross", tmp_path / "runs/shapes-cross")
    (tmp_path / "runs/shapes-cross/best.safetensors").unlink()  # rewritten under a run
    process = run("caption.py", *moved[:8], *flags[8:], cwd=tmp_path)
    assert_error(process, "was trained with other pictures or captions")


def test_karpathys_split_has_runs_of_its_own(captions_run, shapes, tmp_path):
    """A bridge that is scored on the pictures that chose it, or on those of val2017."""
    images = []
    for i in range(30):
        captions = coco_eval.read_dataset(shapes, "val")[i]["captions"]
        split = ("train", "restval", "val", "test", "train")[i % 5]
        sentences = [{"raw": text} for text in captions]
        images.append({"cocoid": i, "split": split, "sentences": sentences})
        path = tmp_path / "coco" / ("val2017" if i % 2 else "train2017") / f"{i:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coco_eval.load_image(shapes / f"val/{i + 1:06d}.png").save(path)
    write_json(tmp_path / "coco/annotations/dataset_coco.json", {"images": images})
    flags = ["--data", "coco", "--karpathy", *captions_run[0][2:6], "--bridge", "linear"]
    process = run("caption.py", *flags, "--steps", 3, "--batch", 4, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "6 validation pictures" in process.stdout and "tenth" not in process.stdout
    results = coco_eval.read_results(tmp_path / "runs/coco-karpathy-linear/results.json")
    assert sorted(map(int, results)) == [3, 8, 13, 18, 23, 28]
    command = ["--data", "coco", "--karpathy", "--bridge", "linear", "--eval"]
    process = run("caption.py", *command, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    images[0]["sentences"].pop()
    write_json(tmp_path / "coco/annotations/dataset_coco.json", {"images": images})
    process = run("caption.py", *command, cwd=tmp_path)
    assert_error(process, "trained on other pictures, captions or another split")
    assert [p["id"] for p in coco_eval.read_dataset(tmp_path / "coco", "train", True)] == [
        i for i in range(30) if i % 5 in (0, 1, 4)]
    shutil.rmtree(tmp_path / "coco/train2017")
    assert_error(run("caption.py", *command, cwd=tmp_path), "--download")


def test_sampling_pictures(captions_run, shapes, server, tmp_path, precision, monkeypatch):
    """--sample: files of several kinds, a broken one, an address, --grid, --num, --attention."""
    monkeypatch.setattr(caption, "BATCH", 2)  # over batches, too, each keeps its own caption
    flags, folder, _ = captions_run
    own = tmp_path / "my pictures"
    (own / "inner/.hidden").mkdir(parents=True)
    image = coco_eval.load_image(shapes / "val/000001.png")
    for i, name in enumerate(("0.png", "1.jpg", "2.webp", "inner/4.JFIF", "5.ppm")):
        image.resize((90 + 40 * i, 70)).save(own / name, format="JPEG" if i == 3 else None)
    for name in ("3.gif", "notes.txt", "._0.png", "inner/.hidden/a.png"):
        (own / name).write_bytes(b"no picture")
    command = ["--ckpt", folder / "runs/shapes-cross", "--sample", own]
    process = run("caption.py", *command, "--grid", tmp_path / "out.png", cwd=folder)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith(f"{own}/")]
    names = [Path(line.split(": ")[0]).name for line in lines]
    assert names == ["0.png", "1.jpg", "2.webp", "5.ppm", "4.JFIF"]
    alone = run("caption.py", *command[:3], own / "5.ppm", cwd=folder).stdout.splitlines()
    assert alone[-1] == lines[3]
    assert "6 pictures, 1 other files" in process.stdout
    assert "3.gif cannot be read" in process.stderr
    assert Image.open(tmp_path / "out.png").size[0] > 700
    process = run("caption.py", *command, "--num", 4, cwd=folder)
    assert process.stdout.count("0.png:") == 4
    other = run("caption.py", *command, "--num", 4, "--seed", 7, cwd=folder)  # of the sampling
    assert other.stdout.count("0.png:") == 4 and other.stdout != process.stdout
    process = run("caption.py", *command, "--beam", 3, cwd=folder)
    assert process.stdout.count("0.png:") == 1, process.stderr
    body = (own / "0.png").read_bytes()
    for flag, file in (("--grid", own / "0.png"), ("--attention", own), ("--grid", "runs")):
        assert_error(run("caption.py", *command, flag, file, cwd=folder), "there already")
    assert (own / "0.png").read_bytes() == body
    server.files = {"/a.png": body}
    captions = []
    for name in (own / "0.png", f"{server.address}/a.png"):
        options = ["--attention", tmp_path / f"{len(captions)}.png"]
        process = run("caption.py", *command[:3], name, *options, cwd=tmp_path)
        captions += [line.split(f"{name}: ")[1] for line in process.stdout.splitlines()
                     if line.startswith(f"{name}: ")]
        assert Image.open(options[1]).width == 1128
    assert captions[0] == captions[1] and len(captions) == 2
    server.files = {"/a.png": b"<html>"}
    process = run("caption.py", *command[:3], f"{server.address}/a.png", cwd=tmp_path)
    assert_error(process, "a.png cannot be read as a picture")
    assert_error(run("caption.py", *command, "--attention", "x.png", cwd=folder), "only one")


@pytest.mark.parametrize("args, words", [
    (["--bridge", "cross", "--sample", "nothing.png"], ["nothing.png is not there"]),
    (["--bridge", "cross", "--sample", "empty"], ["no pictures"]),
    (["--bridge", "cross", "--sample", "text.png"], ["text.png cannot be read"]),
    (["--ckpt", "nothing", "--sample", "1.png"], ["nothing is not there"]),
    (["--ckpt", "clip", "--sample", "1.png"], ["is not a bridge"]),
    (["--bridge", "cross", "--data", "shapes", "--lm", "run", "--clip", "x/y"], ["--clip x/y"]),
    (["--bridge", "cross", "--data", "shapes", "--lm", "empty"], ["--lm empty: ", "no model"]),
    (["--bridge", "cross", "--data", "empty", "--sample", "1.png"],  # before GPT-2 is downloaded
     ["COCO's layout", "--download"])])
def test_mistakes_in_captioning_are_one_line(args, words, tmp_path, whole, shapes, toy_clip):
    """A traceback, or a training that begins before the pictures are looked at."""
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    (tmp_path / "text.png").write_text("no picture")
    given = {"run": whole[0] / "run", "shapes": shapes, "clip": toy_clip}
    process = run("caption.py", *(given.get(arg, arg) for arg in args), cwd=tmp_path)
    assert_error(process, *words)
    assert not (tmp_path / "runs").exists()


@torch.no_grad()
def test_captions_may_be_as_long_as_in_training():
    """Captions that end after 30 tokens, greedy and by beam search; samples that do not."""
    model = small_captioner("linear", config=dataclasses.replace(WIDE, block_size=64))
    model.eot = -1  # never drawn
    vision = torch.randn(1, 5, 12)
    assert model.room == 59
    assert model.generate(vision).size(1) == caption.beam_search(model, vision, 2).size(1) == 59
    prompt = torch.zeros(1, 4, dtype=torch.long)
    assert model.generate(vision, prompt=prompt).size(1) == 55
    vision = torch.randn(2, 5, 12)
    assert {len(row) for rows in caption.draw_samples(model, vision, None) for row in rows} == {30}


def test_what_vision_tokens_depend_on_is_their_identity(toy_clip, shapes, tmp_path, monkeypatch):
    """The same weights with another activation, preprocessing or precision, taken for the same."""
    digests = set()
    model = open_clip.CLIP(**caption.TOY_CLIP)
    path = tmp_path / "clip.safetensors"
    for activation in (True, False):
        about = {"clip": caption.TOY_CLIP | {"quick_gelu": activation}}
        train_gpt2.save_weights(path, model, about)
        digests.add(caption.load_clip(path).digest)
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda model: {"size": 64})
    assert len(digests | {caption.load_clip(path).digest}) == 3
    monkeypatch.chdir(tmp_path)
    pictures = coco_eval.read_dataset(shapes, "train")[:3]
    for precision in (False, True, True):
        monkeypatch.setattr(train_gpt2, "uses_bf16", lambda device, p=precision: p)
        caption.cached_features(caption.load_clip(toy_clip), pictures, shapes, "train")
    assert len(list(Path("data/features").glob("*.bin"))) == 2


def test_a_bridge_knows_its_parts(captions_run, shapes, whole, tmp_path):
    """A shared bridge that needs flags, trains something, or takes other parts without a word."""
    flags, folder, _ = captions_run
    shutil.copy(folder / "runs/shapes-cross/best.safetensors", tmp_path / "b.safetensors")
    shutil.copy(shapes / "val/000001.png", tmp_path / "a.png")
    command = ["--ckpt", "b.safetensors", "--sample", "a.png"]
    process = run("caption.py", *command, cwd=tmp_path)
    assert process.returncode == 0 and "a.png: " in process.stdout, process.stderr
    about, tensors = train_gpt2.read_weights(tmp_path / "b.safetensors")
    model = small_model(config=train_gpt2.PRESETS["tiny"])
    train_gpt2.export_hf(model, fineweb.get_tokenizer(431), tmp_path / "other")
    process = run("caption.py", *command, "--lm", "other", cwd=tmp_path)
    assert_error(process, "trained with other weights of --lm", str(whole[0]))
    process = run("caption.py", *flags[:2], "--bridge", "cross", "--eval", cwd=folder)
    assert process.returncode == 0 and "METEOR" in process.stdout, process.stderr  # a run, too
    for bridge, more in (("linear", ["--eval"]), ("linear", ["--scst"]), ("cross", ["--seed", 1])):
        out = ["--out", folder / "runs/shapes-cross"]
        process = run("caption.py", *flags[:6], "--bridge", bridge, *out, *more, cwd=folder)
        assert_error(process, "has a cross bridge, of seed 0")
    holder = types.SimpleNamespace(state_dict=lambda: tensors)
    for change, words in (({"lm": "runs/mine"}, "--lm runs/mine"), ({"bridge": "x"}, "bridge")):
        train_gpt2.save_weights(tmp_path / "b.safetensors", holder, about | {"toy": True} | change)
        assert_error(run("caption.py", *command, cwd=tmp_path), words)  # nothing is trained
    assert not (tmp_path / "runs").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "cross", "qformer"])
def test_recorded_attention_is_that_of_the_captions(name, fp32):
    """A map of attention that is not what the captions come from, or of the wrong words."""
    tokenizer = fineweb.get_tokenizer(431)
    decoder = small_model(config=train_gpt2.PRESETS["tiny"])
    model = caption.build(name, 33, 96, decoder)
    vision = torch.randn(1, 33, 96)
    text = "a red circle and a blue square"
    packed = model.pack([[[*tokenizer.encode_ordinary(text), model.eot]]])
    usual = train_gpt2.attention
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, "attention", lambda q, k, v, *a, **o: outputs.append(
            (v, usual(q, k, v, *a, **o))) or outputs[-1][1])
        with caption.recorded_attention() as weights:
            model.predict(vision, packed)
    for w, (v, y) in zip(weights, outputs, strict=True):
        assert torch.allclose(w @ v, y, atol=1e-5)
    assert train_gpt2.attention is usual
    words, seen = caption.word_attention(model, vision, text, tokenizer)
    assert [word.strip() for word in words] == text.split()
    assert all(w.shape == (33,) and w.min() >= 0 and w.sum() < 1 + 1e-5 for w in seen)
    place = packed.source[0, 1]  # where "red" is predicted
    size = packed.mask.size(3)
    own = [w.mean((0, 1)) for w in weights if w.size(2) == w.size(3) == size]
    to_picture = [w.mean((0, 1)) for w in weights if w.size(2) != w.size(3) == 33]
    expected = {
        "linear": lambda: sum(own)[place, :33] / 4,
        "cross": lambda: sum(to_picture)[place] / 4,
        "qformer": lambda: sum(own)[place, :32] / 4 @ (sum(to_picture) / len(to_picture)),
    }[name]()
    assert np.allclose(seen[1], expected, atol=1e-6)
    words, seen = caption.word_attention(model, vision, "a red circle " * 40, tokenizer)  # is cut
    assert len(words) == model.room and all(w[1:].max() > 0 for w in seen)


@real_data
def test_the_whole_way_with_gpt2s_vocabulary(server, tmp_path, monkeypatch):
    """From a download to a caption, as on a laptop, with small random weights: all bridges."""
    rng = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    pictures = {}
    for i in range(40):
        photo = io.BytesIO()
        size = rng.integers(40, 200, 2)
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(photo, "JPEG")
        pictures[f"val2017/{i:012d}.jpg"] = photo.getvalue()
    images = [{"id": i, "file_name": Path(name).name} for i, name in enumerate(pictures)]
    annotations = [{"image_id": i % 40, "caption": f"A photo of {i} dogs."} for i in range(200)]
    text = json.dumps({"images": images, "annotations": annotations})
    archives = []
    contents = ({"annotations/captions_val2017.json": text}, pictures)
    for (address, _), content in zip(coco_eval.ARCHIVES, contents, strict=False):
        body = archive(content)
        archives.append((address, hashlib.md5(body).hexdigest()))
        server.files[f"/{address}"] = body
    monkeypatch.setattr(coco_eval, "HOST", server.address)
    monkeypatch.setattr(coco_eval, "ARCHIVES", archives)
    process = run("coco_eval.py", "--download", "--val-only")
    assert process.returncode == 0, process.stderr
    small_export(tmp_path / "lm")
    vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": caption.TOY_CLIP["text_cfg"]}
    open_clip.add_model_config(write_json(tmp_path / "configs/ViT-small.json", config).parent)
    torch.save(open_clip.create_model("ViT-small").state_dict(), tmp_path / "clip.pt")
    parts = ["--clip", f"ViT-small/{tmp_path}/clip.pt", "--lm", tmp_path / "lm"]
    flags = ["--data", "data/coco", "--steps", 4, "--batch", 8]
    shutil.copy("data/coco/val2017/000000000007.jpg", "photo.jpg")
    for name in ("linear", "qformer", "cross"):
        process = run("caption.py", *flags, *parts, "--bridge", name, "--sample", "photo.jpg")
        assert process.returncode == 0 and "photo.jpg: " in process.stdout, process.stderr
        assert "4 validation pictures" in process.stdout and "not comparable" in process.stdout
    expected = process.stdout.split("photo.jpg: ")[1].splitlines()[0]
    shutil.copytree("runs/coco-cross", "elsewhere")
    process = run("caption.py", "--ckpt", "../elsewhere/best.safetensors", "--sample",
                  "../photo.jpg", cwd=tmp_path / "elsewhere")
    assert process.stdout.split("photo.jpg: ")[1].splitlines()[0] == expected, process.stderr


# -----------------------------------------------------------------------------
# train_gpt2.py and caption.py on a GPU that is not there


@contextlib.contextmanager
def fake_cuda(monkeypatch, learns=()):
    """CUDA tensors that have shape, type and device, but no content; `learns`: to be trained.

    Operations on tensors of two devices, or of shapes or types that do not go together, raise as
    they would on a GPU. The backward pass needs one, so its gradients are made up.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if torch.__version__ < "2.11" and not torch.cuda.is_available():
        pytest.skip("needs PyTorch 2.11, or a GPU")  # older ones end the process

    def to(module, function, recurse=True):
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        new = function(t.data)
                        is_parameter = isinstance(t, nn.Parameter)
                        tensors[name] = nn.Parameter(new, t.requires_grad) if is_parameter else new
        return module

    def backward(loss, **options):
        for module in learns:
            for p in module.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None

    def content(t):
        return np.ones(tuple(t.shape), int)

    device = torch.device("cuda", 0)
    for module in (train_gpt2, caption):
        monkeypatch.setattr(module, "pick_device", lambda: device)
    monkeypatch.setattr(train_gpt2, "uses_bf16", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(nn.Module, "_apply", to)
    values = {"backward": backward, "item": lambda t: 1.0, "numpy": content,
              "tolist": lambda t: content(t).tolist(), "any": lambda t: True,
              "all": lambda t: False}
    for name, value in values.items():
        monkeypatch.setattr(torch.Tensor, name, value)
    with FakeTensorMode():
        yield device


FAKE = GPTConfig(64, 431, 2, 2, 32)


@pytest.mark.parametrize("muon", [0, 5])
def test_training_and_evaluation_on_a_fake_gpu(muon, monkeypatch):
    """A tensor on the CPU among those of a GPU: training, evaluation, sampling, packed losses."""
    learns = []
    with fake_cuda(monkeypatch, learns) as device:
        model = GPT(FAKE).to(device)
        learns.append(model)
        recipe = Recipe(3, 128, 2, 1e-3, 1, muon=muon)
        optimizer = train_gpt2.configure_optimizer(model, recipe)
        x = torch.zeros(2, 64, dtype=torch.long)
        for _ in range(2):
            batches = [(x, x, 0.5), (x, x, 0.5)]
            train_gpt2.train_step(model, optimizer, batches, recipe, device)
        with torch.no_grad(), train_gpt2.autocast(device):
            assert model(x.to(device), x.to(device))[1].device == device
        item = hellaswag.Item([1] * 9, [[2] * 3, [3] * 4, [4] * 5, [5] * 6], [3, 4, 5, 6], 0)
        monkeypatch.setattr(train_gpt2, "pack", functools.partial(cpu_pack, train_gpt2.pack))
        with train_gpt2.autocast(device):
            train_gpt2.ending_losses(model, [item] * 3, device)
        train_gpt2.freeze(model, device)
        idx = torch.zeros(3, 5, dtype=torch.long, device=device)
        with train_gpt2.autocast(device):  # beyond the context
            assert generate(model, idx, 70, top_k=5, top_p=0.9).shape == (3, 75)


def cpu_pack(pack, *args):
    """pack(), whose tensors begin as lists: they are made with content, then faked."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        packed = pack(*args)
    fields = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in vars(packed).items()}
    return train_gpt2.Packed(**fields)


@pytest.mark.parametrize("name", caption.BRIDGES)
def test_bridges_on_a_fake_gpu(name, monkeypatch):
    """The same of captions: training, self-critical weights, greedy, sampled, by beam search."""
    learns = []
    with fake_cuda(monkeypatch, learns) as device:
        decoder = train_gpt2.freeze(GPT(FAKE), device)
        model = caption.build(name, 33, 96, decoder).to(device)
        learns.append(model.bridge)
        recipe = Recipe(3, 2, 2, 1e-3, 1)
        optimizer = train_gpt2.configure_optimizer(model.bridge, recipe)
        monkeypatch.setattr(train_gpt2, "pack", functools.partial(cpu_pack, train_gpt2.pack))
        packed = model.pack([[[1, 2, 430], [3, 430]]] * 2)
        vision = torch.empty(2, 33, 96)
        train_gpt2.train_step(model, optimizer, [(vision, packed, 1.0)], recipe, device)
        batch = (vision, packed, torch.empty(2, 2), 1.0)
        scored = caption.ScoredCaptioner(model)
        train_gpt2.train_step(scored, optimizer, [batch], recipe, device)
        vision = vision.to(device)
        with train_gpt2.autocast(device):
            for options in ({}, {"temperature": 1.0}):
                assert model.generate(vision, 4, **options).shape == (2, 4)
            assert caption.beam_search(model, vision, 3, 4).shape == (2, 4)
        if name == "linear":  # CLIP, the toy one and ViT-L/14
            large = open_clip.create_model("ViT-L-14", force_quick_gelu=True)
            for clip, size in ((open_clip.CLIP(**caption.TOY_CLIP), 64), (large, 224)):
                encoder = caption.ImageEncoder(clip.visual, None, "x")
                tokens = caption.pool_tokens(encoder(torch.empty(2, 3, size, size)))
                assert tokens.device == device and tokens.shape[:2] == (2, 33)


# -----------------------------------------------------------------------------
# The whole at full size, where there is a GPU: python test_all.py -k full_size -s


def test_full_size(tmp_path, monkeypatch, capsys):
    """Training, sampling, HellaSwag, bridges and captions, a checkpoint saved and resumed.

    Random weights; small shapes on a CPU; on a GPU the 124M and ViT-L/14, with what they take.
    """
    device = train_gpt2.pick_device()
    gpu = device.type == "cuda"
    config = train_gpt2.PRESETS["gpt2"] if gpu else GPTConfig(64, 431, 2, 2, 32)
    T = config.block_size
    data = write_text(tmp_path / "data", np.arange(200 * T + 1) % 430, config.vocab_size)
    batch = 64 if gpu else 4

    def say(*lines):
        with capsys.disabled() if gpu else contextlib.nullcontext():
            print(*(f"  {line}" for line in lines), sep="\n")

    def timed(what, count, unit, function, *args, **options):
        """Call a function twice; print what the first and the second call took."""
        rates = []
        for _ in range(2):
            began = time.perf_counter()
            result = function(*args, **options)
            if gpu:
                torch.cuda.synchronize()
            rates.append(time.perf_counter() - began)
        say(f"{what}: first {rates[0]:.2f} s, then {count / rates[1]:,.0f} {unit}/s")
        return result

    def train(name, steps, muon):
        recipe = Recipe(steps, batch * T, batch // 4, 1e-3, 2, muon=muon, eval_every=8,
                        eval_tokens=8 * T, log_every=2)
        train_gpt2.train("full", data, tmp_path / name, recipe)
        lines = capsys.readouterr().out.splitlines()
        say(*[f"{name}: {line}" for line in lines if line.startswith("step")])
        rows = read_log(tmp_path / name / "log.csv")
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    monkeypatch.setitem(train_gpt2.PRESETS, "full", config)
    print()
    for name, muon in (("AdamW", 0.0), ("Muon", 5.6)):
        train(name, 8, muon)
        losses = train(name, 12, muon)  # resumed
        assert losses[12] < losses[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt2, "compiled", lambda function: function)
            eager = train(f"{name}, eager", 12, muon)
        assert losses == pytest.approx(eager, rel=1e-2)
    model, tokenizer = train_gpt2.load_model(tmp_path / "AdamW")
    train_gpt2.freeze(model, device)
    n = 200 if gpu else 20
    for num in (1, 16):
        timed(f"batch {num}", num * n, "tokens", train_gpt2.complete, model, tokenizer, "", n, num)
    items = [hellaswag.render(each, tokenizer) for each in made_items(800 if gpu else 20)]
    timed("HellaSwag", len(items), "items", train_gpt2.evaluate_hellaswag, model, items, device)
    B, D = (64, 1024) if gpu else (4, 12)
    if gpu:
        clip = open_clip.create_model("ViT-L-14-quickgelu").visual
        encoder = caption.ImageEncoder(clip, None, "")
        timed("ViT-L/14", 64, "pictures", encoder, torch.randn(64, 3, 224, 224))
    vision = torch.randn(B, 33, D)
    ids = tokenizer.encode_ordinary(" a red circle above a blue one")
    for name in ("linear", "cross", "qformer"):
        captioner = caption.build(name, 33, D, model).to(device)
        recipe = Recipe(3, B, B, 1e-3, 1)
        optimizer = train_gpt2.configure_optimizer(captioner.bridge, recipe)
        parts = [(vision, captioner.pack([[[*ids, tokenizer.eot_token]] * 5] * B), 1.0)]
        inputs = (captioner, optimizer, parts, recipe, device)
        timed(f"{name}, training", B, "pictures", train_gpt2.train_step, *inputs)
        for beams in (1, 5):
            timed(f"{name}, {beams} beams", B, "captions", caption.write_captions,
                  captioner, vision, tokenizer, beams=beams)
    if gpu:
        memory = torch.cuda.max_memory_allocated() / 1e9
        say(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {memory:.1f} GB")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
