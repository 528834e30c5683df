"""
Pictures with captions, and the scores of captions.

    python coco_eval.py --references captions_val2017.json --results results.json [more.json …]     the scores of one or several systems
    python coco_eval.py --download [DIR]                                                            COCO 2017: 20 GB, 40 GB while it unpacks
    python coco_eval.py --make-shapes DIR [--images N] [--seed N]                                   the shapes world, drawn in seconds

A caption is scored against some five that people wrote, by four metrics that differ in what they count as agreement:

    BLEU       which words and phrases of the candidate occur in a reference?                        (precision)
    ROUGE-L    how much of a reference does the candidate say in the same order?                     (precision and recall)
    CIDEr-D    the same phrases, those that tell this picture from others weighing more             (cosine of tf-idf vectors)
    METEOR     which words agree, other endings allowed, and in how few pieces?                      (recall before precision)

All four equal the numbers of the official COCO scorer, which needs Java; only METEOR leaves out a part, its tables of synonyms
and paraphrases, and says so: "METEOR (exact + stem)". The worked examples, but for CIDEr's, score one candidate against two references:

    candidate       a red circle and a blue square
    references      a red circle above a blue square  |  a blue square
"""
import html
import json
import math
import os
import random
import re
import shutil
import warnings
import zipfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from fineweb import GRID, Parser, UserError, atomic_write, captions, command_line, download, random_scene, require_space

# ---------------------------------------------------------------------------------------------------------------------
# Words: what the Stanford tokeniser, which the official scorer uses, makes of a caption

_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")                                  # dog's → dog 's
_TWO_WORDS = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta))\b")                                # cannot → can not
_TOKEN = re.compile(r"""
      n't | '(?:s|re|ve|ll|d|m)(?!\w)
    | [a-z](?:\.[a-z])+(?![a-z])\.? | [a-z]\.                                                         # u.s.  d.v.d  a.
    | (?:st|ave|blvd|rd|mt|ft|mr|mrs|ms|dr|jr|sr|etc|vs|inc|co|corp|ltd|no|al|ca|ky|fla|calif)\.(?!\w)
    | \d+:\d+(?=[ap]m\b)
    | \d+(?:[.,:]\d+)*\w*(?:[-/]\w+)*                                                                 # 1,000  10:30  1950s  6ft
    | \w+(?:['&/.-]\w+)*                                                                              # t-shirt  o'clock  at&t
    | \.\.+ | --+ | [^\s\U00010000-\U0010ffff]                                                       # emoji are dropped
    """, re.VERBOSE)
_STRAIGHT = str.maketrans({"‘": "'", "’": "'", "´": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}      # lower case, so they count as words
_DROPPED = {"'", "`", "``", '"', ".", "..", "...", "?", "!", ",", ":", ";", "-", "--", "---"}


def tokenize(caption):
    """The words of a caption, lower-cased, without punctuation: "A dog's t-shirt." → ["a", "dog", "'s", "t-shirt"].

    Equal to the Penn Treebank tokens of Stanford CoreNLP and the official list of dropped punctuation on 99.9 % of COCO's captions.
    """
    text = html.unescape(caption).translate(_STRAIGHT).lower()
    text = _TWO_WORDS.sub(lambda match: " ".join(filter(None, match.groups())), _CONTRACTION.sub(r" \1", text))
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text) if token not in _DROPPED]


def ngram_counts(tokens):
    """How often each run of 1, 2, 3 and 4 words occurs: four Counters of tuples."""
    return [Counter(zip(*(tokens[i:] for i in range(n)))) for n in range(1, 5)]


# ---------------------------------------------------------------------------------------------------------------------
# BLEU


