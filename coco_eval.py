"""
Pictures with captions, and the scores of captions.

    python coco_eval.py --references captions_val2017.json --results results.json [--out FILE]
    python coco_eval.py --download [DIR] [--val-only]      COCO 2017: 20 GB, 40 GB while it unpacks

A caption is scored against about five that people wrote, by four metrics that differ in what
they count as agreement:

    BLEU      which words and phrases of the candidate occur in a reference?     (precision)
    ROUGE-L   how much of a reference does it say in the same order?             (both)
    CIDEr-D   the same phrases, weighted by how much they tell about a picture   (tf-idf cosine)
    METEOR    which words agree, other endings allowed, in how few pieces?       (recall first)

On the same tokens (equal for 99.9 % of captions) all give the numbers of the official COCO scorer,
which needs Java, except that METEOR leaves out the tables of synonyms and paraphrases and says so:
"METEOR (exact + stem)". The worked examples below, but CIDEr's, score one candidate against two
references:

    candidate       a red circle and a blue square
    references      a red circle above a blue square  |  a blue square

To read, in five minutes: CIDEr-D, which everyone quotes and which captions can be trained on; for
another evening BLEU, ROUGE-L and METEOR. After the banner: tokens, evaluation, pictures and
datasets, COCO, the toy pictures and the facts of a caption, the command line.
"""
import hashlib
import html
import json
import math
import os
import random
import zipfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import filelock
import numpy as np
import regex
import requests
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import fineweb
from fineweb import COLORS, GRID, NUMBERS, SHAPES, SIZES, UserError

# -----------------------------------------------------------------------------
# CIDEr-D


def ngram_counts(tokens):
    """How often each run of 1, 2, 3 and 4 words occurs: four Counters of tuples."""
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, 5)]


class CIDEr:
    """CIDEr-D: n-grams weighted by how much they tell (Vedantam et al. 2015, arXiv's eq. 4).

    "a" stands in every caption and tells nothing; "giraffe" does. So an n-gram g weighs
    w(g) = tf(g) * (ln N - ln df(g)): tf is its count in the caption, N the number of pictures, and
    df the number of pictures that have g in a reference (at least 1). Then

        CIDEr_n = mean over references of  sum_g min(w_c(g), w_r(g)) * w_r(g) / (|w_c| |w_r|)
                                           * exp(-d^2 / (2 * 6^2))
        CIDEr-D = 10 * mean of CIDEr_1 ... CIDEr_4

    a cosine, clipped by min() so that repeating a word gains nothing, and lower for a difference of
    length d (in bigrams). df comes from the pictures that are scored: a subset of them has other
    scores. With one picture all weights are 0.

    Example: two pictures, one reference each, "a blue square" and "a red circle"; the candidate for
    the first is "a square". "a" is in both and weighs 0, other words ln 2 = .69. 1-grams: .69^2 /
    (.69 * .69 sqrt 2) = .707; no longer n-gram is common. d = 1 - 2.
    CIDEr-D = 10 * (.707 + 0 + 0 + 0) / 4 * exp(-1/72) = 1.743.
    """

    def __init__(self, references):
        """Take the document frequencies of pictures; references: token lists of each."""
        self.df = Counter()
        for picture in references:
            grams = set()
            for reference in picture:
                grams.update(*ngram_counts(reference))
            self.df.update(grams)
        self.log_n = math.log(len(references))

    def weigh(self, tokens):
        """(bigrams, for n = 1 ... 4 the vector {n-gram: weight} and its norm) of a caption."""
        vectors = []
        for counts in ngram_counts(tokens):
            vector = {}
            for gram, tf in counts.items():
                vector[gram] = tf * (self.log_n - math.log(max(1, self.df[gram])))
            vectors.append((vector, math.sqrt(sum(w * w for w in vector.values()))))
        return max(0, len(tokens) - 1), vectors

    def score(self, references, candidate):
        """The score of one picture's candidate; references: what weigh() made of each."""
        length_c, of_candidate = self.weigh(candidate)
        total = 0.0
        for length_r, of_reference in references:
            cosines = 0.0
            for (w_c, norm_c), (w_r, norm_r) in zip(of_candidate, of_reference, strict=True):
                common = sum(min(w, w_r[g]) * w_r[g] for g, w in w_c.items() if g in w_r)
                cosines += common / (norm_c * norm_r) if norm_c and norm_r else 0.0
            d = length_c - length_r
            total += math.exp(-(d**2) / (2 * 6**2)) * cosines
        return 10 * total / 4 / len(references)


