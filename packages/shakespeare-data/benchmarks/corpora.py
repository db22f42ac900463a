"""Measure the numbers in the README about corpora, partitions and large files.

    python benchmarks/corpora.py [parsing|similarity|partitions|mapped ...]

`nox -s corpora` runs this file. Tiny Shakespeare is read from the cache. The measurement `mapped`
writes 4 GiB to the directory for temporary files.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from statistics import median

import numpy as np

from shakespeare_data import (
    SCHEMES,
    Batches,
    Corpus,
    DataError,
    Speech,
    load_corpus,
    partition,
)
from shakespeare_data.partition import jensen_shannon

LEAF_ROLES = 1_129  # roles in LEAF's Shakespeare task, arXiv 1812.01097, table 1


def parsing() -> None:
    """Count plays, speeches and roles, and print ten random speeches of Tiny Shakespeare."""
    for name in ("tiny-shakespeare", "nine-plays", "plays"):
        corpus = load_corpus(name)
        speeches = corpus.speeches
        acts = sum(bool(act.heading) for play in corpus.plays for act in play.acts)
        scenes = sum(
            bool(scene.heading)
            for play in corpus.plays
            for act in play.acts
            for scene in act.scenes
        )
        known = sum(bool(speech.play and speech.speaker) for speech in speeches)
        print(
            f"{name}: {len(corpus.text):,} characters, {len(corpus.plays)} plays, {acts} acts, "
            f"{scenes} scenes, {len(speeches):,} speeches, {known:,} with play and speaker, "
            f"{len(roles(speeches)):,} roles"
        )
        for least in (100, 1_000, 2_000, 5_000):
            enough = sum(size >= least for size in roles(speeches).values())
            print(f"  roles with at least {least:,} characters: {enough} (LEAF: {LEAF_ROLES:,})")
    print("ten speeches of Tiny Shakespeare:")
    for speech in random.Random(4).sample(load_corpus("tiny-shakespeare").speeches, 10):
        first = speech.lines[0] if speech.lines else "(no words)"
        print(f"  {speech.play} | {speech.speaker} | {first}")


def roles(speeches: Iterable[Speech]) -> Counter[tuple[str, str]]:
    """Return the number of characters that each role has."""
    sizes: Counter[tuple[str, str]] = Counter()
    for speech in speeches:
        if speech.speaker:
            sizes[speech.role] += len(speech.text)
    return sizes


def similarity() -> None:
    """Compare the nine plays with Tiny Shakespeare."""
    tiny, nine = load_corpus("tiny-shakespeare"), load_corpus("nine-plays")
    for what, ours, theirs in (
        ("lines", lines(nine), lines(tiny)),
        ("speeches", [key(s) for s in nine.speeches], [key(s) for s in tiny.speeches]),
        ("play and speaker of speeches", [s.role for s in nine.speeches], roles_of(tiny)),
    ):
        common = sum((Counter(ours) & Counter(theirs)).values())
        blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
        in_order = sum(block.size for block in blocks)
        print(
            f"{what}: {len(ours):,} in the nine plays, {len(theirs):,} in Tiny Shakespeare, "
            f"{common:,} equal ({common / len(theirs):.2%}), {in_order:,} in the same order"
        )
    counts = [
        np.bincount(np.frombuffer(c.text.encode("latin-1"), np.uint8), minlength=256)
        for c in (tiny, nine)
    ]
    distinct = np.count_nonzero(sum(counts))
    divergence = jensen_shannon(counts[1], counts[0])
    print(
        f"characters: {len(nine.text):,} in the nine plays, {len(tiny.text):,} in Tiny "
        f"Shakespeare, {distinct} distinct; "
        f"Jensen-Shannon divergence of their distributions {divergence:.2e} bits"
    )


def lines(corpus: Corpus) -> list[str]:
    return [line for line in corpus.text.split("\n") if line]


def key(speech: Speech) -> tuple[str, str, tuple[str, ...]]:
    return (*speech.role, speech.lines)


def roles_of(corpus: Corpus) -> list[tuple[str, str]]:
    return [speech.role for speech in corpus.speeches]


def partitions() -> None:
    """Print a summary of each scheme for 2, 10 and 100 clients, on two texts."""
    row = "{:16} {:14} {:>7} {:>19} {:>17} {:>8} {:>9} {:>7} {:>26}"
    titles = ("corpus", "scheme", "clients", "train", "val", "left out", "speakers", "plays")
    print(row.format(*titles, "divergence"))
    for name in ("tiny-shakespeare", "plays"):
        corpus = load_corpus(name)
        for scheme in SCHEMES:
            for clients in (2, 10, 100):
                try:
                    divided = partition(corpus, clients, scheme, 1, min_characters=65)
                except DataError as error:
                    print(row.format(name, scheme, clients, "", "", "", "", "", "refused"), error)
                    continue
                report = divided.report()
                found = [part.divergence for part in report]
                print(
                    row.format(
                        name,
                        scheme,
                        clients,
                        extent(part.train for part in report),
                        extent(part.val for part in report),
                        f"{divided.left_out / len(corpus.text):.1%}",
                        extent(part.speakers for part in report),
                        extent(part.plays for part in report),
                        f"{min(found):.5f} {median(found):.5f} {max(found):.5f}",
                    )
                )


def extent(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:,}-{ordered[-1]:,}"


def mapped() -> None:
    """Measure the resident memory while 10,000 batches of 64 x 256 are drawn from 4 GiB."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        rng = np.random.default_rng(0)
        for _ in range(64):
            rng.integers(0, 65, 2**25, dtype=np.uint16).tofile(file)
        file.flush()
        batches = Batches(file.name, 64, 256, seed=1)
        before, most = resident(), Counter[str]()
        began = time.perf_counter()
        for i in range(10_000):
            next(batches)
            if i % 10 == 0:
                most |= resident()
        seconds = time.perf_counter() - began
    size = Path(file.name).name
    print(f"10,000 batches of 64 x 256 from 4 GiB ({size}): {seconds / 10:.3f} ms a batch")
    for kind, about in (("VmRSS", "all"), ("RssAnon", "own"), ("RssFile", "mapped files")):
        print(f"  resident, {about}: {before[kind]} MiB before, at most {most[kind]} MiB")


def resident() -> Counter[str]:
    """Return the resident memory of this process in MiB, for each kind of memory.

    This function needs Linux.
    """
    found = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return Counter({words[0][:-1]: int(words[1]) // 1024 for words in found if "kB" in words})


MEASUREMENTS = {measure.__name__: measure for measure in (parsing, similarity, partitions, mapped)}

if __name__ == "__main__":
    for name in sys.argv[1:] or MEASUREMENTS:
        print(f"--- {name}")
        MEASUREMENTS[name]()
