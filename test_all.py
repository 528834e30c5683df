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
import csv
import dataclasses
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
import re
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
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code = 0
    with contextlib.chdir(cwd or os.getcwd()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "open_streams", lambda: None)
        patch.setattr(sys, "argv", [script, *args])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            fineweb.command_line(importlib.import_module(Path(script).stem).main)
        except SystemExit as end:
            code = end.code
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(args, code, *texts)


def read_log(path):
    """The rows of a log.csv, as dicts of floats without what is empty."""
    rows = csv.DictReader(Path(path).read_text().splitlines())
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def real_items():
    """HellaSwag's items from the real data."""
    lines = (REAL / "hellaswag/hellaswag_val.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def assert_error(process, *words):
    """One line on stderr that begins with "error:" and has the words, and exit code 2."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
        process.stderr
    )
    assert all(word in lines[0] for word in words), lines[0]


def steps(model, recipe, get_batches, first=0, trained=None):
    """Yield (loss, norm) of training steps without end; `trained` is what the optimizer changes."""
    optimizer = train_gpt2.configure_optimizer(trained or model, recipe)
    for step in itertools.count(first):
        for group in optimizer.param_groups:
            group["lr"] = train_gpt2.get_lr(step, recipe) * group["lr_scale"]
        batches = get_batches(step)
        yield train_gpt2.train_step(model, optimizer, batches, recipe, CPU)


def text_steps(model, recipe, dataset, seed=0, first=0):
    """steps() of a GPT on a TokenDataset."""
    get = functools.partial(train_gpt2.get_micro_batches, dataset, recipe, seed, model.config)
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


def test_a_vocabulary_that_is_not_the_expected_file_is_one_line(monkeypatch):
    """A login page in place of GPT-2's vocabulary that ends in a traceback."""

    def get_encoding(name):
        raise ValueError("Hash mismatch for data downloaded from ...")

    monkeypatch.setattr(fineweb.tiktoken, "get_encoding", get_encoding)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        fineweb.get_tokenizer.__wrapped__("gpt2")


def test_tiny_tokenizer_is_lossless_and_knows_the_words():
    """Text that does not come back from its tokens; words of the scenes that are several tokens."""
    tokenizer = fineweb.get_tokenizer("tiny")
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
        told = {f"{fineweb.object_name(thing)} {fineweb.place(thing)} {thing['size']}"
                for thing in scene["objects"]}
        first, *lines = fineweb.scene_document(scene, rng).split("\n")
        assert first == fineweb.scene_map(scene)
        numbers += lines[0].startswith("there are")
        for line in lines:
            assert False not in coco_eval.facts(line, scene).values()
            pair = line.split(", ")
            if set(pair) <= told:
                assert len(set(pair)) == 2
                pairs += 1
    assert 40 < numbers < 130 and 210 < pairs < 270


def test_shards_keep_their_tokens(tmp_path):
    """Shards that llm.c would not read, or that lose tokens."""
    tokens = np.random.default_rng(0).integers(0, 65536, 1000).astype(np.uint16)
    path = tmp_path / "x_train_000001.bin"
    fineweb.write_shard(path, tokens)
    assert (fineweb.read_shard(path) == tokens).all()
    raw = path.read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 1000]
    assert len(raw) == 1024 + 2000


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-2], lambda raw: raw + b"xx", lambda raw: b"\0" + raw[1:],
     lambda raw: raw[:100], lambda raw: b""])
def test_damaged_shards_are_refused(tmp_path, damage):
    """A shard that is cut, too long or of another kind and is read all the same."""
    path = tmp_path / "a.bin"
    fineweb.write_shard(path, np.arange(50))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="a.bin"):
        fineweb.read_shard(path)


def test_a_shard_may_have_more_than_a_billion_tokens(tmp_path):
    """The size of a shard of 2^30 tokens and more, computed in int32."""
    count = 2**30 + 5
    path = tmp_path / "big.bin"
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, count)
    path.write_bytes(header.tobytes())
    with open(path, "r+b") as file:
        file.truncate(1024 + 2 * count)  # a hole: it takes no disk
    assert len(fineweb.read_shard(path)) == count


def test_scenes_say_what_is_true():
    """Captions that are not true of their scene, or facts that are judged wrongly."""
    rng = random.Random(0)
    seen = set()
    for _ in range(500):
        scene = fineweb.random_scene(rng)
        other = fineweb.random_scene(rng)
        captions = fineweb.captions(scene, rng)
        assert len(set(captions)) == 5
        for text in [*captions, *fineweb.relation_captions(scene, rng)]:
            stated = coco_eval.facts(text, scene)
            assert False not in stated.values(), (text, scene)
            seen |= set(stated.items()) | set(coco_eval.facts(text, other).items())
    assert seen == set(itertools.product(coco_eval.FACTS, (True, False, None)))
    for unseen in (False, True):
        for _ in range(100):
            objects = fineweb.random_scene(rng, unseen)["objects"]
            assert fineweb.has_unseen_pair(objects) == unseen


SCENE = {
    "objects": [
        {"color": "red", "shape": "circle", "size": "small", "row": 0, "col": 1},
        {"color": "blue", "shape": "square", "size": "large", "row": 0, "col": 3},
    ]
}


