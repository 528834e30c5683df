"""
Text on disk: from documents to shards of tokens on which a GPT-2 is trained.

    python fineweb.py --tokens 1B                     FineWeb-Edu: 2.2 GB of disk (10B: 20 GB)
    python fineweb.py --text book.txt --out DIR       your own .txt or .jsonl files

Either way the result is a folder of shards, NAME_train_000001.bin ... and NAME_val_000000.bin,
for `train_gpt2.py --data DIR`, with tokens.json, which names the tokenizer. Each document begins
with <|endoftext|>; documents follow each other without padding, across shards too.

Where nothing can be downloaded there is the toy text, made here in seconds: the English that
every Python installation carries, and short documents about scenes of colored shapes.

To read, in ten minutes: tokenizers; shards; the toy text (after train_gpt2.py, before caption.py).
After the banner: the toy text's files, FineWeb-Edu, your own text, the command line; errors, files
and downloads, which all files use.
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
import tiktoken
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging as hub_logging
from tiktoken.load import read_file_cached
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Tokenizers

EOT = "<|endoftext|>"  # begins each document


@functools.lru_cache
def get_tokenizer(name):
    """The tokenizer "gpt2" (50,257 tokens; tiktoken downloads 1.5 MB once) or "tiny" (made here).

    GPT-2's is a byte-pair encoding (Sennrich et al. 2016): frequent runs of bytes are one token
    each. "tiny" has the 256 bytes, two tokens for each word of the toy scenes (with a leading space
    and without, as in GPT-2) and <|endoftext|>. In both, <|endoftext|> has the largest id.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (requests.RequestException, ValueError) as error:  # no network, or a wrong file
            problem = "GPT-2's vocabulary cannot be downloaded"
            raise UserError(problem, "connect once, or set TIKTOKEN_CACHE_DIR") from error
    pieces = [bytes([byte]) for byte in range(256)]
    for word in [*SCENE_WORDS, "."]:
        pieces += [piece.encode() for piece in (word, f" {word}") if len(piece) > 1]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    pattern = r" ?[A-Za-z]+(?:-[A-Za-z]+)?| ?\.|[\s\S]"
    special = {EOT: len(pieces)}
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def gpt2_files():
    """GPT-2's vocabulary as transformers names its two files; tiktoken has them in its cache."""
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
    return {ours: read_file_cached(address + theirs) for ours, theirs in names.items()}


def encode_document(text, tokenizer):
    """<|endoftext|> and the tokens of one document, uint16.

    "<|endoftext|>" within the text is plain text. Runs of whitespace are cut at a thousand, because
    tiktoken fails at a million; half a surrogate pair, which no UTF-8 can hold, becomes "?".
    """
    text = text.encode(errors="replace").decode()
    tokens = [[tokenizer.eot_token]]
    for part in re.split(r"(\s{1000})", text):
        tokens.append(tokenizer.encode_to_numpy(part, disallowed_special=()))
    return np.concatenate(tokens, dtype=np.uint16, casting="unsafe")


# -----------------------------------------------------------------------------
# Shards, in the layout of llm.c (Karpathy's GPT-2 in C): a header of 256 int32 (magic number,
# version, number of tokens, zeros), then the tokens as uint16

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000


def write_shard(path, tokens):
    """Write uint16 tokens as one shard, all or nothing."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = (MAGIC, VERSION, len(tokens))
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, dtype="<u2").tobytes())


def read_shard(path):
    """Memory-map the tokens of a shard (uint16); UserError if the file is not one, or not whole.

    A memory map looks like an array, but the system reads a page of it only when it is used.
    """
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path} is not a shard of tokens", "make one with fineweb.py")
    count = int(header[2])  # int32 would overflow below, at 2^30 tokens
    if os.path.getsize(path) != HEADER_BYTES + 2 * count:
        raise UserError(f"{path} is not as long as its header says", "make it again (fineweb.py)")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def write_tokens_info(folder, tokenizer, source):
    """tokens.json names the tokenizer of a folder's shards, "gpt2" or "tiny", and their source."""
    write_json(Path(folder) / "tokens.json", {"tokenizer": tokenizer, "source": source})


def read_tokens_info(folder):
    """What write_tokens_info() wrote; folders made by others have GPT-2's tokens."""
    path = Path(folder) / "tokens.json"
    if not path.exists():
        return {"tokenizer": "gpt2", "source": "unknown"}
    with reading(path, 'a JSON object that names the "tokenizer" gpt2 or tiny'):
        info = json.loads(path.read_bytes())
        if info["tokenizer"] not in ("gpt2", "tiny"):
            raise ValueError(info["tokenizer"])
    return info


