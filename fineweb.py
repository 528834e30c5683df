"""
Text on disk: from documents to shards of tokens on which a GPT-2 is trained.

    python fineweb.py --tokens 1B                     FineWeb-Edu: 2.2 GB of disk (10B: 20 GB)
    python fineweb.py --text book.txt --out DIR       your own .txt or .jsonl files

Either way the result is a folder of shards, NAME_train_000001.bin ... and NAME_val_000000.bin,
for `train_gpt2.py --data DIR`. Each document begins with <|endoftext|>; documents follow each other
without padding, across shards too.

Where nothing can be downloaded there is the toy text, made here in seconds: the English that
every Python installation carries, and short documents about scenes of colored shapes.

To read, in ten minutes: tokenizers; shards; the toy text (after train_gpt2.py, before caption.py).
After the banner: the toy text's files, FineWeb-Edu, your own text, the command line; and, for all
files, errors (UserError), flags, and files that are written whole or not at all (atomic_write).
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from huggingface_hub import hf_hub_download
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Tokenizers

EOT = "<|endoftext|>"  # begins each document


@functools.lru_cache
def get_tokenizer(n_vocab):
    """GPT-2's tokenizer (n_vocab 50,257; tiktoken downloads 1.5 MB once), or the toy's (431).

    GPT-2's is a byte-pair encoding (Sennrich et al. 2016): it begins with the 256 bytes, and the
    most frequent pair of neighbors within a word of its training text became a new token, 50,000
    times. A word has the space before it:

        " then"         " "  "t"  "h"  "e"  "n"          bytes
        1st merge       " t"      "h"  "e"  "n"
        3rd merge       " t"      "he"      "n"
        7th merge       " the"              "n"
        533rd merge     " then"                          one token

    The toy's has the bytes, two tokens for each word of the toy scenes (with a leading space and
    without, as in GPT-2) and <|endoftext|>, which has the largest id in both.
    """
    if n_vocab == 50257:
        return tiktoken.get_encoding("gpt2")
    if n_vocab == TOY_VOCAB:
        return make_toy_tokenizer()
    problem = f"there is no tokenizer of {n_vocab:,} tokens"
    raise UserError(problem, f"GPT-2's has 50,257, the toy's {TOY_VOCAB}")


def encode_document(text, tokenizer):
    """<|endoftext|> and the tokens of one document, uint16; in it "<|endoftext|>" is plain text."""
    text = text.encode(errors="replace").decode()  # half a surrogate pair, no UTF-8, becomes "?"
    tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
    return np.append(tokenizer.eot_token, tokens).astype(np.uint16)


# -----------------------------------------------------------------------------
# Shards, in the layout of llm.c (Karpathy's GPT-2 in C): a header of 256 int32 (magic number,
# version, number of tokens, and, ours alone, size of the vocabulary), then the tokens as uint16

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000


def write_shard(path, tokens, n_vocab):
    """Write uint16 tokens as one shard, all or nothing."""
    header = np.zeros(256, dtype="<i4")
    header[:4] = (MAGIC, VERSION, len(tokens), n_vocab)
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, dtype="<u2").tobytes())


def read_shard(path, n_vocab):
    """Memory-map the tokens of a shard (uint16): the system reads a page of it when it is used.

    Raises UserError if the file is not a shard, not whole, or for another tokenizer.
    """
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path} is not a shard of tokens", "make one with fineweb.py")
    vocabulary = int(header[3]) or 50257  # shards of others have GPT-2's tokens, and 0 here
    if vocabulary != n_vocab:
        problem = f"{path} has tokens of {vocabulary:,}, and the model knows {n_vocab:,}"
        raise UserError(problem, "name shards of the model's tokenizer with --data")
    count = int(header[2])  # as int32 it would overflow below, at 2^30 tokens
    if os.path.getsize(path) != HEADER_BYTES + 2 * count:
        raise UserError(f"{path} is damaged", "remove it, and make or download it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


# -----------------------------------------------------------------------------
# The toy text: scenes of colored shapes, in words
#
# A scene is two to four objects on a grid of 4 x 4 cells. coco_eval.py draws it; here it is
# described. A language model learns to look things up in its context only where that pays, so a
# scene document shows first what is there, as a map, and then describes it:
#
#     <|endoftext|> . . . . red-circle red-circle . . BLUE-SQUARE BLUE-SQUARE . . ...   the map
#     there are two objects                                                 the number, in 20 %
#     blue square top left large, red circle top right small, right above       two, in 80 %
#     a picture of a blue square and a red circle                             one or five captions
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
    name = object_name(thing)
    where = place(thing)
    return [
        rng.choice((f"there are {number} objects", f"{number} objects in a picture")),
        rng.choice((f"a picture of a {a} and a {b}", f"a {a} and a {b} can be seen")),
        rng.choice((f"the {name} is at the {where}", f"at the {where} there is a {name}")),
        relation_caption(scene, rng),
        f"{', '.join(things[:-1])} and {things[-1]}",
    ]


def relation_caption(scene, rng):
    """Where one object lies as seen from another: "a blue square with a red circle above it".

    Of two pairs of objects it takes the one with fewer relations, which is harder: that two objects
    are in one column is learned last, and with some seeds it was not.
    """
    pairs = [rng.sample(scene["objects"], 2) for _ in range(2)]
    a, b = min(pairs, key=lambda pair: len(relations(*pair)))
    relation = rng.choice(relations(a, b))
    a = object_name(a)
    b = object_name(b)
    if relation in ("left", "right"):
        return f"a {b} with a {a} to its {relation}"
    return f"a {b} with a {a} {relation} it"


def scene_map(scene):
    """The scene as 32 words, two for each cell in reading order: the object in it, or "."."""
    words = ["."] * (GRID * GRID)
    for thing in scene["objects"]:
        word = f"{thing['color']}-{thing['shape']}"
        word = word.upper() if thing["size"] == "large" else word
        words[thing["row"] * GRID + thing["col"]] = word
    return "".join(f" {word} {word}" for word in words)


def scene_document(scene, rng):
    """A scene's map, sometimes its number, mostly a list of two objects, one or five captions.

    The list tells the place and size of both, and where the second lies as seen from the first.
    Five captions are more than fit: the block is full then.
    """
    lines = [scene_map(scene)]
    if rng.random() < 0.2:
        lines.append(f"there are {NUMBERS[len(scene['objects'])]} objects")
    a, b = rng.sample(scene["objects"], 2)
    if rng.random() < 0.8:
        told = [f"{object_name(thing)} {place(thing)} {thing['size']}" for thing in (a, b)]
        lines.append(", ".join([*told, " ".join(relations(b, a))]))
    more = [relation_caption(scene, rng) for _ in range(3)]
    lines += rng.sample(captions(scene, rng) + more, rng.choice((1, 5, 5, 5)))
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
#     no relation in the list of two objects        relations .67 with one seed in ten
#     a higher rate, or smaller steps, of training  relations .4 to .9 with some seeds
#     every pair of objects as often in a relation  .91 with one seed in twenty

TOY_VOCAB = 431
TOY_SCENE_BLOCKS = 35_400  # 85 % of the text; the rest is English


def make_toy_tokenizer():
    """The toy's tokenizer: as GPT-2's, it splits a text into words, and never merges across them.

    "there" is a word of the scenes, so " there" and "there" are tokens; "then" is five bytes.
    """
    on_map = [f"{color}-{shape}" for color, shape in itertools.product(COLORS, SHAPES)]
    others = """top bottom left right above below there are is objects in a picture of and can be
        seen the at with to its it""".split()
    words = {*COLORS, *SHAPES, *SIZES, *NUMBERS.values(), *on_map, *map(str.upper, on_map), *others}
    pieces = [bytes([byte]) for byte in range(256)]
    for word in [*sorted(words), "."]:
        pieces += [piece.encode() for piece in (word, f" {word}") if len(piece) > 1]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    pattern = r" ?[A-Za-z]+(?:-[A-Za-z]+)?| ?\.|[\s\S]"
    special = {EOT: len(pieces)}
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def make_toy_text(folder):
    """Write the toy text's shards, once: one for training; English and scenes for validation.

    English is pydoc's help topics, the last twentieth for validation.
    """
    from pydoc_data.topics import topics  # 0.5 MB, in every Python installation

    if Path(folder).exists():
        return
    tokenizer = get_tokenizer(TOY_VOCAB)
    english = np.concatenate([encode_document(topics[key], tokenizer) for key in sorted(topics)])
    border = len(english) * 19 // 20 // TOY_BLOCK * TOY_BLOCK
    scenes = scene_blocks(TOY_SCENE_BLOCKS, tokenizer, seed=0)
    end = [tokenizer.eot_token]  # the last target of the last window
    shards = {
        "tiny_train_000001": np.concatenate([scenes, english[:border], end]),
        "english_val_000000": english[border:],
        "scenes_val_000000": scene_blocks(800, tokenizer, seed=1),
    }
    with new_folder(folder) as building:
        for name, tokens in shards.items():
            write_shard(building / f"{name}.bin", tokens, TOY_VOCAB)


# -----------------------------------------------------------------------------
# FineWeb-Edu (Penedo et al. 2024): the first 10 B tokens of its sample, tokenized for GPT-2

FINEWEB_REPO = "kjj0/finewebedu10B-gpt2"
FINEWEB_SHARDS = 99  # 98 of 100 M tokens, and one of 54 M


def fetch_fineweb(tokens, folder):
    """Download the validation shard and as many training shards as `tokens` asks for."""
    count = min(math.ceil(tokens / SHARD_TOKENS), FINEWEB_SHARDS)
    names = ["finewebedu_val_000000.bin"]
    names += [f"finewebedu_train_{number:06d}.bin" for number in range(1, count + 1)]
    for name in names:
        if not Path(folder, name).exists():
            hub_download(FINEWEB_REPO, name, repo_type="dataset", local_dir=folder)
    print(f"{len(names)} shards are in {folder}")


def hub_download(repo, name, **options):
    """The path of a file of the Hugging Face hub, cached in HF_HOME, or in local_dir if given."""
    try:
        return Path(hf_hub_download(repo, name, **options))
    except Exception as error:  # no network, no such file, a full disk: its kinds are many
        problem = f"{repo}/{name} cannot be downloaded ({type(error).__name__})"
        raise UserError(problem, "check name, network and disk, or set HF_ENDPOINT") from error


# -----------------------------------------------------------------------------
# Your own text


def read_documents(paths):
    """Yield the texts of .txt files (one each) and .jsonl files (one a line), in order.

    Raises UserError, naming the place, for bytes that are not UTF-8 and a line without "text".
    """
    for path in map(Path, paths):
        if path.suffix not in (".txt", ".jsonl"):
            raise UserError(f"{path} is not .txt or .jsonl", "convert or rename it")
        is_json = path.suffix == ".jsonl"
        with open(path, "rb") as file:
            for number, part in enumerate(file if is_json else [file.read()], 1):
                with reading(f"{path}, line {number}," if is_json else path, "text in UTF-8"):
                    text = part.decode("utf-8-sig")
                    if is_json and text.strip():
                        text = json.loads(text)["text"] + ""  # a TypeError if it is not a string
                if text.strip():
                    yield text


def text_to_shards(paths, folder):
    """Tokenize documents with GPT-2's vocabulary, on all cores, into a new folder of shards.

    The last hundredth of the tokens, which are in memory (2 bytes each), is for validation.
    """
    folder = Path(folder)
    tokenizer = get_tokenizer(50257)  # fails here, before any work
    with new_folder(folder) as building:
        encode = functools.partial(encode_document, tokenizer=tokenizer)
        documents = read_documents(paths)
        parts = [np.zeros(0, np.uint16)]
        # tiktoken lets other threads run while it works
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(unit=" texts", disable=None) as bar:
            while batch := list(itertools.islice(documents, 1000)):  # in memory at a time
                parts += pool.map(encode, batch)
                bar.update(len(batch))
        tokens = np.concatenate(parts)
        least = 4 * 1024 + 1  # four windows of GPT-2's context
        border = len(tokens) - max(len(tokens) // 100, least)
        if border < least:
            problem = f"{len(tokens):,} tokens are too little text"
            raise UserError(problem, f"name files with {2 * least:,} or more")
        for i, begin in enumerate(range(0, border, SHARD_TOKENS), 1):
            shard = tokens[begin : min(begin + SHARD_TOKENS, border)]
            write_shard(building / f"{folder.name}_train_{i:06d}.bin", shard, tokenizer.n_vocab)
        val_tokens = tokens[border:]
        write_shard(building / f"{folder.name}_val_000000.bin", val_tokens, tokenizer.n_vocab)
    print(f"{border:,} tokens for training, {len(val_tokens):,} for validation in {folder}")


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
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=token_count, help="how much of FineWeb-Edu (default: 10B)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="tokenize these files instead")
    parser.add_argument("--out", help="new folder (FineWeb-Edu: data/fineweb_edu)")
    args = parser.parse_args()
    if args.text:
        only(parser, args, "--text", "out")
        if not args.out:
            parser.error("--text needs a new folder for its shards: give --out")
        text_to_shards(args.text, args.out)
    else:
        fetch_fineweb(args.tokens or 10_000_000_000, args.out or "data/fineweb_edu")


# -----------------------------------------------------------------------------
# Errors, flags and files, for all files


class UserError(SystemExit):
    """What the user can correct, UserError(problem, what_to_do): one line, and exit code 1."""

    def __init__(self, problem, what_to_do):
        super().__init__(f"error: {problem}: {what_to_do}")
        self.problem = problem


def command_line(main):
    """Run main(); what the system refuses (a file, the network, memory) is one line, too."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # a UserError is none: Python prints its line, and leaves with 1
        # PyTorch, while it writes a file, makes a RuntimeError of the system's own
        refused = error if isinstance(error, OSError) else error.__context__
        no_memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
        no_memory = no_memory or "allocate memory" in str(error)  # PyTorch's words on a CPU
        if "TRACEBACK" in os.environ or not (no_memory or isinstance(refused, OSError)):
            raise
        advice = "out of memory: use a smaller --micro-batch or model"
        sys.exit(f"error: {advice if no_memory else refused} (TRACEBACK=1 shows where)")