def bleu(references, candidates):
    """BLEU-1 … BLEU-4: the share of the candidate's n-grams that a reference has too (Papineni et al. 2002, sections 2.1-2.3).

    An n-gram counts at most as often as it occurs in the reference that has it most often (clipping), so "a a a a" gains nothing:

        p_n    = Σ min(count in the candidate, largest count in one reference) / Σ count in the candidate
        BLEU-n = BP · (p_1 · … · p_n)^(1/n)         BP = exp(1 - r/c) if c < r, else 1

    c is the candidate's length, r that of the reference closest to it (of two, the shorter): without BP, one sure word would be
    a perfect caption. For the corpus all counts and lengths are summed first; it is no mean over pictures.

    Example: 6 of the 7 words occur in the first reference ("and" does not): p_1 = 6/7. Of the 6 pairs of words the four
    "a red", "red circle", "a blue", "blue square" do: p_2 = 4/6. c = r = 7. BLEU-2 = √(6/7 · 4/6) = 0.756.

    references: for each picture a list of token lists; candidates: for each a token list. Returns {"BLEU-n": (corpus, [each picture])}.
    """
    rows = np.array([_bleu_counts(r, c) for r, c in zip(references, candidates)], dtype=float)
    corpus, pictures = _bleu_scores(rows.sum(0, keepdims=True)), _bleu_scores(rows)
    return {f"BLEU-{n}": (corpus[0, n - 1], pictures[:, n - 1]) for n in range(1, 5)}


def _bleu_counts(references, candidate):
    """[c, r, matches of 1- to 4-grams, candidate's 1- to 4-grams] of one picture."""
    matches, reference_counts = [], [ngram_counts(reference) for reference in references]
    for n, counts in enumerate(ngram_counts(candidate)):
        matches.append(sum(min(count, max(reference[n][gram] for reference in reference_counts)) for gram, count in counts.items()))
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return [len(candidate), closest, *matches, *(max(0, len(candidate) - n) for n in range(4))]


def _bleu_scores(rows):
    """BLEU-1 … BLEU-4 of each row of counts; 1e-15 and 1e-9 are the official code's guards against dividing by 0."""
    c, r, matches, total = rows[:, :1], rows[:, 1:2], rows[:, 2:6], rows[:, 6:]
    mean = np.cumprod((matches + 1e-15) / (total + 1e-9), axis=1) ** (1 / np.arange(1, 5))
    ratio = (c + 1e-15) / (r + 1e-9)
    return mean * np.exp(np.minimum(0, 1 - 1 / ratio))


# ---------------------------------------------------------------------------------------------------------------------
# ROUGE-L


def rouge_l(references, candidates):
    """ROUGE-L: the longest common subsequence, words in the same order with gaps allowed (Lin 2004, section 3.1).

        P = max LCS / length of the candidate      R = max LCS / length of the reference      F = (1 + β²) P R / (R + β² P),  β = 1.2

    The maxima are taken over the references one by one, as the official code does, so P and R may come from two of them.

    Example: "a red circle a blue square" is common to the candidate and the first reference: P = 6/7 and R = 6/7. The second
    reference is contained whole: R = 3/3. F = 2.44 · 6/7 · 1 / (1 + 1.44 · 6/7) = 0.936.

    Arguments and result as for bleu().
    """
    pictures = [_rouge_l(r, c) for r, c in zip(references, candidates)]
    return {"ROUGE-L": (float(np.mean(pictures)), pictures)}