def cider(references, candidates):
    """{"CIDEr": (mean, [each picture])} of token lists: for a picture several, and a candidate."""
    scorer = CIDEr(references)
    pictures = []
    for picture, candidate in zip(references, candidates, strict=True):
        pictures.append(scorer.score([scorer.weigh(tokens) for tokens in picture], candidate))
    return {"CIDEr": (float(np.mean(pictures)), pictures)}


# -----------------------------------------------------------------------------
# BLEU (optional)


def bleu(references, candidates):
    """BLEU-1 ... BLEU-4: the share of n-grams that a reference has too (Papineni et al. 2002).

    An n-gram counts at most as often as it occurs in the reference that has it most often
    (clipping), so "a a a a" gains nothing (sections 2.1 to 2.3):

        p_n    = sum of min(count in the candidate, largest count in a reference)
                 / sum of counts in the candidate
        BLEU-n = BP * (p_1 * ... * p_n)^(1/n)         BP = exp(1 - r/c) if c < r, else 1

    c is the length of the candidate, r that of the reference closest to it (of two, the shorter):
    without BP, one sure word would be a perfect caption. For the corpus all counts and lengths are
    summed first; it is not the mean over pictures.

    Example: 6 of the 7 words occur in the first reference ("and" does not): p_1 = 6/7. Of the 6
    pairs of words, 4 do: "a red", "red circle", "a blue", "blue square". p_2 = 4/6. c = r = 7.
    BLEU-2 = sqrt(6/7 * 4/6) = 0.756.

    references: for each picture a list of token lists; candidates: for each a token list.
    Returns {"BLEU-n": (corpus, [each picture])}.
    """
    rows = [bleu_counts(r, c) for r, c in zip(references, candidates, strict=True)]
    rows = np.array(rows, dtype=float)
    corpus = bleu_scores(rows.sum(0, keepdims=True))
    pictures = bleu_scores(rows)
    return {f"BLEU-{n}": (corpus[0, n - 1], pictures[:, n - 1]) for n in range(1, 5)}


def bleu_counts(references, candidate):
    """[c, r, matching 1- to 4-grams, the candidate's 1- to 4-grams] of a picture."""
    of_references = [ngram_counts(reference) for reference in references]
    matches = []
    totals = []
    for n, counts in enumerate(ngram_counts(candidate)):
        clipped = 0
        for gram, count in counts.items():
            clipped += min(count, max(of_reference[n][gram] for of_reference in of_references))
        matches.append(clipped)
        totals.append(max(0, len(candidate) - n))
    lengths = [len(reference) for reference in references]
    closest = min(lengths, key=lambda length: (abs(length - len(candidate)), length))
    return [len(candidate), closest, *matches, *totals]


def bleu_scores(rows):
    """BLEU-1 ... BLEU-4 of rows of counts; 1e-15 and 1e-9 are the official guards against 0/0."""
    c = rows[:, :1]
    r = rows[:, 1:2]
    precision = (rows[:, 2:6] + 1e-15) / (rows[:, 6:] + 1e-9)
    mean = np.cumprod(precision, axis=1) ** (1 / np.arange(1, 5))
    ratio = (c + 1e-15) / (r + 1e-9)
    return mean * np.exp(np.minimum(0, 1 - 1 / ratio))


# -----------------------------------------------------------------------------
# ROUGE-L (optional)


def rouge_l(references, candidates):
    """ROUGE-L: the longest common subsequence, gaps allowed (Lin 2004, section 3.1).

        P = max LCS / length of the candidate     R = max LCS / length of the reference
        F = (1 + b^2) P R / (R + b^2 P),  b = 1.2

    Each maximum is taken over the references by itself, as the official code does.

    Example: "a red circle a blue square" is common to the candidate and the first reference:
    P = 6/7 and R = 6/7. The second reference is contained whole: R = 3/3.
    F = 2.44 * 6/7 * 1 / (1 + 1.44 * 6/7) = 0.936.

    Arguments and result as for bleu(); the corpus is the mean.
    """
    pictures = [rouge_l_picture(r, c) for r, c in zip(references, candidates, strict=True)]
    return {"ROUGE-L": (float(np.mean(pictures)), pictures)}


