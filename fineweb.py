"""
Text on disk: from documents to shards of tokens that a GPT-2 is trained on.

    python fineweb.py --tokens 1B                             FineWeb-Edu, already tokenised: 2.2 GB of disk (10B: 20 GB)
    python fineweb.py --text book.txt more.jsonl --out DIR    your own text: .txt, .jsonl and .parquet with a "text" column

Either way a folder of shards comes out, NAME_train_000001.bin … and NAME_val_000000.bin, for `train_gpt2.py --data DIR`.
A document begins with <|endoftext|>, and documents follow each other without padding, across the borders of shards too.

Where nothing can be downloaded there is the tiny world, made here in seconds: the English that every Python carries, and
short documents that describe scenes of coloured shapes, which can also be drawn as pictures.

The pieces that every file of this project needs stand first: errors, files that are never half-written, downloads.
"""
import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import requests
import tiktoken

# ---------------------------------------------------------------------------------------------------------------------
# Errors, files, downloads


class UserError(Exception):
    """Something that the user can mend; its text is one line that says what is wrong and what to do about it."""


def command_line(main):
    """Run main(). A UserError, or a file that the system refuses, becomes one line on stderr and exit code 2; Ctrl-C ends it quietly."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:                               # a full disk, a read-only folder, a file that is not there
        what_to_do = "make room" if error.errno == errno.ENOSPC else "check the place, or name another"
        print(f"error: {error.filename or 'writing'}: {error.strerror or error}: {what_to_do}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """A command line's flags, told by the file's docstring; a mistake in them is a UserError."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help shows the flags)")


@contextlib.contextmanager
def atomic_write(path, mode="wb", **options):
    """Open a temporary file beside `path`; it takes that name only when it is whole and safe on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one(folder):
    """Within this context no other process gets into it for the same folder, where the system has locks (not on Windows)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)                  # the folder itself is locked; the lock goes with the process, however that ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}: wait until it ends, or choose another --out") from None
    try:
        yield
    finally:
        os.close(handle)


