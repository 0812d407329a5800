"""How often do 95 % intervals cover the truth, and tests find what is not there? By simulation.

python benchmarks/intervals.py --repeats 4000

Scores are drawn with known means: `normal`, `good` (Beta(18, 2), like organs), `hard` (Beta(5, 1.5), like small
structures) and `failures` (one case in ten has Beta(2, 4), the others Beta(40, 6)). Scans of one patient share 90 % of
the latent variance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from scipy import stats

from autoseg.evaluation.intervals import compare, difference_to_rest, holm, mean_interval

KINDS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "normal": (lambda u: 0.8 + 0.05 * stats.norm.ppf(u), 0.8),
    "good": (lambda u: stats.beta.ppf(u, 18, 2), 0.9),
    "hard": (lambda u: stats.beta.ppf(u, 5, 1.5), 5 / 6.5),
    "failures": (
        lambda u: np.where(
            u < 0.1,
            stats.beta.ppf(np.clip(u / 0.1, 0, 1), 2, 4),
            stats.beta.ppf(np.clip((u - 0.1) / 0.9, 0, 1), 40, 6),
        ),
        0.1 * 2 / 6 + 0.9 * 40 / 46,
    ),
}
"""Name -> quantile function, true mean."""
SHARED = 0.9
"""Share of the latent variance that scans of one patient have in common."""
NUM_BOOTSTRAP = 1000
DESIGNS = {
    "8 cases": (1,) * 8,
    "15 cases": (1,) * 15,
    "40 cases": (1,) * 40,
    "200 cases": (1,) * 200,
    "40 patients of 5 scans": (5,) * 40,
    "20 patients of 1 to 10 scans": tuple(range(1, 11)) * 2,
}
"""Name -> scans of each patient."""


def draw(kind: str, sizes: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores and patients of a study."""
    patient = np.repeat(np.arange(len(sizes)), sizes)
    shared = np.sqrt(SHARED) * rng.standard_normal(len(sizes))[patient] if max(sizes) > 1 else 0.0
    own = np.sqrt(1 - SHARED) if max(sizes) > 1 else 1.0
    latent = shared + own * rng.standard_normal(len(patient))
    return KINDS[kind][0](stats.norm.cdf(latent)), patient


def student(values: np.ndarray, patient: np.ndarray) -> tuple[float, float]:
    """Student's t on the means of patients, weighted by their scans."""
    num = patient.max() + 1
    influence = np.bincount(patient, values - values.mean()) / len(values)
    error = np.sqrt((influence**2).sum() * num / (num - 1))
    quantile = stats.t.ppf(0.975, num - 1)
    return values.mean() - quantile * error, values.mean() + quantile * error


def bootstrap(values: np.ndarray, patient: np.ndarray, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Percentile, BCa and bootstrap-t intervals, patients drawn whole; and percentile with cases drawn."""
    num, mean = patient.max() + 1, values.mean()
    sums, sizes = np.bincount(patient, values), np.bincount(patient).astype(float)
    drawn = rng.integers(num, size=(NUM_BOOTSTRAP, num))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    cases = values[rng.integers(len(values), size=(NUM_BOOTSTRAP, len(values)))].mean(axis=1)
    influence = (sums - mean * sizes) / len(values)
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    bias = stats.norm.ppf(np.clip((means < mean).mean(), 1e-3, 1 - 1e-3))
    ends = stats.norm.ppf([0.025, 0.975])
    bca = np.percentile(means, 100 * stats.norm.cdf(bias + (bias + ends) / (1 - acceleration * (bias + ends))))
    residuals = sums[drawn] - means[:, None] * sizes[drawn]
    errors = np.sqrt((residuals**2).sum(axis=1) * num / (num - 1)) / sizes[drawn].sum(axis=1)
    error = np.sqrt((influence**2).sum() * num / (num - 1))
    ratios = (means - mean)[errors > 0] / errors[errors > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "cases drawn": tuple(np.percentile(cases, [2.5, 97.5])),
        "percentile": tuple(np.percentile(means, [2.5, 97.5])),
        "BCa": (bca[0], bca[1]),
        "bootstrap-t": (mean - high * error, mean - low * error),
    }


def coverage(repeats: int, rng: np.random.Generator) -> None:
    """Print how often each method's interval holds the true mean, and its median width."""
    print("| Study | scores | cases drawn | percentile | BCa | bootstrap-t | t | autoseg | width of t | of autoseg |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for design, sizes in DESIGNS.items():
        for kind, (_, truth) in KINDS.items():
            hits: dict[str, list[bool]] = {}
            widths: dict[str, list[float]] = {}
            for _ in range(repeats):
                values, patient = draw(kind, sizes, rng)
                intervals = bootstrap(values, patient, rng)
                intervals["t"] = student(values, patient)
                intervals["autoseg"] = mean_interval(values[:, None], patient.tolist())
                for name, (low, high) in intervals.items():
                    hits.setdefault(name, []).append(bool(low <= truth <= high))
                    widths.setdefault(name, []).append(high - low)
            shares = " | ".join(f"{np.mean(of):.3f}" for of in hits.values())
            both = " | ".join(f"{np.median(widths[name]):.3f}" for name in ("t", "autoseg"))
            print(f"| {design} | {kind} | {shares} | {both} |", flush=True)


def tests(repeats: int, rng: np.random.Generator) -> None:
    """Print how often tests find a difference: where there is none, and where there is one of 5 points."""
    print(
        "| Sites (patients) | scores | found where there is none | Welch's t there | 5 points less in the first found |"
    )
    print("|---|---|---|---|---|")
    for sites in ((40,) * 5, (8,) * 5, (60, 20, 8, 5), (10, 10)):
        for kind in KINDS:
            site = np.repeat(np.arange(len(sites)), sites)
            found = {"null": 0, "welch": 0, "planted": 0}
            for _ in range(repeats):
                values, _ = draw(kind, (1,) * len(site), rng)
                levels = range(len(sites)) if len(sites) > 2 else range(1)
                null = holm([difference_to_rest(values, site == s).p for s in levels])
                found["null"] += min(p for p in null if p is not None) < 0.05
                welch = [stats.ttest_ind(values[site == s], values[site != s], equal_var=False).pvalue for s in levels]
                found["welch"] += min(p for p in holm(welch) if p is not None) < 0.05
                planted = values - 0.05 * (site == 0)
                by_site = holm([difference_to_rest(planted, site == s).p for s in levels])
                found["planted"] += by_site[0] is not None and by_site[0] < 0.05
            shares = " | ".join(f"{of / repeats:.3f}" for of in found.values())
            print(f"| {', '.join(map(str, sites))} | {kind} | {shares} |", flush=True)
    print("\n| Paired test, no difference | found |\n|---|---|")
    for design, sizes in DESIGNS.items():
        hits = 0
        for _ in range(repeats):
            (first, patient), (second, _) = draw("good", sizes, rng), draw("good", sizes, rng)
            scores = {name: {str(i): v for i, v in enumerate(of)} for name, of in (("a", first), ("b", second))}
            p = compare(scores, [("a", "b")], {str(i): who for i, who in enumerate(patient.tolist())})[0].p
            hits += p is not None and p < 0.05
        print(f"| {design} | {hits / repeats:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--tests", type=int, default=400, help="repeats of the tests")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    rng = np.random.default_rng(a.seed)
    if a.repeats:
        coverage(a.repeats, rng)
    print()
    tests(a.tests, rng)


if __name__ == "__main__":
    main()
