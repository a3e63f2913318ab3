"""Running sums over tokens from which the similarity of experts follows, in memory that does not grow with the tokens.

Metrics and sources (arXiv 2602.07616 and its repository's calibration/utils.py; Ei [N, H] is expert i's output on N tokens):

frobenius  1 - ||Ei - Ej||_F / the layer's largest such distance. Exact from the Gram matrix of the flattened outputs,
           since ||Ei - Ej||^2 = Gii + Gjj - 2 Gij. Where a distance is small beside the outputs, the experts' mean is taken
           off each token's outputs first, which leaves every distance as it is, so that float32 products do.
cosine     (mean over tokens of cos(Ei, Ej) + 1) / 2. Exact from the Gram matrix of the outputs scaled to length 1.
cka        linear CKA, ||Yj' Yi||_F^2 / (||Yi' Yi||_F ||Yj' Yj||_F) with Y centred over tokens. Exact from the running
           cross-covariances of all pairs, which are H x H each: E (E + 1) / 2 * H^2 doubles a layer, so small models only.

Every sum is kept apart for the two halves of the data, so that one pass also says how stable the result is.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from sere_ext.contract.similarity import Metric
from sere_ext.similarity.packing import Matrix

HALVES = 2
_DOUBLE_BYTES = 8
_SUM_VALUES = 1 << 17  # of one expert that float32 adds up at a time
_COPY_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of outputs that are scaled or centred at a time: a core's share of cache
# Squared distance as a share of the squared norms it comes from: float32 products keep about 2e-7 / share of a distance.
_ALIKE = 0.1  # below it the experts' mean is taken off first
_CLOSE = 1e-3  # below it even then the pair's distance is summed directly

Arrays = dict[str, np.ndarray[Any, Any]]


class Moments(Protocol):
    """One layer's running sums."""

    tokens: list[int]  # of each half

    def add(self, outputs: Any, half: int) -> None:
        """outputs: float32 [E, n, H] of all experts on the same n tokens; tokens with an answer that is not finite are left out."""

    def matrix(self, halves: tuple[int, ...] = (0, 1)) -> Matrix:
        """float32 [E, E] from these halves' tokens: symmetric, diagonal 1, larger is more alike."""

    def state(self) -> Arrays:
        """What a checkpoint holds."""

    def restore(self, state: Arrays) -> None: ...


def moments_bytes(metric: Metric, experts: int, hidden: int) -> int:
    """Memory of one layer's sums."""
    per_half = experts * (experts + 1) // 2 * hidden * hidden if metric == "cka" else experts * experts
    return HALVES * _DOUBLE_BYTES * per_half


def make_moments(metric: Metric, experts: int, device: Any) -> Moments:
    return CrossMoments(experts, device) if metric == "cka" else GramMoments(metric, experts, device)


