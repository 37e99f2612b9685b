"""How far one gets without reading the question: by length, by words, by what is named first.

An accuracy here is the share of held-out pairs in which a rule scores the chosen answer higher; a
tie counts half. Rules may be fitted on the train pairs.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from dpo_fast.demo.checker import solve
from dpo_fast.demo.data import Pair

Pairs = Sequence[Pair]


def length_accuracy(train: Pairs, heldout: Pairs) -> float:
    """The longer answer (in characters), or the shorter one, whichever is right more often in
    train.
    """

    def longer(pairs: Pairs) -> np.ndarray:
        return np.sign([len(pair.chosen) - len(pair.rejected) for pair in pairs])

    direction = 1.0 if longer(train).mean() >= 0 else -1.0
    return _accuracy(direction * longer(heldout))


def bag_of_words_accuracy(train: Pairs, heldout: Pairs, l2: float = 1e-3) -> float:
    """Logistic regression on the words of the answers, fitted by Newton's method on the train
    pairs.
    """
    vocabulary = sorted({word for pair in train for word in _words(pair.chosen, pair.rejected)})
    column = {word: i for i, word in enumerate(vocabulary)}

    def features(pairs: Pairs) -> np.ndarray:
        table = np.zeros((len(pairs), len(vocabulary)))
        for row, pair in zip(table, pairs, strict=True):
            for sign, text in ((1.0, pair.chosen), (-1.0, pair.rejected)):
                for word in _words(text):
                    if word in column:
                        row[column[word]] += sign
        return table

    weights = fit_logistic(features(train), l2)
    return _accuracy(features(heldout) @ weights)


def first_named_accuracy(train: Pairs, heldout: Pairs) -> float:
    """The option that the question names first, or the last one, whichever is right more often in
    train.
    """

    def first(pairs: Pairs) -> np.ndarray:
        return np.array(
            [1.0 if solve(pair.prompt).right_is_named_first else -1.0 for pair in pairs]
        )

    direction = 1.0 if first(train).mean() >= 0 else -1.0
    return _accuracy(direction * first(heldout))


BASELINES: dict[str, Callable[[Pairs, Pairs], float]] = {
    "length of the answer": length_accuracy,
    "bag of words (logistic regression)": bag_of_words_accuracy,
    "option named first": first_named_accuracy,
}


def fit_logistic(differences: np.ndarray, l2: float) -> np.ndarray:
    """Weights ``[d]`` minimising ``mean log(1 + exp(-x w)) + l2/2 |w|^2`` over the rows x of
    ``differences [n, d]`` (features of chosen minus rejected).
    """
    count, size = differences.shape
    weights = np.zeros(size)
    for _ in range(50):
        miss = 1.0 / (1.0 + np.exp(np.clip(differences @ weights, -30.0, 30.0)))
        gradient = -differences.T @ miss / count + l2 * weights
        curvature = (differences * (miss * (1.0 - miss))[:, None]).T @ differences / count
        step = np.linalg.solve(curvature + l2 * np.eye(size), gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return weights


def _accuracy(scores: np.ndarray) -> float:
    return float(np.mean((scores > 1e-9) + 0.5 * (np.abs(scores) <= 1e-9)))


def _words(*texts: str) -> list[str]:
    return [word for text in texts for word in re.findall(r"\w+", text)]