def _rouge_l(references, candidate, beta=1.2):
    common = [_common_subsequence(reference, candidate) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(length / len(reference) for length, reference in zip(common, references) if reference)
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


def _common_subsequence(a, b):
    """Length of the longest common subsequence of two lists, by dynamic programming row after row."""
    row = [0] * (len(b) + 1)                               # row[j]: the length for the words of `a` so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


# ---------------------------------------------------------------------------------------------------------------------
# CIDEr-D


def cider(references, candidates):
    """CIDEr-D: n-grams weighted by how much they tell about the picture (Vedantam et al. 2015, section 3 and equation 6).

    "a" stands in every caption and tells nothing; "giraffe" does. So an n-gram g weighs w(g) = tf(g) · (ln N - ln df(g)), where tf is
    its count in the caption, N the number of pictures, and df the number of pictures that have g in a reference (at least 1). Then

        CIDEr_n = mean over the references of  Σ_g min(w_c(g), w_r(g)) · w_r(g) / (|w_c| |w_r|) · exp(-Δ² / (2 σ²)),   σ = 6
        CIDEr-D = 10 · mean of CIDEr_1 … CIDEr_4

    a cosine, clipped by min() so that repeating a word gains nothing, less for a difference of length Δ (in bigrams). The document
    frequencies come from the pictures that are scored: a subset of them has other scores. With one picture every weight is 0.

    Example: two pictures, one reference each, "a blue square" and "a red circle"; the candidate for the first is "a square". "a" is in
    both and weighs 0, any other word ln 2 = .69. 1-grams: .69² / (.69 · .69 √2) = .707; no longer n-gram is common. Δ = 1 - 2.
    CIDEr-D = 10 · (.707 + 0 + 0 + 0) / 4 · exp(-1/72) = 1.743.

    Arguments and result as for bleu().
    """
    counts = [[ngram_counts(reference) for reference in picture] for picture in references]
    frequency = Counter(gram for picture in counts for gram in {gram for reference in picture for n in reference for gram in n})
    information = {gram: math.log(len(references)) - math.log(df) for gram, df in frequency.items()}
    unheard = math.log(len(references))                    # the weight of what no reference says

    def weigh(counts):
        """For n = 1 … 4 the vector {n-gram: weight} and its norm."""
        vectors = [{gram: count * information.get(gram, unheard) for gram, count in n.items()} for n in counts]
        return [(vector, math.sqrt(sum(w * w for w in vector.values()))) for vector in vectors]

    pictures = []
    for picture, lengths, candidate in zip(counts, references, candidates):
        vectors, total = weigh(ngram_counts(candidate)), 0.0
        for reference, tokens in zip(picture, lengths):
            delta = max(0, len(candidate) - 1) - max(0, len(tokens) - 1)
            total += math.exp(-delta ** 2 / (2 * 6 ** 2)) * sum(map(_clipped_cosine, vectors, weigh(reference)))
        pictures.append(10 * total / 4 / len(picture))
    return {"CIDEr": (float(np.mean(pictures)), pictures)}


def _clipped_cosine(candidate, reference):
    (w_c, norm_c), (w_r, norm_r) = candidate, reference
    common = sum(min(weight, w_r[gram]) * w_r[gram] for gram, weight in w_c.items() if gram in w_r)
    return common / (norm_c * norm_r) if norm_c and norm_r else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# METEOR

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75         # tuned to human rankings of translations (Denkowski & Lavie 2014)
STEM_WEIGHT = 0.6                                          # of a match that is not the very same word
FUNCTION_WORDS = frozenset("""the and of to in a that for as is i it was with on 's by he be at are his not from or this you had have their an but they
    which were her all more my will one when can what we so she would who if other me there than has about some been its people time
    no into could up over also out after two most said new first""".split())    # more frequent than one word in a thousand


def meteor(references, candidates):
    """METEOR (exact + stem): words aligned one to one, order as few pieces (Denkowski & Lavie 2014; Banerjee & Lavie 2005).

    Every word of the candidate is aligned with at most one of the reference that is equal, or equal but for its ending; of all
    alignments with the most matches the one in the fewest chunks, runs that are adjacent in both, is taken. A match counts 1, or
    0.6 by stem; function words weigh 1 - δ and content words δ, in the matches m and in the lengths l alike:

        P = m_c / l_c      R = m_r / l_r      F = P R / (α P + (1 - α) R)      α = .85: recall counts most
        METEOR = F · (1 - γ · (chunks / matches)^β)                            β = .20, γ = .60; no penalty if all is one chunk

    The best reference counts. For the corpus the statistics of the best references are summed and the formula is applied once.
    The full METEOR 1.5 also matches synonyms and paraphrases, from tables of 60 MB; on COCO that adds some .01.

    Example, with the first reference: six words match in the two chunks "a red circle" and "a blue square". "a" and "and" are function
    words: m = 4 · .75 + 2 · .25 = 3.5, l_c = 3.75, l_r = 4.25. P = .933, R = .824, F = .838, METEOR = .838 · (1 - .6 · (2/6)^.2) = .435.
    The second reference is said whole, in one chunk of three: P = 1.75 / 3.75 = .467, R = 1, F = .854, METEOR = .442, so this one counts.

    Arguments and result as for bleu().
    """
    rows = [max((_meteor_statistics(_split(reference), _split(candidate)) for reference in picture), key=lambda row: (_meteor_score(row), row))
            for picture, candidate in zip(references, candidates)]
    return {"METEOR": (_meteor_score(np.sum(rows, axis=0)), [_meteor_score(row) for row in rows])}


def _split(tokens):
    return " ".join(tokens).replace("-", " ").split()      # METEOR sees t-shirt as two words


def _meteor_statistics(reference, candidate):
    """(m_c, l_c, m_r, l_r weighted; matched words, words of the candidate, of the reference, chunks)."""
    pairs = align(reference, candidate)
    agreement = [1.0 if candidate[i] == reference[j] else STEM_WEIGHT for i, j in pairs]
    return (sum(a * _weight(candidate[i]) for a, (i, _) in zip(agreement, pairs)), sum(map(_weight, candidate)),
            sum(a * _weight(reference[j]) for a, (_, j) in zip(agreement, pairs)), sum(map(_weight, reference)),
            len(pairs), len(candidate), len(reference), count_chunks(pairs))


def _weight(word):
    return 1 - DELTA if word in FUNCTION_WORDS else DELTA


def _meteor_score(statistics):
    m_c, l_c, m_r, l_r, matches, words_c, words_r, chunks = statistics
    if not matches:
        return 0.0
    precision, recall = m_c / l_c, m_r / l_r
    f = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    fragmentation = 0 if chunks == 1 and matches == words_c == words_r else chunks / matches
    return float(f * (1 - GAMMA * fragmentation ** BETA))


def count_chunks(pairs):
    """The number of runs in which both positions grow by one."""
    return sum(after != (before[0] + 1, before[1] + 1) for before, after in zip([(-2, -2), *pairs], pairs))


def align(reference, candidate, beam=40):
    """Pair equal stems one to one: the most pairs, then the fewest chunks, then the least crossing. Returns [(i, j), …]: candidate[i], reference[j].

    A stem that occurs n times here and m times there makes min(n, m) pairs whatever is chosen; what is open is which, and that is
    searched from left to right. A state is (positions of the reference in use, the one used last); the best way to each is kept.
    The limits, `beam` states and the 8 nearest positions, matter only where one word stands there again and again.
    """
    places, left = {}, Counter(map(stem, candidate))
    for j, word in enumerate(reference):
        places.setdefault(stem(word), []).append(j)
    states = {(0, None): (0, 0, ())}                       # (in use, last): (chunks, distance, pairs)
    for i, word in enumerate(candidate):
        here, after = places.get(stem(word), ()), {}
        left[stem(word)] -= 1
        for (used, last), (chunks, distance, pairs) in states.items():
            free = [j for j in here if not used >> j & 1]
            nearest = free if len(free) <= 8 else sorted(free, key=lambda j: (last is None or j != last + 1, abs(i - j)))[:8]
            ways = [((used | 1 << j, j), (chunks + (last is None or j != last + 1), distance + abs(i - j), (*pairs, (i, j)))) for j in nearest]
            if left[stem(word)] >= len(free):              # enough of this word follow: it may stay without a partner
                ways.append(((used, None), (chunks, distance, pairs)))
            for key, way in ways:
                if key not in after or way < after[key]:
                    after[key] = way
        states = after if len(after) <= beam else dict(sorted(after.items(), key=lambda item: (-len(item[1][2]), item[1]))[:beam])
    return list(min(states.values())[2])


_ENDINGS = [(re.compile(pattern), rest) for pattern, rest in (
    (r"^skies$", "sky"), (r"'s?$", ""), (r"(ss|i)es$", r"\1"), (r"(..[^su])s$", r"\1"),                        # dog's, glasses, cats
    (r"([aeiouy].*)(ing|ed|ingly|edly)$", r"\1+"),                                                              # + marks what is mended next:
    (r"([bdfgmnprt])\1\+$", r"\1"), (r"(at|bl|iz|^[^aeiouy]*[aeiouy][^aeiouywx])\+$", r"\1e"), (r"\+$", ""),    # sitting, riding, parked
    (r"([^aeiouy])(?<!^sk)y$", r"\1i"), (r"([aeiouy].*)ly$", r"\1"), (r"(......)(er|al|ic|or|ment)$", r"\1"),
    (r"^(?![^aeiouy]*[aeiouy][^aeiouywx]e$)(.*[aeiouy].+)e$", r"\1"), (r"ll$", "l"))]


@lru_cache(maxsize=100_000)
def stem(word):
    """A word without its ending, as Porter's second stemmer leaves it in most cases: cats → cat, riding and rides → ride, cities → citi."""
    for ending, rest in _ENDINGS:
        word = ending.sub(rest, word)
    return word


# ---------------------------------------------------------------------------------------------------------------------
# All scores of a set of captions


def evaluate(references, candidates):
    """Score raw captions. references: {id: [str, …]}, candidates: {id: str}; 7 and "7" are the same id. Result as of score_tokens()."""
    return score_tokens({id: [tokenize(caption) for caption in captions] for id, captions in references.items()},
                        {id: tokenize(caption) for id, caption in candidates.items()})


def score_tokens(references, candidates):
    """Score captions that are token lists already. Pictures without a candidate are left out.

    Returns {"corpus": {"CIDEr", "METEOR", "BLEU-1", …, "BLEU-4", "ROUGE-L"}, "per_image": {id: {the same}}}. Raises UserError when
    there is no candidate, one without references, or two ids that differ in their type only.
    """
    known = {str(id): captions for id, captions in references.items()}
    if not candidates:
        raise UserError("there is no caption to score: name a result file that has some")
    if len(known) < len(references) or len({str(id) for id in candidates}) < len(candidates):
        raise UserError("two ids are the same but for their type (7 and \"7\"): keep one of them")
    for id in candidates:
        if not known.get(str(id)):
            raise UserError(f"picture {id} has a caption but no references: score it with the annotations it belongs to")
    pairs = [known[str(id)] for id in candidates], list(candidates.values())
    scores = cider(*pairs) | meteor(*pairs) | bleu(*pairs) | rouge_l(*pairs)
    return {"corpus": {metric: float(corpus) for metric, (corpus, _) in scores.items()},
            "per_image": {id: {metric: float(pictures[i]) for metric, (_, pictures) in scores.items()} for i, id in enumerate(candidates)}}


# ---------------------------------------------------------------------------------------------------------------------
# Files in COCO's layout: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, results [{"image_id", "caption"}]

METEOR_NAME = "METEOR (exact + stem)"


def read_json(path):
    """What a JSON file holds; UserError when it holds none."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no whole JSON file ({str(error)[:60]}): fetch or write it again") from None


def caption_pairs(entries, path):
    """[(picture's id, caption), …] of annotations or results; UserError when an entry lacks one of them, or the caption is no string."""
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list of captions: it should be in COCO's format, [{{\"image_id\": 1, \"caption\": \"…\"}}, …]")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), (int, str)) or not isinstance(entry.get("caption"), str):
            raise UserError(f"{path}: entry {number} needs an \"image_id\" (a number or a string) and a \"caption\" (a string), and is {str(entry)[:60]}")
    return [(entry["image_id"], entry["caption"]) for entry in entries]


def read_references(path):
    """{id: [caption, …]} of a COCO annotation file."""
    content, references = read_json(path), {}
    for id, caption in caption_pairs(content.get("annotations") if isinstance(content, dict) else None, path):
        references.setdefault(id, []).append(caption)
    return references


def read_results(path):
    """{id: caption} of a COCO result file; UserError when a picture has two."""
    results = {}
    for id, caption in caption_pairs(read_json(path), path):
        if id in results:
            raise UserError(f"{path} has two captions for picture {id}: keep one")
        results[id] = caption
    return results


def read_dataset(folder, split):
    """The pictures of a folder in COCO's layout that have captions: [{"id", "path", "captions": [str, …], "scene" or None}, …].

    split: "train" or "val". The captions are in annotations/captions_<split>2017.json or captions_<split>.json, the pictures in
    <split>2017/ or <split>/. Your own pictures may also lie in images/, with annotations/captions.json; then every tenth is for "val".
    Raises UserError when there is no such file, or an id stands twice or belongs to no picture.
    """
    folder = Path(folder)
    for names, pictures in ((f"captions_{split}2017.json", f"{split}2017"), (f"captions_{split}.json", split), ("captions.json", "images")):
        path = folder / "annotations" / names
        if path.exists():
            break
    else:
        raise UserError(f"{folder} has no annotations/captions_{split}2017.json, captions_{split}.json or captions.json: name a folder in COCO's layout")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path} has no list of \"images\": it should be in COCO's format")
    dataset = {}
    for entry in content["images"]:
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("file_name"), str):
            raise UserError(f"{path}: a picture needs an \"id\" and a \"file_name\", and is {str(entry)[:60]}")
        if entry["id"] in dataset:
            raise UserError(f"{path}: picture {entry['id']} stands there twice: keep one")
        dataset[entry["id"]] = {"id": entry["id"], "path": inside(folder / pictures, entry["file_name"]), "captions": [], "scene": entry.get("scene")}
    for id, caption in caption_pairs(content.get("annotations"), path):
        if id not in dataset:
            raise UserError(f"{path}: a caption belongs to picture {id}, which is not among its \"images\"")
        dataset[id]["captions"].append(caption)
    told = [picture for picture in dataset.values() if picture["captions"]]
    if names == "captions.json":
        told = [picture for i, picture in enumerate(told) if (i % 10 == 9) == (split == "val")]
    if not told:
        raise UserError(f"{path} has no captions for the split {split!r}: name a folder that has some")
    return told