class GramMoments:
    """Sum over tokens of <Ei(x), Ej(x)>, of the outputs less their mean over experts (frobenius) or of their directions (cosine)."""

    def __init__(self, metric: Metric, experts: int, device: Any) -> None:
        import torch

        self.metric = metric
        self.tokens = [0] * HALVES
        self._gram = torch.zeros(HALVES, experts, experts, dtype=torch.float64, device=device)
        self._centred = False  # whether this layer's experts were once so alike that their mean is taken off

    def add(self, outputs: Any, half: int) -> None:
        tokens, start = outputs.shape[1], 0
        while start < tokens:
            part = outputs[:, start : start + self._block(outputs)]
            start += part.shape[1]
            gram = self._products(part)
            if not gram.isfinite().all():  # asked of the products, which are few: nearly always all is well
                part = _finite(part)
                gram = self._products(part)
            self._gram[half] += gram
            self.tokens[half] += part.shape[1]

    def _block(self, outputs: Any) -> int:
        """Tokens of the next block."""
        experts, _, hidden = outputs.shape
        copied = self.metric == "cosine" or self._centred
        values = _COPY_BYTES.get(outputs.device.type, _COPY_BYTES["cpu"]) // (4 * experts) if copied else _SUM_VALUES
        return max(1, values // hidden)

    def _products(self, part: Any) -> Any:
        """float64 [E, E]: this block's share of the Gram matrix."""
        import torch

        if self.metric == "cosine":
            return _gram(torch.nn.functional.normalize(part, dim=-1))
        if not self._centred:
            gram = _gram(part)
            if not _alike(gram, _ALIKE).any():
                return gram
            self._centred = True
        return _exact_gram(part - part.mean(0))

    def matrix(self, halves: tuple[int, ...] = (0, 1)) -> Matrix:
        gram = self._gram[list(halves)].sum(0).numpy(force=True)
        gram = (gram + gram.T) / 2
        if self.metric == "frobenius":
            return frobenius(gram)
        return _finished((gram / max(1, sum(self.tokens[half] for half in halves)) + 1) / 2)

    def state(self) -> Arrays:
        centred = np.array(self._centred)  # a run that goes on gives the same digits as one that was never cut short
        return {"gram": self._gram.numpy(force=True), "tokens": np.array(self.tokens), "centred": centred}

    def restore(self, state: Arrays) -> None:
        import torch

        self._gram.copy_(torch.from_numpy(state["gram"]))
        self.tokens = state["tokens"].tolist()
        self._centred = bool(state.get("centred", True))


def _finite(outputs: Any) -> Any:
    """Without tokens on which some expert overflows: it would never get most of them, and one takes all similarities with it."""
    if outputs.sum().isfinite():  # one pass where all is well, which is nearly always
        return outputs
    return outputs[:, outputs.isfinite().all(-1).all(0)]


def _alike(gram: Any, share: float) -> Any:
    """bool [E, E], above the diagonal: pairs whose squared distance is below this share of their squared norms."""
    norms = gram.diagonal()
    both = norms[:, None] + norms
    return ((both - gram - gram.T) < share * both).triu(1)


def _gram(part: Any) -> Any:
    """float64 [E, E] Gram matrix of float32 [E, n, H]. On the CPU in a piece per core: one product of this form keeps one busy."""
    import torch

    tokens = part.shape[1]
    pieces = max(1, min(tokens, torch.get_num_threads() if part.device.type == "cpu" else 1))
    even = tokens - tokens % pieces
    split = part[:, :even].unflatten(1, (pieces, even // pieces)).flatten(2).transpose(0, 1)
    gram = (split @ split.transpose(1, 2)).double().sum(0)
    if even < tokens:
        rest = part[:, even:].flatten(1)
        gram += (rest @ rest.T).double()
    return gram


def _exact_gram(part: Any) -> Any:
    """As `_gram`, of outputs less their mean, and good to float32 in every distance that follows from it, however small."""
    import torch

    gram = _gram(part)
    close = _alike(gram, _CLOSE).nonzero()
    if len(close) > part.shape[0]:  # layers of equal or dead experts
        wide = part.flatten(1).double()
        return wide @ wide.T
    for i, j in close.tolist():
        squares = torch.sub(part[i], part[j]).square_().sum(dtype=torch.float64)
        gram[i, j] = gram[j, i] = (gram[i, i] + gram[j, j] - squares) / 2
    return gram


class CrossMoments:
    """Sum over tokens of Ei(x) Ej(x)' for every pair i <= j, shifted by the first chunk's mean so that float32 products do."""

    def __init__(self, experts: int, device: Any) -> None:
        self.experts, self.device = experts, device
        self.tokens = [0] * HALVES
        self.hidden = 0  # known from the first outputs
        self._cross: list[Any] = []

    def _allocate(self, hidden: int, shift: Any) -> None:
        import torch

        def zeros(*shape: int) -> Any:
            return torch.zeros(HALVES, *shape, dtype=torch.float64, device=self.device)

        self.hidden, self._shift = hidden, shift  # float32 [E * H]
        self._sum = zeros(self.experts * hidden)
        # Row i: expert i against experts i, i + 1, ...
        self._cross = [zeros(hidden, (self.experts - i) * hidden) for i in range(self.experts)]

    def add(self, outputs: Any, half: int) -> None:
        outputs = _finite(outputs)
        if not outputs.shape[1]:
            return
        if not self.hidden:
            self._allocate(outputs.shape[2], outputs.mean(1).reshape(-1))
        wide = outputs.transpose(0, 1).reshape(outputs.shape[1], -1) - self._shift  # [n, E * H]
        for i, cross in enumerate(self._cross):
            begin = i * self.hidden
            cross[half] += wide[:, begin : begin + self.hidden].T @ wide[:, begin:]
        self._sum[half] += wide.double().sum(0)
        self.tokens[half] += outputs.shape[1]

    def matrix(self, halves: tuple[int, ...] = (0, 1)) -> Matrix:
        chosen, tokens = list(halves), max(1, sum(self.tokens[half] for half in halves))
        total = self._sum[chosen].sum(0)
        strength = np.zeros((self.experts, self.experts))  # squared norm of each pair's covariance
        for i, cross in enumerate(self._cross):
            begin = i * self.hidden
            centred = cross[chosen].sum(0) - total[begin : begin + self.hidden, None] * total[begin:] / tokens
            squares = centred.square_().reshape(self.hidden, -1, self.hidden).sum((0, 2)).numpy(force=True)
            strength[i, i:] = strength[i:, i] = squares
        scale = np.sqrt(np.outer(np.diag(strength), np.diag(strength)))
        return _finished(np.divide(strength, scale, out=np.zeros_like(strength), where=scale > 0))

    def state(self) -> Arrays:
        tokens = {"tokens": np.array(self.tokens)}
        if not self.hidden:
            return tokens
        rows = {f"cross.{i}": cross.numpy(force=True) for i, cross in enumerate(self._cross)}
        return {**rows, "sum": self._sum.numpy(force=True), "shift": self._shift.numpy(force=True), **tokens}

    def restore(self, state: Arrays) -> None:
        import torch

        self.tokens = state["tokens"].tolist()
        if "shift" not in state:
            return
        shift = torch.from_numpy(state["shift"]).to(self.device)
        self._allocate(shift.shape[0] // self.experts, shift)
        for i, cross in enumerate(self._cross):
            cross.copy_(torch.from_numpy(state[f"cross.{i}"]))
        self._sum.copy_(torch.from_numpy(state["sum"]))


def frobenius(gram: np.ndarray[Any, Any]) -> Matrix:
    """1 - distance / largest distance, from the Gram matrix [E, E] of the experts' outputs.

    Returns:
        float32 [E, E], symmetric, diagonal 1; all 1 if every expert answers the same.
    """
    norms = np.diag(gram)
    distance = np.sqrt(np.maximum(norms[:, None] + norms[None, :] - (gram + gram.T), 0.0))
    np.fill_diagonal(distance, 0.0)
    largest = distance.max()
    return _finished(1.0 - (distance / largest if largest > 0 else distance))


def _finished(values: np.ndarray[Any, Any]) -> Matrix:
    np.fill_diagonal(values, 1.0)
    return values.astype(np.float32)
