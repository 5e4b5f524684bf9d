"""The sentences of each training batch: a pure function of (seed, batch number), for indexed and streamed data.

To resume is to start at another number; nothing has to be saved. Every process takes its own part of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from grefcoco_data.loading import shuffle_shards
from grefcoco_data.rows import explode
from training.augmentation import Augmentation, Donors

BLOCK = 256  # images of a stream whose sentences are shuffled together


class SentenceBatchSampler:
    """Endless batches of (epoch, expression index).

    Each epoch is a new permutation; the sentences of one image are cut into groups of `sentences_per_image` that stay
    together. Every process takes its own part of the same global batch. Sentences that do not fill the last batch of
    an epoch are not used in that epoch.

    Args:
        image_ids: the image of each expression.
        batch_size: sentences in a batch of one process.
        sentences_per_image: sentences of one image that stay together.
        seed: of the permutations.
        rank, world_size: index of this process and number of processes.
        start: number of the first batch.

    Raises:
        ValueError: there are fewer sentences than one global batch.
    """

    def __init__(
        self,
        image_ids: np.ndarray,
        batch_size: int,
        sentences_per_image: int,
        seed: int,
        rank: int,
        world_size: int,
        start: int = 0,
    ) -> None:
        order = np.argsort(image_ids, kind="stable")
        self.groups = np.split(order, np.flatnonzero(np.diff(image_ids[order])) + 1)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.sentences_per_image, self.seed, self.start = sentences_per_image, seed, start
        self.batches_per_epoch = len(image_ids) // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"a batch of {batch_size} x {world_size} processes is more than {len(image_ids)} sentences"
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start
        while True:
            epoch, position = divmod(step, self.batches_per_epoch)
            for batch in self._epoch(epoch)[position:]:
                yield [(epoch, index) for index in batch.tolist()]
                step += 1

    def _epoch(self, epoch: int) -> np.ndarray:  # (batches, batch_size) of this process
        random = np.random.default_rng((self.seed, epoch))
        order = np.concatenate(_shuffled_pieces(self.groups, self.sentences_per_image, random))
        whole = self.batches_per_epoch * self.batch_size * self.world_size
        return order[:whole].reshape(self.batches_per_epoch, self.world_size, self.batch_size)[:, self.rank]


class TrainRows(Dataset):
    """Expression rows by (epoch, index), augmented."""

    def __init__(self, rows: datasets.Dataset, augmentation: Augmentation, seed: int) -> None:
        self.rows, self.augmentation, self.seed = rows, augmentation, seed
        self.donors = donors(rows) if augmentation.active else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[dict]:
        rows = self.rows.__getitems__([index for _, index in keys])
        if self.donors is None:
            return rows
        return self.augmentation(rows, self.donors, self.seed, keys[0][0])


def donors(rows: datasets.Dataset) -> Donors:
    """The sentences that hard negatives of these expression rows are taken from."""
    index = rows.select_columns(["image_id", "sentence", "raw", "category_ids"]).with_format("numpy")[:]
    return Donors(index["sentence"], index["raw"], index["category_ids"], index["image_id"].tolist())


class StreamedBatches(IterableDataset):
    """Endless batches of expression rows from a stream of images.

    The row groups of the stored files (up to 100 images each) come in a new order every epoch. The sentences of
    `BLOCK` successive images are shuffled together; groups of `sentences_per_image` stay together. Processes and
    workers share the row groups. Sentences that do not fill a worker's last batch are not used in that epoch.

    To start at a later batch the sentences before it are counted again, without reading images.

    Args:
        images: gives the stream of image rows with the columns it is asked for, as `grefcoco.load(...,
            streaming=True, layout="image", columns=...)` does.
        columns: of the expression rows.
        rank, world_size: index of this process and number of processes.
        start: number of the first batch; with workers a multiple of their number, since they take turns from the
            first worker on.

    Raises:
        ValueError: when there are fewer groups of images than processes and workers, or fewer sentences than a batch.
    """

    def __init__(
        self,
        images: Callable[[list[str]], datasets.IterableDataset],
        columns: Sequence[str],
        augmentation: Augmentation,
        batch_size: int,
        sentences_per_image: int,
        seed: int,
        rank: int,
        world_size: int,
        start: int = 0,
    ) -> None:
        self.columns, self.augmentation, self.batch_size = columns, augmentation, batch_size
        self.sentences_per_image, self.seed, self.rank, self.start = sentences_per_image, seed, rank, start
        self.world_size = world_size
        self.full = images(["image", "image_id", "file_name", "width", "height", "objects", "expressions"])
        self.full = self.full.cast_column("image", datasets.Image(decode=False))
        self.light = images(["expressions"])
        self.num_shards = self._shuffled(self.light, epoch=0).num_shards

    def __iter__(self) -> Iterator[list[dict]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        # batch b is made by worker b % workers
        skip, epoch = max(0, -(-(self.start - number) // workers)), 0
        while skip and (num_batches := sum(1 for _ in self._plans(self.light, epoch))) <= skip:
            self._refuse_empty_epoch(num_batches)
            skip, epoch = skip - num_batches, epoch + 1
        while True:
            num_batches = skip
            for plan in islice(self._plans(self.full, epoch), skip, None):
                yield self._rows(plan, epoch)
                num_batches += 1
            self._refuse_empty_epoch(num_batches)
            skip, epoch = 0, epoch + 1

    def _refuse_empty_epoch(self, num_batches: int) -> None:
        if not num_batches:
            raise ValueError(
                f"a process or worker got fewer sentences than one batch of {self.batch_size} from its part of the "
                f"{self.num_shards} groups of images: use fewer processes and workers, or a smaller batch"
            )

    def _plans(self, stream: datasets.IterableDataset, epoch: int) -> Iterator[list[tuple[dict, int]]]:
        """Batches of (image row, index of the expression in it)."""
        source, waiting = iter(self._shuffled(stream, epoch)), []
        random = np.random.default_rng((self.seed, epoch, self.rank))
        while block := list(islice(source, BLOCK)):
            pairs = [(row, place) for row in block for place in range(len(row["expressions"]))]
            groups = np.split(np.arange(len(pairs)), np.cumsum([len(row["expressions"]) for row in block])[:-1])
            order = np.concatenate(_shuffled_pieces(groups, self.sentences_per_image, random))
            waiting += [pairs[i] for i in order]
            while len(waiting) >= self.batch_size:
                yield waiting[: self.batch_size]
                waiting = waiting[self.batch_size :]

    def _shuffled(self, stream: datasets.IterableDataset, epoch: int) -> datasets.IterableDataset:
        # Not by `set_epoch`: workers share a stream's epoch in memory, so one that is ahead would change the order of
        # another that is about to start its epoch.
        seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        return split_dataset_by_node(shuffle_shards(stream, seed), self.rank, self.world_size)

    def _rows(self, plan: list[tuple[dict, int]], epoch: int) -> list[dict]:
        rows, donor_rows = [], []
        for image, places in _by_image(plan):
            batch_image = {**image, "expressions": [image["expressions"][place] for place in places]}
            rows += _expression_rows(batch_image, self.columns)
            if self.augmentation.active:
                donor_rows += _expression_rows(image, ["sentence", "raw", "category_ids", "image_id"])
        if not self.augmentation.active:
            return rows
        names = {"sentences": "sentence", "raw": "raw", "category_ids": "category_ids", "image_ids": "image_id"}
        donors = Donors(**{name: [row[column] for row in donor_rows] for name, column in names.items()})
        return self.augmentation(rows, donors, self.seed, epoch)


def pick_rows(rows: datasets.Dataset, per_kind: int, seed: int) -> datasets.Dataset:
    """Pick `per_kind` random rows each of several, one and no target, in that order."""
    random = np.random.default_rng(seed)
    counts = np.array([len(ids) for ids in rows.with_format(None)["ann_ids"]])
    kinds = [np.flatnonzero(chosen) for chosen in (counts > 1, counts == 1, counts == 0)]
    return rows.select(np.concatenate([random.permutation(kind)[:per_kind] for kind in kinds]).tolist())


def vision_only(batch: dict[str, object]) -> dict[str, object]:
    """The part of a batch that trains the vision trunk on categories and objects, without any sentence."""
    names = ("categories", "object_boxes", "object_masks", "num_objects")
    labels = {name: batch["labels"][name] for name in names if name in batch["labels"]}
    return {"pixel_values": batch["pixel_values"], "labels": labels}


def _expression_rows(image: dict, columns: Sequence[str]) -> list[dict]:
    """The expression rows of an image row."""
    rows = explode({name: [value] for name, value in image.items()}, list(columns))
    return [dict(zip(rows, values)) for values in zip(*rows.values())]


def _shuffled_pieces(groups: Sequence[np.ndarray], size: int, random: np.random.Generator) -> list[np.ndarray]:
    """Shuffle each group, cut it into pieces of `size`, and return all pieces in a random order."""
    shuffled = [random.permutation(group) for group in groups]
    pieces = [group[i : i + size] for group in shuffled for i in range(0, len(group), size)]
    return [pieces[i] for i in random.permutation(len(pieces))]


def _by_image(plan: list[tuple[dict, int]]) -> list[tuple[dict, list[int]]]:
    """The plan's images in order of their first sentence, each with the indices of its sentences."""
    images: dict[int, tuple[dict, list[int]]] = {}
    for image, place in plan:
        images.setdefault(id(image), (image, []))[1].append(place)
    return list(images.values())