@pytest.mark.parametrize(
    "caption, stated",
    [
        ("there are two objects", {"count": True}),
        ("four objects in a picture", {"count": False}),
        ("a picture of a red circle and a blue square", {"objects": True}),
        ("a picture of a red square and a blue square", {"objects": False}),
        ("the red circle is small and the blue square is large", {"objects": True}),
        ("the red circle is large and the blue square is large", {"objects": False}),
        ("a red circle with a blue square below it", {"objects": True, "relation": False}),
        ("the red circle is at the top left", {"objects": True, "place": True}),
        ("at the bottom left there is a red circle", {"objects": True, "place": False}),
        ("the pink circle is at the top left", {"objects": False, "place": False}),
        ("a blue square with a red circle to its left", {"objects": True, "relation": True}),
        ("a blue square with a red circle to its right", {"objects": True, "relation": False}),
        ("a red circle is to the left of a blue square", {"objects": True, "relation": True}),
        ("a red circle is above a blue square", {"objects": True, "relation": False}),
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
    tokens = fineweb.read_shard(tiny / "tiny_train_000001.bin")
    scenes = fineweb.TOY_SCENE_BLOCKS * fineweb.TOY_BLOCK
    eot = fineweb.get_tokenizer("tiny").eot_token
    assert (tokens[: scenes : fineweb.TOY_BLOCK] == eot).all()  # each block begins with a scene
    assert scenes / len(tokens) == pytest.approx(5 / 6, abs=0.03)


def test_a_folder_called_tiny_may_be_the_users(tmp_path):
    """The user's own shards in data/tiny, overwritten or taken for toy text."""
    folder = tmp_path / "data/tiny"
    for split in ("train_000001", "val_000000"):
        fineweb.write_shard(folder / f"x_{split}.bin", np.arange(300))
    assert_error(run("train_gpt2.py", "--preset", "tiny", cwd=tmp_path), "is not the toy text")
    process = run("train_gpt2.py", "--preset", "tiny", "--data", folder, cwd=tmp_path)
    assert_error(process, "tokens of gpt2", "--data") if REAL.is_dir() else None
    assert len(list(folder.iterdir())) == 2


@pytest.fixture
def server(tmp_path, monkeypatch):
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
            if wrong == "503" or body is None:
                return self.send_error(503 if wrong else 404)
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
        monkeypatch.setattr(fineweb.time, "sleep", lambda seconds: None)
        yield Handler
        service.shutdown()


BODY = random.Random(0).randbytes(400_000)


def test_download_goes_on_where_it_broke_off(server, tmp_path):
    """An interrupted download that starts over, or leaves a file that is not whole."""
    server.files = {"/a/b": BODY}
    server.behave = ["break off", "503", "break off", "no ranges"]
    digest = hashlib.sha256(BODY).hexdigest()
    path = fineweb.download(f"{server.address}/a/b", tmp_path / "b", len(BODY), digest)
    assert path.read_bytes() == BODY
    assert server.ranges == [0, 65536, 65536, 131072]  # whole pieces of 64 KiB are kept
    assert list(tmp_path.iterdir()) == [path]
    fineweb.download(f"{server.address}/a/b", path, len(BODY))
    assert len(server.ranges) == 4  # what is there is not downloaded again


def test_download_refuses_what_is_wrong(server, tmp_path):
    """A wrong file that is kept, or a server's answer that ends in a traceback."""
    server.files = {"/a": BODY}
    wrong = [(len(BODY) - 1, None), (len(BODY), hashlib.md5(b"").hexdigest()),
             (None, hashlib.sha256(b"").hexdigest())]
    for size, digest in wrong:
        with pytest.raises(UserError, match="not the expected file"):
            fineweb.download(f"{server.address}/a", tmp_path / "a", size, digest)
        assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="404"):
        fineweb.download(f"{server.address}/nothing", tmp_path / "a")
    for address in ("https://example..com/a.jpg", "https://[x/a.jpg"):
        with pytest.raises(UserError, match="cannot be reached"):
            fineweb.download(address, tmp_path / "a", tries=1)
    server.behave = ["503"] * 5
    with pytest.raises(UserError, match="cannot be reached"):
        fineweb.download(f"{server.address}/a", tmp_path / "a")


def test_fineweb_shards_come_from_the_hub(server, tmp_path):
    """Shards that are not downloaded through HF_ENDPOINT, not checked, or downloaded twice."""
    names = ["val_000000", "train_000001", "train_000002"]
    for name in names:
        path = tmp_path / "made.bin"
        fineweb.write_shard(path, np.arange(len(name) * 1000) % 50_000)
        address = f"/datasets/{fineweb.FINEWEB_REPO}/resolve/main/finewebedu_{name}.bin"
        server.files[address] = path.read_bytes()
    env = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
    command = ("fineweb.py", "--tokens", "150M", "--out", tmp_path / "edu")
    process = run(*command, env=env)
    assert process.returncode == 0 and "3 shards" in process.stdout, process.stderr
    for name in names:
        address = f"/datasets/{fineweb.FINEWEB_REPO}/resolve/main/finewebedu_{name}.bin"
        found = (tmp_path / f"edu/finewebedu_{name}.bin").read_bytes()
        assert found == server.files[address]
    assert fineweb.read_tokens_info(tmp_path / "edu")["tokenizer"] == "gpt2"
    asked = len(server.ranges)
    assert run(*command, env=env).returncode == 0 and len(server.ranges) == asked
    process = run("fineweb.py", "--tokens", "300M", "--out", tmp_path / "edu", env=env)
    assert_error(process, "finewebedu_train_000003.bin cannot be downloaded")


def test_no_network_is_one_line(tmp_path):
    """Traces and retries of the hub's client instead of one line."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    process = run("fineweb.py", "--tokens", "1M", "--out", tmp_path / "x", env=env)
    assert_error(process, "finewebedu_val_000000.bin cannot be downloaded", "HF_ENDPOINT")


def test_no_room_is_said_before(tmp_path):
    """A download that fills the disk and fails then."""
    with pytest.raises(UserError, match="MB are needed"):
        fineweb.require_space(tmp_path / "not" / "there", 10**18)


@real_data
def test_own_text_becomes_shards_byte_for_byte(tmp_path):
    """Own text that is lost, changed or split otherwise than asked for; spawned workers too."""
    source = REAL / "text/fineweb_edu_150_docs.jsonl"
    odd = "日本語 <|endoftext|> is plain text here\r\n"
    (tmp_path / "odd.TXT").write_bytes(b"\xef\xbb\xbf" + odd.encode())  # a byte order mark
    paths = [source, tmp_path / "odd.TXT"]
    counts = fineweb.text_to_shards(paths, tmp_path / "own", val_fraction=0.1, shard_tokens=20_000)
    paths = sorted((tmp_path / "own").glob("own_train_*")) + [tmp_path / "own/own_val_000000.bin"]
    shards = [fineweb.read_shard(path) for path in paths]
    assert all(len(shard) == 20_000 for shard in shards[:-2])
    assert counts == (sum(map(len, shards[:-1])), len(shards[-1]))
    assert counts[1] / sum(counts) == pytest.approx(0.1, rel=1e-3)
    tokenizer = fineweb.get_tokenizer("gpt2")
    pieces = " ".join(map(str, np.concatenate(shards))).split("50256")[1:]
    documents = [tokenizer.decode(list(map(int, piece.split()))) for piece in pieces]
    expected = [json.loads(line)["text"] for line in open(source, encoding="utf-8")] + [odd]
    assert documents == expected
    with pytest.raises(UserError, match="not empty"):
        fineweb.text_to_shards([source], tmp_path / "own")
    script = "import multiprocessing as m, fineweb; m.set_start_method('spawn'); fineweb.main()"
    command = [sys.executable, "-c", script, "--text", source, tmp_path / "odd.TXT"]
    command += ["--out", tmp_path / "spawned"]
    subprocess.run(command, cwd=HERE, check=True, timeout=120)  # as on macOS and Windows
    spawned = fineweb.read_shard(tmp_path / "spawned/spawned_train_000001.bin")
    assert np.array_equal(spawned, np.concatenate(shards)[: round(0.99 * sum(counts))])


@real_data
@pytest.mark.parametrize(
    "documents", [["line of a book\n" * 3000], ["Recipe 1\n" + "word " * 400] * 50, ["x"] * 2500])
def test_the_share_for_validation_is_what_was_asked_for(documents, tmp_path):
    """One book, or a few lines, that give validation another share; documents that are lost."""
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train, val = fineweb.text_to_shards([tmp_path / "a.jsonl"], tmp_path / "out", 0.05)
    assert val / (train + val) == pytest.approx(0.05, rel=0.02)
    tokenizer = fineweb.get_tokenizer("gpt2")
    lengths = [len(fineweb.encode_document(text, tokenizer)) for text in documents]
    assert train + val == sum(lengths)


def test_runs_of_spaces_are_encoded():
    """A million spaces, at which tiktoken fails."""
    tokenizer = fineweb.get_tokenizer("tiny")
    text = "a" + " " * 1_000_000 + "b"
    tokens = fineweb.encode_document(text, tokenizer)[1:]
    assert tokenizer.decode(tokens.tolist()) == text


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"\xff\xfe no utf-8", "not text in UTF-8"),
    ("a.jsonl", b'{"text": "\xff"}', "line 1"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "line 2"),
    ("a.jsonl", b'{"text": null}', "line 1"),
    ("a.jsonl", b"{torn", "line 1"),
    ("a.jsonl", b"[1]", "line 1"),
    ("a.parquet", b"", "not .txt or .jsonl")])
def test_unreadable_text_is_refused(name, content, words, tmp_path):
    """A file that is no text, tokenized all the same."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(fineweb.read_documents([tmp_path / name]))


def test_documents_are_read_as_they_are(tmp_path):
    """A blank line that becomes a document, or spaces and line ends that are lost."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n  \n{"text": ""}\n{"text": " y "}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "c.txt").write_bytes(b"")
    paths = [tmp_path / name for name in ("a.jsonl", "b.txt", "c.txt")]
    assert list(fineweb.read_documents(paths)) == ["x", " y ", "one\r\ntwo\n"]


@real_data
def test_too_little_text_and_two_at_once_are_refused(tmp_path, monkeypatch):
    """Shards without text, a name from "--out .", or two processes that write one folder."""
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="too little text"):
        fineweb.text_to_shards([tmp_path / "a.txt"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.txt").write_text("some words of a text " * 100)
    (tmp_path / "out.tmp").mkdir(exist_ok=True)
    with fineweb.lock(tmp_path / "out.tmp"), pytest.raises(UserError, match="another process"):
        fineweb.text_to_shards([tmp_path / "a.txt"], tmp_path / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fineweb.text_to_shards([tmp_path / "a.txt"], ".")
    assert (tmp_path / "here/here_train_000001.bin").exists()


@pytest.mark.parametrize("script, args, words", [
    ("fineweb.py", ["--tokens", "11B"], ["11B"]),
    ("fineweb.py", ["--text", "a.txt", "--tokens", "1B"], ["--tokens", "--text"]),
    ("coco_eval.py", ["--make-shapes", "x", "--val-only"], ["--val-only"]),
    ("train_gpt2.py", ["--seed", "-1"], ["--seed"]),
    ("train_gpt2.py", ["--temperature=0.8"], ["--temperature", "training"]),
    ("train_gpt2.py", ["--eval", "--steps", "5"], ["--steps"]),
    ("fineweb.py", ["--text", "a.txt"], ["--out"]),
    ("caption.py", ["--compare", "--beam", "5"], ["--beam"]),
    ("caption.py", ["--bridge", "cross", "--sample", "x", "--num", "2", "--beam", "3"], ["--num"]),
    ("caption.py", ["--bridge", "cross", "--sample", "x", "--seed", "1"], ["--seed"]),
    ("caption.py", ["--bridge", "cross", "--num", "2"], ["--num", "training"])])
def test_flags_that_do_nothing_are_refused(script, args, words, tmp_path):
    """A flag that is silently ignored, or a number out of bounds that is taken."""
    assert_error(run(script, *args, cwd=tmp_path), *words)


def test_a_terminal_that_cannot_print_and_a_closed_pipe(tmp_path):
    """A traceback at the first "±" on an ASCII terminal, or in `| head -1`."""
    script = "import fineweb; fineweb.command_line(lambda: print('± 日本 \\udcff'))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.startswith("?"), process.stderr
    script = "import fineweb; fineweb.command_line(lambda: [print(i) for i in range(100_000)])"
    process = subprocess.run(["sh", "-c", f'{sys.executable} -c "{script}" | head -1'], cwd=HERE,
                             capture_output=True, text=True)
    assert process.stdout == "0\n" and process.stderr == ""


def test_half_a_surrogate_pair_is_encoded():
    """A document of JSON, "\\ud800", at which the encoding of a whole corpus ends."""
    tokenizer = fineweb.get_tokenizer("tiny")
    tokens = fineweb.encode_document("a \ud800 é <|endoftext|>", tokenizer)
    assert tokens.dtype == np.uint16 and tokens[0] == tokenizer.eot_token
    assert tokenizer.decode(tokens[1:].tolist()) == "a ? é <|endoftext|>"
    assert tokenizer.eot_token not in tokens[1:]


def test_documents_come_in_order():
    """Threads that mix up documents, or lose some of a batch."""
    tokenizer = fineweb.get_tokenizer("tiny")
    texts = [f"{i} " * (i * 7919 % 50) for i in range(2_500)]
    encoded = fineweb.encode_all(iter(texts), tokenizer)
    assert [tokenizer.decode(tokens[1:].tolist()) for tokens in encoded] == texts


@real_data
def test_a_book_has_gpt2s_tokens():
    """A document whose tokens are not those that tiktoken gives by its other method."""
    tokenizer = fineweb.get_tokenizer("gpt2")
    book = sorted((REAL / "text/gutenberg").glob("*.jsonl"))[0]
    text = "\n\n".join(fineweb.read_documents([book])) * 5
    assert len(text) > 1_500_000
    assert fineweb.encode_document(text, tokenizer)[1:].tolist() == tokenizer.encode_ordinary(text)


def test_a_new_folder_may_be_an_empty_one(tmp_path):
    """A mount point, which cannot be replaced: all the work lost at its end."""
    mount = tmp_path / "mount"
    (mount / "lost+found").mkdir(parents=True)
    with fineweb.new_folder(mount) as building:
        assert building.parent == mount
        (building / "a").write_text("a")
    assert {path.name for path in mount.iterdir()} == {"lost+found", "a"}
    with pytest.raises(UserError, match="not empty"), fineweb.new_folder(mount):
        pass
    with contextlib.suppress(KeyError), fineweb.new_folder(tmp_path / "failed"):
        raise KeyError
    assert not list(tmp_path.glob("failed*"))


def test_damaged_and_missing_shards(server, tmp_path, capsys):
    """A cut shard that is never downloaded again; shards missing between others, without a word."""
    for name in ("train_000001", "train_000004", "val_000000"):
        fineweb.write_shard(tmp_path / f"a_{name}.bin", np.arange(300))
    fineweb.write_tokens_info(tmp_path, "tiny", "test")
    train_gpt2.open_data(tmp_path, train_gpt2.PRESETS["tiny"])
    assert "lacks the training shards 2, 3" in capsys.readouterr().out
    path = tmp_path / "a_train_000001.bin"
    assert fineweb.is_whole(path) and not fineweb.is_whole(tmp_path / "nothing")
    for body in (b"", path.read_bytes()[:-2]):
        path.write_bytes(body)
        assert not fineweb.is_whole(path)
    with pytest.raises(UserError, match="has other text"):
        fineweb.fetch_fineweb(1_000, tmp_path)


def test_two_downloads_of_one_file(server, tmp_path):
    """Two processes that append to one file; a picture that stays the old one at its address."""
    pytest.importorskip("fcntl", reason="needs a system with locks")
    server.files = {"/a": BODY}
    path = tmp_path / "a"
    with fineweb.lock(tmp_path / "a.part"), pytest.raises(UserError, match="another process"):
        fineweb.download(f"{server.address}/a", path)
    fineweb.download(f"{server.address}/a", path)
    server.files = {"/a": BODY[::-1]}
    (tmp_path / "a.part").write_bytes(BODY[:1000])  # of the old one, killed in the middle
    assert fineweb.download(f"{server.address}/a", path, anew=True).read_bytes() == BODY[::-1]
    assert list(tmp_path.iterdir()) == [path]
    server.files = {}
    with pytest.raises(UserError, match="404"):
        fineweb.download(f"{server.address}/a", path, anew=True)
    assert path.read_bytes() == BODY[::-1]  # what the user may have put there is not lost


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """Training that is refused on a network file system which cannot lock."""
    fcntl = pytest.importorskip("fcntl", reason="needs a system with locks")

    def flock(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with fineweb.lock(tmp_path):
        assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.parametrize("script, args", [
    ("train_gpt2.py", ["--export-hf", ""]), ("train_gpt2.py", ["--data", ""]),
    ("train_gpt2.py", ["--eval", "--ckpt="]), ("caption.py", ["--bridge", "linear", "--out", ""]),
    ("caption.py", ["--bridge", "linear", "--sample", ""]), ("fineweb.py", ["--out", ""]),
    ("coco_eval.py", ["--results", "a.json", "--references", ""])])
def test_an_empty_value_is_refused(script, args, tmp_path):
    """A variable that is not set, taken for "not given": another command than was meant."""
    assert_error(run(script, *args, cwd=tmp_path), "is empty")


def test_our_own_mistakes_can_be_seen(tmp_path):
    """TRACEBACK=1 that shows no more than the one line."""
    script = "import fineweb; fineweb.command_line(lambda: open('nothing'))"
    for more in ({}, {"TRACEBACK": "1"}):
        process = subprocess.run([sys.executable, "-c", script], cwd=HERE, env=os.environ | more,
                                 capture_output=True, text=True)
        assert process.returncode == (1 if more else 2)
        assert ("Traceback" in process.stderr) == bool(more)
        assert more or "TRACEBACK=1 shows where" in process.stderr


# -----------------------------------------------------------------------------
# hellaswag.py


def test_items_that_are_not_right(server, tmp_path, monkeypatch):
    """Another file than the published one, taken without a word."""
    item = made_items(1)[0]
    good = json.dumps(item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", f"{server.address}/hellaswag_val.jsonl")
    server.files = {"/hellaswag_val.jsonl": good.encode()}
    with pytest.raises(UserError, match="not the expected file"):
        hellaswag.load_examples()
    hellaswag.FILE.parent.mkdir(parents=True, exist_ok=True)
    hellaswag.FILE.write_text(good)
    with pytest.raises(UserError, match="not the published file: remove it"):
        hellaswag.load_examples()
    hellaswag.FILE.unlink()
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/hellaswag_val.jsonl")
    with pytest.raises(UserError, match="cannot be reached.*put it at data/hellaswag"):
        hellaswag.load_examples()
    hellaswag.FILE.write_text(f"{good}\n" * 2)
    monkeypatch.setattr(hellaswag, "SHA256", fineweb.file_digest(hellaswag.FILE, "0" * 64))
    examples = hellaswag.load_examples()
    assert examples == [item, item]
    assert hellaswag.subset(examples * 50, 7) == hellaswag.subset(examples * 50, 7)
    assert len(hellaswag.subset(examples, 7)) == 2


@real_data
def test_rendering_of_the_first_original_items():
    """Contexts and endings that are not those of build-nanogpt and of the harness."""
    tokenizer = fineweb.get_tokenizer("gpt2")
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


def test_spaces_after_a_context_go_to_the_endings():
    """The harness moves spaces at the end of a context to the endings before it tokenizes."""
    tokenizer = fineweb.get_tokenizer("tiny")
    example = {**made_items(1)[0], "ctx_a": "a b", "ctx_b": "[header]", "endings": ["x"] * 4}
    item = hellaswag.render(example, tokenizer, "harness")
    assert tokenizer.decode(item.context) == "Shapes: a b"
    assert tokenizer.decode(item.endings[0]) == "  x"


# -----------------------------------------------------------------------------
# train_gpt2.py: the model


@pytest.mark.parametrize("preset, V, count", [
    ("gpt2", 50257, 124_439_808), ("gpt2-medium", 50257, 354_823_168),
    ("gpt2-large", 50257, 774_030_080), ("gpt2-xl", 50257, 1_557_611_200)])
def test_number_of_parameters(preset, V, count):
    """A preset that is not the GPT-2 whose name it has."""
    c = train_gpt2.PRESETS[preset]
    with torch.device("meta"):
        model = GPT(c)
    unused = (len(model.wte.weight) - V) * c.n_embd
    assert c.vocab_size == V and sum(p.numel() for p in model.parameters()) == count + unused


def test_initialization_is_gpt2s():
    """Weights that begin at another scale: residual projections at 1 / sqrt(2 * layers)."""
    model = small_model(config=GPTConfig(64, 512, 4, 4, 128))
    for name, p in model.named_parameters():
        if "ln_" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert not p.any()
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


def test_decoder_equals_a_plain_float64_one():
    """Attention, LayerNorm, GELU, weight tying or the causal mask."""
    model = small_model()
    idx = torch.randint(0, 43, (12,))
    assert torch.allclose(model(idx[None])[0][0].double(), plain_decoder(model, idx), atol=1e-4)


def test_mask_hides_what_it_hides():
    """A mask through which hidden positions are seen."""
    model = small_model()
    idx = torch.randint(0, 43, (2, 10))
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    causal = model.hidden_states(model.embed(idx))
    assert torch.allclose(model.hidden_states(model.embed(idx), mask), causal, atol=1e-5)
    mask[3:, :3] = False  # positions 3 ... do not see the first three, whatever stands there
    other = idx.clone()
    other[:, :3] = (other[:, :3] + 1) % 43
    a = model.hidden_states(model.embed(idx), mask)
    b = model.hidden_states(model.embed(other), mask)
    assert torch.allclose(a[:, 3:], b[:, 3:], atol=1e-5)
    assert not torch.allclose(a[:, :3], b[:, :3], atol=1e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_its_gradients_equal_float64(reduction, monkeypatch):
    """The chunked cross-entropy: several chunks, the last one partial; padded rows of the table."""
    monkeypatch.setattr(train_gpt2, "ROWS", 7)
    model = small_model()
    h = torch.randn(3, 9, 32, requires_grad=True)
    targets = torch.randint(0, 43, (3, 9))
    targets[0, :4] = targets[2, 8] = -100
    model.loss(h, targets, reduction).sum().backward()
    h64 = h.detach().double().requires_grad_()
    w64 = model.wte.weight.detach().double().requires_grad_()
    logits = (h64 @ w64[:43].T).view(-1, 43)  # rows that are no tokens have no probability
    expected = F.cross_entropy(logits, targets.view(-1), reduction=reduction)
    expected.sum().backward()
    assert torch.allclose(h.grad.double(), h64.grad, atol=1e-5)
    assert torch.allclose(model.wte.weight.grad.double(), w64.grad, atol=1e-4)
    for context in (contextlib.nullcontext(), torch.no_grad()):
        with context:
            loss = model.loss(h, targets, reduction).double().view(-1)
        assert torch.allclose(loss, expected.view(-1), atol=1e-5)


def test_a_second_backward_raises():
    """Gradients that are given away once and silently missing the second time."""
    model = small_model()
    idx = torch.randint(0, 43, (2, 8))
    loss = model(idx, idx)[1]
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_compiled_head_stores_no_second_logits():
    """The head as it is compiled on CUDA: other values, or another buffer of the size (rows, V)."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    rows, V = 24, 512
    logits = (3 * torch.randn(rows, V)).bfloat16()
    target = torch.randint(0, 500, (rows, 1))
    target[3] = -100
    plain = logits.clone()
    loss = train_gpt2.softmax_minus_one_hot(plain, target, 500)
    function = torch.compile(train_gpt2.softmax_minus_one_hot)
    try:
        compiled_loss, codes = run_and_get_code(function, logits, target, 500)
    except (RuntimeError, OSError) as error:
        pytest.skip(f"needs a compiler ({type(error).__name__})")
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    counts = target[:, 0] != -100
    assert torch.allclose(logits[counts].float(), plain[counts].float(), atol=1e-2)
    assert not logits[:, 500:].any()
    for code in codes:
        assert not re.search(rf"buf\d+ = empty\w+\(\({rows}, {V}\)", code)


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


def test_forward_returns_logits_or_loss():
    """model(idx) and model(idx, targets), as other GPT-2s have them."""
    model = small_model()
    idx = torch.randint(0, 43, (2, 8))
    targets = idx.roll(-1, 1)
    logits, no_loss = model(idx)
    no_logits, loss = model(idx, targets)
    assert no_loss is None and no_logits is None and logits.shape == (2, 8, 43)
    expected = F.cross_entropy(logits.view(-1, 43), targets.view(-1)).item()
    assert loss.item() == pytest.approx(expected, abs=1e-5)


# -----------------------------------------------------------------------------
# train_gpt2.py: generation


def plain_generate(model, idx, n, sampling, prefix=None):
    """Continue one row (1, T) without a cache; a full context drops its older half."""
    P = 0 if prefix is None else prefix.size(1)
    room = model.config.block_size - P
    context = idx[:, -room:]
    new = []
    for _ in range(n):
        if context.size(1) > room:
            context = context[:, -(room // 2) :]
        x = model.embed(context, torch.arange(P, P + context.size(1)))
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)
        logits = model.logits(model.hidden_states(x)[:, -1]).float()
        token = train_gpt2.sample_token(logits, **sampling)
        new.append(token.item())
        context = torch.cat([context, token[:, None]], dim=1)
    return new


@torch.no_grad()
def test_a_prefix_may_fill_the_context_but_for_one_token():
    """Half of one token of room, rounded to all of the context: a position that is not there."""
    model = small_model()
    out = train_gpt2.generate(model, torch.ones(1, 1, dtype=torch.long), 4,
                              prefix=torch.randn(1, 15, 32), temperature=0)
    assert out.shape == (1, 5)


def test_cached_equals_uncached_beyond_the_context():
    """The KV cache, the positions after a prefix, or what happens when the context is full."""
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
    prefix = torch.randn(1, 6, 32)
    for idx in (torch.randint(0, 43, (1, 3)), torch.empty(1, 0, dtype=torch.long)):
        out = generate(model, idx, 20, temperature=0, prefix=prefix)[0, idx.size(1) :].tolist()
        assert out == plain_generate(model, idx, 20, {"temperature": 0}, prefix)


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


@pytest.mark.parametrize("p", [0.9, 0.95, 0.999, 1.0])
def test_the_nucleus_is_that_of_transformers(p, monkeypatch):
    """Tokens left out near p = 1, where a sum of 50,257 numbers in fp32 is too rough."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 50_257)
    kept = []

    def look(probabilities, count, generator=None):
        kept.append(probabilities > 0)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(train_gpt2.torch, "multinomial", look)
    train_gpt2.sample_token(logits, top_p=p)
    theirs = torch.ones_like(logits, dtype=torch.bool)
    if p < 1:
        warper = transformers.generation.logits_process.TopPLogitsWarper(p)
        theirs = warper(None, logits.double()) > -math.inf
    difference = (kept[0] != theirs).sum(1)
    assert difference.max() <= 1  # at the border itself the two sums may round differently


# -----------------------------------------------------------------------------
# train_gpt2.py: data


def test_every_token_is_a_target_once_in_an_epoch(tmp_path):
    """Tokens that are skipped or read twice: at the borders of shards, windows, steps or epochs."""
    sizes = (50, 7, 1, 64)
    T = 8
    row = np.arange(sum(sizes))
    for i, part in enumerate(np.split(row, np.cumsum(sizes)[:-1])):
        fineweb.write_shard(tmp_path / f"x_train_{i:06d}.bin", part)
    dataset = TokenDataset(sorted(tmp_path.iterdir()))
    windows = dataset.num_windows(T)
    assert windows == 16  # 122 tokens are 121 targets: 15 windows, and one with one target
    seen = []
    for step in range(12):  # three epochs of four steps of four windows
        chosen = train_gpt2.step_indices(5, step, 4, windows)
        x, y = dataset.get_batch(chosen, T, 1000)
        assert ((y == x + 1) | (y == -100)).all()  # these tokens count upwards
        seen.append(y[y >= 0].tolist())
    epochs = [sum(seen[e : e + 4], []) for e in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(1, len(row))) for epoch in epochs)
    assert epochs[0] != epochs[1]  # each epoch in an order of its own
    straddling = [train_gpt2.step_indices(5, step, 5, windows) for step in range(10)]
    straddling = np.concatenate(straddling)  # 5 does not divide 16
    for epoch in (straddling[:16], straddling[16:32]):
        assert sorted(epoch.tolist()) == list(range(16))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_divide_an_epoch_among_them(size, tmp_path, monkeypatch):
    """Windows that two ranks read, or none; shares of the loss that are not a mean."""
    for i, part in enumerate(np.split(np.arange(1022), [400, 407, 900])):
        fineweb.write_shard(tmp_path / f"x_train_{i:06d}.bin", part)
    dataset = TokenDataset(sorted(tmp_path.iterdir()))
    recipe = Recipe(16, 8 * 16, 2, 1e-3, 1)
    config = GPTConfig(16, 1024, 1, 1, 8)
    monkeypatch.setattr(train_gpt2, "world_size", lambda: size)
    seen = [[], []]
    shares = []
    for step, r in itertools.product(range(16), range(size)):  # 64 windows: 8 steps are an epoch
        monkeypatch.setattr(train_gpt2, "rank", lambda r=r: r)
        for x, y, share in train_gpt2.get_micro_batches(dataset, recipe, 7, config, step):
            assert len(x) == 2 and ((y == x + 1) | (y == -100)).all()
            seen[step // 8] += y[y >= 0].tolist()
            shares.append(share)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(1, 1022)) and seen[0] != seen[1]
    assert sum(shares) == pytest.approx(16)  # the micro-batches of a step make one mean


def test_batches_that_cannot_be_divided_are_refused(monkeypatch):
    """A step that is silently larger or smaller than --batch-tokens."""
    monkeypatch.setattr(train_gpt2, "world_size", lambda: 4)
    recipe = train_gpt2.RECIPES["tiny"]
    for batch in (64, 1000):
        with pytest.raises(UserError, match=f"{batch:,} cannot .* a multiple of 64, at least 256"):
            train_gpt2.with_flags(recipe, {"batch_size": batch}, 64)
    flags = {"batch_size": 16 * 64, "lr": 0.0}
    chosen = train_gpt2.with_flags(recipe, flags, 64)
    assert (chosen.batch_size, chosen.micro_batch, chosen.lr) == (1024, 24, 0.0)  # 0 is a number
    train_gpt2.configure_optimizer(small_model(), chosen)


def test_many_shards_are_mapped_and_not_read(tmp_path):
    """Shards that are loaded into memory, or read wrongly across their borders."""
    for i in range(100):
        fineweb.write_shard(tmp_path / f"x_train_{i:06d}.bin", np.full(10_000, i))
    dataset = TokenDataset(sorted(tmp_path.iterdir()))
    assert all(isinstance(shard, np.memmap) for shard in dataset.shards)
    assert len(dataset) == 1_000_000
    assert dataset.read(9_999, 20_001).tolist() == [0] + [1] * 10_000 + [2]


def test_shards_are_found_and_told_apart(tmp_path):
    """Shards that are missed, read twice, or exchanged for others without being noticed."""
    with pytest.raises(UserError, match="has no shards NAME_train"):
        train_gpt2.open_shards(tmp_path)
    for name in ("a_train", "a_val", "b_val_000000"):  # llm.c's small ones have no number
        fineweb.write_shard(tmp_path / f"{name}.bin", np.arange(500))
    train, val = train_gpt2.open_shards(tmp_path)
    assert len(train) == 500 and list(val) == ["a", "b"]
    digest = train_gpt2.digest(train)
    fineweb.write_shard(tmp_path / "a_train.bin", np.arange(500)[::-1])
    assert train_gpt2.digest(train_gpt2.open_shards(tmp_path)[0]) != digest


def test_prefetch_gives_each_step_once_and_in_order():
    """Batches of another step than the one that trains, or prepared after the last."""
    asked = []

    def get(step):
        asked.append(step)
        return step * 10

    assert list(train_gpt2.prefetch(get, 3, 6)) == [(3, 30), (4, 40), (5, 50)]
    assert sorted(asked) == [3, 4, 5]


def test_validation_is_the_mean_over_all_its_tokens(tmp_path, fp32):
    """Windows that are left out, or a short last one that counts as much as the others."""
    model = small_model(config=train_gpt2.PRESETS["tiny"])
    tokenizer = fineweb.get_tokenizer("tiny")
    tokens = np.random.default_rng(0).integers(0, 431, 5 * 64 + 11)
    fineweb.write_shard(tmp_path / "a.bin", tokens)
    dataset = train_gpt2.TokenDataset([tmp_path / "a.bin"])
    losses = []
    for x, y in zip(np.split(tokens[:-1], range(64, 330, 64)),
                    np.split(tokens[1:], range(64, 330, 64)), strict=True):
        logits = model(torch.from_numpy(x)[None])[0][0]
        losses += F.cross_entropy(logits, torch.from_numpy(y), reduction="none").tolist()
    for count, size in ((330, 6 * 64), (128, 2 * 64)):  # all of it, or the first two windows
        sets = {"val": dataset}
        row = train_gpt2.validate(model, model.config, sets, tokenizer, size, 4, CPU)
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


def test_prefetching_leaves_the_processor_to_the_step():
    """Threads that compute with threads of their own, which slow down every operation of a step."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = dict(train_gpt2.prefetch(lambda step: torch.get_num_threads(), 0, 6))
        assert set(seen.values()) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    script = "import torch, train_gpt2; list(train_gpt2.prefetch(print, 0, 1)); "
    script += "print(torch.get_num_threads())"  # in a process that has not computed yet
    options = {"env": os.environ | {"OMP_NUM_THREADS": "2"}, "capture_output": True, "text": True}
    process = subprocess.run([sys.executable, "-c", script], cwd=HERE, **options)
    assert process.stdout.split() == ["0", "2"], process.stderr


# -----------------------------------------------------------------------------
# train_gpt2.py: the recipe and training


def test_schedule_is_warm_up_then_cosine():
    """GPT-3's recipe, which the preset gpt2 is to the letter."""
    recipe = train_gpt2.RECIPES["gpt2"]
    assert (recipe.max_steps, recipe.batch_size, recipe.warmup_steps) == (19_073, 524_288, 715)
    assert (recipe.weight_decay, recipe.grad_clip, recipe.lr) == (0.1, 1.0, 6e-4)
    expected = {0: 6e-4 / 715, 714: 6e-4, 715: 6e-4, (715 + 19_073) // 2: 3.3e-4, 19_072: 6e-5}
    for step, lr in expected.items():
        assert train_gpt2.get_lr(step, recipe) == pytest.approx(lr, rel=1e-3)


def test_a_schedule_with_a_cooldown_is_flat_then_linear():
    """gpt2-fast: a rate that falls too early, or does not reach zero."""
    recipe = dataclasses.replace(train_gpt2.RECIPES["gpt2-fast"], max_steps=1000, cooldown=0.25)
    expected = {0: 1.8e-3 / 250, 249: 1.8e-3, 749: 1.8e-3, 875: 0.9e-3, 999: 1.8e-3 / 250}
    for step, lr in expected.items():
        assert train_gpt2.get_lr(step, recipe) == pytest.approx(lr, rel=1e-3)


def test_weight_decay_is_on_matrices_only():
    """Biases and LayerNorms that decay, or matrices that do not."""
    model = small_model()
    optimizer = train_gpt2.configure_optimizer(model, train_gpt2.RECIPES["gpt2"])
    decayed = []
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["weight_decay"] in (0.0, 0.1)
        decayed += group["params"] if group["weight_decay"] else []
    names = {name for name, p in model.named_parameters() if any(p is other for other in decayed)}
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert names == matrices and sum(len(g["params"]) for g in optimizer.param_groups) == len(
        list(model.parameters()))


def small_setup(tmp_path, **changes):
    """(model, recipe, dataset) of 700 random tokens: 44 windows, the last one partial."""
    tokens = np.random.default_rng(0).integers(0, 43, 700)
    fineweb.write_shard(tmp_path / "a_train_000001.bin", tokens)
    recipe = {"max_steps": 20, "batch_size": 8 * 16, "micro_batch": 4, "lr": 1e-2}
    recipe = Recipe(**recipe | {"warmup_steps": 2} | changes)
    return small_model(), recipe, TokenDataset([tmp_path / "a_train_000001.bin"])


def test_a_step_is_one_clipped_adamw_update(tmp_path, fp32):
    """The loss, the gradient's norm or its clipping."""
    model, recipe, dataset = small_setup(tmp_path)
    twin = small_model()
    x, y = dataset.get_batch(train_gpt2.step_indices(0, 0, 8, 44), 16, 43)
    loss = F.cross_entropy(twin(x)[0].view(-1, 43), y.view(-1))
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    optimizer = train_gpt2.configure_optimizer(model, recipe)
    batches = train_gpt2.get_micro_batches(dataset, recipe, 0, model.config, 0)
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
    batches = train_gpt2.get_micro_batches(dataset, recipe, 0, model.config, 0)
    train_gpt2.train_step(model, optimizer, batches, recipe, CPU)
    before = [p.clone() for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    loss = GPT.loss
    monkeypatch.setattr(GPT, "loss", lambda *args: loss(*args) * math.nan)
    assert math.isnan(train_gpt2.train_step(model, optimizer, batches, recipe, CPU)[0])
    for p, old, moment in zip(model.parameters(), before, moments, strict=True):
        assert torch.equal(p, old) and torch.equal(optimizer.state[p]["exp_avg"], moment)


def test_a_stopped_run_tells_how_it_goes_on(tmp_path, capsys):
    """The same command, with --restart, that loses the steps it has just saved."""
    for restart, words in ((False, "the same command resumes"), (True, "without --restart")):
        run = train_gpt2.Run(tmp_path, {}, train_gpt2.RECIPES["tiny"], "tokens", restart)
        model = torch.nn.Linear(1, 1)
        with pytest.raises(SystemExit), run:
            run.save_and_exit(model, torch.optim.AdamW(model.parameters()))
        assert words in capsys.readouterr().out


def test_many_such_losses_stop_the_run(tmp_path):
    """A run that goes on for days with a loss that is not finite."""
    with train_gpt2.Run(tmp_path, {}, train_gpt2.RECIPES["tiny"], "tokens") as run:
        for loss in [math.nan] * 9 + [1.0] + [math.inf] * 9:
            run.count_step(loss, 1.0)
        assert (run.skipped, run.step) == (18, 19)
        with pytest.raises(UserError, match="10 steps in a row.*ckpt.pt.*--lr"):
            run.count_step(math.nan, 1.0)
    train_gpt2.draw_curves(tmp_path / "a.png", {"loss": {"train": []}})  # none of it is finite


def test_seconds_are_those_of_training(tmp_path, monkeypatch):
    """A run's time and speed that count its evaluations; one that ended without being finished."""
    clock = iter(itertools.count())
    monkeypatch.setattr(train_gpt2.time, "time", lambda: next(clock))  # a second for each look
    recipe = Recipe(2, 64, 1, 1e-3, 1)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with train_gpt2.Run(tmp_path, {}, recipe, "tokens") as run:
        run.count_step(1.0, 1.0)
        seconds = run.seconds
        for _ in range(50):  # an evaluation
            train_gpt2.time.time()
        run.record({"val_val": 1.0}, model, optimizer)
        assert not run.finished and not train_gpt2.is_finished(tmp_path / "ckpt.pt")
        run.count_step(1.0, 1.0)
        run.progress(1.0, 1e-3, 1.0)
        assert run.seconds - seconds < 5 and run.rows[-1]["seconds"] == run.seconds
        run.record({"val_val": 1.0}, model, optimizer)
        assert run.finished and train_gpt2.is_finished(tmp_path / "ckpt.pt")


def test_orthogonalized_matrices_have_singular_values_near_one():
    """Newton-Schulz steps: directions that change, or singular values far from 1."""
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 32, 128), (2, 128, 32)):
        G = torch.randn(shape)
        U, S, Vh = torch.linalg.svd(train_gpt2.orthogonalize(G), full_matrices=False)
        assert S.min() > 0.3 and S.max() < 1.3
        exact_U, _, exact_Vh = torch.linalg.svd(G, full_matrices=False)
        nearest = exact_U @ exact_Vh
        cosine = F.cosine_similarity(train_gpt2.orthogonalize(G).flatten(1), nearest.flatten(1))
        assert cosine.min() > 0.95


def test_muon_is_its_formula(fp32):
    """Muon's momentum, decay and scale; q, k and v apart; AdamW for everything else."""
    recipe = Recipe(10, 64, 1, lr=1e-2, warmup_steps=0, muon=5, weight_decay=0.1)
    model = small_model()
    twin = small_model()
    optimizer = train_gpt2.configure_optimizer(model, recipe)
    adamw = train_gpt2.configure_optimizer(twin, dataclasses.replace(recipe, muon=0.0))
    weight = model.h[0].attn.c_attn.weight
    expected = weight.detach().clone()
    momentum = torch.zeros_like(expected)
    for step in range(3):
        for net, opt in ((model, optimizer), (twin, adamw)):
            torch.manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            for group in opt.param_groups:
                group["lr"] = 1e-2 * group["lr_scale"]
            if net is model:
                momentum = 0.95 * momentum + weight.grad
                update = weight.grad + 0.95 * momentum
                parts = [train_gpt2.orthogonalize(part[None])[0] for part in update.chunk(3)]
                expected = expected - 0.05 * (torch.cat(parts) + 0.1 * expected)
            opt.step()
    assert torch.allclose(weight, expected, atol=1e-5)
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
    each = model.loss(packed.at_source(h), packed.targets, "none")
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


def test_continuations_of_one_token_are_packed():
    """A batch of captions without a word, after a prefix of 32: ids that are no integers."""
    packed = train_gpt2.pack([([], [[5]])], P=32)
    assert packed.idx.dtype == torch.long and packed.idx.numel() == 0
    assert packed.targets[0, :2].tolist() == [5, -100] and packed.source[0, 0] == 31


def test_the_packing_is_the_one_of_the_docstring():
    """The example with which pack() is explained; ids that look like padding are targets too."""
    packed = train_gpt2.pack([([7, 8, 9], [[0, 42], [1, 0, 2]])])
    assert packed.idx[0, :6].tolist() == [7, 8, 9, 0, 1, 0]
    assert packed.positions[0, :6].tolist() == [0, 1, 2, 3, 3, 4]
    assert packed.source[0, :5].tolist() == [2, 3, 2, 4, 5]
    assert packed.targets[0].tolist() == [0, 42, 1, 0, 2, -100, -100, -100]
    assert packed.owner[0, :6].tolist() == [0, 0, 1, 1, 1, -1]
    mask = packed.mask[0, 0, :6, :6].int().tolist()
    assert mask[3] == [1, 1, 1, 1, 0, 0] and mask[5] == [1, 1, 1, 0, 1, 1]


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
    tokenizer = fineweb.get_tokenizer("tiny")
    config = GPTConfig(40, 431, 2, 2, 32, init_std=0.3)
    model = small_model(config=config)
    items = [hellaswag.render(example, tokenizer) for example in made_items(30)]
    items[3].context *= 9  # too long: cut from the left
    assert_losses_are_plain_ones(model, items)


def test_endings_have_their_losses_compiled_too(monkeypatch):
    """HellaSwag on a GPU runs compiled: other losses, or a compilation for each shape."""
    tokenizer = fineweb.get_tokenizer("tiny")
    config = GPTConfig(40, 431, 2, 2, 32, init_std=0.3)
    model = small_model(config=config)
    items = [hellaswag.render(example, tokenizer) for example in made_items(150)]
    shapes = []

    def compiled(function):
        function = torch.compile(function, backend="aot_eager")
        return lambda x, mask: shapes.append(x.shape) or function(x, mask)

    monkeypatch.setattr(train_gpt2, "compiled", compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_losses_are_plain_ones(model, items)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs < len(set(shapes)) / 2


def test_accuracies_are_those_of_the_losses(capsys, precision):
    """Both HellaSwag metrics: what they divide by."""
    tokenizer = fineweb.get_tokenizer("tiny")
    examples = made_items(40)
    model = small_model(config=GPTConfig(64, 431, 2, 2, 32, init_std=0.3))
    for method in ("token mean", "harness"):
        right = {"acc": 0, "acc_norm": 0}
        items = [hellaswag.render(example, tokenizer, method) for example in examples]
        scores = train_gpt2.evaluate_hellaswag(model, items, CPU, method)
        for example, item in zip(examples, items, strict=True):
            losses = np.array(plain_losses(model, item))
            endings = example["endings"] if method == "harness" else item.endings
            right["acc"] += losses.argmin() == example["label"]
            right["acc_norm"] += (losses / [*map(len, endings)]).argmin() == example["label"]
        assert {key: scores[key] * 40 for key in right} == pytest.approx(right)
        line = capsys.readouterr().out
        prefix = "harness_" if method == "harness" else ""
        assert f"{prefix}acc_norm {scores['acc_norm']:.4f}" in line and "40 items" in line


@real_data
def test_real_items_have_the_losses_of_one_at_a_time(tmp_path, monkeypatch):
    """HellaSwag on real items: short, long and odd ones, with random and with trained weights."""
    tokenizer = fineweb.get_tokenizer("gpt2")
    examples = real_items()
    assert len(examples) == 10_042
    examples.sort(key=lambda e: len(e["ctx"]) + sum(map(len, e["endings"])))
    odd = [e for e in examples if not (e["ctx"] + "".join(e["endings"])).isascii()]
    chosen = examples[:6] + examples[-4:] + odd[:6]
    items = [hellaswag.render(example, tokenizer) for example in chosen]
    items += [hellaswag.render(example, tokenizer, "harness") for example in chosen]
    config = GPTConfig(256, 50257, 2, 2, 32, init_std=0.3)
    assert_losses_are_plain_ones(small_model(config=config), items)
    book = sorted((REAL / "text/openstax-ccby").glob("*.jsonl"))[0]
    texts = itertools.islice(fineweb.read_documents([book]), 40)
    tokens = np.concatenate([fineweb.encode_document(text, tokenizer) for text in texts])
    fineweb.write_shard(tmp_path / "x_train_000001.bin", tokens)
    model = small_model(config=GPTConfig(256, 50257, 2, 2, 32, init_std=0.05))
    dataset = TokenDataset([tmp_path / "x_train_000001.bin"])
    list(itertools.islice(text_steps(model, Recipe(12, 1024, 4, 1e-2, 2), dataset), 12))
    assert_losses_are_plain_ones(model, items)
    content = {"config": vars(model.config), "model": model.state_dict()}
    content["run"] = {"preset": "gpt2", "tokenizer": "gpt2"}
    train_gpt2.save_checkpoint(tmp_path / "ckpt.pt", content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "load_examples", lambda: examples)
    printed = run("train_gpt2.py", "--eval", "--ckpt", tmp_path, "--limit", "20").stdout
    assert printed.count("of 20 items") == 2 and "there are no shards" in printed


@real_data
@measured
def test_measured_hellaswag_beside_one_at_a_time():
    """The 124M on 48 items: four padded rows with all logits an item, beside ours."""
    tokenizer = fineweb.get_tokenizer("gpt2")
    examples = real_items()
    items = [hellaswag.render(e, tokenizer) for e in hellaswag.subset(examples, 48)]
    model = small_model(config=train_gpt2.PRESETS["gpt2"])

    @torch.no_grad()
    def one_at_a_time():
        losses = []
        for item in items:
            n = len(item.context)
            rows = torch.zeros(4, n + max(map(len, item.endings)), dtype=torch.long)
            counts = torch.zeros(rows.shape)
            for row, ending in enumerate(item.endings):
                rows[row, : n + len(ending)] = torch.tensor(item.context + ending)
                counts[row, n : n + len(ending)] = 1
            logits = model(rows)[0][:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="none").view(4, -1)
            losses.append((loss * counts[:, 1:]).sum(1).tolist())
        return losses

    def ours():
        with train_gpt2.autocast(CPU):
            return train_gpt2.ending_losses(model, items, CPU)

    np.testing.assert_allclose(ours(), one_at_a_time(), rtol=1e-2)
    plain, fast = in_turns(one_at_a_time, ours, rounds=2)
    print(f"\none at a time, fp32: {1000 * plain / 48:.0f} ms an item; "
          f"ours: {1000 * fast / 48:.0f} ms, {plain / fast:.2f} times as fast")


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
    if V == 431:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "tiny"}))
    elif not REAL.is_dir():
        pytest.skip("needs REAL_DATA, for the GPT-2 vocabulary")
    model, tokenizer, _ = train_gpt2.load_model(tmp_path)
    idx = torch.randint(0, V, (2, 20))
    assert tokenizer.n_vocab == V
    assert torch.allclose(model.eval()(idx)[0], theirs(idx).logits, atol=1e-4)
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert loss == pytest.approx(theirs(idx, labels=idx).loss.item(), rel=1e-5)