def require_space(folder, size):
    """Raise UserError unless `size` bytes are free where `folder` is, or will be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{size / 1e6:,.1f} MB are needed in {folder} and {free / 1e6:,.1f} MB are free: make room, or choose another folder")


MIRROR = "GPT2_CAPTION_MIRROR"     # this environment variable replaces https://<host> in every address that is downloaded


def request(url, **options):
    """GET `url`, or the same path at the mirror. Answers of 400 to 499 are a UserError: asking again would not help."""
    mirror = os.environ.get(MIRROR)
    if mirror:
        url = mirror.rstrip("/") + "/" + url.split("://", 1)[1].split("/", 1)[1]
    answer = requests.get(url, timeout=30, **options)
    if 400 <= answer.status_code < 500 and answer.status_code not in (408, 416, 429):
        raise UserError(f"{url} answered {answer.status_code} {answer.reason}: fetch the file by other means, or set {MIRROR} to a mirror's address")
    if answer.status_code != 416:
        answer.raise_for_status()
    return answer


def download(url, path, size=None, digest=None, tries=5):
    """Fetch `url` into `path`, which appears only when it is whole: an interrupted download goes on where it stopped.

    size:    bytes, checked when given; so is the room on the disk.
    tries:   how often in a row it may fail without any progress.
    digest:  MD5 (32 hexadecimal digits) or SHA-256 (64), checked when given.
    Returns the path. Raises UserError when there is no network, or when what came is not the file that was asked for.
    """
    path = Path(path)
    if path.exists() and size in (None, path.stat().st_size):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if size:
        require_space(path.parent, size - (part.stat().st_size if part.exists() else 0))
    failures = 0
    while failures < tries:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part, path.name)
            break
        except requests.RequestException as error:         # no network, a broken line, 5xx: wait 1, 2, 4, … seconds
            failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
            if failures == tries:
                raise UserError(f"{url} cannot be reached ({type(error).__name__}): check the network, or put the file at {path} yourself") from None
            time.sleep(2 ** (failures - 1))
    whole = part.stat().st_size
    if size and whole != size or digest and file_digest(part, digest) != digest:
        part.unlink()
        raise UserError(f"{url} sent a file of {whole:,} bytes that is not the expected one: run the command again, or put the right file at {path}")
    os.replace(part, path)
    return path


def _fetch(url, part, name):
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with request(url, stream=True, headers=headers) as answer:
        if answer.status_code == 416:                      # nothing lies behind what we have; the caller checks it
            return
        if answer.status_code != 206:                      # the server does not know ranges and begins anew
            done = 0
        total = done + int(answer.headers.get("Content-Length", 0))
        began, before, shown = time.time(), done, 0.0
        with open(part, "ab" if done else "wb") as file:
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                done += len(chunk)
                now = time.time()
                if now - shown > 0.2 or done == total:
                    rate, shown = (done - before) / max(now - began, 1e-3), now
                    print(f"\r{name}  {done / 1e6:,.1f} of {total / 1e6:,.1f} MB  {rate / 1e6:.1f} MB/s ", end="", flush=True)
        print()
        if done < total:                                   # requests itself does not notice a line that broke off
            raise requests.ConnectionError(f"{done} of {total} bytes")


def file_digest(path, like):
    """MD5 or SHA-256 of a file in hexadecimal, whichever is as long as `like`."""
    digest = hashlib.md5(usedforsecurity=False) if len(like) == 32 else hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The shapes world: scenes of coloured shapes, told in words
#
# A scene is two to four objects on a grid of 4 × 4 cells. A language model learns
# to look things up in its context only where that pays, so a scene document shows first what is there, then tells it:
#
#     <|endoftext|> . . . . red-circle red-circle . . BLUE-SQUARE BLUE-SQUARE . . …        map: 16 cells in reading order
#     red circle top left, blue square top right                                            list: in six documents of ten
#     there are two objects                                                                 one to five captions
#     the blue square is at the top right
#
# A cell is said twice because it will be two of the 32 vision tokens of a picture, and a large object is in capitals.
# One word for colour and shape together: with a word each, the decoder had not learnt to pair them after 50 s of training.

COLOURS = ("red", "green", "blue", "yellow", "pink", "white")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
NUMBERS = {2: "two", 3: "three", 4: "four"}
GRID = 4
UNSEEN = {("red", "cross"), ("blue", "triangle"), ("yellow", "square")}      # pairs that no training picture shows


def random_scene(rng, unseen=None):
    """Draw a scene with random.Random `rng`: {"objects": [{"colour", "shape", "size", "row", "col"}, …]}, in reading order.

    The colours within a scene differ, so "the red circle" is one object. unseen: False leaves out the pairs in UNSEEN, as in
    training pictures; True makes sure that one is there; None (text) does not mind.
    """
    while True:
        number = rng.choice(tuple(NUMBERS))
        cells = sorted(rng.sample(range(GRID * GRID), number))
        objects = [{"colour": colour, "shape": rng.choice(SHAPES), "size": rng.choice(SIZES), "row": cell // GRID, "col": cell % GRID}
                   for colour, cell in zip(rng.sample(COLOURS, number), cells)]
        if unseen is None or unseen == any((o["colour"], o["shape"]) in UNSEEN for o in objects):
            return {"objects": objects}


def name(thing):
    """"red circle"."""
    return f"{thing['colour']} {thing['shape']}"


def place(thing):
    """The quarter of the picture that an object lies in: "top left", "top right", "bottom left" or "bottom right"."""
    return f"{'top' if thing['row'] < GRID // 2 else 'bottom'} {'left' if thing['col'] < GRID // 2 else 'right'}"


def relations(a, b):
    """How `a` lies as seen from `b`: one or two of "left", "right", "above", "below"."""
    across = ["left"] * (a["col"] < b["col"]) + ["right"] * (a["col"] > b["col"])
    return across + ["above"] * (a["row"] < b["row"]) + ["below"] * (a["row"] > b["row"])


def captions(scene, rng):
    """Five captions that tell five different things: how many, which two, where one is, how two lie, and all with sizes."""
    objects = scene["objects"]
    a, b = rng.sample(objects, 2)
    relation = rng.choice(relations(a, b))
    beside = f"to its {relation}" if relation in ("left", "right") else f"{relation} it"
    towards = f"to the {relation} of" if relation in ("left", "right") else relation
    number = NUMBERS[len(objects)]
    things = [f"a {thing['size']} {name(thing)}" for thing in rng.sample(objects, len(objects))]
    return [
        rng.choice((f"there are {number} objects", f"{number} objects in a picture")),
        rng.choice((f"a picture of a {name(a)} and a {name(b)}", f"a {name(a)} and a {name(b)} can be seen")),
        rng.choice((f"the {name(a)} is at the {place(a)}", f"at the {place(a)} there is a {name(a)}")),
        rng.choice((f"a {name(b)} with a {name(a)} {beside}", f"a {name(a)} is {towards} a {name(b)}")),
        f"{', '.join(things[:-1])} and {things[-1]}",
    ]


def map_word(thing):
    """"red-circle", or "RED-CIRCLE" if it is large."""
    word = f"{thing['colour']}-{thing['shape']}"
    return word.upper() if thing["size"] == "large" else word


def scene_map(scene):
    """The scene as 32 words, two for each cell in reading order: the object there, or "."."""
    cells = {(o["row"], o["col"]): map_word(o) for o in scene["objects"]}
    return "".join(2 * f" {cells.get((row, col), '.')}" for row in range(GRID) for col in range(GRID))


def scene_document(scene, rng):
    """A scene's map, in six of ten documents its list, and one to five of its captions in any order, a line each."""
    lines = [scene_map(scene)]
    if rng.random() < 0.6:
        lines.append(", ".join(f"{name(o)} {place(o)}" for o in scene["objects"]))
    return "\n".join(lines + rng.sample(captions(scene, rng), rng.randint(1, 5)))