# -----------------------------------------------------------------------------
# The toy text: scenes of colored shapes, in words
#
# A scene is two to four objects on a grid of 4 x 4 cells. coco_eval.py draws it; here it is
# described. A language model learns to look things up in its context only where that pays, so a
# scene document shows first what is there, as a map, and then describes it:
#
#     <|endoftext|> . . . . red-circle red-circle . . BLUE-SQUARE BLUE-SQUARE . . ...   the map
#     there are two objects                                                 the number, in 20 %
#     blue square top left large, red circle top right small          two of the objects, in 80 %
#     a picture of a blue square and a red circle                           one to five captions
#     the blue square is at the top left
#
# The map names each cell twice, to fill 32 places: caption.py will later put 32 vectors there that
# show a picture, two for each cell. Large objects are in capitals.

COLORS = ("red", "green", "blue", "yellow", "pink", "white")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
NUMBERS = {2: "two", 3: "three", 4: "four"}
GRID = 4
TOY_BLOCK = 64  # tokens of context of the preset `tiny`
UNSEEN_PAIRS = {("red", "cross"), ("blue", "triangle"), ("yellow", "square")}


def random_scene(rng, unseen=None):
    """Draw {"objects": [{"color", "shape", "size", "row", "col"}, ...]} with a random.Random.

    Objects are in reading order and differ in color. unseen: False leaves UNSEEN_PAIRS out,
    as in training pictures; True makes sure that the scene has one; None (text) does not care.
    """
    while True:
        number = rng.choice(tuple(NUMBERS))
        cells = sorted(rng.sample(range(GRID * GRID), number))
        objects = []
        for color, cell in zip(rng.sample(COLORS, number), cells, strict=True):
            thing = {"color": color, "shape": rng.choice(SHAPES), "size": rng.choice(SIZES)}
            objects.append(thing | {"row": cell // GRID, "col": cell % GRID})
        if unseen is None or unseen == has_unseen_pair(objects):
            return {"objects": objects}


def has_unseen_pair(objects):
    """Whether one of the objects has a color and shape that no training picture joins."""
    return any((thing["color"], thing["shape"]) in UNSEEN_PAIRS for thing in objects)


def object_name(thing):
    """ "red circle" """
    return f"{thing['color']} {thing['shape']}"


def place(thing):
    """The quarter of the picture in which an object lies, "top left" for instance."""
    vertical = "top" if thing["row"] < GRID // 2 else "bottom"
    horizontal = "left" if thing["col"] < GRID // 2 else "right"
    return f"{vertical} {horizontal}"


def relations(a, b):
    """Where `a` lies as seen from `b`: one or two of "left", "right", "above", "below"."""
    sides = []
    if a["col"] != b["col"]:
        sides.append("left" if a["col"] < b["col"] else "right")
    if a["row"] != b["row"]:
        sides.append("above" if a["row"] < b["row"] else "below")
    return sides


def captions(scene, rng):
    """Five captions of five kinds: count, two objects, a place, a relation, the sizes of all."""
    objects = scene["objects"]
    number = NUMBERS[len(objects)]
    a, b = map(object_name, rng.sample(objects, 2))
    thing = rng.choice(objects)
    shuffled = rng.sample(objects, len(objects))
    things = [f"the {object_name(thing)} is {thing['size']}" for thing in shuffled]
    return [
        rng.choice((f"there are {number} objects", f"{number} objects in a picture")),
        rng.choice((f"a picture of a {a} and a {b}", f"a {a} and a {b} can be seen")),
        rng.choice((f"the {object_name(thing)} is at the {place(thing)}",
                    f"at the {place(thing)} there is a {object_name(thing)}")),
        relation_captions(scene, rng)[0],
        f"{', '.join(things[:-1])} and {things[-1]}",
    ]


def relation_captions(scene, rng):
    """Two wordings of one random relation; captions use the first, which is easier to learn."""
    a, b = rng.sample(scene["objects"], 2)
    relation = rng.choice(relations(a, b))
    a = object_name(a)
    b = object_name(b)
    if relation in ("left", "right"):
        return f"a {b} with a {a} to its {relation}", f"a {a} is to the {relation} of a {b}"
    return f"a {b} with a {a} {relation} it", f"a {a} is {relation} a {b}"


def scene_map(scene):
    """The scene as 32 words, two for each cell in reading order: the object in it, or "."."""
    words = ["."] * (GRID * GRID)
    for thing in scene["objects"]:
        word = f"{thing['color']}-{thing['shape']}"
        word = word.upper() if thing["size"] == "large" else word
        words[thing["row"] * GRID + thing["col"]] = word
    return "".join(f" {word} {word}" for word in words)


def scene_document(scene, rng):
    """A scene's map, sometimes its number, mostly two of its objects, and one to five captions."""
    lines = [scene_map(scene)]
    if rng.random() < 0.2:
        lines.append(f"there are {NUMBERS[len(scene['objects'])]} objects")
    pair = rng.sample(scene["objects"], 2)
    if rng.random() < 0.8:
        lines.append(", ".join(f"{object_name(a)} {place(a)} {a['size']}" for a in pair))
    relations = [rng.choice(relation_captions(scene, rng)) for _ in range(3)]
    lines += rng.sample(captions(scene, rng) + relations, rng.randint(1, 5))
    return "\n".join(lines)


def scene_blocks(number, tokenizer, seed):
    """Blocks of 64 tokens, which are the windows of `tiny`, as one row:

        <|endoftext|> map, capt|<|endoftext|> map, captions <|endoftext|> m|<|endoftext|> ...

    Each begins with a document, so a map stands at the positions where a picture's tokens will
    stand later. The last document of a block is cut.
    """
    rng = random.Random(seed)
    blocks = []
    for _ in range(number):
        block = []
        while len(block) < TOY_BLOCK:
            block.extend(encode_document(scene_document(random_scene(rng), rng), tokenizer))
        blocks.append(block[:TOY_BLOCK])
    return np.array(blocks, dtype=np.uint16).reshape(-1)


# =============================================================================
# From here on: tooling, for reference
# =============================================================================
# The toy text's files
#
# What was tried for its documents (facts that the decoder then completes correctly, of 1):
#
#     color and shape as two words of the map       too long to learn: objects .35 to .45 at 50 s
#     no number directly after the map              numbers .9 with one seed in three
#     the two objects in the order of the map       it walks along the map, it looks nothing up
#     the two objects without their sizes           sizes .7 with one seed in three
#     captions that name the size first             a third of the sizes wrong
#     one relation instead of four of eight lines   relations, the hardest fact, are not learned

MAP_WORDS = [f"{color}-{shape}" for color, shape in itertools.product(COLORS, SHAPES)]
OTHER_WORDS = """top bottom left right above below there are is objects in a picture of and can be
    seen the at with to its it""".split()
SCENE_WORDS = {*COLORS, *SHAPES, *SIZES, *NUMBERS.values(), *MAP_WORDS, *OTHER_WORDS}
SCENE_WORDS = sorted(SCENE_WORDS | {word.upper() for word in MAP_WORDS})

TOY_SCENE_BLOCKS = 35_400  # 85 % of the text; the rest is English


def make_toy_text(folder):
    """Write the toy text's shards: one for training; English and scenes apart for validation.

    English is pydoc's help topics, the last twentieth for validation. A folder that has the toy
    text already is left alone; UserError when it has something else.
    """
    from pydoc_data.topics import topics  # 0.5 MB, in every Python installation

    folder = Path(folder)
    source = f"toy text with sizes, {TOY_SCENE_BLOCKS:,} scenes"
    if folder.exists() and not is_empty(folder):
        if read_tokens_info(folder).get("source") != source:
            problem = f"{folder} is not the toy text of this version"
            raise UserError(problem, "rename it, or name it with --data")
        return
    tokenizer = get_tokenizer("tiny")
    english = np.concatenate([encode_document(topics[key], tokenizer) for key in sorted(topics)])
    border = len(english) * 19 // 20 // TOY_BLOCK * TOY_BLOCK
    scenes = scene_blocks(TOY_SCENE_BLOCKS, tokenizer, seed=0)
    with new_folder(folder) as building:
        write_shard(building / "tiny_train_000001.bin", np.concatenate([scenes, english[:border]]))
        write_shard(building / "english_val_000000.bin", english[border:])
        write_shard(building / "scenes_val_000000.bin", scene_blocks(800, tokenizer, seed=1))
        write_tokens_info(building, "tiny", source)


# -----------------------------------------------------------------------------
# FineWeb-Edu (Penedo et al. 2024): the first 10 B tokens of its sample, tokenized for GPT-2

FINEWEB_REPO = "kjj0/finewebedu10B-gpt2"
FINEWEB_SHARDS = 99  # 98 of 100 M tokens, and one of 54 M


def fetch_fineweb(tokens, folder):
    """Download the validation shard and as many training shards as `tokens` asks for."""
    folder = Path(folder)
    source = f"FineWeb-Edu, {FINEWEB_REPO}"
    if read_tokens_info(folder).get("source", "unknown") not in (source, "unknown"):
        raise UserError(f"{folder} has other text", "name another folder with --out")
    count = min(math.ceil(tokens / SHARD_TOKENS), FINEWEB_SHARDS)
    names = ["finewebedu_val_000000.bin"]
    names += [f"finewebedu_train_{number:06d}.bin" for number in range(1, count + 1)]
    missing = [name for name in names if not is_whole(folder / name)]
    require_space(folder, 2 * len(missing) * SHARD_TOKENS)
    for name in missing:
        (folder / name).unlink(missing_ok=True)  # the hub's client would keep a damaged one
        hub_download(FINEWEB_REPO, name, repo_type="dataset", local_dir=folder)
    write_tokens_info(folder, "gpt2", source)
    print(f"{len(names)} shards are in {folder}")


def is_whole(path):
    """Whether there is a shard that is as long as its header says."""
    try:
        return path.exists() and read_shard(path) is not None
    except UserError:
        return False


# -----------------------------------------------------------------------------
# Your own text


def read_documents(paths):
    """Yield the texts of .txt files (one each) and .jsonl files (one a line), in order.

    Raises UserError, naming the place, for bytes that are not UTF-8 and a line without "text".
    """
    for path in map(Path, paths):
        is_json = path.suffix.lower() == ".jsonl"
        if not is_json and path.suffix.lower() != ".txt":
            raise UserError(f"{path} is not .txt or .jsonl", "convert or rename it")
        what = 'a JSON object with a "text", in UTF-8' if is_json else "text in UTF-8"
        with open(path, "rb") as file:
            for number, part in enumerate(file if is_json else [file.read()], 1):
                with reading(f"{path} line {number}" if is_json else path, what):
                    text = part.decode("utf-8-sig")
                    if is_json:
                        text = json.loads(text)["text"] if text.strip() else ""
                    if not isinstance(text, str):
                        raise TypeError(f"its text is {text}")
                if text:
                    yield text


def text_to_shards(paths, folder, val_fraction=0.01, shard_tokens=SHARD_TOKENS):
    """Tokenize documents with GPT-2's vocabulary, on all cores, into a new folder of shards.

    The last val_fraction of the tokens is for validation, be they a corpus or a single book.
    Returns the numbers of tokens for training and validation. The folder appears when it is whole.
    """
    folder = Path(folder).resolve()
    tokenizer = get_tokenizer("gpt2")  # fails here, before any work
    with new_folder(folder) as building:
        raw = building / "tokens"  # before they are cut into shards
        with open(raw, "wb") as file:
            for tokens in encode_all(read_documents(paths), tokenizer):
                file.write(tokens.tobytes())
        count = raw.stat().st_size // 2
        val_count = round(count * val_fraction)
        if val_count < 2:
            raise UserError("there is too little text", "name files that have more")
        border = count - val_count
        for i, begin in enumerate(range(0, border, shard_tokens), 1):
            shard = building / f"{folder.name}_train_{i:06d}.bin"
            size = min(shard_tokens, border - begin)
            write_shard(shard, np.fromfile(raw, np.uint16, size, offset=2 * begin))
        val_tokens = np.fromfile(raw, np.uint16, offset=2 * border)
        write_shard(building / f"{folder.name}_val_000000.bin", val_tokens)
        raw.unlink()
        write_tokens_info(building, "gpt2", "own text")
    print(f"{border:,} tokens for training, {val_count:,} for validation in {folder}")
    return border, val_count


def encode_all(documents, tokenizer):
    """Yield the tokens of each document, in order; a thousand documents are in memory at a time."""
    encode = functools.partial(encode_document, tokenizer=tokenizer)
    # tiktoken lets other threads run while it works
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(unit=" tokens", disable=None) as bar:
        while batch := list(itertools.islice(documents, 1000)):
            for tokens in pool.map(encode, batch):
                bar.update(len(tokens))
                yield tokens


# -----------------------------------------------------------------------------
# Command line


def token_count(text):
    """10B -> 10,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    count = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else 0
    if not 1 <= count <= 10e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 100M, up to 10B")
    return int(count)


def main():
    """The commands at the top of this file."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--tokens", type=token_count, help="how much of FineWeb-Edu (default: 10B)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="tokenize these files instead")
    parser.add_argument("--out", help="new folder (FineWeb-Edu: data/fineweb_edu)")
    args = parser.parse_args()
    if args.text:
        parser.only("--text", "--out")
        if not args.out:
            raise UserError("--text needs a new folder for its shards", "give --out")
        text_to_shards(args.text, args.out)
    else:
        fetch_fineweb(args.tokens or 10_000_000_000, args.out or "data/fineweb_edu")


# -----------------------------------------------------------------------------
# Errors and the command line, for all files


class UserError(Exception):
    """What the user can correct, UserError(problem, what_to_do): one line on the screen."""

    def __str__(self):
        return ": ".join(self.args)


def command_line(main):
    """Run main(); a UserError, or a file that the system refuses, is one line and exit code 2."""
    open_streams()
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = str(error)
        if isinstance(error, OSError):  # a full disk, a read-only folder, ...
            message += ": make room, or name another (TRACEBACK=1 shows where)"
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            message = "out of memory: ask for less at once (TRACEBACK=1 shows where)"
        elif not isinstance(error, UserError):
            raise
        if "TRACEBACK" in os.environ:
            raise
        print("error:", message, file=sys.stderr)
        sys.exit(2)


class Stream(io.FileIO):
    """A standard stream; what is written after its reader has gone (`| head -1`) goes nowhere."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(data)


def open_streams():
    """Make Streams of stdout and stderr; a character that they cannot encode becomes "?"."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed (>&-): its number would be lent to a checkpoint
            os.open(os.devnull, os.O_RDWR)
        if number:
            encoding = getattr(getattr(sys, name), "encoding", "utf-8")
            buffer = io.BufferedWriter(Stream(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, "replace", line_buffering=True))


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with the file's docstring as the help; a wrong flag is a UserError."""

    def __init__(self, docstring):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=docstring, formatter_class=formatter, allow_abbrev=False)
        self.register("type", None, not_empty)  # for flags without a type of their own

    def error(self, message):
        raise UserError(message, "--help shows the flags")

    def parse_args(self, arguments=None):
        words = sys.argv[1:] if arguments is None else arguments
        # flags that were typed, with their default value too
        self.given = {word.split("=")[0] for word in words} & set(self._option_string_actions)
        return super().parse_args(arguments)

    def only(self, task, *allowed):
        """UserError when a flag was given that does nothing for `task`.

        allowed: flags, and groups of flags as add_argument_group() returns them.
        """
        useless = self.given - {task.split()[0]}
        for each in allowed:
            actions = [] if isinstance(each, str) else each._group_actions
            useless -= {each, *(action.option_strings[0] for action in actions)}
        if useless:
            raise UserError(f"{min(useless)} does nothing for {task}", "leave one of them out")


def not_empty(text):
    """The argparse type of a name; an empty one mostly comes from a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind, low, high=10**9):
    """The argparse type of an int or float from `low` to `high`."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in its own messages
    return convert


@contextlib.contextmanager
def reading(path, what, *errors, what_to_do="correct it, or get it again"):
    """Parsing a file: what goes wrong in the body is one UserError, which says why.

    The body has to be short: a mistake of our own in it would be blamed on the file
    (TRACEBACK=1 in the environment shows both).
    """
    mistakes = (ValueError, KeyError, IndexError, TypeError, RecursionError, EOFError)
    try:
        yield
    except (*mistakes, *errors) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:70]
        raise UserError(f"{path} is not {what} ({reason})", what_to_do) from error