@real_data
@torch.no_grad()
def test_rows_after_gpt2s_tokens_are_no_tokens(tmp_path):
    """A pad token that a fine-tuning added: ids that are generated and not known."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50_264, n_embd=32, n_layer=1, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model, _, _ = train_gpt2.load_model(tmp_path)
    idx = torch.randint(0, 50_257, (1, 5))
    expected = theirs(idx).logits[..., :50_257]
    assert torch.allclose(model.eval()(idx)[0], expected, atol=1e-4)


@torch.no_grad()
def test_export_gives_transformers_the_same_logits(tmp_path):
    """--export-hf, and its way back with the tokenizer that it was trained with."""
    transformers = pytest.importorskip("transformers")
    tokenizer = fineweb.get_tokenizer("tiny")
    model = small_model(config=train_gpt2.PRESETS["tiny"])
    train_gpt2.export_hf(model, tokenizer, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    idx = torch.randint(0, 431, (2, 64))
    assert theirs.get_input_embeddings().weight.shape == (tokenizer.n_vocab, 128)
    assert torch.allclose(model(idx)[0], theirs(idx).logits, atol=1e-4)
    again, same_tokenizer, _ = train_gpt2.load_model(tmp_path / "hf")
    assert torch.allclose(again(idx)[0], theirs(idx).logits, atol=1e-4)
    assert same_tokenizer.name == "tiny"
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()  # padded rows count nowhere
    assert loss == pytest.approx(again(idx[:, :-1], idx[:, 1:])[1].item(), rel=1e-6)


@pytest.mark.parametrize("change, words", [
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ({"model_type": "gpt_neo"}, "model_type"), ({"n_head": 3}, "missing or wrong"), (None, "JSON")])
def test_a_gpt2_that_is_not_gpt2_is_refused(change, words, tmp_path):
    """Weights of another model, read all the same with wrong logits."""
    train_gpt2.export_hf(small_model(), fineweb.get_tokenizer("tiny"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "{")
    with pytest.raises(UserError, match=words):
        train_gpt2.load_model(tmp_path)


def test_files_that_hold_no_gpt2_are_refused(tmp_path):
    """An untied head, no config for odd heads, torn files, several files instead of one."""
    from safetensors.torch import load_file, save_file

    def refuse(words):
        with pytest.raises(UserError, match=words):
            train_gpt2.load_model(tmp_path)

    train_gpt2.export_hf(small_model(), fineweb.get_tokenizer("tiny"), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    (tmp_path / "config.json").unlink()
    refuse("config.json")  # width 32 is no multiple of 64
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, path)
    refuse("a head of its own")
    save_file({"a": torch.zeros(2)}, path)
    refuse("not a whole GPT-2")
    path.write_bytes(b"nothing of the kind")
    refuse("not a whole GPT-2")
    path.rename(tmp_path / "pytorch_model.bin")
    refuse("neither ckpt.pt.*save the model as one safetensors file")


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
    assert names == {".lock", "ckpt.pt", "log.csv", "curves.png", "samples.txt"}
    for words in ("data  ", "model  ", "858,880 parameters", "256 for each step", "english",
                  "scenes", "bits per byte", "tokens/s", "--sample"):
        assert words in output
    rows = read_log(folder / "run/log.csv")
    assert [row["step"] for row in rows] == [1, 10, 20, 30, 40]
    assert all("val_scenes" in row and "val_english" in row for row in rows[1:])
    assert rows[-1]["loss"] < 3 < rows[0]["loss"]
    assert rows[-1]["tokens_per_second"] > 0 and rows[-1]["seconds"] > rows[0]["seconds"]


@pytest.mark.parametrize("after, number", [
    (20, signal.SIGKILL), (20, signal.SIGTERM), (1, signal.SIGHUP)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny, whole, tmp_path, after, number):
    """Exact resume, bit for bit, after any kind of end."""
    process = start("train_gpt2.py", *RUN_FLAGS, "--data", tiny, cwd=tmp_path)
    code, output = interrupt(process, after, number)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "the same command resumes" in output
    if number == signal.SIGTERM:  # rows after the checkpoint
        with open(tmp_path / "run/log.csv", "a") as log:
            log.write("99,1.0,2.0,3.0\n")
    process = train(tiny, tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_outcome(whole[0] / "run", tmp_path / "run")


def test_a_finished_run_says_so_and_refuses_another_recipe(tiny, whole):
    """A finished run that trains again, or a run that goes on with another seed or other data."""
    folder, _ = whole
    again = train(tiny, folder)
    assert again.returncode == 0 and "are done (--restart" in again.stdout
    assert "step     " not in again.stdout
    assert_error(train(tiny, folder, "--seed", 1), "seed 0, not 1")
    other = folder / "other"
    shutil.copytree(tiny, other, dirs_exist_ok=True)
    tokens = fineweb.read_shard(tiny / "tiny_train_000001.bin")[::-1]
    fineweb.write_shard(other / "tiny_train_000001.bin", tokens)  # as many, but others
    assert_error(train(other, folder), "made with data")


def test_two_runs_into_one_folder_are_refused(tiny, tmp_path):
    """Two processes that write one checkpoint."""
    pytest.importorskip("fcntl", reason="needs a system with locks")
    (tmp_path / "run").mkdir()
    with fineweb.lock(tmp_path / "run"):
        assert_error(train(tiny, tmp_path), "another process is at work in run")


def test_checkpoints_that_cannot_be_read(tmp_path):
    """Damaged or foreign checkpoints: a traceback, or advice to remove someone else's file."""
    path = tmp_path / "ckpt.pt"

    def refuse(words):
        with pytest.raises(UserError, match=words):
            train_gpt2.load_model(path)

    refuse("is not there: train first")
    torch.save({"format": 0}, path)
    refuse("not a whole checkpoint of a config, format 3 .*format 0")
    torch.save({"model_args": {}, "model": {}}, path)  # nanoGPT's
    refuse("'format'.*name another")
    path.write_bytes(b"PK\x03\x04 torn")
    refuse("not a whole checkpoint.*name another$")  # --restart does nothing with --ckpt