def questions(scene, rng):
    """For each kind of fact the beginning of a caption that has to state it next: {"count", "objects", "place", "relation"}."""
    a, b = rng.sample(scene["objects"], 2)
    return {"count": "there are", "objects": "a picture of a", "place": f"the {name(a)} is at the", "relation": f"a {name(b)} with a {name(a)}"}


_THING = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_SIZED = re.compile(rf"(?:({'|'.join(SIZES)}) )?{_THING}")
_COUNT = re.compile(rf"\b({'|'.join(NUMBERS.values())}) objects")
_PLACE = re.compile(rf"the {_THING} is at the (\w+ \w+)|at the (\w+ \w+) there is a {_THING}")
_RELATION = re.compile(rf"a {_THING} with a {_THING} (?:to its )?(left|right|above|below)|a {_THING} is (?:to the )?(left|right|above|below)(?: of)? a {_THING}")


def facts(caption, scene):
    """Which facts a caption states, and whether they hold: {"count", "objects", "place", "relation"}, each True, False or None (not stated).

    objects: every object that is named is there, with its size where that is named. place and relation need their objects too.
    """
    things = {name(o): o for o in scene["objects"]}
    stated = dict.fromkeys(("count", "objects", "place", "relation"))
    if found := _COUNT.search(caption):
        stated["count"] = found[1] == NUMBERS[len(things)]
    if named := _SIZED.findall(caption):
        stated["objects"] = all(f"{c} {s}" in things and z in ("", things[f"{c} {s}"]["size"]) for z, c, s in named)
    if found := _PLACE.search(caption):
        c, s, where = (found[1], found[2], found[3]) if found[1] else (found[5], found[6], found[4])
        stated["place"] = f"{c} {s}" in things and place(things[f"{c} {s}"]) == where
    if found := _RELATION.search(caption):
        b, a, relation = (found.group(1, 2), found.group(3, 4), found[5]) if found[1] else (found.group(9, 10), found.group(6, 7), found[8])
        a, b = things.get(" ".join(a)), things.get(" ".join(b))
        stated["relation"] = a is not None and b is not None and relation in relations(a, b)
    return stated


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

