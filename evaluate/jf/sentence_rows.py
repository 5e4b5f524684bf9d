"""What the metrics of gRefCOCO share: rows of sentences, checked inputs, thresholds, intervals, and `compute`.

Each metric is a Space of its own, so this file lies in each of their folders; the copies are identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    import torch

BATCH = 4096  # sentences scored at once: bounds the memory that a large `compute` needs


@dataclass(frozen=True)
class Threshold:
    """A threshold with the ids of the sentences on which it was chosen, which therefore cannot be reported."""

    value: float
    sent_ids: frozenset[int]

    def for_rows(self, rows: np.ndarray) -> float:
        """The value; ValueError if it was chosen on any of these rows, or if that cannot be known."""
        if (rows["sent_id"] < 0).any():
            raise ValueError(
                "a chosen threshold needs the sent_id of every reference, to prove that they were held out"
            )
        if reused := self.sent_ids.intersection(rows["sent_id"].tolist()):
            raise ValueError(
                f"the threshold {self.value:.4f} was chosen on {len(reused)} of the {len(rows)} sentences reported "
                f"(first: {min(reused)}): choose it on a part of train that the model was not trained on"
            )
        return self.value


class SentenceRows:
    """One row per sentence, whatever the order and process it came from: the base of both accumulators."""

    row: ClassVar[np.dtype]

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer) // self.row.itemsize

    def add(self, *, prediction: Mapping, reference: Mapping) -> None:
        """Add one sentence; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Add sentences; defined by each metric."""
        raise NotImplementedError

    def state(self) -> np.ndarray:
        """All rows as bytes, uint8 (n, bytes of a row): a small array to send to other processes."""
        return np.frombuffer(bytes(self._buffer), np.uint8).reshape(-1, self.row.itemsize)

    def merge(self, state: np.ndarray | torch.Tensor) -> None:
        """Add the rows of another process's `state()`. A sentence that both have is counted once, see `rows`."""
        if len(state.shape) != 2 or state.shape[1] != self.row.itemsize:
            raise ValueError(f"a state is uint8 (n, {self.row.itemsize}), this one is {tuple(state.shape)}")
        self._buffer += np.asarray(state, np.uint8).tobytes()

    def rows(self, expected: Iterable[int] | None = None) -> np.ndarray:
        """The sentences as a structured array, in the order of their ids; a repeated sentence once.

        A distributed sampler repeats sentences to fill its last batch: equal rows of one id are one sentence.

        Args:
            expected: the ids of all sentences, to find missing and unexpected ones.

        Raises:
            ValueError: one id has two different rows, or ids are missing or unexpected.
        """
        rows = np.frombuffer(bytes(self._buffer), self.row)
        order = self._first_places(rows)
        rows = rows[order[np.argsort(rows["sent_id"][order], kind="stable")]]
        if expected is not None:
            _refuse_gaps(rows["sent_id"], np.fromiter(expected, np.int64))
        return rows

    def arrived_rows(self) -> np.ndarray:
        """As `rows`, in the order in which the sentences were added."""
        rows = np.frombuffer(bytes(self._buffer), self.row)
        return rows[self._first_places(rows)]

    def _first_places(self, rows: np.ndarray) -> np.ndarray:
        """Where each sentence stands first, ascending; ValueError for an id with two different rows."""
        order = np.argsort(rows["sent_id"], kind="stable")
        ids = rows["sent_id"][order]
        repeated = (ids[1:] == ids[:-1]) & (ids[1:] >= 0)
        if repeated.any():
            later, earlier = rows[order[1:][repeated]], rows[order[:-1][repeated]]
            if (clash := later != earlier).any():
                raise ValueError(
                    f"sentence {later['sent_id'][clash][0]} was {self.verb} twice with different results: "
                    "give every sentence to one process, or drop the padding with accelerator.gather_for_metrics"
                )
        return np.sort(order[np.append(True, ~repeated)]) if len(rows) else order

    verb: ClassVar[str]

    def _append(self, number: int, columns: Mapping[str, Sequence]) -> None:
        """Add `number` rows of these columns; a column that is not given has -1, "unknown"."""
        rows = np.zeros(number, self.row)
        for name in ("sent_id", "image_id"):
            rows[name] = -1
        for name, values in columns.items():
            rows[name] = values
        self._buffer += rows.tobytes()