def test_a_flipped_bit_or_a_torn_checkpoint_is_noticed(tmp_path):
    """Damage that PyTorch reads over."""
    path = tmp_path / "ckpt.pt"
    rng = random.Random(0)
    train_gpt2.save_checkpoint(path, {"run": {"seed": 1}, "x": torch.arange(500.0)})
    intact = path.read_bytes()
    for _ in range(300):
        place = rng.randrange(len(intact))
        body = bytearray(intact)
        body[place] ^= 1 << rng.randrange(8)
        path.write_bytes(body if rng.random() < 0.7 else body[:place])
        with contextlib.suppress(UserError):  # or it does not matter: a date, padding
            assert torch.equal(train_gpt2.read_checkpoint(path)["x"], torch.arange(500.0))


def test_checkpoints_of_another_kind_are_refused(tmp_path, toy_clip):
    """A CLIP that is taken for a decoder, or the other way round."""
    for load in (train_gpt2.load_model, train_gpt2.read_checkpoint):
        with pytest.raises(UserError, match="not a whole checkpoint of a (config|run)"):
            load(toy_clip)
    train_gpt2.save_checkpoint(tmp_path / "ckpt.pt", {"run": {}})
    with pytest.raises(UserError, match="not a whole checkpoint of a clip"):
        caption.load_clip(tmp_path / "ckpt.pt")


FULL_DISK = """
import resource, signal, sys, torch, train_gpt2
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
content = {"x": torch.zeros(10 ** 6)}
train_gpt2.fineweb.command_line(lambda: train_gpt2.save_checkpoint(sys.argv[1], content))
"""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A checkpoint that is lost while the next one is written."""
    path = tmp_path / "ckpt.pt"
    train_gpt2.save_checkpoint(path, {"x": torch.zeros(10)})
    command = [sys.executable, "-c", FULL_DISK, path]
    assert_error(subprocess.run(command, cwd=HERE, capture_output=True, text=True), "make room")
    assert len(train_gpt2.read_checkpoint(path, holds="x")["x"]) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


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
    (["--data", "bare"], ["bare has shards without text"]),
    (["--lr", "nan"], ["--lr"]),
    (["--preset", "tiny", "--batch-tokens", 1000], ["a multiple of 64"]),
    (["--preset", "small", "--data", "beyond", "--batch-tokens", 256], ["token 60000 of 50,257"]),
    (["--sample", "x", "--ckpt", "nothing.pt"], ["nothing.pt is not there", "train first"])])
def test_a_mistake_is_one_line(args, words, tmp_path):
    """A traceback where the user made a mistake."""
    if "beyond" in args and not REAL.is_dir():
        pytest.skip("needs REAL_DATA, for the GPT-2 vocabulary")
    for folder, tokens in (("beyond", np.full(600, 60_000)), ("bare", [])):
        for file in ("x_train_000001.bin", "x_val_000000.bin"):
            fineweb.write_shard(tmp_path / folder / file, tokens)
    assert_error(run("train_gpt2.py", *args, cwd=tmp_path), *words)


def test_half_an_environment_of_torchrun_is_one_line(tmp_path, monkeypatch):
    """RANK that was left in the environment without the rest."""
    monkeypatch.setenv("RANK", "0")
    assert_error(run("train_gpt2.py", cwd=tmp_path), "WORLD_SIZE", "torchrun")


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", "312"), ("NVIDIA H100 80GB HBM3", "989"), ("NVIDIA RTX A5000", "111"),
    ("NVIDIA GeForce RTX 4090", "165"), ("NVIDIA RTX A1000", None), ("NVIDIA L4", None)])
def test_the_share_of_a_gpus_peak_is_of_that_gpu(name, peak, monkeypatch):
    """A small card that is judged by the peak of one whose name begins like its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9)
    text = train_gpt2.hardware_use(50e12)
    assert "5.0 GB" in text and (f"of {peak} TFLOP/s" in text if peak else "MFU" not in text)


def test_curves_are_drawn(tmp_path):
    """Curves without their validation, their second panel, or with points outside."""
    log = tmp_path / "log.csv"
    log.write_text("step,loss,val_val,hellaswag\n1,3.0,,\n10,2.0,2.5,.26\n13,1.9,,\n")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, "draw_curves", lambda _, panels: drawn.extend(panels.values()))
        train_gpt2.draw_run(tmp_path / "curves.png", read_log(log))
    losses = {"training": [(1, 3.0), (10, 2.0), (13, 1.9)], "validation": [(10, 2.5)]}
    assert drawn[0] == losses and drawn[1]["validation"] == [(10, 0.26)]
    train_gpt2.draw_run(tmp_path / "curves.png", read_log(log))
    image = Image.open(tmp_path / "curves.png")
    assert image.size == (1800, 480)
    chart = image.crop((0, 0, 1800, 440))  # without its legend: a single point, too, is seen
    colors = {color for _, color in chart.getcolors(1 << 20)}
    assert {(255, 255, 255), (0x94, 0xA3, 0xB8), (0x25, 0x63, 0xEB)} <= colors
    assert train_gpt2.nice_ticks([3, 97]) == [0, 20, 40, 60, 80, 100]
    ticks = train_gpt2.nice_ticks([0.251, 0.309])
    assert ticks == pytest.approx([0.25, 0.26, 0.27, 0.28, 0.29, 0.30, 0.31])
    assert len(train_gpt2.nice_ticks([5, 5])) >= 2


@real_data
def test_the_124m_trains_on_real_text(tmp_path):
    """GPT-2 at its full size: the loss begins at ln(50,257) and falls."""
    source = REAL / "text/fineweb_edu_150_docs.jsonl"
    fineweb.text_to_shards([source], tmp_path / "own", val_fraction=0.02)
    train_set, _, _ = train_gpt2.open_data(tmp_path / "own", train_gpt2.PRESETS["gpt2"])
    recipe = Recipe(max_steps=2, batch_size=1024, micro_batch=1, lr=6e-4, warmup_steps=1)
    model = small_model(config=train_gpt2.PRESETS["gpt2"])
    losses = [loss for loss, _ in itertools.islice(text_steps(model, recipe, train_set), 2)]
    assert losses[0] == pytest.approx(math.log(50257), abs=0.3) and losses[1] < losses[0] - 0.3


def small_export(folder, **changes):
    """A GPT-2 of GPT-2's vocabulary in transformers' layout, with changes to its config.json."""
    model = small_model(config=GPTConfig(64, 50257, 1, 2, 32, init_std=0.3))
    train_gpt2.export_hf(model, fineweb.get_tokenizer("gpt2"), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model


@torch.no_grad()
def test_centered_tokens_change_no_probability():
    """Logits near -100, which bf16 rounds to steps of .5: other words than in fp32."""
    config = GPTConfig(32, 507, 2, 4, 64, init_std=0.3)
    idx = torch.randint(0, 507, (4, 32))
    exact = small_model(config=config)(idx)[0].log_softmax(-1)
    errors = {}
    for offset in (0, -100):
        for centered in (False, True):
            model = small_model(config=config)
            h = model.hidden_states(model.embed(idx)).flatten(0, 1)
            mean = h.mean(0)
            shift = offset * mean / (mean @ mean)  # lowers the logits of a mean state by `offset`
            model.wte.weight += shift
            model.wpe.weight -= shift  # as OpenAI's: the embeddings are what they were
            if centered:
                train_gpt2.center_tokens(model)
            assert torch.allclose(model(idx)[0].log_softmax(-1), exact, atol=2e-4)
            model.wte.bfloat16()
            h = model.hidden_states(model.embed(idx).float()).bfloat16()
            log_p = model.logits(h).float().log_softmax(-1)
            errors[offset, centered] = (log_p - exact).abs().mean().item()
    assert errors[-100, False] > 2 * errors[0, False]
    assert errors[-100, True] < 1.1 * errors[0, False]


def test_a_missing_compiler_is_told_and_missing_memory_is_not_one(monkeypatch, capsys):
    """A machine without Python.h that trains slowly without a reason; an error taken for that."""
    def fail(error):
        def compile(function):
            raise error
        monkeypatch.setattr(torch, "compile", compile)
        return train_gpt2.can_compile.__wrapped__()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_gpt2, "pick_device", lambda: CPU)
    assert not fail(RuntimeError("backend='inductor' raised:\nno Python.h\nmuch more"))
    out = capsys.readouterr().out
    assert "no Python.h" in out and "much more" not in out
    with pytest.raises(torch.OutOfMemoryError):
        fail(torch.OutOfMemoryError("CUDA out of memory"))


def test_memory_that_is_short_has_advice_that_helps(tmp_path, monkeypatch):
    """--micro-batch 1 as advice when it is 1 already; HellaSwag that stops a run."""
    for batch, words in ((8, "--micro-batch 4"), (1, "a smaller model")):
        recipe = dataclasses.replace(train_gpt2.RECIPES["tiny"], micro_batch=batch)
        with pytest.raises(UserError, match=words):
            with train_gpt2.Run(tmp_path, {}, recipe, "tokens"):
                raise torch.OutOfMemoryError("CUDA out of memory")
    tokenizer = fineweb.get_tokenizer("tiny")
    model = small_model(config=GPTConfig(40, 431, 2, 2, 32, init_std=0.3))
    items = [hellaswag.render(example, tokenizer) for example in made_items(20)]
    expected = train_gpt2.ending_losses(model, items, CPU)
    loss = GPT.loss

    def short(model, h, *args):
        if len(h) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, h, *args)

    monkeypatch.setattr(GPT, "loss", short)
    np.testing.assert_allclose(train_gpt2.ending_losses(model, items, CPU), expected, rtol=1e-5)


