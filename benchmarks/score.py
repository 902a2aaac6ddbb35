"""Seconds of the NPIB matrix, how they grow, and its ranking and speed beside the estimators of MKA's authors.

    python benchmarks/score.py --states states.safetensors

`mka observe MODEL --output states.safetensors` writes the states; without them only synthetic layers are compared. The
authors' estimators (arXiv 2406.16330) are written afresh here from their description, on scikit-learn: for each pair of
layers the mean of the K x K mutual informations of single coordinates, divided by the root of the product of the two
entropies, which are estimated anew for each pair. Takes three minutes on 2 cores that do nothing else; the load of
the machine is printed before and after.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy.stats import kendalltau, spearmanr
from sklearn.feature_selection import mutual_info_regression
from sklearn.neighbors import NearestNeighbors
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import describe_ratio, time_rounds
from mka.evidence.states import HiddenStates
from mka.similarity.information import _count_cores, npib_matrix
from mka.similarity.npib import SimilaritySettings, embed_layers

Pairs = list[tuple[int, int]]

CORES = _count_cores()
# Of the authors' entropy.
ENTROPY_NEIGHBOURS = 50


def main() -> None:
    """Print growth, independence of threads, and the comparison with the authors' estimators."""
    parser = argparse.ArgumentParser(description="Seconds of the NPIB matrix, and MKA's authors' estimators beside it.")
    parser.add_argument("--states", type=Path, help="hidden states written by mka observe, compared as well")
    parser.add_argument("--layers", type=int, default=80, help="L of the main figure; L/4 and L/2 give the growth")
    parser.add_argument("--samples", type=int, default=2048, help="N of the main figure; N/4 to 2N give the growth")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions that medians are taken of")
    parser.add_argument("--sampled", type=int, default=60, help="pairs from which the authors' L, N figure is reckoned")
    given = parser.parse_args()
    print(f"{CORES} cores; load {describe_load()}; medians of {given.repeats}; K = 2\n")
    print_growth(given.layers, given.samples, given.repeats)
    print_threads(given.layers, given.samples)
    print_comparison(given.layers, given.samples, given.repeats, given.sampled, given.states)
    print(f"load at the end {describe_load()}")