# -----------------------------------------------------------------------------
# Files and downloads, for all files


@contextlib.contextmanager
def atomic_write(path, mode="wb", **options):
    """Open a temporary file beside `path`, which takes that name when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # ranks may write at once
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Write JSON, all or nothing."""
    with atomic_write(path, "w") as file:
        json.dump(content, file)


def is_empty(folder):
    """Whether nothing is in a folder, except what new_folder() or a new file system puts there."""
    return {path.name for path in folder.iterdir()} <= {".tmp", ".lock", "lost+found"}


@contextlib.contextmanager
def new_folder(folder):
    """Yield a folder that takes the name `folder` when the body is done, or is removed.

    It lies beside `folder`, or, when that is an empty folder already (a mount point, say), inside.
    """
    folder = Path(folder).resolve()
    inside = folder.exists()
    if inside and not is_empty(folder):
        raise UserError(f"{folder} is not empty", "remove it, or name another folder")
    building = folder / ".tmp" if inside else folder.with_name(folder.name + ".tmp")
    building.mkdir(parents=True, exist_ok=True)
    with lock(building):
        for left_over in building.iterdir():  # of a process that was killed
            if left_over.name != ".lock":
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        try:
            yield building
            if inside:
                for path in building.glob("[!.]*"):
                    os.replace(path, folder / path.name)
            else:
                os.replace(building, folder)
                (folder / ".lock").unlink(missing_ok=True)
        finally:
            shutil.rmtree(building, ignore_errors=True)  # when the body failed