@real_data
@torch.no_grad()
def test_an_export_works_alone_in_transformers(tmp_path):
    """--export-hf without a tokenizer; a vocabulary of its own that is read as GPT-2's."""
    transformers = pytest.importorskip("transformers")
    model = small_export(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Once upon a time, naïve 日本"
    ours = fineweb.get_tokenizer("gpt2").encode_ordinary(text)
    assert tokenizer(text)["input_ids"] == ours and tokenizer.eos_token_id == 50256
    pipe = transformers.pipeline("text-generation", str(tmp_path))
    out = pipe("Once upon", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    idx = torch.tensor([fineweb.get_tokenizer("gpt2").encode_ordinary("Once upon")])
    expected = generate(model, idx, 4, temperature=0)[0].tolist()
    assert out == fineweb.get_tokenizer("gpt2").decode(expected)
    again, _, _ = train_gpt2.load_model(tmp_path)
    assert again.config.vocab_size == 50_257 and len(again.wte.weight) == 50_304
    words = json.loads((tmp_path / "vocab.json").read_text())
    for name, content in (("vocab.json", words), ("tokenizer.json", {"model": {"vocab": words}})):
        (tmp_path / name).write_text(json.dumps(content))
        train_gpt2.load_model(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(words | {"Ġthe": 7}))
    with pytest.raises(UserError, match="is not GPT-2's vocabulary"):
        train_gpt2.load_model(tmp_path)


@real_data
@pytest.mark.parametrize("changes, words", [
    ({"tokenizer": "GPT2"}, "tokenizer is 'GPT2'"), ({"tokenizer": None}, "tokenizer is None"),
    ({"tokenizer": "bert-base"}, "bert-base"), ({"n_head": 0}, "0 heads"),
    ({"n_head": -4}, "-4 heads"), ({"n_head": "2"}, "2 heads")])
def test_a_configuration_that_cannot_be_right_is_one_line(changes, words, tmp_path):
    """A tokenizer that is not known, no heads: a traceback, or another model."""
    small_export(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        train_gpt2.load_model(tmp_path)


@real_data
def test_fewer_rows_than_tokens_are_refused(tmp_path):
    """A vocabulary of 32,000 that is decoded with GPT-2's."""
    model = small_model(config=GPTConfig(32, 32_000, 1, 2, 32))
    train_gpt2.export_hf(model, fineweb.get_tokenizer("gpt2"), tmp_path)
    with pytest.raises(UserError, match="32,000 tokens"):
        train_gpt2.load_model(tmp_path)


def test_what_is_on_disk_comes_first_and_is_told(whole, tiny):
    """OpenAI's model in place of a run named gpt2; a run and its export with two losses."""
    folder, _ = whole
    (folder / "runs").mkdir(exist_ok=True)
    for name in ("gpt2", "tiny"):
        shutil.copytree(folder / "run", folder / "runs" / name, dirs_exist_ok=True)
    os.utime(folder / "runs/gpt2/ckpt.pt", (1, 1))
    process = run("train_gpt2.py", "--export-hf", "gpt2", cwd=folder)  # the newest, not the last
    assert "model      runs/tiny/ckpt.pt" in process.stdout, process.stderr
    losses = []
    for ckpt in ("runs/tiny", "gpt2"):
        process = run("train_gpt2.py", "--eval", "--ckpt", ckpt, "--data", tiny, cwd=folder)
        losses.append(process.stdout.split(":\n")[1])
        assert process.returncode == 0 and "tokens" in losses[-1], process.stderr
    assert losses[0] == losses[1]
    (folder / "empty").mkdir(exist_ok=True)
    process = run("train_gpt2.py", "--sample", "x", "--ckpt", "empty", cwd=folder)
    assert_error(process, "neither ckpt.pt", "train first")
    assert_error(run("train_gpt2.py", "--eval", "--ckpt", "gpt2", "--data", "x", cwd=folder), "x")


def test_other_peoples_files_stay(tiny, whole, tmp_path):
    """A folder with something else, into which a run is written; files of others deleted in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert_error(train(tiny, tmp_path), "has files, but no run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    shutil.copytree(whole[0] / "run", tmp_path / "run", dirs_exist_ok=True)
    for name in ("scores_mine.json", ".mine.tmp"):
        (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run/ckpt.pt").write_bytes(b"torn")  # which --restart is for
    assert train(tiny, tmp_path, "--restart").returncode == 0
    for name in ("notes.txt", "scores_mine.json", ".mine.tmp"):
        assert (tmp_path / "run" / name).read_text() == "mine"
    log = tmp_path / "run/log.csv"
    log.write_text(log.read_text().replace("tokens_per_second", "pictures_per_second"))
    assert_error(train(tiny, tmp_path, "--restart"), "another kind of run")


def test_a_restart_that_is_killed_has_forgotten(tiny, whole, tmp_path):
    """--restart, killed before its first checkpoint, after which the old run goes on."""
    shutil.copytree(whole[0] / "run", tmp_path / "run")
    flags = [*RUN_FLAGS, "--data", tiny, "--restart"]
    interrupt(start("train_gpt2.py", *flags, cwd=tmp_path), 1, signal.SIGKILL)
    assert not (tmp_path / "run/ckpt.pt").exists()
    process = train(tiny, tmp_path)
    assert "are done" not in process.stdout
    assert_same_outcome(whole[0] / "run", tmp_path / "run")
    process = train(tiny, tmp_path, "--lr", 0.5)  # a finished run is not what was asked for
    assert_error(process, "another recipe", "--restart")


def test_a_stop_in_an_evaluation_step_leaves_no_hole(tiny, whole, tmp_path, monkeypatch):
    """A validation, and a row of the log, that a run lacks because it was stopped there."""
    requested = train_gpt2.Run.stop_requested
    monkeypatch.setattr(train_gpt2.Run, "stop_requested", lambda run: run.step == 20)
    process = train(tiny, tmp_path)
    assert "stopped after step 20" in process.stdout
    monkeypatch.setattr(train_gpt2.Run, "stop_requested", requested)
    assert train(tiny, tmp_path).returncode == 0
    expected, log = (outcome(f / "run")[1] for f in (whole[0], tmp_path))
    assert_same_outcome(whole[0] / "run", tmp_path / "run")
    assert log == expected


PIPED = """
import os, signal, subprocess, sys
options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
process = subprocess.Popen(sys.argv[2:], **options)
for line in process.stdout:
    if line.startswith(b"step     10") or line.startswith(b"step     20"):
        process.stdout.close()  # as `tee` that Ctrl-C has ended
        if sys.argv[1] != "0":
            os.killpg(process.pid, int(sys.argv[1]))
        break
sys.exit(process.wait() % 256)
"""


def without_a_reader(number, command, cwd):
    """The exit code of a command whose output is closed after some steps, with a signal to all."""
    command = [sys.executable, "-c", PIPED, int(number), sys.executable, "-u", *command]
    return subprocess.run(list(map(str, command)), cwd=cwd, timeout=150).returncode


@pytest.mark.parametrize("number", [0, signal.SIGINT])
def test_a_run_without_a_reader_is_saved(tiny, whole, tmp_path, number):
    """`| tee log` and Ctrl-C, `| head -6`: a run that ends unsaved, with exit code 0."""
    command = [HERE / "train_gpt2.py", *RUN_FLAGS, "--data", tiny]
    code = without_a_reader(number, command, tmp_path)
    checkpoint = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert (code, checkpoint["finished"]) == ((130, False) if number else (0, True))
    assert number or outcome(tmp_path / "run")[1] == outcome(whole[0] / "run")[1]


def test_ranks_and_bridges_without_a_reader_are_saved(tiny, captions_run, tmp_path):
    """The same of torchrun, and of a bridge."""
    module = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    command = [*module, HERE / "train_gpt2.py", *RUN_FLAGS[:4], "--steps", 2000, "--data", tiny]
    assert without_a_reader(signal.SIGINT, command, tmp_path) != 0
    assert 10 <= torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] < 2000
    flags, _, _ = captions_run
    command = [HERE / "caption.py", *flags, "--steps", 2000]
    assert without_a_reader(signal.SIGINT, command, tmp_path) == 130
    path = tmp_path / "runs/shapes-cross/ckpt.pt"
    assert 10 <= torch.load(path, weights_only=True)["step"] < 2000


def test_a_run_whose_terminal_is_closed_is_saved(tiny, tmp_path):
    """A closed terminal: no checkpoint, and a traceback that nobody sees."""
    pty = pytest.importorskip("pty", reason="needs a system with terminals")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, list(map(str, [sys.executable, "-u", HERE / "train_gpt2.py",
                                                *RUN_FLAGS, "--data", tiny])))
    output = b""
    while b"scenes" not in output:  # evaluated after step 10
        output += os.read(terminal, 1000)
    os.close(terminal)  # which sends SIGHUP
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert 10 <= torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] < 40


def test_closed_standard_streams(tmp_path):
    """A traceback when there is no standard output or error at all."""
    command = f"{sys.executable} {HERE / 'train_gpt2.py'} --sample x --ckpt nothing.pt"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        process = subprocess.run(["sh", "-c", f"{command} {closed}"], cwd=tmp_path,
                                 capture_output=True, text=True)
        assert process.returncode == 2 and "Traceback" not in process.stderr


def test_torchrun_ends_without_a_noise(whole, tiny):
    """Ranks that leave while others work: an abort after right results."""
    folder, _ = whole
    for _ in range(2):
        process = torchrun("train_gpt2.py", "--eval", "--ckpt", "run", "--data", tiny, cwd=folder)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and "terminate" not in errors, errors
        assert output.count("nats per token") == 2


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
    train_set, val_sets = train_gpt2.open_shards(tiny)
    recipe = Recipe(3, 8 * 64, max(1, 4 // size), 1e-3, 1, muon=20, eval_tokens=64 * 21)
    model = small_model(config=train_gpt2.PRESETS["tiny"])
    net = train_gpt2.parallelize(model)
    sums = []
    if size > 1:  # count how often the gradients are summed
        net.register_comm_hook(sums, count_sums)
    config = model.config
    get = functools.partial(train_gpt2.get_micro_batches, train_set, recipe, 0, config)
    border = train_set.num_windows(64) // 8 - 1
    results = []
    for loss, norm in itertools.islice(steps(net, recipe, get, first=border, trained=model), 3):
        results += [loss, norm]
    results.append(model.h[0].attn.c_attn.weight.double().sum().item())
    tokenizer = fineweb.get_tokenizer("tiny")
    results += train_gpt2.validate(net, config, val_sets, tokenizer, 64 * 21, 4, CPU).values()
    items = [hellaswag.render(example, tokenizer) for example in made_items(41)]
    results += train_gpt2.evaluate_hellaswag(model, items, CPU).values()
    pictures = some_pictures(9)
    captioner = small_captioner("cross")
    net = train_gpt2.parallelize(captioner, compile=False)
    recipe = Recipe(3, 7, 8, 1e-2, 1)  # 4 pictures and 3
    get = functools.partial(caption.get_micro_batches, pictures, captioner, recipe, 0)
    for loss, norm in itertools.islice(steps(net, recipe, get), 3):
        results += [loss, norm]
    results += caption.caption_loss(captioner, pictures, CPU)
    texts = caption.write_captions(captioner, pictures.vision(), tokenizer, max_new_tokens=6)
    if rank == 0:
        Path(out).write_text(json.dumps([results, texts, len(sums)]))
    if size > 1:
        torch.distributed.destroy_process_group()


def count_sums(sums, bucket):
    """DDP's own sum of a bucket of gradients, counted."""
    sums.append(bucket.index())
    world = torch.distributed.get_world_size()
    future = torch.distributed.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def test_one_two_and_four_processes_have_the_same_losses(tiny, tmp_path):
    """DDP: other losses on several ranks, or gradients summed at each micro-batch."""
    results = []
    for size in (1, 2, 4):
        args = (size, free_port(), tiny, str(tmp_path / "out.json"))
        torch.multiprocessing.spawn(train_together, args, nprocs=size)
        results.append(json.loads((tmp_path / "out.json").read_text()))
    (expected, texts, _), *others = results
    for losses, other_texts, sums in others:
        assert losses == pytest.approx(expected, rel=1e-4) and other_texts == texts
        assert sums <= 2 * 3  # of 3 steps; of buckets there is one, in the first step two


def disagree_then_hang(rank, port, out):
    """The ranks are at different steps, which they notice; then rank 1 does not answer, and rank 0
    waits for it, here for six seconds at most."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, 2, rank, "127.0.0.1", port)
    os.environ.update(zip(names, map(str, values), strict=True))
    seconds = train_gpt2.datetime.timedelta(seconds=6)
    train_gpt2.datetime = types.SimpleNamespace(timedelta=lambda **_: seconds)
    train_gpt2.join_processes()
    run = train_gpt2.Run(Path(out).parent, {}, train_gpt2.RECIPES["tiny"], "tokens")
    run.step = rank  # as if each had a folder of its own
    with pytest.raises(UserError, match="different checkpoints"):
        run.resume(None, None)
    if rank == 1:
        time.sleep(15)
        os._exit(0)
    try:
        with run:
            run.stop_requested()
    except UserError as error:
        Path(out).write_text(str(error))
    os._exit(0)


def test_ranks_that_disagree_or_hang_are_named_in_one_line(tmp_path):
    """Ranks that train from different steps, wait for ever for another, or end in a traceback."""
    out = tmp_path / "error.txt"
    torch.multiprocessing.spawn(disagree_then_hang, (free_port(), str(out)), nprocs=2)
    assert "another rank does not answer" in out.read_text()


def test_the_first_signal_asks_and_the_second_ends(tmp_path):
    """A Ctrl-C that is not noted, a second one that is caught too, a nohup that is undone."""
    before = signal.getsignal(signal.SIGINT)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with pytest.raises(SystemExit) as stop:  # at the end, too: --compare would go on
        with train_gpt2.Run(tmp_path, {}, train_gpt2.RECIPES["tiny"], "tokens") as run:
            assert not run.stop_requested() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            assert run.stop_requested() and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) == before
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
    assert f"{stopped} are done" in process.stdout
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


HEAD = """
import sys, time, torch, train_gpt2
from torch.nn import functional as F
rows, way = 16_384, sys.argv[1]
torch.manual_seed(0)
h = torch.randn(rows, 768, requires_grad=True)
w = (torch.randn(50_304, 768) * 0.02).requires_grad_()
y = torch.randint(50_257, (rows,))
h.grad, w.grad = torch.zeros_like(h), torch.zeros_like(w)

def loss():
    if way.startswith("linear_cross_entropy"):
        return F.linear_cross_entropy(h, w, y, options=torch.nn.LinearCrossEntropyOptions())
    with train_gpt2.autocast(torch.device("cpu")):
        if way == "plain":
            return F.cross_entropy(F.linear(h, w).float(), y)
        return train_gpt2.ChunkedCrossEntropy.apply(h, w, y, 50_304) / rows

times = []
for _ in range(3):
    began = time.time()
    value = loss()
    value.backward()
    times.append(time.time() - began)
print(f"{way:28} {value.item():.4f} nats, peak{train_gpt2.hardware_use(0)}, {min(times):5.2f} s")
"""


@measured
def test_measured_parts_of_training():
    """The head's loss on 16,384 rows in three ways, and attention in fp32 and bf16."""
    print()
    for way in ("plain", "linear_cross_entropy, fp32", "ours"):  # a process each, for its memory
        if hasattr(F, "linear_cross_entropy") or not way.startswith("linear"):
            subprocess.run([sys.executable, "-c", HEAD, way], cwd=HERE, check=True)
    for B, nh, T, hs in ((24, 4, 64, 32), (8, 12, 256, 64), (4, 12, 512, 64), (2, 12, 1024, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(3, B, T, nh, hs, dtype=dtype).transpose(2, 3).requires_grad_()

            def attend(qkv=qkv):
                F.scaled_dot_product_attention(*qkv, is_causal=True).sum().backward()

            (seconds,) = in_turns(attend)
            milliseconds = f"{1000 * seconds:.1f} ms forward and backward"
            print(f"attention, {B} x {nh} heads x {T} tokens, {dtype}: {milliseconds}")


@measured
@real_data
def test_measured_muon_beside_adamw(tmp_path):
    """AdamW and Muon on real text, preset `small`: the best of three rates each, two seeds."""
    texts = [*REAL.glob("text/*/*.jsonl"), *REAL.glob("text/*.txt")]
    fineweb.text_to_shards(sorted(texts), tmp_path / "real")
    config = train_gpt2.PRESETS["small"]
    train_set, val_sets, tokenizer = train_gpt2.open_data(tmp_path / "real", config)
    recipe = Recipe(300, 1024, 4, 1e-3, 30, eval_tokens=16_384)
    recipes = {"AdamW": [dataclasses.replace(recipe, lr=lr) for lr in (5e-4, 1e-3, 2e-3)],
               "Muon": [dataclasses.replace(recipe, muon=times) for times in (5, 10, 20)]}

    def train(recipe, seed):
        model = small_model(seed, config)
        losses = []
        began = time.process_time()
        seconds = 0.0
        for i, _ in enumerate(text_steps(model, recipe, train_set, seed), 1):
            if i % 25 == 0:
                seconds += time.process_time() - began
                row = train_gpt2.validate(model, config, val_sets, tokenizer, 16_384, 4, CPU)
                losses.append((i, row["val_val"]))
                began = time.process_time()
            if i == recipe.max_steps:
                print(f"lr {recipe.lr}, Muon {recipe.lr * recipe.muon}, seed {seed}: "
                      f"{losses[-1][1]:.4f} nats after {i} steps, {seconds:.0f} s", flush=True)
                return losses

    means = {}
    for name, choices in recipes.items():
        runs = [train(recipe, 0) for recipe in choices]
        best = min(range(3), key=lambda i: runs[i][-1][1])
        pairs = zip(runs[best], train(choices[best], 1), strict=True)
        means[name] = [(step, (a + b) / 2) for (step, a), (_, b) in pairs]
    final = means["AdamW"][-1][1]
    reached = [step for step, loss in means["Muon"] if loss <= final]
    print(f"Muon reaches AdamW's {final:.4f} after {reached[:1]} of 300 steps", means)
    train_gpt2.draw_curves(tmp_path / "muon.png", {"validation loss, nats per token": means})
    print(tmp_path / "muon.png")


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
    """Tokens of the 124M beside transformers' generate(); captions, greedy and beam 5."""
    transformers = pytest.importorskip("transformers")
    print()
    model = GPT(train_gpt2.PRESETS["gpt2"])
    train_gpt2.export_hf(model, fineweb.get_tokenizer("gpt2"), tmp_path)
    train_gpt2.freeze(model, CPU)
    dtype = torch.bfloat16 if train_gpt2.uses_bf16(CPU) else torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
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
    captioner = caption.build("linear", 33, 1024, model)
    captioner.eot = -1  # never drawn: all captions have 20 tokens
    vision = torch.randn(64, 33, 1024)
    with train_gpt2.autocast(CPU):
        times = in_turns(lambda: captioner.generate(vision, 20),
                         lambda: caption.beam_search(captioner, vision, 5, 20), rounds=1)
    print(f"captions of 20 tokens, 64 pictures, 124M: greedy {64 / times[0]:.1f} a second, "
          f"beam 5 {64 / times[1]:.1f}")


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
    ours = coco_eval.score_tokens(references, candidates)
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


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


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
    """The whole process from raw captions in files, ours and the official one, in turns."""
    references, candidates = leave_one_out()
    for pictures in (1_000, 5_000):
        ids = list(candidates)[:pictures]
        annotations = [{"image_id": id, "caption": c} for id in ids for c in references[id]]
        write_json(tmp_path / "references.json", {"annotations": annotations})
        results = [{"image_id": id, "caption": candidates[id]} for id in ids]
        write_json(tmp_path / "results.json", results)
        files = ["references.json", "results.json"]
        ours = [HERE / "coco_eval.py", "--references", files[0], "--results", files[1]]

        def call(command):
            command = [sys.executable, *command]
            subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

        ours = functools.partial(call, ours)
        theirs = functools.partial(call, ["-c", OFFICIAL_SCORES, *files])
        fast, slow = in_turns(ours, theirs, rounds=2)
        ratio = f"{fast / slow:.2f}"
        print(f"\n{pictures:,} pictures: ours {fast:.2f} s, official {slow:.2f} s ({ratio})")


@pytest.mark.parametrize("word, stem", [
    ("quickly", "quick"), ("nearly", "near"), ("only", "onli"), ("family", "famili"),
    ("cities", "citi"), ("sitting", "sit"), ("riding", "ride"), ("dogs", "dog"), ("sky", "sky"),
    ("colorful", "color"), ("happily", "happili"), ("skies", "sky"), ("hill", "hill")])
def test_stems_are_those_of_porters_second_stemmer(word, stem):
    """A rule that never applies, since another one comes before it."""
    assert coco_eval.stem(word) == stem


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


def test_tokens_by_hand():
    """Tokens without Java: contractions, punctuation, brackets, times, other scripts."""
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
    scores = coco_eval.score_tokens(references, candidates)
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


def test_saying_a_word_again_gains_nothing():
    """Clipping, in BLEU and in CIDEr-D."""
    dogs = [["two", "dogs"]]
    assert coco_eval.bleu([dogs], [["dogs"] * 4])["BLEU-1"][0] == pytest.approx(1 / 4)
    bleu = coco_eval.bleu([[["dogs"] * 2]], [["dogs", "cat"]])
    assert bleu["BLEU-1"][0] == pytest.approx(1 / 2)

    def cider(words):
        return coco_eval.cider([dogs, [["a", "cat"]]], [words, ["a"]])["CIDEr"][1][0]

    length = math.exp(-1 / 72)
    assert cider(["dogs", "x", "y"]) == pytest.approx(10 / 4 / math.sqrt(6) * length)
    assert cider(["dogs"] * 3) == pytest.approx(10 / 4 / 3 / math.sqrt(2) * length)


def shapes_captions(number, seed=0):
    """References and candidates of toy scenes."""
    rng = random.Random(seed)
    captions = [fineweb.captions(fineweb.random_scene(rng), rng) for _ in range(number)]
    references = {i: texts[1:] for i, texts in enumerate(captions)}
    return references, {i: texts[0] for i, texts in enumerate(captions)}


def test_scores_do_not_depend_on_order_or_the_type_of_ids():
    """Scores that change with the order of pictures, or with pictures that are not scored."""
    references, candidates = shapes_captions(40)
    scores = coco_eval.evaluate(references, candidates)
    backwards = {str(id): references[id][::-1] for id in reversed(references)}
    other = coco_eval.evaluate(backwards, dict(reversed(candidates.items())))
    metrics = set(scores["corpus"]) - {"METEOR"}  # where references are equal, the first counts
    for metric in metrics:
        assert other["corpus"][metric] == pytest.approx(scores["corpus"][metric], abs=1e-12)
        for id, picture in scores["per_image"].items():
            assert other["per_image"][id][metric] == pytest.approx(picture[metric], abs=1e-12)
    half = {id: candidates[id] for id in range(20)}
    alone = coco_eval.evaluate({id: references[id] for id in range(20)}, half)
    assert coco_eval.evaluate(references, half) == alone


def test_a_perfect_candidate_has_full_marks():
    """Less than full marks for a candidate that is a reference, or more than none for nothing."""
    references, _ = shapes_captions(40)
    first = {id: texts[3] for id, texts in references.items()}
    scores = coco_eval.evaluate({id: [text] for id, text in first.items()}, first)["corpus"]
    assert scores.pop("CIDEr") == pytest.approx(10)
    assert all(value == pytest.approx(1) for value in scores.values())
    nothing = coco_eval.evaluate({1: ["a red cross"], 2: ["two dogs"]}, {1: "", 2: "zebra"})
    assert not any(picture["METEOR"] for picture in nothing["per_image"].values())


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


def test_common_subsequence_equals_brute_force():
    """ROUGE-L's longest common subsequence."""
    rng = random.Random(0)
    for _ in range(50):
        a = rng.choices("abc", k=rng.randint(0, 7))
        b = rng.choices("abc", k=rng.randint(0, 7))
        lengths = []
        for n in range(8):
            if set(itertools.combinations(a, n)) & set(itertools.combinations(b, n)):
                lengths.append(n)
        assert coco_eval.common_subsequence(a, b) == max(lengths)


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
    results = [{"image_id": id, "caption": text} for id, text in perfect.items()]
    good = write_json(tmp_path / "good.json", results)
    process = run("coco_eval.py", "--references", truth, "--results", good, cwd=tmp_path)
    expected = coco_eval.evaluate(references, perfect)
    assert process.returncode == 0 and "10 of 12 pictures scored" in process.stdout
    assert f"{expected['corpus']['METEOR']:.4f}" in process.stdout
    assert "METEOR (exact + stem)" in process.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == json.loads(json.dumps(expected))
    with pytest.raises(UserError, match="--out"):  # which would overwrite the captions
        coco_eval.score_file(truth, good, good)


@pytest.mark.parametrize("results, words", [
    ("[]", "no caption"), ("{", "JSON"), ('{"a": 1}', "list of results"),
    ('[{"image_id": 1}]', "'caption'"), ('[{"image_id": 1, "caption": 3}]', '"caption" of'),
    ('[{"image_id": 1.0, "caption": "a"}]', '"image_id" or'),
    ('[{"image_id": [1], "caption": "a"}]', '"image_id" or'),
    ('[{"image_id": true, "caption": "a"}]', '"image_id" or'),
    ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', "1 2 times"),
    ('[{"image_id": 7, "caption": "a"}]', "picture 7"),
    ('[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]', "1 2 times")])
def test_wrong_results_are_one_line(results, words, tmp_path):
    """Results that are wrong, scored all the same."""
    annotations = {"annotations": [{"image_id": 1, "caption": "a dog"}]}
    references = write_json(tmp_path / "references.json", annotations)
    path = write_json(tmp_path / "results.json", results)
    with pytest.raises(UserError, match=words):
        coco_eval.score_file(references, path, tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()


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
    with pytest.raises(UserError, match="not empty"):
        coco_eval.make_shapes(shapes)


def test_a_folder_of_own_pictures(tmp_path):
    """Your own pictures: how they are split, and what is wrong with their annotations."""
    images = [{"id": i, "file_name": f"{i}.png", "scene": 3} for i in range(20)]
    annotations = [{"image_id": str(i), "caption": f"number {i}"} for i in range(20)]
    silent = [{"id": 99, "file_name": "silent.png"}]
    content = {"images": images + silent, "annotations": annotations}
    path = write_json(tmp_path / "annotations/captions.json", content)
    (tmp_path / "images").mkdir()
    train = coco_eval.read_dataset(tmp_path, "train")
    val = coco_eval.read_dataset(tmp_path, "val")
    assert [p["id"] for p in val] == [0, 10] and len(train) == 18
    expected = {"id": 0, "path": tmp_path / "images/0.png", "captions": ["number 0"]}
    assert val[0] == expected | {"scene": None}  # a scene of another program is none
    write_json(path, {"images": images[:9], "annotations": annotations[:9]})
    assert [p["id"] for p in coco_eval.read_dataset(tmp_path, "val")] == [0]  # nine are enough
    wrong = [
        ({"annotations": []}, "images"), ({**content, "images": images[:1] * 2}, "0 2 times"),
        ({**content, "images": images[1:]}, "picture 0"),
        ({"images": images, "annotations": annotations[:1]}, "too few pictures"),
        ({"images": [{"id": 1}]}, "file_name"), ({"images": [{"id": 1.0, "file_name": "a"}]}, "id"),
        ({"images": [{"id": 1, "file_name": "../../etc/passwd"}]}, "leads out"),
        ({"images": [{"id": 1, "file_name": "/etc/passwd"}]}, "leads out"),
        ({"images": [{"id": 1, "file_name": "a\\..\\b.png"}]}, "leads out"),
        ({"images": [{"id": 1, "file_name": "C:b.png"}]}, "leads out")]
    for content, words in wrong:
        write_json(path, content)
        with pytest.raises(UserError, match=words):
            coco_eval.read_dataset(tmp_path, "train")
    with pytest.raises(UserError, match="COCO's layout"):
        coco_eval.read_dataset(tmp_path / "images", "train")


def test_val2017_alone_is_split(tmp_path):
    """COCO's validation pictures on a laptop: 4,500 for training and 500 for validation."""
    for split, count in (("val2017", 50), ("train2017", 30)):
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(count)]
        annotations = [{"image_id": i, "caption": "a"} for i in range(count)]
        path = tmp_path / f"annotations/captions_{split}.json"
        write_json(path, {"images": images, "annotations": annotations})
    (tmp_path / "val2017").mkdir()
    sizes = [len(coco_eval.read_dataset(tmp_path, split)) for split in ("train", "val")]
    assert sizes == [45, 5]
    (tmp_path / "train2017").mkdir()
    sizes = [len(coco_eval.read_dataset(tmp_path, split)) for split in ("train", "val")]
    assert sizes == [30, 50]


def archive(files, compression=zipfile.ZIP_STORED):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", compression) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return body.getvalue()


def test_coco_is_fetched_unpacked_and_left_alone(server, tmp_path, monkeypatch):
    """COCO's archives: downloads that break off, what is there already, the room on the disk."""
    pictures = {f"val2017/{i}.jpg": BODY[:3000] for i in range(50)}
    annotations = {"annotations/captions_val2017.json": "{}"}
    bodies = [archive(annotations), archive(pictures), archive({"train2017/1.jpg": BODY[:100]})]
    archives = []
    for (address, _, _), body in zip(coco_eval.ARCHIVES, bodies, strict=True):
        archives.append((address, len(body), hashlib.md5(body).hexdigest()))
        server.files[f"/{address}"] = body
    monkeypatch.setattr(coco_eval, "HOST", server.address)
    monkeypatch.setattr(coco_eval, "ARCHIVES", archives)
    server.behave = ["", "break off", "503"]
    coco_eval.download_coco(tmp_path / "coco", val_only=True)
    assert {p.name for p in (tmp_path / "coco").iterdir()} == {"annotations", "val2017"}
    assert len(list((tmp_path / "coco/val2017").iterdir())) == 50
    asked = len(server.ranges)
    coco_eval.download_coco(tmp_path / "coco")
    assert (tmp_path / "coco/train2017/1.jpg").read_bytes() == BODY[:100]
    assert len(server.ranges) == asked + 1  # what is there is not downloaded again
    (tmp_path / "half").mkdir()
    (tmp_path / "half/train2017.zip.part").write_bytes(bytes(700))
    (tmp_path / "half/train2017.tmp").mkdir()
    (tmp_path / "half/train2017.tmp/1.jpg").write_bytes(bytes(300))
    archives[:] = [("zips/train2017.zip", 10**15, "0" * 32)]
    asked = []
    monkeypatch.setattr(fineweb, "require_space", lambda folder, size: asked.append(size))
    monkeypatch.setattr(coco_eval, "unpack", lambda *args: None)
    monkeypatch.setattr(fineweb, "download", lambda *args: None)
    coco_eval.download_coco(tmp_path / "half")
    assert asked == [2 * 10**15 - 1000]


def test_archives_that_are_not_right(tmp_path):
    """An archive that writes somewhere else, or leaves half a folder."""
    names = ("val2017/1.jpg", "val2017/../../out.txt")
    (tmp_path / "a.zip").write_bytes(archive(dict.fromkeys(names, "x")))
    coco_eval.unpack(tmp_path / "a.zip", tmp_path / "coco", "val2017")
    assert {path.name for path in tmp_path.iterdir()} == {"coco"}
    assert {path.name for path in (tmp_path / "coco").iterdir()} == {"val2017"}
    damaged = bytearray(archive({"val2017/1.jpg": BODY}, zipfile.ZIP_DEFLATED))
    damaged[60] ^= 255
    damage = {b"PK no archive": "cannot be unpacked", bytes(damaged): "cannot be unpacked",
              archive({"other/1.jpg": "x"}): "outside", archive({"/etc/out.txt": "x"}): "outside"}
    for body, words in damage.items():
        (tmp_path / "a.zip").write_bytes(body)
        with pytest.raises(UserError, match=words):
            coco_eval.unpack(tmp_path / "a.zip", tmp_path / "coco/again", "val2017")
        assert not list(tmp_path.glob("coco/again/*"))


def test_pictures_of_every_kind_are_read_right(tmp_path):
    """16 and 32 bits, floats, EXIF orientation, transparency, palettes, CMYK, animations."""
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(1, 64).repeat(4, 0)
    left_red = Image.new("RGB", (8, 4), "white")
    left_red.paste((255, 0, 0), (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    half = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 4))
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((ramp // 257).astype(np.int32)).save(tmp_path / "32.tif")
    left_red.save(tmp_path / "turned.png", exif=exif)
    left_red.convert("CMYK").save(tmp_path / "cmyk.tif")
    half.save(tmp_path / "half.png")
    half.convert("RGB").quantize(4).save(tmp_path / "palette.png", transparency=0)
    black = Image.new("RGB", (8, 4), "black")
    left_red.save(tmp_path / "moving.gif", save_all=True, append_images=[black])
    image = {path.stem: np.asarray(coco_eval.load_image(path)) for path in tmp_path.iterdir()}
    assert all(i.dtype == np.uint8 and i.shape[2] == 3 for i in image.values())
    for kind in ("16", "float", "32"):  # scaled, not clipped
        assert np.abs(image[kind][0, :, 0] - np.linspace(0, 255, 64)).max() <= 1, kind
    assert image["turned"].shape == (8, 4, 3)
    assert (image["turned"][0] == (255, 0, 0)).all() and (image["turned"][-1] == 255).all()
    assert (image["half"][:, 0] == (0, 0, 255)).all() and (image["half"][:, 3] == 255).all()
    assert (image["cmyk"][0, 0] == (255, 0, 0)).all() and (image["moving"][0, -1] > 250).all()
    assert (image["palette"] == 255).all(-1).any()


@real_data
def test_odd_pictures_are_read_or_refused_by_name():
    """41 difficult files: half-decoded pictures, wrong sizes, orientation."""
    folder = REAL / "odd-images"
    for entry in json.loads((folder / "manifest.json").read_text()):
        path = folder / entry["file"]
        if not entry["decodes"]:
            with pytest.raises(UserError, match=entry["file"]):
                coco_eval.load_image(path)
            continue
        turned = entry["exif_orientation"] in (5, 6, 7, 8)
        size = entry["size"][::-1] if turned else entry["size"]
        image = coco_eval.load_image(path)
        assert image.mode == "RGB" and list(image.size) == size, entry
    upright = np.asarray(coco_eval.load_image(folder / "hopper.jpg"), dtype=float)
    turned = np.asarray(coco_eval.load_image(folder / "hopper_orientation_6.jpg"), dtype=float)
    assert np.abs(upright - turned).mean() < 12  # the same person, whichever way the file is turned
    ramp = np.asarray(coco_eval.load_image(folder / "pngsuite_basn0g16.png"))
    assert len(np.unique(ramp)) > 30  # clipping would leave white


def test_pictures_with_odd_numbers(tmp_path):
    """A NaN that makes a picture black; signed values; transparent 16-bit gray; a long strip."""
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 64).repeat(4, 0)
    broken = ramp.copy()
    broken[0, 0] = np.nan
    broken[1, 0] = np.inf
    signed = (ramp * 2 - 1) * 30_000
    deep = (ramp * 65535).astype(np.uint16)
    Image.fromarray(broken).save(tmp_path / "broken.tif")
    Image.fromarray(signed).save(tmp_path / "float.tif")
    Image.fromarray(signed.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(deep).save(tmp_path / "clear.png", transparency=0)
    image = {path.stem: np.asarray(coco_eval.load_image(path)) for path in tmp_path.iterdir()}
    for name in ("broken", "float", "int"):
        assert image[name][:, :, 0].mean() == pytest.approx(127, abs=2), name
    assert (image["clear"][:, 0] == 255).all() and image["clear"][0, 1, 0] < 10
    Image.new("L", (1, 1_000_000)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match="1 x 1000000 pixels"):
        coco_eval.load_image(tmp_path / "strip.png")


def test_two_pictures_with_one_id_are_refused(tmp_path):
    """References of two pictures that are pooled because they share an id."""
    images = [{"id": 5, "file_name": "a.png"}, {"id": "5", "file_name": "b.png"}]
    content = {"images": images, "annotations": [{"image_id": 5, "caption": "a"}]}
    path = write_json(tmp_path / "references.json", content)
    with pytest.raises(UserError, match="picture 5 2 times"):
        coco_eval.read_references(path)


def test_scenes_of_other_programs_are_none(tmp_path):
    """A "toy_scene" that means something else, and a traceback in the facts."""
    scene = fineweb.random_scene(random.Random(0))
    assert coco_eval.toy_scene({"toy_scene": scene}) == scene
    thing = scene["objects"][0]
    for other in (None, 3, [], {}, {"objects": 7}, {"objects": [{}]}, {"objects": [[1]]},
                  {"objects": [thing | {"color": "black"}]}, {"objects": [thing | {"row": 9}]},
                  {"objects": [thing | {"size": 3}]}):
        assert coco_eval.toy_scene({"toy_scene": other}) is None, other


@pytest.mark.parametrize("text, words", [
    ("wow!!!! what??", "wow !!!! what ??"), ("a <b> bold </b> word", "a <b> bold </b> word"),
    ("see http://a.b/c?d=1 now", "see http://a.b/c?d=1 now"), ("x.com", "x.com"),
    ("mail me@x.org", "mail me@x.org"), ("plan b. is u.s. made", "plan b. is u.s. made")])
def test_tokens_that_are_rare(text, words):
    """Runs of marks, tags, addresses: what the Stanford tokenizer makes of them."""
    assert coco_eval.tokenize(text) == words.split()


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
    look = model.bridge.hook(vision[None])
    h = model.decoder.hidden_states(x, before_block=look)
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
    each = model.loss(vision, packed, "none")
    for b, captions in enumerate(pictures.captions):
        for k, tokens in enumerate(captions):
            loss = plain_caption_loss(model, vision[b], tokens).sum().item()
            assert each[b][packed.owner[b] == k].sum().item() == pytest.approx(loss, rel=1e-5)
    count = (packed.targets >= 0).sum().item()
    assert count == sum(map(len, itertools.chain(*pictures.captions)))
    mean = each.sum().item() / count
    assert model.loss(vision, packed).item() == pytest.approx(mean, rel=1e-5)
    alone = model.loss(vision[:1], model.pack(pictures.captions[:1]), "sum").item()
    assert alone == pytest.approx(each[0].sum().item(), rel=1e-5)  # whoever else is in the batch
    token, whole = caption.caption_loss(model, pictures, CPU, batch=3)
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
        still = ".bias" in n or (name == "blind" and n == "norm.weight")  # it multiplies zeros
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
            while len(tokens) < len(row) and model.eot not in tokens:
                losses = plain_next(model, vision[b], tokens)
                tokens.append(losses.argmax().item())
            assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {model.eot}
    alone = model.generate(vision[2:3], 12).tolist()[0]
    together = model.generate(vision, 12).tolist()[2]
    assert together[: len(alone)] == alone and set(together[len(alone) :]) <= {model.eot}


def plain_next(model, vision, tokens):
    """Logits of the token after `tokens`, computed again."""
    start = model.beginning(vision[None])
    P = start.size(1)
    inputs = torch.tensor([tokens], dtype=torch.long)
    x = torch.cat([start, model.decoder.embed(inputs, torch.arange(P, P + len(tokens)))], 1)
    look = model.bridge.hook(vision[None])
    return model.decoder.logits(model.decoder.hidden_states(x, before_block=look))[0, -1]


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
    _, loss = model(vision.expand(169, -1, -1), packed, advantages * chance * 169 / 2)
    for ours, theirs in zip(gradient(loss), exact, strict=True):
        assert torch.allclose(ours, -theirs, atol=1e-6)
    assert max(g.abs().max() for g in exact) > 1e-4


def test_samples_have_the_rewards_of_their_own_picture(precision, monkeypatch):
    """A sample that is scored for another picture, or packed behind it."""
    tokenizer = fineweb.get_tokenizer("tiny")
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


@torch.no_grad()
def test_cross_attention_begins_with_the_decoder_as_it_is():
    """A bridge that disturbs the decoder before it has learned anything."""
    bridge = caption.build("cross", 5, 12, small_model(config=WIDE)).bridge
    x = torch.randn(1, 6, 32)
    assert torch.equal(bridge.hook(torch.randn(1, 5, 12))(2, x), x)


def plain_attention(layer, x, source):
    """caption.Attention for one row in float64, head by head and place by place."""
    w = {n: p.double() for n, p in layer.state_dict().items()}
    C = x.size(1)
    q = x @ w["q.weight"].T + w["q.bias"]
    k, v = (source @ w["kv.weight"].T + w["kv.bias"]).split(C, dim=1)
    hs = x.size(1) // layer.n_head
    y = torch.zeros_like(q)
    for h in range(layer.n_head):
        s = slice(h * hs, (h + 1) * hs)
        for t in range(len(x)):
            y[t, s] = (k[:, s] @ q[t, s] / math.sqrt(hs)).softmax(0) @ v[:, s]
    return y @ w["c_proj.weight"].T + w["c_proj.bias"]


def plain_norm(norm, x):
    centered = x - x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True) + norm.eps
    return centered / variance.sqrt() * norm.weight.double() + norm.bias.double()


@torch.no_grad()
def test_bridges_equal_plain_float64_ones():
    """A layer of the Q-Former, gated cross-attention, the linear map."""
    torch.manual_seed(1)
    x = torch.randn(7, 32)
    vision = torch.randn(5, 12)
    wide = torch.randn(5, 32)
    layer = small_captioner("qformer").bridge.layers[0]
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    normed = plain_norm(layer.ln_self, x.double())
    y = x.double() + plain_attention(layer.self_attn, normed, normed)
    w = {n: p.double() for n, p in layer.mlp.state_dict().items()}
    u = plain_norm(layer.ln_mlp, y) @ w["c_fc.weight"].T + w["c_fc.bias"]
    y = y + plain_gelu(u) @ w["c_proj.weight"].T + w["c_proj.bias"]
    y = y + plain_attention(layer.cross_attn, plain_norm(layer.ln_cross, y), wide.double())
    assert torch.allclose(layer(x[None], wide[None])[0].double(), y, atol=1e-4)
    model = small_captioner("cross")
    bridge = model.bridge
    ln = bridge.ln[1]
    seen = plain_norm(ln, bridge.linear.prefix(vision).double())
    looked = plain_attention(bridge.cross_attn[1], plain_norm(ln, x.double()), seen)
    expected = (x.double() + looked).float()[None]
    assert torch.allclose(bridge.hook(vision[None])(1, x[None]), expected, atol=1e-4)
    bridge = small_captioner("linear").bridge
    y = plain_norm(bridge.norm, vision.double()) @ bridge.project.weight.double().T
    y = y + bridge.project.bias.double() + bridge.positions.double()
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


def test_a_prefix_has_to_fit_into_the_context():
    """Vision tokens that leave no room for a caption."""
    decoder = small_model(config=train_gpt2.PRESETS["tiny"])
    for name in caption.BRIDGES:
        with pytest.raises(UserError, match="65 vision tokens leave no room.*--lm"):
            caption.build(name, 65, 12, decoder)


@pytest.mark.parametrize("name", caption.BRIDGES)
def test_frozen_parts_have_the_weights_that_products_need(name, monkeypatch):
    """Weights cast to bf16 at each call; or losses that differ more than bf16 does."""
    pictures = some_pictures(4)
    vision = pictures.vision(range(4))
    model = small_captioner(name)
    packed = model.pack(pictures.captions)
    exact = model.loss(vision, packed).item()
    monkeypatch.setattr(train_gpt2, "uses_bf16", lambda device: True)
    train_gpt2.freeze(model.decoder, CPU)
    assert model.decoder.h[0].ln_1.weight.dtype == model.decoder.wpe.weight.dtype == torch.float32
    weights = {(96, 32), (48, 32)}  # c_attn and wte, whose shapes nothing in a bridge has
    with train_gpt2.autocast(CPU), torch.profiler.profile(record_shapes=True) as profile:
        loss = model.loss(vision, packed)
        model.generate(vision, 5)
    assert loss.item() == pytest.approx(exact, abs=0.1, rel=2e-2)
    casts = [e for e in profile.events() if e.name == "aten::_to_copy" and e.input_shapes[0]]
    assert casts and not weights & {tuple(event.input_shapes[0]) for event in casts}


@pytest.fixture(scope="session")
def toy_clip(tmp_path_factory):
    """A tiny CLIP with random weights, as a checkpoint."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    model = open_clip.CLIP(**caption.TOY_CLIP)
    content = {"clip": caption.TOY_CLIP, "model": model.state_dict()}
    train_gpt2.save_checkpoint(path, content)
    return path


def test_the_toy_clip_is_trained(shapes, tmp_path, monkeypatch):
    """A first run that stops at the toy CLIP, or leaves parts of it as they were."""
    def short(steps, *args, **options):
        return Recipe(6, *args, **options)

    monkeypatch.setattr(caption, "Recipe", short)
    caption.train_clip(shapes, tmp_path / "clip.pt")
    encoder = caption.load_clip(tmp_path / "clip.pt")
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 65, 96)
    torch.manual_seed(0)
    before = open_clip.CLIP(**caption.TOY_CLIP).state_dict()
    after = train_gpt2.read_checkpoint(tmp_path / "clip.pt", holds="clip")["model"]
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert len(same) < len(before) / 10, same


def test_the_decoder_is_asked_about_the_map_of_the_picture(shapes, monkeypatch):
    """map_facts(): maps of other pictures, or answers that are cut in the wrong place."""
    pictures = coco_eval.read_dataset(shapes, "val")[:100]
    tokenizer = fineweb.get_tokenizer("tiny")
    scenes = {fineweb.scene_map(p["scene"]): p["scene"] for p in pictures}

    def true_answer(decoder, idx, length, **options):
        rows = []
        for row in idx.tolist():
            scene_map, prompt = tokenizer.decode(row[1:]).split("\n")
            things = {fineweb.object_name(t): t for t in scenes[scene_map]["objects"]}
            named = [thing for name, thing in things.items() if name in prompt]
            end = f" {list(things)[0]}" if prompt.endswith("of a") else ""
            if prompt == "there are":
                end = f" {fineweb.NUMBERS[len(things)]} objects"
            elif prompt.endswith("the") and named:
                end = " " + fineweb.place(named[0])
            elif len(named) == 2:
                named.sort(key=lambda t: prompt.index(fineweb.object_name(t)))
                side = fineweb.relations(*named[::-1])[0]
                end = f" to its {side}" if side in ("left", "right") else f" {side} it"
            rows.append((row + tokenizer.encode_ordinary(end + "\n a b c d e"))[: len(row) + 6])
        return torch.tensor(rows)

    monkeypatch.setattr(train_gpt2, "generate", true_answer)
    setup = types.SimpleNamespace(tokenizer=tokenizer, decoder=None)
    shares = caption.map_facts(setup, pictures)
    assert shares == dict.fromkeys(coco_eval.FACTS, 1.0)


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
        toy_clip, shapes, tmp_path, monkeypatch, precision):
    """Vision tokens of another picture or CLIP; work that is done twice."""
    monkeypatch.chdir(tmp_path)
    encoder = caption.load_clip(toy_clip)
    pictures = coco_eval.read_dataset(shapes, "train")[:150]
    seen = []
    prepared = caption.prepared
    monkeypatch.setattr(caption, "prepared", lambda *args: seen.append(args) or prepared(*args))

    def features(pictures=pictures, encoder=encoder):
        """(vision tokens, how many pictures were read for them)"""
        seen.clear()
        tokens, _ = caption.cached_features(encoder, pictures, "x")
        return np.array(tokens), len(seen)

    first, count = features()
    assert first.shape == (150, 33, 96) and first.dtype == np.float16 and count == 150
    assert not any(p.requires_grad for p in encoder.visual.parameters())
    image = encoder.preprocess(coco_eval.load_image(pictures[70]["path"]))[None]
    tokens = caption.pool_tokens(encoder(image))[0].numpy()
    assert np.allclose(first[70], tokens, atol=2e-2)
    again, count = features()
    assert np.array_equal(first, again) and count == 0
    path = next(Path("data/features").glob("x-*.bin"))
    part = path.rename(path.with_suffix(".part"))
    with fineweb.lock(part), pytest.raises(UserError, match="another process is at work"):
        features()
    os.truncate(part, 100 * 33 * 96 * 2 + 7)  # as a kill leaves it
    again, count = features()
    assert np.array_equal(first, again) and count == 150 - 64
    other = caption.ImageEncoder(encoder.visual, encoder.preprocess, "other")
    for change in ({"pictures": pictures[:9]}, {"encoder": other}):
        assert features(**change)[1] == len(change.get("pictures", pictures))
    copies = [picture | {"path": tmp_path / Path(picture["path"]).name} for picture in pictures[:9]]
    for copy, picture in zip(copies, pictures, strict=False):
        shutil.copy(picture["path"], copy["path"])
    copies[3]["path"].write_bytes(b"no picture")
    assert np.isnan(features(copies)[0]).any((1, 2)).tolist() == [i == 3 for i in range(9)]
    shutil.copy(pictures[8]["path"], copies[3]["path"])  # now it is whole, under the same name
    found, count = features(copies)
    assert np.allclose(found[3], first[8], atol=1e-3) and count == 9


EXTRACTION = """
import sys, time, caption, coco_eval
pool_tokens = caption.pool_tokens
caption.pool_tokens = lambda *args: (time.sleep(1), pool_tokens(*args))[1]
pictures = coco_eval.read_dataset(sys.argv[2], "train")
caption.cached_features(caption.load_clip(sys.argv[1]), pictures, "x")
"""


def test_an_extraction_that_is_killed_goes_on(toy_clip, shapes, tmp_path, monkeypatch):
    """Vision tokens that are lost, or wrong, after a kill."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", EXTRACTION, toy_clip, shapes]
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    batch = 64 * 33 * 96 * 2  # bytes; a file that is being written may show a part of them
    while not any(p.stat().st_size >= batch for p in tmp_path.glob("data/features/x-*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    size = next(tmp_path.glob("data/features/x-*.part")).stat().st_size
    done = size // batch * 64
    pictures = coco_eval.read_dataset(shapes, "train")
    assert 0 < done < len(pictures)
    encoder = caption.load_clip(toy_clip)
    seen = []
    prepared = caption.prepared
    monkeypatch.setattr(caption, "prepared", lambda *args: seen.append(args) or prepared(*args))
    again = np.array(caption.cached_features(encoder, pictures, "x")[0])
    assert len(seen) == len(pictures) - done
    shutil.rmtree("data/features")
    whole = np.array(caption.cached_features(encoder, pictures, "x")[0])
    assert np.array_equal(again, whole)


@pytest.fixture(scope="session")
def captions_run(toy_clip, shapes, whole, tmp_path_factory):
    """(flags of a short run, the folder in which one was made without interruption, its output)."""
    flags = ["--data", shapes, "--lm", whole[0] / "run/ckpt.pt", "--clip", toy_clip]
    flags += ["--bridge", "cross", "--steps", 30, "--batch", 8, "--micro-batch", 4]
    folder = tmp_path_factory.mktemp("captions")
    process = run("caption.py", *flags, cwd=folder)
    assert process.returncode == 0, process.stderr
    return flags, folder, process.stdout


def test_a_caption_run_leaves_its_folder(captions_run, shapes):
    """The files of a bridge's run; scores that are not those of its results."""
    flags, folder, output = captions_run
    out = folder / "runs/shapes-cross"
    names = {"ckpt.pt", "best.pt", "log.csv", "curves.png", "grid.png", "results.json"}
    assert {path.name for path in out.iterdir()} >= names | {"scores.json"}
    for words in ("trainable parameters", "METEOR (exact + stem)", "facts, unseen pairs", "left",
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
    process = run("caption.py", "--bridge", "cross", "--out", out, "--eval", cwd=folder)
    assert f"100 validation pictures of {shapes}" in process.stdout, process.stderr


def test_a_change_of_the_captions_is_noticed(captions_run, shapes, tmp_path):
    """Captions that were rewritten under a run that goes on with them."""
    flags, folder, _ = captions_run
    shutil.copytree(shapes, tmp_path / "shapes")
    path = tmp_path / "shapes/annotations/captions_train.json"
    path.write_text(path.read_text().replace("picture", "image"))
    out = folder / "runs/shapes-cross"
    flags = ["--data", tmp_path / "shapes", *flags[2:], "--out", out]
    process = run("caption.py", *flags, cwd=folder)
    assert_error(process, "made with captions")


def test_an_interrupted_caption_run_ends_as_if_it_had_not_been(captions_run, tmp_path):
    """Exact resume of a bridge."""
    flags, folder, _ = captions_run
    process = start("caption.py", *flags, cwd=tmp_path)
    code, _ = interrupt(process, 20, signal.SIGKILL)
    assert code != 0
    assert run("caption.py", *flags, cwd=tmp_path).returncode == 0
    out = "runs/shapes-cross"
    one = torch.load(folder / out / "ckpt.pt", weights_only=True)
    other = torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    assert one["best"] == other["best"]
    assert_same_outcome(folder / out, tmp_path / out)


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
    assert rows["place"][1] == f"{scores['place']:.2f}" and len(rows["nats per caption"]) == 4
    process = run("caption.py", *flags[:6], *options[:1], "--steps", 2, *options[3:], cwd=folder)
    assert_error(process, "another recipe", "more --steps than 3", "--restart")
    results = [{"linear": {"place": x}} for x in (0.5, 0.6, 1.0)]
    assert list(caption.comparison(results))[2] == "| place | 0.70 (0.50-1.00) |"


def test_self_critical_training_and_an_exported_bridge(captions_run, shapes, server, tmp_path):
    """--scst that does not go on from the bridge; an export that captions otherwise."""
    flags, folder, _ = captions_run
    picture = shapes / "val/000001.png"
    unfinished = folder / "unfinished"
    shutil.copytree(folder / "runs/shapes-cross", unfinished)
    checkpoint = torch.load(unfinished / "ckpt.pt", weights_only=True)
    torch.save(checkpoint | {"finished": False}, unfinished / "ckpt.pt")  # it was interrupted
    for task in (["--scst"], ["--scst", "--sample", picture], ["--eval"], ["--export", "half"]):
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
    first = train_gpt2.read_checkpoint(folder / "runs/shapes-cross/best.pt")["model"]
    changed = train_gpt2.read_checkpoint(out / "ckpt.pt")["model"]
    distance = {name: (p - changed[name]).abs().max().item() for name, p in first.items()}
    assert 0 < max(distance.values()) < 0.05  # three small steps from there
    file = tmp_path / "bridge.safetensors"
    out = folder / "runs/shapes-cross"
    name = tmp_path / "bridge"  # the suffix is added
    process = run("caption.py", "--bridge", "cross", "--out", out, "--export", name, cwd=folder)
    assert process.returncode == 0 and file.stat().st_size < 2_000_000, process.stderr
    server.files = {"/a.png": (shapes / "val/000001.png").read_bytes()}
    captions = []
    for path in (file, out / "best.pt"):
        process = run("caption.py", *flags[2:6], "--ckpt", path, "--sample",
                      f"{server.address}/a.png", cwd=tmp_path)
        captions.append(process.stdout.split(".png: ")[-1])
    assert captions[0] == captions[1] != "" and process.returncode == 0, process.stderr
    file.write_bytes(file.read_bytes()[:500])
    process = run("caption.py", *flags[2:6], "--ckpt", file, "--sample", "a.png", cwd=tmp_path)
    assert_error(process, "is not there")
    shutil.copy(shapes / "val/000001.png", tmp_path / "a.png")
    process = run("caption.py", *flags[2:6], "--ckpt", file, "--sample", "a.png", cwd=tmp_path)
    assert_error(process, "not a bridge that --export wrote")


def test_a_bridge_of_another_version_is_one_line(captions_run):
    """Tensors of other names, with --sample and in a run that goes on: a traceback, or nonsense."""
    flags, folder, _ = captions_run
    shutil.copytree(folder / "runs/shapes-cross", folder / "old")
    for name in ("best.pt", "ckpt.pt"):
        checkpoint = torch.load(folder / "old" / name, weights_only=True)
        checkpoint["model"]["old_name"] = checkpoint["model"].pop("ln.0.weight")
        torch.save(checkpoint, folder / "old" / name)
    process = run("caption.py", *flags[:8], "--out", "old", "--eval", cwd=folder)
    assert_error(process, "best.pt is not a bridge of this version", "train anew")
    process = run("caption.py", *flags, "--out", "old", cwd=folder)
    assert_error(process, "ckpt.pt is not of this version", "--restart")


def test_one_set_of_pictures_trains_and_scores(captions_run, shapes, tmp_path, precision):
    """COCO's validation pictures alone: one in both splits, scores that pass for val2017's."""
    shutil.copytree(shapes / "val", tmp_path / "coco/val2017")
    (tmp_path / "coco/annotations").mkdir()
    content = json.loads((shapes / "annotations/captions_val.json").read_text())
    for entry in content["images"]:
        del entry["toy_scene"]
    (tmp_path / "coco/annotations/captions_val2017.json").write_text(json.dumps(content))
    flags = ["--data", "coco", *captions_run[0][2:6], "--bridge", "linear", "--steps", 4]
    process = run("caption.py", *flags, "--batch", 8, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "10 validation pictures of coco" in process.stdout
    assert "not comparable with results on val2017" in process.stdout
    results = coco_eval.read_results(tmp_path / "runs/coco-linear/results.json")
    train = {str(p["id"]) for p in coco_eval.read_dataset(tmp_path / "coco", "train")}
    assert len(train) == 90 and not train & set(results)


def test_sampling_pictures(captions_run, shapes, tmp_path, precision):
    """--sample: files of several kinds, a broken one, --grid, --num, another decoder."""
    flags, folder, _ = captions_run
    own = tmp_path / "my pictures"
    own.mkdir()
    image = coco_eval.load_image(shapes / "val/000001.png")
    for i, name in enumerate(("0.png", "1.jpg", "2.webp", "4.JFIF")):
        image.resize((90 + 40 * i, 70)).save(own / name, format=None if i < 3 else "JPEG")
    (own / "3.gif").write_bytes(b"GIF no")
    flags = [*flags[2:8], "--ckpt", folder / "runs/shapes-cross/best.pt", "--sample", own]
    process = run("caption.py", *flags, "--grid", tmp_path / "out.png", cwd=folder)
    assert process.returncode == 0 and process.stdout.count("my pictures") == 4, process.stderr
    assert "3.gif cannot be read" in process.stderr
    assert Image.open(tmp_path / "out.png").size[0] > 700
    process = run("caption.py", *flags, "--num", 4, cwd=folder)
    assert process.stdout.count("0.png:") == 4
    other = run("caption.py", *flags, "--num", 4, "--seed", 7, cwd=folder)  # of the sampling
    assert other.stdout.count("0.png:") == 4 and other.stdout != process.stdout
    process = run("caption.py", *flags, "--beam", 3, cwd=folder)
    assert process.stdout.count("0.png:") == 1, process.stderr
    content = train_gpt2.read_checkpoint(flags[1])
    content["model"] = {name: p + 1e-3 for name, p in content["model"].items()}
    train_gpt2.save_checkpoint(tmp_path / "other.pt", content)
    (own / "3.gif").unlink()
    process = run("caption.py", "--lm", tmp_path / "other.pt", *flags[2:], cwd=folder)
    assert_error(process, "was trained with other weights of --lm", "--restart")


@pytest.mark.parametrize("args, words", [
    (["--bridge", "gate"], ["invalid choice", "linear"]), ([], ["--bridge"]),
    (["--bridge", "cross", "--sample", "nothing.png"], ["nothing.png is not there"]),
    (["--bridge", "cross", "--sample", "empty"], ["no pictures"]),
    (["--bridge", "cross", "--sample", "text.png"], ["text.png cannot be read"]),
    (["--ckpt", "ckpt", "--sample", "1.png"], ["a bridge"]),
    (["--bridge", "cross", "--data", "shapes", "--lm", "ckpt", "--clip", "x/y"], ["--clip x/y"]),
    (["--bridge", "cross", "--data", "empty", "--sample", "1.png"],  # before GPT-2 is downloaded
     ["COCO's layout", "--download"])])
def test_mistakes_in_captioning_are_one_line(args, words, tmp_path, whole, shapes):
    """A traceback, or a training that begins before the pictures are looked at."""
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    (tmp_path / "text.png").write_text("no picture")
    given = {"ckpt": whole[0] / "run/ckpt.pt", "shapes": shapes}
    process = run("caption.py", *(given.get(arg, arg) for arg in args), cwd=tmp_path)
    assert_error(process, *words)
    assert not (tmp_path / "runs").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", caption.BRIDGES)
def test_a_bridge_does_not_notice_that_tokens_are_centered(name):
    """A prefix to whose positions the mean token is added, so that a bridge reads another one."""
    model = small_captioner(name)
    model.decoder.wte.weight += torch.randn(32)  # as OpenAI's table has a mean
    pictures = some_pictures(4)
    vision = pictures.vision(range(4))
    packed = model.pack(pictures.captions)
    expected = model.loss(vision, packed).item()
    scale = caption.token_scale(model.decoder)
    train_gpt2.center_tokens(model.decoder)
    assert model.loss(vision, packed).item() == pytest.approx(expected, rel=1e-5)
    assert caption.token_scale(model.decoder) == pytest.approx(scale, rel=1e-5)


@torch.no_grad()
def test_captions_may_be_as_long_as_in_training():
    """Captions that end after 30 tokens, greedy, sampled and by beam search."""
    model = small_captioner("linear", config=dataclasses.replace(WIDE, block_size=64))
    model.eot = -1  # never drawn
    vision = torch.randn(1, 5, 12)
    assert model.room == 59
    assert model.generate(vision).size(1) == caption.beam_search(model, vision, 2).size(1) == 59
    vision = torch.randn(2, 5, 12)
    assert {len(row) for rows in caption.draw_samples(model, vision, None) for row in rows} == {59}


def test_what_vision_tokens_depend_on_is_their_identity(toy_clip, shapes, tmp_path, monkeypatch):
    """The same weights with another activation, preprocessing or precision, taken for the same."""
    digests = set()
    checkpoint = train_gpt2.read_checkpoint(toy_clip, holds="clip")
    for activation in (True, False):
        path = tmp_path / f"{activation}.pt"
        train_gpt2.save_checkpoint(path, checkpoint | {
            "clip": checkpoint["clip"] | {"quick_gelu": activation}})
        digests.add(caption.load_clip(path).digest)
    cfg = {"size": 64, "mean": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda model: cfg)
    digests.add(caption.load_clip(tmp_path / "True.pt").digest)
    assert len(digests) == 3
    monkeypatch.chdir(tmp_path)
    pictures = coco_eval.read_dataset(shapes, "train")[:3]
    for precision in (False, True, True):
        monkeypatch.setattr(train_gpt2, "uses_bf16", lambda device, p=precision: p)
        caption.cached_features(caption.load_clip(toy_clip), pictures, "x")
    assert len(list(Path("data/features").glob("*.bin"))) == 2


def test_vision_tokens_that_are_cut_are_made_again(toy_clip, shapes, tmp_path, monkeypatch, capsys):
    """A cut file of vision tokens; a picture that could not be read once, left out for ever."""
    monkeypatch.chdir(tmp_path)
    encoder = caption.load_clip(toy_clip)
    pictures = coco_eval.read_dataset(shapes, "train")[:9]
    pictures = [picture | {"path": shutil.copy(picture["path"], tmp_path)} for picture in pictures]
    pictures[4]["path"] = tmp_path / ("x" * 300 + ".png")  # no such name can be
    pictures[5]["id"] = "\ud800"
    load_image = coco_eval.load_image

    def unreadable(path):
        if Path(path).name == Path(pictures[2]["path"]).name:
            raise UserError("permission denied", "check it")
        return load_image(path)

    monkeypatch.setattr(coco_eval, "load_image", unreadable)
    first, left_out = caption.cached_features(encoder, pictures, "x")
    assert left_out == [2, 4]
    monkeypatch.setattr(coco_eval, "load_image", load_image)
    tokenizer = fineweb.get_tokenizer("tiny")
    data = tmp_path / "x"
    setup = types.SimpleNamespace(encoder=encoder, data=data, tokenizer=tokenizer)
    monkeypatch.setattr(coco_eval, "read_dataset", lambda *args: pictures)
    train_set = caption.load_pictures(setup, "train")  # now it can be read
    assert train_set.rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert not np.isnan(train_set.vision()).any()
    assert "1 of 9 pictures (train) cannot be read" in capsys.readouterr().out
    path = next(Path("data/features").glob("x-*.bin"))
    whole = path.read_bytes()
    for body in (b"", whole[:-100]):
        path.write_bytes(body)
        caption.cached_features(encoder, pictures, "x")
        assert path.read_bytes() == whole


def test_a_bridge_knows_its_parts(captions_run, shapes, tmp_path):
    """An export that needs the flags with which it was trained, or takes others without a word."""
    flags, folder, _ = captions_run
    out = folder / "runs/shapes-cross"
    shutil.copy(shapes / "val/000001.png", tmp_path / "a.png")
    run("caption.py", "--bridge", "cross", "--out", out, "--export", tmp_path / "b", cwd=folder)
    process = run("caption.py", "--ckpt", "b.safetensors", "--sample", "a.png", cwd=tmp_path)
    assert process.returncode == 0 and "a.png: " in process.stdout, process.stderr
    (tmp_path / "linear").mkdir()  # a folder is no bridge
    for flag, value in (("--clip", "ViT-L-14/openai"), ("--lm", "gpt2"), ("--bridge", "linear")):
        process = run("caption.py", "--ckpt", "b.safetensors", "--sample", "a.png", flag, value,
                      cwd=tmp_path)
        assert_error(process, f"was trained with {flag}", f"not {value}")
    process = run("caption.py", *flags[:2], "--bridge", "cross", "--eval", cwd=folder)
    assert process.returncode == 0 and "METEOR" in process.stdout, process.stderr  # a run, too
    with open(tmp_path / "b.safetensors", "rb") as file:
        body = file.read()
    assert str(shapes).encode() not in body  # a folder of this machine
    for old, new in ((b'\\"S\\": 33', b'\\"S\\": -3'), (b'\\"seed\\"', b'\\"sead\\"')):
        assert old in body
        (tmp_path / "c.safetensors").write_bytes(body.replace(old, new))
        process = run("caption.py", "--ckpt", "c.safetensors", "--sample", "a.png", cwd=tmp_path)
        assert_error(process, "c.safetensors")


@pytest.mark.parametrize("name", ["linear", "cross", "qformer"])
def test_recorded_attention_is_the_fused_one(name, fp32):
    """A map of attention that is not what the captions come from, or of the wrong words."""
    tokenizer = fineweb.get_tokenizer("tiny")
    decoder = small_model(config=train_gpt2.PRESETS["tiny"])
    model = caption.build(name, 33, 96, decoder)
    vision = torch.randn(1, 33, 96)
    text = "a red circle and a blue square"
    packed = model.pack([[[*tokenizer.encode_ordinary(text), model.eot]]])
    fused = model.loss(vision, packed)
    train_gpt2.recorded = weights = []
    plain = model.loss(vision, packed)
    train_gpt2.recorded = None
    assert plain.item() == pytest.approx(fused.item(), rel=1e-5)
    train_gpt2.recorded = []  # without a mask: causal
    logits, _ = decoder(packed.idx)
    train_gpt2.recorded = None
    assert torch.allclose(logits, decoder(packed.idx)[0], atol=1e-5)
    assert all(torch.allclose(w.sum(-1), torch.ones(()), atol=1e-5) for w in weights)
    words, seen = caption.look(model, vision, text, tokenizer)
    assert [word.strip() for word in words] == text.split() and train_gpt2.recorded is None
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
    assert np.allclose(seen[1], expected.detach(), atol=1e-6)
    words, seen = caption.look(model, vision, "a red circle " * 40, tokenizer)  # is cut
    assert len(words) == model.room and all(w[1:].max() > 0 for w in seen)


@measured
@pytest.mark.parametrize("name", ["linear", "cross", "qformer"])
def test_measured_attention(name):
    """In how many of 100 pictures the cell seen most, when a shape is said, is that object's.

    It needs runs/toy-NAME, here: python caption.py --compare makes them.
    """
    path = HERE / f"runs/toy-{name}/best.pt"
    if not path.exists():
        pytest.skip(f"needs {path}")
    args = types.SimpleNamespace(data=None, lm=None, clip=None, bridge=name)
    setup = caption.open_setup(caption.choose_parts(args, run=caption.read_bridge(path)[0]))
    captioner = caption.load_captioner(path, setup)
    pictures = caption.load_pictures(setup, "val")
    rng = random.Random(0)
    correct = []
    for i in range(100):
        objects = rng.sample(pictures.pictures[i]["scene"]["objects"], 2)
        a, b = map(fineweb.object_name, objects)
        text = f"a picture of a {a} and a {b}"
        _, seen = caption.look(captioner, pictures.vision([i]), text, setup.tokenizer)
        for thing, weights in zip(objects, (seen[5], seen[9]), strict=True):  # the two shapes
            row, col = divmod(weights[1:].argmax(), 8)
            correct.append((row, col // 2) == (thing["row"], thing["col"]))
    print(f"\n{name}: {np.mean(correct):.3f} of {len(correct)} shapes, by chance {1 / 16:.3f}")


def test_many_pictures_in_order_and_what_must_not_be_overwritten(captions_run, shapes, tmp_path):
    """Pictures of a folder that lose their order or their captions; a photograph replaced."""
    flags, folder, _ = captions_run
    own = tmp_path / "own"
    shutil.copytree(shapes / "val", own)
    (own / "000000.png").symlink_to("nothing")  # a broken link that sorts first
    (own / "000050.png").write_bytes(b"no picture")
    command = ["--ckpt", folder / "runs/shapes-cross/best.pt", "--sample"]
    process = run("caption.py", *command, own, "--results", "out.json", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr.count("error:") == 2, process.stderr
    for pictures, code in (([own / "000077.png"], 0), ([own], 2)):
        out = run("caption.py", *command, *pictures, "--attention", "at.png", cwd=tmp_path)
        assert out.returncode == code and (code or Image.open(tmp_path / "at.png").width == 1128)
    results = json.loads((tmp_path / "out.json").read_text())
    names = [Path(entry["image_id"]).name for entry in results]
    assert names == [f"{i:06d}.png" for i in range(1, 101) if i != 50]
    one = run("caption.py", *command, own / "000077.png", cwd=tmp_path).stdout.split("77.png: ")[1]
    assert one.strip() == results[75]["caption"]
    photo = own / "000001.png"
    body = photo.read_bytes()
    process = run("caption.py", *flags[:8], "--seed", 1, "--eval", cwd=folder)
    assert_error(process, "no trained bridge")
    out = folder / "runs/shapes-cross"
    process = run("caption.py", *flags, "--seed", 1, "--out", out, cwd=folder)
    assert_error(process, "was trained with --seed 0, not 1")
    for flag, file in (("--grid", photo), ("--grid", "."), ("--results", own)):
        process = run("caption.py", *command, photo, flag, file, cwd=tmp_path)
        assert_error(process, "cannot be written to")
    assert photo.read_bytes() == body
    process = run("caption.py", *flags[:8], "--export", "own/", cwd=folder)
    assert_error(process, "own/ is a folder")
    process = run("caption.py", *flags[:8], "--out", ".", cwd=folder)
    assert_error(process, "has no name")
    process = run("caption.py", *flags[:8], "--out", own, cwd=folder)
    assert_error(process, "has files, but no run")
    process = run("caption.py", *flags, "--sample", photo, "--lr", 0.5, cwd=folder)
    assert_error(process, "another recipe", "--restart")


def test_a_stop_in_an_evaluation_step_of_a_bridge(captions_run, tmp_path, monkeypatch):
    """A candidate for best.pt that is lost because the run was stopped there."""
    flags, folder, _ = captions_run
    requested = train_gpt2.Run.stop_requested
    monkeypatch.setattr(train_gpt2.Run, "stop_requested", lambda run: run.step == 15)
    process = run("caption.py", *flags, cwd=tmp_path)
    assert "stopped after step 15" in process.stdout, process.stderr
    monkeypatch.setattr(train_gpt2.Run, "stop_requested", requested)
    assert run("caption.py", *flags, cwd=tmp_path).returncode == 0
    out = "runs/shapes-cross"
    assert_same_outcome(folder / out, tmp_path / out)
    one, other = (torch.load(f / out / "best.pt", weights_only=True) for f in (folder, tmp_path))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_an_address_gives_the_picture_of_today(captions_run, shapes, server, tmp_path):
    """The caption of the picture that was at an address before."""
    command = ["--ckpt", captions_run[1] / "runs/shapes-cross/best.pt", "--sample"]
    captions = []
    for name in ("000001.png", "000002.png"):
        server.files = {"/a.png": (shapes / "val" / name).read_bytes()}
        process = run("caption.py", *command, f"{server.address}/a.png", cwd=tmp_path)
        captions.append(process.stdout.split(".png: ")[1].strip())
        alone = run("caption.py", *command, shapes / "val" / name, cwd=tmp_path)
        assert captions[-1] == alone.stdout.split(".png: ")[1].strip()
    server.files = {"/a.png": b"<html>"}
    process = run("caption.py", *command, f"{server.address}/a.png", cwd=tmp_path)
    assert_error(process, "cannot be read as a picture")


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
    for (address, _, _), content in zip(coco_eval.ARCHIVES, contents, strict=False):
        body = archive(content)
        archives.append((address, len(body), hashlib.md5(body).hexdigest()))
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
    monkeypatch.setattr(caption, "CLIP_BATCH", 8)
    pool_tokens = caption.pool_tokens
    passes = []

    def interrupted(tokens):
        passes.append(len(tokens))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return pool_tokens(tokens)

    monkeypatch.setattr(caption, "pool_tokens", interrupted)
    process = run("caption.py", *flags, *parts, "--bridge", "linear")
    assert process.returncode == 130
    shutil.copy("data/coco/val2017/000000000007.jpg", "photo.jpg")
    for name in ("linear", "qformer", "cross"):
        process = run("caption.py", *flags, *parts, "--bridge", name, "--sample", "photo.jpg")
        assert process.returncode == 0 and "photo.jpg: " in process.stdout, process.stderr
        assert "4 validation pictures" in process.stdout and "not comparable" in process.stdout
    assert passes[:7] == [8, 8, 8, 8, 8, 4, 4]  # of 36 pictures two batches were kept
    expected = process.stdout.split("photo.jpg: ")[1].splitlines()[0]
    process = run("caption.py", "--data", "data/coco", "--bridge", "cross", "--export", "bridge")
    assert process.returncode == 0, process.stderr
    (tmp_path / "elsewhere").mkdir()
    process = run("caption.py", "--ckpt", "../bridge.safetensors", "--sample", "../photo.jpg",
                  cwd=tmp_path / "elsewhere")
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
        for weights in ((), (torch.empty(2, 2),)):
            batch = (vision, packed, *weights, 1.0)
            train_gpt2.train_step(model, optimizer, [batch], recipe, device)
        vision = vision.to(device)
        with train_gpt2.autocast(device):
            for options in ({}, {"temperature": 1.0}):
                assert model.generate(vision, 4, **options).shape == (2, 4)
            assert caption.beam_search(model, vision, 3, 4).shape == (2, 4)


@pytest.mark.parametrize("shape", ["toy", "ViT-L-14"])
def test_the_image_encoder_on_a_fake_gpu(shape, monkeypatch):
    """The same of CLIP, the toy one and ViT-L/14."""
    with fake_cuda(monkeypatch) as device:
        if shape == "toy":
            clip = open_clip.CLIP(**caption.TOY_CLIP)
        else:
            clip = open_clip.create_model(shape, force_quick_gelu=True)
        encoder = caption.ImageEncoder(clip.visual, None, "x")
        size = 64 if shape == "toy" else 224
        tokens = caption.pool_tokens(encoder(torch.empty(2, 3, size, size)))
        assert tokens.device == device and tokens.shape[:2] == (2, 33)


def test_attention_of_many_shapes_does_without_cudnn(monkeypatch):
    """cuDNN, which plans each new shape for .4 s, where shapes change with every token."""
    enabled = []

    def attend(q, k, v, **options):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with fake_cuda(monkeypatch) as device:
        q = torch.empty(1, 2, 8, 16, device=device)
        train_gpt2.attention(q, q, q, is_causal=True)  # training: one shape, any backend
        train_gpt2.attention(q, q, q, mask=torch.ones(8, 8, dtype=torch.bool, device=device))
        train_gpt2.attention(q[:, :, :1], q, q)
    assert enabled == [True, False, False]


# -----------------------------------------------------------------------------
# README.md


def chapters(file):
    """{title: number of lines} of the chapters of a file, in order; the banner is one of them."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    bars = [i for i, line in enumerate(lines) if re.fullmatch(r"# [-=]{77}", line)]
    ends = [*bars[1:], len(lines)]
    return {lines[i + 1][2:]: end - i for i, end in zip(bars, ends, strict=True)}


def test_the_reading_path_is_as_long_as_the_readme_says():
    """A table of the path whose lines are not those of the files; a path that grew."""
    banner = "From here on: tooling, for reference"
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\n\| (?:optional: )?`(\w+\.py)`, (.*?) \| (\d+) \|", readme)
    assert len(rows) == 11
    together = re.search(r"\*\*together\*\* \| \*\*([\d,]+)\*\*", readme)[1]
    assert int(together.replace(",", "")) == sum(int(lines) for *_, lines in rows[:9])
    total = 0
    for file, what, lines in rows:
        titles = list(chapters(file))
        before = titles[: titles.index(banner)]
        chosen = [title for title in before if "(optional)" not in title]
        if match := re.fullmatch(r"(\d)(?: to (\d))?", what):
            numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
            chosen = [title for title in titles if title[0].isdigit() and int(title[0]) in numbers]
        elif file == "fineweb.py":
            is_toy = "toy" in what
            chosen = [title for title in before if title.startswith("The toy") == is_toy]
        elif "loss in chunks" in what or "BLEU" in what:
            chosen = [title for title in titles if "(optional)" in title]
        counted = sum(chapters(file)[title] for title in chosen)
        assert counted == pytest.approx(int(lines), rel=0.05), (file, what, counted)
        total += counted if "(optional)" not in chosen[0] else 0
    assert total <= 1_700


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