def print_growth(layers: int, samples: int, repeats: int) -> None:
    """Seconds of the matrix by number of layers and of samples, and the exponents of a power law through them."""
    by_layers = [(size, samples) for size in (layers // 4, layers // 2, layers)]
    by_samples = [(layers // 4, size) for size in (samples // 4, samples // 2, samples, 2 * samples)]
    shapes = list(dict.fromkeys(by_layers + by_samples))
    calls = {f"{count},{size}": partial(npib_matrix, walk_layers(count, size)) for count, size in shapes}
    seconds = dict(zip(shapes, time_rounds(calls, repeats).values()))
    medians = {shape: statistics.median(taken) for shape, taken in seconds.items()}
    rows = [[*shape, f"{medians[shape]:.2f}", f"{min(seconds[shape]):.2f}"] for shape in shapes]
    print(f"NPIB matrix, {CORES} threads, by median and by best")
    print(tabulate(rows, headers=["layers", "samples", "seconds", "best"], disable_numparse=True))
    for name, column, chosen in (("layers", 0, by_layers), ("samples", 1, by_samples)):
        sizes = [shape[column] for shape in chosen]
        slope = np.polyfit(np.log(sizes), np.log([medians[shape] for shape in chosen]), 1)[0]
        print(f"grows as {name}^{slope:.2f} from {sizes[0]} to {sizes[-1]}")
    print()


def print_threads(layers: int, samples: int) -> None:
    """The same matrix with 1, 2 and 4 threads, compared bit by bit."""
    embeddings = walk_layers(layers // 2, samples)
    rows, first = [], None
    for number in (1, 2, 4):
        started = time.perf_counter()
        found = score_on(number, embeddings)
        seconds = time.perf_counter() - started
        first = found if first is None else first
        same = "yes" if found.tobytes() == first.tobytes() else f"NO, {np.count_nonzero(found != first)} differ"
        rows.append([number, f"{seconds:.2f}", same])
    print(f"NPIB matrix of {layers // 2} layers, {samples} samples by number of threads; 1 thread is on one core")
    print(tabulate(rows, headers=["threads", "seconds", "every bit as with 1"], disable_numparse=True))
    print()


def print_comparison(layers: int, samples: int, repeats: int, sampled: int, states: Path | None) -> None:
    """Seconds and rankings beside the authors' estimators, on the same embeddings."""
    walks = [walk_layers(12, samples // 4), walk_layers(30, samples)]
    compared = [(f"random walk, {len(walk)} layers, {walk.shape[1]} samples", walk) for walk in walks]
    if states is not None:
        embedded = embed_layers(HiddenStates.load(states), SimilaritySettings())
        compared.append((f"{states.name}, {len(embedded)} layers, {embedded.shape[1]} samples", embedded))
    speeds, rankings = [], []
    for name, embeddings in compared:
        pairs = list_pairs(len(embeddings))
        # The large one takes half a minute.
        rounds = repeats if len(pairs) * embeddings.shape[1] < 1 << 18 else 1
        speeds.append([name, "all", *measure_speed(embeddings, pairs, rounds)])
        rankings += compare_rankings(name, embeddings)
    largest = walk_layers(layers, samples)
    pairs = list_pairs(layers)
    chosen = [pairs[i] for i in np.random.default_rng(0).choice(len(pairs), min(sampled, len(pairs)), replace=False)]
    name = f"random walk, {layers} layers, {samples} samples"
    speeds.append([name, f"{len(chosen)} of {len(pairs)}", *measure_speed(largest, chosen, repeats)])

    print(
        "Seconds beside the authors' estimators, which use one core, measured in turns; ratios are medians with their"
    )
    print("range. Where not all pairs were measured, theirs are seconds per pair times pairs: no work is shared.")
    headers = ["layers", "pairs", "theirs", f"ours, {CORES} cores", "ratio", "ours, 1 core", "ratio"]
    print(tabulate(speeds, headers=headers, disable_numparse=True))
    print("\nRankings of pairs of different layers by NPIB and by the authors' estimators")
    headers = ["layers", "against", "pairs", "NaN", "Spearman", "Kendall"]
    print(tabulate(rankings, headers=headers, disable_numparse=True))
    print()


def measure_speed(embeddings: np.ndarray, pairs: Pairs, repeats: int) -> list[str]:
    """Seconds of theirs and of ours, and how many times as fast ours is, on all cores and on one."""
    calls: dict[str, Callable[[], Any]] = {
        "theirs": partial(estimate_pairs, embeddings, pairs),
        "ours": partial(score_on, CORES, embeddings),
        "alone": partial(score_on, 1, embeddings),
    }
    seconds = time_rounds(calls, repeats, warm=False)
    share = len(pairs) / (len(embeddings) * (len(embeddings) + 1) / 2)
    theirs = [taken / share for taken in seconds["theirs"]]
    row = [f"{statistics.median(theirs):.2f}"]
    for ours in (seconds["ours"], seconds["alone"]):
        row += [f"{statistics.median(ours):.3f}", describe_ratio(theirs, ours)]
    return row


def compare_rankings(name: str, embeddings: np.ndarray) -> list[list[str]]:
    """Rank correlations of NPIB with the authors' similarity and with its numerator alone, which is never NaN."""
    upper = np.triu_indices(len(embeddings), 1)
    ours = npib_matrix(embeddings)[upper]
    similarity, information = estimate_pairs(embeddings, list_pairs(len(embeddings), apart=1))
    rows = []
    for against, values in (("similarity", similarity), ("information alone", information)):
        finite = np.isfinite(values)
        found = ["-", "-"]
        if np.count_nonzero(finite) > 1:
            tests = (spearmanr, kendalltau)
            found = [f"{test(ours[finite], values[finite]).statistic:.3f}" for test in tests]
        rows.append([name, against, str(np.count_nonzero(finite)), str(np.count_nonzero(~finite)), *found])
    return rows


def list_pairs(layers: int, apart: int = 0) -> Pairs:
    """Pairs of layers at least so far apart, in the order of an upper triangle."""
    return [(i, j) for i in range(layers) for j in range(i + apart, layers)]


def estimate_pairs(embeddings: np.ndarray, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The authors' similarity and mean mutual information of each pair of layers, (P,) and (P,).

    The similarity is NaN where one entropy is negative and the other is not.
    """
    similarity, information = np.empty(len(pairs)), np.empty(len(pairs))
    for at, (i, j) in enumerate(pairs):
        information[at] = estimate_mean_information(embeddings[i], embeddings[j])
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.sqrt(estimate_entropy(embeddings[i]) * estimate_entropy(embeddings[j]))
            similarity[at] = information[at] / scale
    return similarity, information


def estimate_mean_information(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over all coordinates of x and y of their mutual information, 3 neighbours, clipped at 0 by scikit-learn."""
    return float(np.mean([mutual_info_regression(x, coordinate, random_state=0) for coordinate in y.T]))


def estimate_entropy(x: np.ndarray) -> float:
    """``-mean log(k / (n r_k^d))`` with r_k the distance to the k-th other sample, (n, d)."""
    n, d = x.shape
    # Small sets of samples have fewer than k others.
    k = min(ENTROPY_NEIGHBOURS, n - 1)
    radii = NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0][:, -1]
    return float(-np.mean(np.log(k / (n * radii**d))))


def walk_layers(layers: int, samples: int, coordinates: int = 2) -> np.ndarray:
    """Each layer is the one before plus noise, (L, N, K)."""
    steps = np.random.default_rng(0).normal(size=(layers, samples, coordinates))
    steps[1:] *= 0.3
    return np.cumsum(steps, axis=0)


def score_on(threads: int, embeddings: np.ndarray) -> np.ndarray:
    """NPIB matrix by so many threads, which are kept to as many cores where there are as many and Linux runs them."""
    pinned = sys.platform == "linux" and threads <= CORES
    allowed = os.sched_getaffinity(0) if pinned else set()
    if pinned:
        os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        with patch("mka.similarity.information._count_cores", lambda: threads):
            return npib_matrix(embeddings)
    finally:
        if pinned:
            os.sched_setaffinity(0, allowed)


def describe_load() -> str:
    """Processes that wanted a core: over 1, 5 and 15 minutes."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg())


if __name__ == "__main__":
    main()