@contextlib.contextmanager
def lock(path):
    """Within this context no other process gets the lock of a file, or of a folder (its .lock)."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing is locked
        yield
        return
    file = Path(path, ".lock") if Path(path).is_dir() else path
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks what is open for writing
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {path}", "wait for it") from None
        except OSError:  # some network file systems
            print(f"{path} cannot be locked: start only one process at a time", file=sys.stderr)
        yield
    finally:
        os.close(handle)


def require_space(folder, size):
    """Make the folder; raise UserError unless `size` bytes are free there."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        needed = f"{size / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free"
        raise UserError(f"{folder}: {needed}", "make room, or choose another folder")


def hub_download(repo, name, **options):
    """The path of a file of the Hugging Face hub, cached in HF_HOME, or in local_dir if given."""
    hub_logging.set_verbosity_error()  # it would report each failed try
    try:
        return Path(hf_hub_download(repo, name, **options))
    except Exception as error:  # no network, no such file, a full disk: its kinds are many
        problem = f"{repo}/{name} cannot be downloaded ({type(error).__name__})"
        raise UserError(problem, "check network and disk, or set HF_ENDPOINT") from error


def download(url, path, size=None, digest=None, tries=5, anew=False):
    """Download `url` to `path`; what was interrupted resumes where it stopped. Returns the path.

    size: bytes, and digest: MD5 or SHA-256 in hexadecimal, are checked when given. tries: how often
    in a row it may fail without progress. anew: fetch it again, from the first byte. Raises
    UserError without a network, for a wrong file, or while another process downloads it.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists() and not anew and size in (None, path.stat().st_size):
        return path
    require_space(path.parent, (size or 0) - (part.stat().st_size if part.exists() else 0))
    otherwise = "get it by other means" if anew else f"put it at {path}"
    with lock(part):
        if anew:
            part.write_bytes(b"")
        failures = 0
        while True:
            before = part.stat().st_size
            try:
                fetch_rest(url, part)
                break
            except (requests.RequestException, ValueError) as error:  # no network, 5xx, no address
                failures = 0 if part.stat().st_size > before else failures + 1
                if failures == tries:
                    what_to_do = f"check the network, or {otherwise}"
                    raise UserError(f"{url} cannot be reached", what_to_do) from error
                time.sleep(2**failures)
        wrong = size not in (None, part.stat().st_size)
        if wrong or (digest and file_digest(part, digest) != digest):
            part.unlink()
            raise UserError(f"{url} is not the expected file", f"try again, or {otherwise}")
        os.replace(part, path)
    return path


def fetch_rest(url, part):
    """Append to `part` what is missing of `url`; requests.RequestException when the line breaks."""
    done = part.stat().st_size
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
    with requests.get(url, stream=True, headers=headers, timeout=30) as answer:
        if answer.status_code == 416:  # nothing is missing
            return
        if answer.status_code in (401, 403, 404, 410):
            raise UserError(f"{url} answered {answer.status_code}", "get the file by other means")
        answer.raise_for_status()
        if answer.status_code != 206:  # the server starts over
            done = 0
        total = done + int(answer.headers.get("Content-Length", 0))
        bar = tqdm(desc=part.stem, initial=done, total=total, unit="B", unit_scale=True,
                   disable=None)  # None: silent where stderr is not a terminal
        with open(part, "ab" if done else "wb") as file, bar:
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < total:  # requests does not notice it
        raise requests.ConnectionError(f"the line broke before {total:,} bytes")


def file_digest(path, like):
    """MD5 or SHA-256 of a file in hexadecimal, whichever is as long as `like`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5" if len(like) == 32 else "sha256").hexdigest()


if __name__ == "__main__":
    command_line(main)