def rouge_l_picture(references, candidate):
    """The F of one picture."""
    common = [common_subsequence(reference, candidate) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(lcs / max(len(r), 1) for lcs, r in zip(common, references, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def common_subsequence(a, b):
    """Length of the longest common subsequence of two lists (dynamic programming)."""
    row = [0] * (len(b) + 1)  # row[j]: the length for the words of `a` so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


# -----------------------------------------------------------------------------
# METEOR (optional)

ALPHA = 0.85  # these four were tuned to human rankings of translations (Denkowski & Lavie 2014)
BETA = 0.20
GAMMA = 0.60
DELTA = 0.75
STEM_WEIGHT = 0.6  # of a match that is not the very same word
FUNCTION_WORDS = frozenset(
    """the and of to in a that for as is i it was with on 's s 't ' by he be at are his not from or
    this you had have their an but they which were her all more will one when can what we so she
    would who if other there than has about some been its people time no into could up over also out
    after two said new first last year years""".split()
)  # more frequent than one word in a thousand


def meteor(references, candidates):
    """METEOR (exact + stem): words aligned one to one, in few pieces (Denkowski & Lavie 2014).

    Each word of the candidate is aligned with at most one of the reference that is equal, or equal
    but for its ending. Of all alignments with the most matches those with the most equal words are
    kept, and of these the one in the fewest chunks, runs that are adjacent in both (Banerjee &
    Lavie 2005). A match counts 1, or .6 by stem; function words weigh 1 - delta and content words
    delta, in the matches m and in the lengths l:

        P = m_c / l_c      R = m_r / l_r      F = P R / (alpha P + (1 - alpha) R), recall first
        METEOR = F * (1 - gamma * (chunks / matches)^beta); no penalty if all is one chunk

    The best reference counts, of equal ones the first. For the corpus the statistics of the best
    references are summed, and the formula is applied once. The full METEOR 1.5 also matches
    synonyms and paraphrases, from tables of 60 MB; on COCO that adds some .01.

    Example, with the first reference: six words match in the two chunks "a red circle" and "a blue
    square". "a" and "and" are function words: m = 4 * .75 + 2 * .25 = 3.5, l_c = 3.75, l_r = 4.25.
    P = .933, R = .824, F = .838, METEOR = .838 * (1 - .6 * (2/6)^.2) = .435. The second reference
    is said whole, in one chunk of three: P = 1.75 / 3.75 = .467, R = 1, F = .854, METEOR = .442,
    so this one counts.

    Arguments and result as for bleu().
    """
    best = []
    for picture, candidate in zip(references, candidates, strict=True):
        words = meteor_words(candidate)
        rows = [meteor_statistics(meteor_words(reference), words) for reference in picture]
        best.append(max(rows, key=meteor_score))
    return {"METEOR": (meteor_score(np.sum(best, axis=0)), [meteor_score(row) for row in best])}


def meteor_words(tokens):
    """The words that METEOR sees: t-shirt, 's and n't are two each."""
    text = " ".join(tokens).replace("-", " ")
    text = regex.sub(r"(?<!\S)'(?=\p{L})", "' ", text)
    return regex.sub(r"(?<=\p{L})'(?=\p{L})", " '", text).split()


def meteor_statistics(reference, candidate):
    """[m_c, l_c, m_r, l_r, matches, chunks]; a whole match in one chunk counts as no chunk."""
    pairs = align(reference, candidate)
    matched_c = 0.0
    matched_r = 0.0
    for i, j in pairs:
        agreement = 1.0 if candidate[i] == reference[j] else STEM_WEIGHT
        matched_c += agreement * weight(candidate[i])
        matched_r += agreement * weight(reference[j])
    chunks = count_chunks(pairs)
    if chunks == 1 and len(pairs) == len(candidate) == len(reference):
        chunks = 0
    length_c = sum(map(weight, candidate))
    length_r = sum(map(weight, reference))
    return [matched_c, length_c, matched_r, length_r, len(pairs), chunks]


def weight(word):
    """Of a word in METEOR's matches and lengths."""
    return 1 - DELTA if word in FUNCTION_WORDS else DELTA


def meteor_score(statistics):
    """The formula of meteor() on what meteor_statistics() gives, or on sums of it."""
    matched_c, length_c, matched_r, length_r, matches, chunks = statistics
    if not matches:
        return 0.0
    precision = matched_c / length_c
    recall = matched_r / length_r
    f = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    return float(f * (1 - GAMMA * (chunks / matches) ** BETA))


def count_chunks(pairs):
    """The number of runs in which both positions grow by one."""
    following = {(i + 1, j + 1) for i, j in pairs}
    return sum(pair not in following for pair in pairs)


def align(reference, candidate, beam=40):
    """Pair equal stems: the most pairs, the fewest unequal words, the fewest chunks, then nearby.

    Returns [(i, j), ...] for candidate[i] and reference[j]. A stem that occurs n times here and m
    times there makes min(n, m) pairs whatever is chosen; which ones is searched from left to right.
    A state is (positions of the reference in use, the last one), and the best way to each is kept.
    The limits, `beam` states and 8 positions, matter only where a word is repeated again and again.
    """
    places = {}
    for j, word in enumerate(reference):
        places.setdefault(stem(word), []).append(j)
    left = Counter(map(stem, candidate))
    # (in use, last or -2): (unequal words, chunks, distance, pairs)
    states = {(0, -2): (0, 0, 0, ())}
    for i, word in enumerate(candidate):
        left[stem(word)] -= 1
        extended = {}
        for (used, last), way in states.items():
            unequal, chunks, distance, pairs = way
            free = [j for j in places.get(stem(word), ()) if not used >> j & 1]
            ways = []
            if left[stem(word)] >= len(free):  # enough of this word follow: it may stay alone
                ways.append(((used, -2), way))
            free.sort(key=lambda j: (reference[j] != word, j != last + 1, abs(i - j)))
            for j in free[:8]:  # equal words, the one after the last, and those nearest to i
                costs = (unequal + (reference[j] != word), chunks + (j != last + 1))
                longer = (*costs, distance + abs(i - j), (*pairs, (i, j)))
                ways.append(((used | 1 << j, j), longer))
            for state, way in ways:
                extended[state] = min(way, extended.get(state, way))
        states = extended
        if len(states) > beam:
            order = sorted(states.items(), key=lambda item: (-len(item[1][3]), item[1]))
            states = dict(order[:beam])
    return list(min(states.values())[3])


PLURALS = ((r"^skies$", "sky"), (r"'s?$", ""), (r"(ss|i)es$", r"\1"), (r"(..[^su])s$", r"\1"))
VERBS = (  # what remains of a verb without -ing or -ed: the first that applies mends it
    (r"([bdfgmnprt])\1$", r"\1"),  # sitting: sitt, sit
    (r"(at|bl|iz|^[^aeiouy]*[aeiouy][^aeiouywx])$", r"\1e"),  # riding: rid, ride
)
SUFFIXES = (
    (r"([^aeiouy])(?<!^sk)y$", r"\1i"),
    (r"([aeiouy][^aeiouy].*)(?<=[cdeghkmnrt])(?<!^on|^ear)li$", r"\1"),  # nearly: nearli, near
    (r"([aeiouy][^aeiouy].*)ful$", r"\1"),
    (r"(......)(er|al|ic|or|ment)$", r"\1"),
    (r"^(?![^aeiouy]*[aeiouy][^aeiouywx]e$)(.*[aeiouy].+)e$", r"\1"),
    (r"(....)ll$", r"\1l"),
)


@lru_cache(maxsize=100_000)
def stem(word):
    """A word without its ending, mostly as Porter's second stemmer has it: cities gives citi."""
    for ending, rest in PLURALS:
        word = regex.sub(ending, rest, word)
    verb = regex.fullmatch(r"(.*[aeiouy].*)(?:ing|ed|ingly|edly)", word)
    if verb:
        mended = [regex.sub(ending, rest, verb[1]) for ending, rest in VERBS]
        word = min(mended, key=lambda stem: stem == verb[1])  # the first that differs, if any
    for ending, rest in SUFFIXES:
        word = regex.sub(ending, rest, word)
    return word


# =============================================================================
# From here on: tooling, for reference
# =============================================================================
# Tokens: what the Stanford tokenizer, which the official scorer uses, makes of a caption

CONTRACTION = regex.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")  # dog's: dog 's
TWO_WORDS = regex.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta))\b")  # cannot: can not
TOKEN = regex.compile(
    r"""
      https?://[^\s"]+ | [\w.+-]+@\w+(?:[.-]\w+)+ | </?[a-z]+> | [!?]{2,}
    | n't | '(?:s|re|ve|ll|d|m)(?!\w)
    | [a-z](?:\.[a-z])+(?![a-z])\.? | [a-z]\.(?!\w)                        # u.s.  d.v.d  a.
    | (?:st|ave|blvd|rd|mt|ft|mr|mrs|ms|dr|jr|sr|etc|vs|inc|co|corp|ltd|no|al|ca|ky|fla|calif)
      \.(?!\w)
    | \d+:\d+(?=[ap]m\b)
    | \d+(?:[.,:]\d+)*\w*(?:[-/]\w+)*                                      # 1,000  10:30  6ft
    | \w+(?:['&/.-]\w+)*                                                   # t-shirt  o'clock
    | \.\.+ | --+ | [^\s\p{C}\U00010000-\U0010ffff]                        # no emoji
    """,
    regex.VERBOSE,
)
REPLACED = str.maketrans("‘’´–—€£“”«»‹›", "'''--$#" + 6 * '"', "\u00ad")  # the last one by nothing
REPLACED |= str.maketrans({"…": " ... ", "½": "1/2", "¼": "1/4", "¾": "3/4"})
INVISIBLE = regex.compile(r"[\p{Cf}\p{Cc}\p{Variation_Selector}\u20e3]")  # joiners and the like
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = {"'", "`", "``", '"', ".", "..", "...", "?", "!", ",", ":", ";", "-", "--", "---"}


def tokenize(caption):
    """The words of a caption without punctuation: "A dog's bone." gives ["a", "dog", "'s", "bone"].

    These are the Penn Treebank tokens of Stanford CoreNLP, less the official list of punctuation,
    for 99.9 % of COCO's captions, and for most other scripts (not for Tibetan and Khmer). The
    official scorer reads all captions as one text: there the dot of a single letter ("sign K.")
    depends on how the next caption begins. It keeps "22 3/4" as one word; here it is two.
    """
    text = html.unescape(caption).translate(REPLACED).lower()
    text = CONTRACTION.sub(r" \1", INVISIBLE.sub(" ", text))
    text = TWO_WORDS.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return [BRACKETS.get(token, token) for token in TOKEN.findall(text) if token not in DROPPED]


# -----------------------------------------------------------------------------
# Evaluation


def evaluate(references, candidates, tokenize=tokenize):
    """Score captions, {id: [str, ...]} and {id: str}. Pictures without a candidate are left out.

    Returns {"corpus": {"CIDEr", "METEOR", "BLEU-1", ..., "BLEU-4", "ROUGE-L"}, "per_image": {id:
    {the same}}}. tokenize: list, for captions that are tokens. Raises UserError for a candidate
    without references, or no candidate.
    """
    if not candidates:
        raise UserError("there is no caption to score", "name a result file that has some")
    for id in candidates:
        if not references.get(id):
            raise UserError(f"picture {id} has no references", "score it with its own annotations")
    targets = [[*map(tokenize, references[id])] for id in candidates]
    texts = [*map(tokenize, candidates.values())]
    scores = {}
    for metric in tqdm((cider, meteor, bleu, rouge_l), "scores", leave=False, disable=None):
        scores |= metric(targets, texts)
    corpus = {name: float(score) for name, (score, _) in scores.items()}
    per_image = {}
    for i, id in enumerate(candidates):
        per_image[id] = {name: float(pictures[i]) for name, (_, pictures) in scores.items()}
    return {"corpus": corpus, "per_image": per_image}


# -----------------------------------------------------------------------------
# Pictures and datasets, in COCO's layout: {"images": [{"id", "file_name"}], "annotations":
# [{"image_id", "caption"}]}, and results [{"image_id", "caption"}]


def id_text(id):
    """An id as text, the same for 7, 7.0 and "7"."""
    return str(id).removesuffix(".0")


def read_captions(path):
    """[(id of the picture, caption), ...] of a COCO annotation file, or of a list of results."""
    with fineweb.reading(path, 'JSON with "image_id" and "caption", as COCO has them'):
        content = json.loads(Path(path).read_bytes())
        entries = content["annotations"] if type(content) is dict else content
        # + "" is a TypeError for a caption that is no text
        return [(id_text(entry["image_id"]), entry["caption"] + "") for entry in entries]


def read_references(path):
    """{id: [caption, ...]} of a COCO annotation file."""
    references = {}
    for id, caption in read_captions(path):
        references.setdefault(id, []).append(caption)
    return references


def read_results(path):
    """{id: caption} of a COCO result file; UserError when a picture has two."""
    rows = read_captions(path)
    results = dict(rows)
    if len(results) < len(rows):
        twice = Counter(id for id, _ in rows).most_common(1)[0][0]
        raise UserError(f"{path} has two captions of picture {twice}", "keep one")
    return results


def read_dataset(folder, split, karpathy=False):
    """The captioned pictures of a folder in COCO's layout: "train", "val" or, of toys, "unseen".

    [{"id", "path", "captions": [str, ...], "scene" or None}, ...]. Where there is one set of
    pictures only, val2017/ or your own in images/ with annotations/captions.json, every tenth is
    for "val". Entries of one file are one picture; captions without a word do not count. Raises
    UserError when there is no such file, an id is unknown or used twice, or pictures are not there.
    """
    folder = Path(folder)
    if karpathy:
        return read_karpathy(folder, split)
    path, pictures, shared = find_layout(folder, split)
    captions = read_references(path)
    dataset = {}
    with fineweb.reading(path, 'COCO\'s "images" with "id" and "file_name"'):
        entries = json.loads(path.read_bytes())["images"]
        if len({id_text(entry["id"]) for entry in entries}) < len(entries):
            raise ValueError("two pictures have the same id")
        for entry in entries:
            name = pictures / entry["file_name"]
            picture = {"id": entry["id"], "path": name, "captions": [], "scene": entry.get("scene")}
            texts = captions.pop(id_text(entry["id"]), [])
            dataset.setdefault(name, picture)["captions"] += filter(str.strip, texts)
    if captions:
        problem = f"{path}: picture {next(iter(captions))} of a caption is not there"
        raise UserError(problem, "remove the caption")
    captioned = [picture for picture in dataset.values() if picture["captions"]]
    if len(captioned) < (2 if shared else 1):
        raise UserError(f"{path} has too few pictures with captions", "add some")
    if not captioned[0]["path"].exists():
        problem = f"{captioned[0]['path']} is not there"
        raise UserError(problem, f"file names of {path} are looked for in {pictures}")
    if shared:
        captioned = [p for i, p in enumerate(captioned) if (i % 10 == 0) == (split == "val")]
    return captioned


def read_karpathy(folder, split):
    """read_dataset() of COCO 2017's pictures in Karpathy's split (Karpathy & Fei-Fei 2015).

    annotations/dataset_coco.json is his file. 113,287 pictures are for training ("train" and
    "restval"), 5,000 for validation ("val") and 5,000 for the scores that papers report ("test").
    """
    path = folder / "annotations" / "dataset_coco.json"
    names = ("train", "restval") if split == "train" else (split,)
    dataset = []
    with fineweb.reading(path, "Karpathy's dataset_coco.json"):
        for entry in json.loads(path.read_bytes())["images"]:
            if entry["split"] in names:
                name = f"{entry['cocoid']:012d}.jpg"
                file = folder / "train2017" / name
                file = file if file.exists() else folder / "val2017" / name
                captions = [sentence["raw"] for sentence in entry["sentences"]]
                picture = {"id": entry["cocoid"], "path": file, "captions": captions, "scene": None}
                dataset.append(picture)
    if not dataset or not dataset[0]["path"].exists():
        raise UserError(f"{folder} has no pictures of {path}", "get all of COCO 2017 (--download)")
    return dataset


def find_layout(folder, split):
    """(annotation file, folder of the pictures, whether both splits share them)."""
    for year in ("2017", ""):
        if (folder / f"train{year}").is_dir():
            path = folder / "annotations" / f"captions_{split}{year}.json"
            return path, folder / f"{split}{year}", False
    for name, pictures in (("captions_val2017.json", "val2017"), ("captions.json", "images")):
        if (folder / pictures).is_dir() and (folder / "annotations" / name).exists():
            return folder / "annotations" / name, folder / pictures, True
    wanted = "train2017/ and annotations/, or images/ and annotations/captions.json"
    what_to_do = f"get COCO with python coco_eval.py --download, or have {wanted}"
    raise UserError(f"{folder} is not in COCO's layout", what_to_do)


def load_image(source, name=None):
    """A picture in a file as Pillow's RGB, its first frame, upright, transparency on white.

    Raises UserError when it cannot be decoded to its end, has more than 179 million pixels, is more
    than 500 times as long as wide (resized to its short side, it would fill memory), or has more
    than 8 bits a channel, whose scale is anybody's guess.
    """
    try:
        with Image.open(source) as image:
            if max(image.size) > 500 * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.load()  # all of it first: getexif() would hide a broken end
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                raise ValueError("it has 16 or 32 bits a channel: save it with 8")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:  # decoders raise whatever they like on broken data
        problem = f"{name or source} cannot be read as a picture ({error or type(error).__name__})"
        raise UserError(problem, "replace it") from error


# -----------------------------------------------------------------------------
# COCO 2017 (Lin et al. 2014): 118,287 pictures for training, 5,000 for validation, each with about
# five captions

HOST = "https://s3.amazonaws.com/images.cocodataset.org"  # the site's own certificate is wrong
ARCHIVES = (  # each has one folder; its MD5
    ("annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c"),
    ("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),
    ("zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),
)


def download_coco(folder, val_only=False):
    """Download, check and unpack COCO 2017, or, if val_only, what belongs to val2017."""
    folder = Path(folder)
    unpacked = folder / ".unpacked"  # archives, and what is in them until it is whole
    unpacked.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(unpacked / ".lock"):  # of two commands the second one waits
        for address, md5 in ARCHIVES[:2] if val_only else ARCHIVES:
            archive = unpacked / Path(address).name
            name = archive.stem.removesuffix("_trainval2017")
            if not (folder / name).exists():
                download(f"{HOST}/{address}", archive, md5)
                with zipfile.ZipFile(archive) as zipped:
                    members = tqdm(zipped.namelist(), name, unit=" files", disable=None)
                    zipped.extractall(unpacked, members)
                os.replace(unpacked / name, folder / name)
            archive.unlink(missing_ok=True)
    print(f"COCO 2017 is in {folder}")


def download(url, path, md5):
    """Download a file, once; what was interrupted goes on where it stopped."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
    with requests.get(url, stream=True, headers=headers, timeout=30) as answer:
        if answer.status_code != 416:  # nothing is missing
            answer.raise_for_status()
            done = done if answer.status_code == 206 else 0  # else the server starts over
            size = int(answer.headers["Content-Length"])
            chunks = answer.iter_content(1 << 20)
            with open(part, "ab" if done else "wb") as file:
                file.writelines(tqdm(chunks, path.name, size >> 20, unit=" MB", disable=None))
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != md5:
        part.unlink()
        raise UserError(f"{url} is not the expected file", "try again")
    os.replace(part, path)


# -----------------------------------------------------------------------------
# The toy pictures: fineweb.py makes scenes of colored shapes and describes them; here they are
# drawn

TRAIN_IMAGES = 6_000
VAL_IMAGES = 500
UNSEEN_IMAGES = 250  # more for validation, with pairs of color and shape that training has not
PAINT = dict(zip(COLORS, "#e23e38 #3ab258 #4276ee #fad034 #f88ebe #f6f6f0".split(), strict=True))


def draw_scene(scene, rng, size=64):
    """A scene as an RGB picture; `rng` moves each object within its cell and tints the ground."""
    large = 4 * size  # drawn large and reduced: smooth edges
    unit = large / GRID / 16  # a cell is 16 units wide
    ground = tuple(rng.randint(20, 44) + extra for extra in (0, 4, 14))
    image = Image.new("RGB", (large, large), ground)
    draw = ImageDraw.Draw(image)
    for thing in scene["objects"]:
        radius = 7.6 if thing["size"] == "large" else 5.8
        slack = 7.9 - radius
        x = (16 * thing["col"] + 8 + rng.uniform(-slack, slack)) * unit
        y = (16 * thing["row"] + 8 + rng.uniform(-slack, slack)) * unit
        draw_shape(draw, thing["shape"], x, y, radius * unit, PAINT[thing["color"]])
    return image.resize((size, size), Image.BOX)


def draw_shape(draw, shape, x, y, r, paint):
    """A shape of radius r around (x, y)."""
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), paint)
    elif shape == "square":
        half = 0.88 * r
        draw.rounded_rectangle((x - half, y - half, x + half, y + half), 0.15 * r, paint)
    elif shape == "triangle":
        draw.polygon(((x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)), paint)
    else:
        for dx, dy in ((r, 0.34 * r), (0.34 * r, r)):
            draw.rounded_rectangle((x - dx, y - dy, x + dx, y + dy), 0.1 * r, paint)


def make_shapes(folder, images=TRAIN_IMAGES):
    """Draw train/, val/ and unseen/ with annotations/captions_*.json, scenes in their entries."""
    splits = {"train": images, "val": VAL_IMAGES, "unseen": UNSEEN_IMAGES}
    with fineweb.new_folder(folder) as building:
        for split, count in splits.items():
            (building / split).mkdir()
            rng = random.Random(f"0 {split}")  # the same scenes each time
            entries = []
            annotations = []
            for id in range(1, count + 1):
                scene = fineweb.random_scene(rng, unseen=split == "unseen")
                name = f"{id:06d}.png"
                draw_scene(scene, rng).save(building / split / name, compress_level=1)
                entries.append({"id": id, "file_name": name, "scene": scene})
                for caption in fineweb.captions(scene, rng):
                    annotations.append({"image_id": id, "caption": caption})
            content = {"images": entries, "annotations": annotations}
            fineweb.write_json(building / f"annotations/captions_{split}.json", content)


# The facts of a caption: what it says about a scene, and whether that is true

FACTS = ("count", "objects", "place", "relation")
THING = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
SIZED_THING = regex.compile(rf"{THING}(?: is ({'|'.join(SIZES)}))?")
COUNT = regex.compile(rf"\b({'|'.join(NUMBERS.values())}) objects")
PLACE = regex.compile(
    rf"the (?P<thing>{THING}) is at the (?P<place>\w+ \w+)"
    rf"|at the (?P<place>\w+ \w+) there is a (?P<thing>{THING})"
)
RELATION = regex.compile(
    rf"a (?P<b>{THING}) with a (?P<a>{THING}) (?:to its )?(?P<side>left|right|above|below)"
)


def facts(caption, scene):
    """For each of FACTS True or False, or None where the caption does not state it.

    objects: every object that is named is there, with its size where that is named. A place or a
    relation of an object that is not there is False.
    """
    things = {fineweb.object_name(thing): thing for thing in scene["objects"]}
    stated = dict.fromkeys(FACTS)
    match = COUNT.search(caption)
    if match:
        stated["count"] = match[1] == NUMBERS[len(things)]
    for color, shape, size in SIZED_THING.findall(caption):
        thing = things.get(f"{color} {shape}")
        is_there = thing is not None and size in ("", thing["size"])
        stated["objects"] = is_there and stated["objects"] is not False
    match = PLACE.search(caption)
    if match:
        thing = things.get(match["thing"])
        stated["place"] = thing is not None and fineweb.place(thing) == match["place"]
    match = RELATION.search(caption)
    if match:
        a = things.get(match["a"])
        b = things.get(match["b"])
        known = a is not None and b is not None
        stated["relation"] = known and match["side"] in fineweb.relations(a, b)
    return stated


def questions(scene, rng):
    """For each of FACTS the beginning of a caption that has to state it next."""
    a, b = map(fineweb.object_name, rng.sample(scene["objects"], 2))
    beginnings = ("there are", "a picture of a", f"the {a} is at the", f"a {b} with a {a}")
    return dict(zip(FACTS, beginnings, strict=True))


# -----------------------------------------------------------------------------
# Command line

def table(scores, of):
    """A system's scores as lines: the corpus, and mean ± standard deviation over pictures."""
    lines = [f"{'':22} corpus    over pictures"]
    for metric, corpus in scores["corpus"].items():
        pictures = [picture[metric] for picture in scores["per_image"].values()]
        label = "METEOR (exact + stem)" if metric == "METEOR" else metric
        spread = f"{np.mean(pictures):.4f} ± {np.std(pictures):.4f}"
        lines.append(f"{label:22} {corpus:.4f}    {spread}")
    scored = len(scores["per_image"])
    if scored < 2:
        lines.append("(CIDEr of fewer than two pictures is always 0: it says nothing)")
    return "\n".join([*lines, f"{scored:,} of {of:,} pictures scored"])


def main():
    """The commands at the top of this file."""
    parser = fineweb.make_parser(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--results", metavar="FILE", help="captions in COCO's format, to be scored")
    task.add_argument("--download", nargs="?", const="data/coco", metavar="DIR", help="COCO 2017")
    parser.add_argument("--references", metavar="FILE", help="annotations in COCO's format")
    parser.add_argument("--out", metavar="FILE", help="write all scores, of each picture too")
    parser.add_argument("--val-only", action="store_true", help="its validation pictures: 1.1 GB")
    args = parser.parse_args()
    if args.download:
        fineweb.only(parser, args, "--download", "val_only")
        download_coco(args.download, args.val_only)
        return
    fineweb.only(parser, args, "--results", "references out")
    if not args.references:
        parser.error("--results needs the captions that people wrote: give --references")
    fineweb.refuse_existing(args.out)
    references = read_references(args.references)
    scores = evaluate(references, read_results(args.results))
    print(table(scores, len(references)))
    if args.out:
        fineweb.write_json(args.out, scores)


if __name__ == "__main__":
    fineweb.command_line(main)