def make_parser(docstring):
    """An argument parser whose help is the file's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=docstring, formatter_class=raw, allow_abbrev=False)


def only(parser, args, task, names=""):
    """Refuse flags that were given and do nothing for `task`; names: of those that do something."""
    for name, value in vars(args).items():
        (flag,) = [a.option_strings[0] for a in parser._actions if a.dest == name]
        if flag != task and name not in names.split() and value != parser.get_default(name):
            parser.error(f"{flag} does nothing for {task}: leave one of them out")


def number(kind, low, high=10**9):
    """The argparse type of an int or float from `low` to `high`."""
    def numeric(text):  # argparse names it in its own messages
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value

    return numeric


@contextlib.contextmanager
def reading(path, what, *errors):
    """Parsing a file that people write: what goes wrong in the body is one UserError.

    The body has to be short: a mistake of our own in it would be blamed on the file.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, *errors) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is not {what} ({reason})", "replace it") from error


@contextlib.contextmanager
def atomic_write(path, mode="wb", **options):
    """Open a temporary file beside `path`, which takes that name when it is whole."""
    path = Path(path).resolve()  # a link stays one: the file is written where it leads
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
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
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(content, file)


@contextlib.contextmanager
def new_folder(folder):
    """Yield a folder that takes the name `folder`, which must be new, when the body is done."""
    folder = Path(folder)
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        building = Path(temporary) / folder.name
        building.mkdir()
        yield building
        os.replace(building, folder)


def refuse_existing(*paths):
    """UserError for an output (None: there is none) that exists already, or is named twice."""
    for path in filter(None, paths):
        if Path(path).exists() or paths.count(path) > 1:
            raise UserError(f"{path} is there already, or named twice", "name another")


if __name__ == "__main__":
    command_line(main)