class DirectCompute:
    """For a metric of `evaluate`: `compute` scores its inputs at once, without a copy in an Arrow file.

    `add` and `add_batch` buffer in Arrow as in every metric, as does `compute` after them or with several processes;
    the buffer is then read part by part.
    """

    def compute(
        self,
        *,
        predictions: Sequence[Mapping] | None = None,
        references: Sequence[Mapping] | None = None,
        **options: object,
    ) -> dict[str, float] | None:
        """Score predictions and references, after those of `add` and `add_batch`, if any."""
        if (predictions is None) != (references is None):
            raise ValueError("give both predictions and references, or neither after add_batch")
        self.check_options(options)
        if predictions is None or self.num_process > 1 or len(self):
            return super().compute(predictions=predictions, references=references, **options)
        return self._compute(predictions, references, **options)

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Buffer sentences; a column that no reference has is filled in."""
        predictions, references = self.plain(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction: Mapping, reference: Mapping) -> None:
        """Buffer one sentence."""
        (prediction,), (reference,) = self.plain([prediction], [reference])
        super().add(prediction=prediction, reference=reference)

    def _finalize(self) -> None:
        super()._finalize()
        if self.data is not None:
            self.data = _Buffered(self.data)


class _Buffered:
    """The Arrow file that `evaluate` has written, of which `compute` takes whole columns, read only in parts."""

    def __init__(self, data: object) -> None:
        self.data = data

    def set_format(self, **_: object) -> None:
        """Entries are Python objects always."""

    def __getitem__(self, column: str) -> _BufferedColumn:
        return _BufferedColumn(self.data, column)


class _BufferedColumn(Sequence):
    def __init__(self, data: object, column: str) -> None:
        self.data, self.column = data.select_columns([column]), column

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | slice) -> object:
        return self if index == slice(None) else self.data[index][self.column]


def batches(
    predictions: Iterable[Mapping], references: Iterable[Mapping]
) -> Iterator[tuple[Sequence[Mapping], Sequence[Mapping]]]:
    """Both in parts of `BATCH` sentences; ValueError if they differ in number."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    for start in range(0, len(predictions), BATCH):
        part = slice(start, start + BATCH)
        yield predictions[part], references[part]


def read_columns(
    entries: Sequence[Mapping], kind: str, required: Sequence[str], optional: Mapping[str, object] | None = None
) -> dict[str, list]:
    """Columns of dictionaries: each required one, and each optional one that any entry has.

    Args:
        kind: "prediction" or "reference", for messages.
        optional: values that stand for keys which an entry lacks; None: keys besides the required are not looked at.

    Raises:
        ValueError: an entry is no dictionary, lacks a key, or has one that is neither required nor optional.
    """
    only_known, optional = optional is not None, optional or {}
    known = [*required, *optional]
    if not all(isinstance(entry, Mapping) for entry in entries):
        _refuse_entry(entries, kind, required, known, only_known)
    kinds = set(map(tuple, entries))  # the few kinds of dictionaries among them, by their keys
    if any(not {*required} <= {*keys} or (only_known and not {*keys} <= {*known}) for keys in kinds):
        _refuse_entry(entries, kind, required, known, only_known)
    columns = {name: [entry[name] for entry in entries] for name in required}
    present = {key for keys in kinds for key in keys}
    return columns | {
        name: [entry.get(name, default) for entry in entries] for name, default in optional.items() if name in present
    }


def _refuse_entry(
    entries: Sequence[Mapping], kind: str, required: Sequence[str], known: Sequence[str], only_known: bool
) -> None:
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{kind} {index} is {type(entry).__name__}, not a dictionary of {', '.join(known)}")
        if missing := set(required) - set(entry):
            raise ValueError(f"{kind} {index} lacks {', '.join(sorted(missing))}")
        if only_known and (unknown := set(entry) - set(known)):
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"{kind} {index} has {names}: its keys can be {', '.join(known)}")


def whole_numbers(name: str, values: Sequence[int], kind: np.dtype, lowest: int = -1) -> np.ndarray:
    """A column of whole numbers that fit into `kind`; ValueError names the first that does not."""
    column = values if isinstance(values, np.ndarray) else np.array([*values])
    if column.dtype.kind not in "iu" or not column.size:
        for index, value in enumerate(values):
            if not isinstance(value, (int, float, np.integer, np.floating)) or value != value or value % 1:
                raise ValueError(f"{name} of sentence {index} is {value!r}: give a whole number, or leave the key out")
        column = np.array([int(value) for value in values], object)
    low, high = (int(end) for end in (column.min(initial=0), column.max(initial=0)))
    if low < lowest or high > np.iinfo(kind).max:
        raise ValueError(
            f"{name} runs from {column.min()} to {column.max()}, a row holds {lowest} to {np.iinfo(kind).max} ({kind})"
        )
    return column.astype(kind)