EOT = "<|endoftext|>"
_MAP_WORDS = [map_word({"colour": colour, "shape": shape, "size": size}) for colour in COLOURS for shape in SHAPES for size in SIZES]
_OTHER_WORDS = "top bottom left right above below there are is objects in a picture of and can be seen the at with to its it".split()
WORDS = sorted({*COLOURS, *SHAPES, *SIZES, *NUMBERS.values(), *_MAP_WORDS, *_OTHER_WORDS})


def get_tokenizer(which):
    """The tokenizer "gpt2" (50,257 tokens; tiktoken fetches its 1.5 MB once) or "tiny" (made here: bytes and the words above).

    In "tiny" a word of the shapes world is one token, with a blank before it or without, as words are in GPT-2; other text is
    spelled in bytes. <|endoftext|> has the largest id in both.
    """
    if which == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except requests.RequestException:
            raise UserError("the GPT-2 vocabulary cannot be fetched: connect once, or let TIKTOKEN_CACHE_DIR name a folder that has it") from None
    pieces = [bytes([byte]) for byte in range(256)] + [(blank + word).encode() for word in [*WORDS, "."] for blank in ("", " ") if len(blank + word) > 1]
    return tiktoken.Encoding("tiny", pat_str=r" ?[A-Za-z]+(?:-[A-Za-z]+)?| ?\.|[\s\S]", mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
                             special_tokens={EOT: len(pieces)})


def encode_document(text, tokenizer):
    """<|endoftext|> and the tokens of one document, uint16. Text that looks like a special token is taken as plain text."""
    try:
        return np.array([tokenizer.eot_token, *tokenizer.encode_ordinary(text)], dtype=np.uint16)
    except UnicodeEncodeError:
        raise UserError(f"a document has characters that are no text (near {text[:40]!r}): save it as UTF-8") from None


# ---------------------------------------------------------------------------------------------------------------------
# Shards: llm.c's layout, a header of 256 int32 (magic, version, number of tokens, 0 …), then the tokens as uint16

MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4
SHARD_TOKENS = 100_000_000