def inside(folder, name):
    """The path of `name` within `folder`; UserError when it would lead out of it."""
    path = (Path(folder) / name).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise UserError(f"{name!r} leads out of {folder}: this file is not to be trusted")
    return Path(folder) / name


def load_image(path):
    """A picture of any kind as Pillow's RGB: turned as its EXIF data say, 16 bits scaled to 8, transparency on white, the first frame.

    Raises UserError, naming the file, when it cannot be decoded to the end or has more than 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # of odd metadata; what is broken raises
            with Image.open(path) as image:
                image.load()                               # all of it, before anything else is asked: no half a picture
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":                  # 16 bits or more: convert() would clip them to white
                    values = np.asarray(image, dtype=np.float64)
                    image = Image.fromarray(np.uint8(np.clip(values / max(257, values.max() / 255), 0, 255).round()))
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path} is not there: check the path") from None
    except Exception as error:                             # decoders raise whatever they like on broken data
        raise UserError(f"{path} cannot be read as a picture ({str(error)[:80] or type(error).__name__}): replace or remove it") from None


# ---------------------------------------------------------------------------------------------------------------------
# COCO 2017: 118,287 pictures for training and 5,000 for validation, with about five captions each

HOST = "https://s3.amazonaws.com/images.cocodataset.org"   # the certificate of the project's own address does not match
ARCHIVES = (                                               # what it gives, the archive, its bytes, its MD5
    ("annotations", "annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"),
    ("val2017", "zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
    ("train2017", "zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"))


def download_coco(folder):
    """Fetch and unpack COCO 2017 into `folder`; what is there already is left alone, what was interrupted goes on.

    An archive is checked, unpacked beside its place, renamed when whole, and removed, so the disk needs 40 GB for a while and 20 GB in the end.
    """
    folder = Path(folder)
    missing = [archive for archive in ARCHIVES if not (folder / archive[0]).exists()]
    needed = max((size for _, _, size, _ in missing), default=0)                 # an archive and what is in it at the same time
    for name, address, size, _ in missing:
        shutil.rmtree(folder / f"{name}.tmp", ignore_errors=True)
        here = next((path for path in (folder / Path(address).name, folder / f"{Path(address).name}.part") if path.exists()), None)
        needed += size - (here.stat().st_size if here else 0)
    require_space(folder, needed)
    for name, address, size, digest in missing:
        unpack(download(f"{HOST}/{address}", folder / Path(address).name, size, digest), folder, name)
    print(f"COCO 2017 is in {folder}")


def unpack(archive, folder, name):
    """Unpack the folder `name` of a zip file to folder/name, all or nothing, and remove the archive. UserError when a path leads out of it."""
    building = Path(folder) / f"{name}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [member for member in zipped.infolist() if not member.is_dir()]
            for member in members:
                inside(building, member.filename)
            require_space(folder, sum(member.file_size for member in members))
            for number, member in enumerate(members, 1):
                zipped.extract(member, building)
                if number % 100 == 0 or number == len(members):
                    print(f"\r{name}: {number:,} of {len(members):,} files unpacked ", end="", flush=True)
            print()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): remove it and run the command again") from None
    if not (building / name).is_dir():
        raise UserError(f"{archive} has no folder {name}: remove it and run the command again")
    os.replace(building / name, Path(folder) / name)
    shutil.rmtree(building)
    archive.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The shapes world, drawn: fineweb.py makes its scenes and tells them, here they become pictures

PAINT = {"red": (226, 62, 56), "green": (58, 178, 88), "blue": (66, 118, 238), "yellow": (250, 208, 52), "pink": (248, 142, 190), "white": (246, 246, 240)}
IMAGES, VAL, VAL_UNSEEN = 6_000, 500, 250                  # pictures for training, for validation, and for validation with unseen pairs


def draw_scene(scene, rng, size=64):
    """A scene as an RGB picture of size × size pixels; `rng` shifts each object within its cell and tints the ground."""
    fine = 4 * size                                        # drawn large and made small: smooth edges
    unit = fine / GRID / 16                                # a cell is 16 units wide
    ground = tuple(rng.randint(20, 44) + extra for extra in (0, 4, 14))
    image = Image.new("RGB", (fine, fine), ground)
    draw = ImageDraw.Draw(image)
    for thing in scene["objects"]:
        r = 7.6 if thing["size"] == "large" else 5.8
        slack = 7.9 - r
        x, y = ((16 * thing[axis] + 8 + rng.uniform(-slack, slack)) * unit for axis in ("col", "row"))
        _draw_shape(draw, thing["shape"], x, y, r * unit, PAINT[thing["colour"]])
    return image.resize((size, size), Image.BOX)


def _draw_shape(draw, shape, x, y, r, paint):
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), paint)
    elif shape == "square":
        draw.rounded_rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), 0.15 * r, paint)
    elif shape == "triangle":
        draw.polygon(((x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)), paint)
    else:
        for dx, dy in ((r, 0.34 * r), (0.34 * r, r)):
            draw.rounded_rectangle((x - dx, y - dy, x + dx, y + dy), 0.1 * r, paint)


def make_shapes(folder, images=IMAGES, seed=0):
    """Draw the shapes world as a dataset in COCO's layout: train/, val/, annotations/captions_{train,val}.json, scenes in the entries.

    The last third of the validation pictures holds pairs of colour and shape that no training picture has. The same seed gives the
    same files. The folder appears when it is whole; UserError when it is there already and not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: remove it, or name another")
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    (building / "annotations").mkdir(parents=True)
    for split, unseen in (("train", [False] * images), ("val", [False] * VAL + [True] * VAL_UNSEEN)):
        (building / split).mkdir()
        rng, content = random.Random(f"{seed} {split}"), {"info": {"description": f"the shapes world, seed {seed}"}, "images": [], "annotations": []}
        for id, pair in enumerate(unseen, 1):
            scene, file_name = random_scene(rng, pair), f"{id:06d}.png"
            draw_scene(scene, rng).save(building / split / file_name, compress_level=1)
            content["images"].append({"id": id, "file_name": file_name, "width": 64, "height": 64, "scene": scene})
            content["annotations"] += [{"id": 5 * id + k, "image_id": id, "caption": caption} for k, caption in enumerate(captions(scene, rng))]
        with atomic_write(building / "annotations" / f"captions_{split}.json", "w", encoding="utf-8") as file:
            json.dump(content, file)
    if folder.exists():
        folder.rmdir()
    os.replace(building, folder)