def flags(name: str, values: Sequence[bool]) -> np.ndarray:
    """A column of true or false (or 1 and 0), bool (n,); ValueError names the first value that is neither."""
    if (isinstance(values, np.ndarray) and values.dtype == bool) or set(map(type, values)) <= {bool}:
        return np.asarray(values, bool)
    for index, value in enumerate(values):
        if isinstance(value, str) or value is None or value not in (0, 1):
            raise ValueError(f"{name} of reference {index} is {value!r}: it must be true or false")
    return np.array([bool(value) for value in values])


def number(name: str, value: float, low: float = -np.inf, high: float = np.inf) -> float:
    """An option that is a number within limits; ValueError names the option."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.integer, np.floating))
        or not low <= value <= high
    ):
        limits = f" from {low:g} to {high:g}" if high < np.inf else ""
        raise ValueError(f"{name}={value!r}: give a number{limits}")
    return float(value)


def choice(name: str, value: str, known: Iterable[str]) -> str:
    """An option that is one of some names; ValueError names the option."""
    if value not in (known := list(known)):
        raise ValueError(f"{name}={value!r} is none of {', '.join(map(str, known))}")
    return value


def ratio(part: float | np.ndarray, whole: float | np.ndarray) -> float | np.ndarray:
    """part / whole, and 0 where whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)[()]


def bootstrap(
    tallies: Mapping[str, np.ndarray],
    image_id: np.ndarray,
    scores: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap of scores: (low, high) each.

    Whole images are drawn, because the errors of one image's sentences are not independent; single sentences where
    an image id is missing.

    Args:
        tallies: a number per sentence each, (n,), of whose sums `scores` are made.
    """
    if not len(image_id):
        raise ValueError("confidence intervals need at least one sentence")
    known = (image_id >= 0).all()
    unit = np.unique(image_id, return_inverse=True)[1] if known else np.arange(len(image_id))
    sums = np.stack([np.bincount(unit, weights) for weights in tallies.values()])
    generator, count = np.random.default_rng(seed), sums.shape[1]
    draws = [sums @ np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(resamples)]
    values = scores(dict(zip(tallies, np.stack(draws, axis=1))))
    tails = [50 * (1 - level), 50 * (1 + level)]
    return {name: tuple(np.percentile(value, tails).tolist()) for name, value in values.items()}


def best_threshold(
    goals: Mapping[str, np.ndarray], by: str, middle: np.ndarray, neutral: float, rows: np.ndarray
) -> Threshold:
    """The threshold with the best goal; of equally good ones that nearest to `neutral`.

    Args:
        goals: values at every threshold, by name; `by` is one of the names.
        middle: for each, a threshold half-way between the scores around it.
        rows: the held-out sentences.
    """
    choice("by", by, goals)
    best = np.flatnonzero(goals[by] >= goals[by].max() - 1e-9)
    value = middle[best[np.argmin(np.abs(middle[best] - neutral))]]
    return Threshold(float(value), frozenset(rows["sent_id"].tolist()))


def refuse_anonymous(rows: np.ndarray) -> None:
    """Raise ValueError where a threshold cannot be chosen on these rows."""
    if not len(rows) or (rows["sent_id"] < 0).any():
        raise ValueError("choosing a threshold needs held-out sentences, each with its sent_id")


def plot_curve(points: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Draw a `curve` into a picture file: N_acc against T_acc, and the scores over the threshold. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    trade, score = figure.subplots(1, 2)
    trade.plot(points["N_acc"], points["T_acc"])
    trade.set(xlabel="N_acc", ylabel="T_acc", xlim=(0, 1.02), ylim=(0, 1.02), title="correct and wrong rejections")
    names = [name for name in points if name not in ("threshold", "N_acc", "T_acc")]
    for name in names:
        score.plot(points["threshold"], points[name], label=name)
    score.set(xlabel="threshold", title="scores over the threshold")
    score.set_ylim(0)
    score.legend()
    figure.savefig(path)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for a card, one line per row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _refuse_gaps(ids: np.ndarray, expected: np.ndarray) -> None:
    missing = np.setdiff1d(expected, ids)
    unexpected = np.setdiff1d(ids, expected)
    if len(missing) or len(unexpected):
        raise ValueError(
            f"of {len(expected)} expected sentences {len(missing)} are missing (first: {missing[:3].tolist()}) and "
            f"{len(unexpected)} are not expected (first: {unexpected[:3].tolist()}): right split, all processes "
            "merged?"
        )