def write_shard(path, tokens):
    """Write uint16 tokens as one shard, all or nothing."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, dtype="<u2").tobytes())


def read_shard(path):
    """Map a shard's tokens as a uint16 array without reading them: llm.c's .bin, or the .npy of build-nanogpt.

    Raises UserError when the file is no shard, or does not hold as many tokens as its header says.
    """
    path = Path(path)
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path} is not a whole shard ({error}): fetch or make it again") from None
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise UserError(f"{path} is not a shard of uint16 tokens but {tokens.dtype} {tokens.shape}: make it again")
        return tokens
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path} is not a shard of tokens (version {VERSION}): point to a folder made by fineweb.py")
    if path.stat().st_size != HEADER + 2 * header[2]:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes where its header says {HEADER + 2 * header[2]:,}: fetch or make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER, shape=(int(header[2]),))


# ---------------------------------------------------------------------------------------------------------------------
# The tiny world

TINY_BLOCK = 64            # tokens of context of the preset `tiny`
TINY_SCENES = 32_000       # blocks of scene documents: four fifths of the text, one fifth is English


def make_tiny(folder):
    """Write the tiny world's shards into `folder`: one for training, and English and scenes apart for validation.

    Each block of 64 tokens begins with a scene, so that its map stands where a picture's tokens will stand later; the last
    scene of a block is cut, as documents are at the end of a context. English: pydoc's help topics, the last twentieth for validation.
    """
    from pydoc_data.topics import topics                   # 0.5 MB of Python's own documentation, in every installation
    folder, tokenizer = Path(folder), get_tokenizer("tiny")
    texts = [topics[topic] for topic in sorted(topics)]
    english = np.concatenate([encode_document(text, tokenizer) for text in texts])
    border = len(english) * 19 // 20 // TINY_BLOCK * TINY_BLOCK
    shards = {"english_val_000000.bin": english[border:], "scenes_val_000000.bin": _scene_blocks(800, tokenizer, seed=1),
              "tiny_train_000001.bin": np.concatenate([_scene_blocks(TINY_SCENES, tokenizer, seed=0), english[:border]])}
    for file, tokens in shards.items():
        write_shard(folder / file, tokens)


def _scene_blocks(number, tokenizer, seed):
    rng, blocks = random.Random(seed), []
    for _ in range(number):
        block = []
        while len(block) < TINY_BLOCK:
            block.extend(encode_document(scene_document(random_scene(rng), rng), tokenizer))
        blocks.append(block[:TINY_BLOCK])
    return np.array(blocks, dtype=np.uint16).reshape(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Your own text


def read_documents(paths):
    """Yield the documents of .txt files (one each), .jsonl ("text" in each line) and .parquet (a column "text"), in order."""
    for path in map(Path, paths):
        try:
            if path.suffix == ".parquet":
                yield from _read_parquet(path)
            elif path.suffix == ".jsonl":
                with open(path, encoding="utf-8") as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield _text_of(line, f"{path} line {number}")
            elif path.suffix == ".txt":
                yield path.read_bytes().decode("utf-8")    # bytes: line ends stay as they are
            else:
                raise UserError(f"{path} is neither .txt, .jsonl nor .parquet: convert or rename it")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start:,}): convert it first") from None


def _text_of(line, where):
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{where} is no JSON object with a string "text": mend or remove the line')
    return text


def _read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000, columns=["text"]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet file with a column \"text\" ({str(error).splitlines()[0]}): make it again") from None


def text_to_shards(paths, folder, val_fraction=0.01, shard_tokens=SHARD_TOKENS):
    """Tokenise documents with the GPT-2 vocabulary on all cores into shards NAME_{train,val}_NNNNNN.bin; NAME is the folder's.

    Every 1/val_fraction-th document is for validation; where there are not as many, the end of each is, from a line break on.
    The folder appears when it is whole. Returns {"train": tokens, "val": tokens}.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: remove it, or choose another --out")
    get_tokenizer("gpt2")                                  # if it cannot be had, that is said at once
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    shards = {"train": _Shards(building, f"{folder.name}_train", 1, shard_tokens), "val": _Shards(building, f"{folder.name}_val", 0, shard_tokens)}
    documents, every = _split_few(read_documents(paths), round(1 / val_fraction) if val_fraction else 0)
    number, began = 0, time.time()
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:       # Ctrl-C is for us, not for each of them
        for batch in _map_in_order(pool, encode_documents, _batches(documents)):
            for tokens in batch:
                shards["val" if every and number % every == 1 else "train"].add(tokens)
                number += 1
            total = shards["train"].total + shards["val"].total
            print(f"\r{number:,} documents  {total / 1e6:,.2f} M tokens  {total / (time.time() - began) / 1e6:.2f} M tokens/s ", end="", flush=True)
    for split in shards.values():
        split.finish()
    print(f"\r{number:,} documents: {shards['train'].total:,} tokens for training, {shards['val'].total:,} for validation, in {folder}")
    if folder.exists():
        folder.rmdir()
    os.replace(building, folder)
    return {split: writer.total for split, writer in shards.items()}


def _split_few(documents, every):
    """The documents; where there are too few for one to be for validation, each is cut at a line break near its end, and `every` is 2."""
    head = list(itertools.islice(documents, every + 1 if every else 1))
    if not any(head):
        raise UserError("there is no document in these files: name files that have text")
    if not every or len(head) > every:
        return itertools.chain(head, documents), every
    halves = []
    for text in head:
        at = len(text) * (every - 1) // every
        cut = text.rfind("\n", 0, at) + 1 or at
        halves += [text[:cut], text[cut:]]
    return iter(halves), 2