# ---------------------------------------------------------------------------------------------------------------------
# The commands at the top of this file

COLUMNS = ("CIDEr", "METEOR", "BLEU-4", "ROUGE-L")


def table(scores, of):
    """One system's scores as lines: the corpus score, and mean ± standard deviation over the pictures."""
    lines = [f"{'':22} corpus    over pictures"]
    for metric, corpus in scores["corpus"].items():
        pictures = [picture[metric] for picture in scores["per_image"].values()]
        lines.append(f"{METEOR_NAME if metric == 'METEOR' else metric:22} {corpus:.4f}    {np.mean(pictures):.4f} ± {np.std(pictures):.4f}")
    return "\n".join([*lines, f"{len(scores['per_image']):,} of {of:,} pictures scored"])


def ranking(systems, of):
    """Several systems' scores as lines, the best CIDEr first. systems: {name: result of evaluate()}."""
    lines, width = [], max(map(len, systems))
    for name, scores in sorted(systems.items(), key=lambda system: -system[1]["corpus"]["CIDEr"]):
        lines.append(f"{name:{width}}" + "".join(f"  {scores['corpus'][metric]:8.4f}" for metric in COLUMNS) + f"  {len(scores['per_image']):6,} of {of:,}")
    return "\n".join([f"{'':{width}}" + "".join(f"  {metric:>8}" for metric in COLUMNS) + "  pictures", *lines, f"METEOR is {METEOR_NAME}"])