def _batches(documents, characters=1_000_000):
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map_in_order(pool, function, items):
    waiting = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == 2 * os.cpu_count():             # enough to keep all busy, few enough for any memory
            yield waiting.pop(0).result()
    yield from (future.result() for future in waiting)


def encode_documents(texts):
    """Documents as encode_document() gives them, with GPT-2's vocabulary."""
    tokenizer = get_tokenizer("gpt2")
    return [encode_document(text, tokenizer) for text in texts]


class _Shards:
    """Collects tokens and writes a shard whenever there are enough for one."""

    def __init__(self, folder, name, number, size):
        self.folder, self.name, self.number, self.size = folder, name, number, size
        self.parts, self.held, self.total = [], 0, 0

    def add(self, tokens):
        self.parts.append(tokens)
        self.held += len(tokens)
        self.total += len(tokens)
        while self.held >= self.size:
            self._write(self.size)

    def finish(self):
        if self.held:
            self._write(self.held)

    def _write(self, count):
        tokens = np.concatenate(self.parts)
        write_shard(self.folder / f"{self.name}_{self.number:06d}.bin", tokens[:count])
        self.parts, self.held, self.number = [tokens[count:]], len(tokens) - count, self.number + 1


# ---------------------------------------------------------------------------------------------------------------------
# FineWeb-Edu: the first 10 B tokens of the sample, already tokenised for GPT-2 by others

FINEWEB = "kjj0/finewebedu10B-gpt2"
HUB = "https://huggingface.co"


def fetch_fineweb(tokens, folder):
    """Fetch the validation shard and as many training shards of 100 M tokens as `tokens` asks for; whole ones are skipped."""
    folder = Path(folder)
    names = _list_hub(folder)
    val, train = [n for n in names if "_val_" in n], [n for n in names if "_train_" in n][:-(-tokens // SHARD_TOKENS)]
    missing = [n for n in val + train if not (folder / n).exists()]
    require_space(folder, sum(names[n][0] for n in missing))
    for number, file in enumerate(val + train, 1):
        download(f"{HUB}/datasets/{FINEWEB}/resolve/main/{file}", folder / file, *names[file])
        try:
            read_shard(folder / file)
        except UserError:
            (folder / file).unlink()
            raise
        print(f"{number} of {len(val) + len(train)} shards are in {folder}")


def _list_hub(folder):
    """{name of a shard: (its size in bytes, its SHA-256 if the hub tells)}."""
    url = f"{HUB}/api/datasets/{FINEWEB}/tree/main"
    try:
        shards = sorted((entry for entry in request(url).json() if entry["path"].endswith(".bin")), key=lambda entry: entry["path"])
        return {shard["path"]: (int(shard["size"]), shard.get("lfs", {}).get("oid")) for shard in shards}
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{url} gives no list of shards ({type(error).__name__}): check the network, or put the .bin files of "
                        f"{HUB}/datasets/{FINEWEB} into {folder} yourself") from None


def _count(text):
    """10B → 10,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens such as 100M or 10B")
    return int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]])


def main():
    """The commands at the top of this file."""
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=_count, default="10B", help="how much of FineWeb-Edu: 100M to 10B")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="tokenise these files instead")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of the documents for validation")
    parser.add_argument("--out", default="data/fineweb_edu", help="folder of the shards")
    args = parser.parse_args()
    if not 0 <= args.val_fraction <= 0.5:
        raise UserError(f"--val-fraction {args.val_fraction} is not between 0 and 0.5")
    if args.text:
        text_to_shards(args.text, args.out, args.val_fraction)
    else:
        fetch_fineweb(args.tokens, args.out)


if __name__ == "__main__":
    command_line(main)