def score_files(references_path, results_paths, out):
    """Score result files, print the table, write everything to `out`."""
    references = read_references(references_path)
    systems = {str(path): evaluate(references, read_results(path)) for path in results_paths}
    if len(systems) == 1:
        (scores,) = systems.values()
        print(table(scores, len(references)))
    else:
        scores = systems
        print(ranking(systems, len(references)))
        if len({frozenset(map(str, system["per_image"])) for system in systems.values()}) > 1:
            print("the systems were not scored on the same pictures: their CIDEr cannot be compared")
    with atomic_write(out, "w", encoding="utf-8") as file:
        json.dump(scores, file)
    print(f"all scores, and each picture's: {out}")


def main():
    """The commands at the top of this file."""
    parser = Parser(__doc__)
    scoring, pictures = parser.add_argument_group("scores"), parser.add_argument_group("pictures")
    scoring.add_argument("--references", metavar="FILE", help="annotations in COCO's format")
    scoring.add_argument("--results", nargs="+", metavar="FILE", help="captions in COCO's result format; with several files the systems are ranked")
    scoring.add_argument("--out", default="scores.json", metavar="FILE", help="where all scores go (default: %(default)s)")
    pictures.add_argument("--download", nargs="?", const="data/coco", metavar="DIR", help="fetch COCO 2017 (default folder: %(const)s)")
    pictures.add_argument("--make-shapes", metavar="DIR", help="draw the shapes world")
    pictures.add_argument("--images", type=int, default=IMAGES, metavar="N", help="training pictures (default: %(default)s)")
    pictures.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    if args.download:
        download_coco(args.download)
    elif args.make_shapes:
        if args.images < 1:
            raise UserError(f"--images {args.images} draws nothing: give a number from 1")
        make_shapes(args.make_shapes, args.images, args.seed)
        print(f"{args.images:,} pictures for training and {VAL + VAL_UNSEEN} for validation are in {args.make_shapes}")
    elif args.references and args.results:
        score_files(args.references, args.results, args.out)
    else:
        raise UserError("give --references with --results, or --download, or --make-shapes")


if __name__ == "__main__":
    command_line(main)
