"""Batches of streamed rows: every sentence once an epoch for any number of processes and workers, any start exact."""

from functools import partial
from itertools import islice

import datasets
import pytest
from torch.utils.data import DataLoader

import grefcoco
from demo.scenes import write_scenes
from training import sampling
from training.augmentation import Augmentation
from training.sampling import StreamedBatches, TrainRows, donors

COLUMNS = ["image", "image_id", "width", "height", "sent_id", "sentence", "raw", "no_target", "ann_ids"]
COLUMNS += ["category_ids", "boxes", "masks", "mask", "objects"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    sizes = {"train": 250, "val": 1, "testA": 1, "testB": 1}
    write_scenes(folder / "scenes", "easy", 0, sizes, size=64)
    grefcoco.build(folder / "scenes", folder / "scenes" / "train2014", folder / "built")
    return folder / "built"


def stream(built, rank=0, world_size=1, start=0, batch_size=8, augmentation=None, **options) -> StreamedBatches:
    load = partial(grefcoco.load, str(built), split="train", streaming=True, layout="image")
    images = lambda names: load(columns=names)  # noqa: E731
    options = {"columns": COLUMNS, "sentences_per_image": 3, "seed": 1} | options
    return StreamedBatches(
        images,
        augmentation=augmentation or Augmentation(),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        start=start,
        **options,
    )


def ids(batches) -> list[list[int]]:
    return [[row["sent_id"] for row in batch] for batch in batches]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sentence_comes_once_an_epoch(built, world_size):
    columns = ["sent_id", "image_id", "sentence"]
    expected = grefcoco.load(str(built), split="train", columns=columns).with_format(None)["sent_id"]
    seen = []
    for rank in range(world_size):
        part = stream(built, rank, world_size, batch_size=1, columns=columns)
        number = sum(1 for _ in part._plans(part.light, 0))
        seen += [one for batch in ids(islice(part, number)) for one in batch]
    assert sorted(seen) == sorted(expected)


@pytest.mark.slow
def test_epochs_differ_and_sentences_of_an_image_stay_together(built):
    part = stream(built)
    number = sum(1 for _ in part._plans(part.light, 0))
    batches = list(islice(part, 2 * number))
    assert ids(batches[:number]) != ids(batches[number:])
    assert sum(len({row["image_id"] for row in batch}) for batch in batches) < 5 * len(batches)


@pytest.mark.parametrize("start", [1, 30, 500])
def test_a_start_is_as_if_it_had_run_until_there(built, start, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 50)
    columns = ["sent_id", "image_id", "sentence"]
    whole = ids(islice(stream(built, columns=columns), start + 3))
    assert ids(islice(stream(built, start=start, columns=columns), 3)) == whole[start:]


@pytest.mark.slow
def test_workers_take_turns_and_resume_exactly(built):
    def loader(start: int) -> DataLoader:
        part = stream(built, start=start, columns=["sent_id", "image_id", "sentence"])
        return DataLoader(part, batch_size=None, num_workers=2, collate_fn=lambda rows: rows)

    whole = ids(islice(loader(0), 560))
    assert ids(islice(loader(154), 6)) == whole[154:160], "in the first epoch"
    assert ids(islice(loader(554), 6)) == whole[554:], "in another one"


def test_a_worker_that_is_ahead_does_not_change_the_order_of_another(built, monkeypatch):
    """`datasets` keeps the epoch of a stream in memory that forked workers share."""
    expected = ids(islice(stream(built, columns=["sent_id", "image_id", "sentence"]), 3))
    set_epoch = datasets.IterableDataset.set_epoch
    monkeypatch.setattr(datasets.IterableDataset, "set_epoch", lambda rows, epoch: set_epoch(rows, epoch + 2))
    assert ids(islice(stream(built, columns=["sent_id", "image_id", "sentence"]), 3)) == expected


def test_streamed_rows_are_the_rows_of_the_index(built):
    (batch,) = islice(stream(built), 1)
    index = grefcoco.load(str(built), split="train", columns=COLUMNS)
    place = {sent_id: i for i, sent_id in enumerate(index.with_format(None)["sent_id"])}
    for row in batch:
        other = index[place[row["sent_id"]]]
        assert row["image"].tobytes() == other["image"].tobytes()
        assert {k: v for k, v in row.items() if k != "image"} == {k: v for k, v in other.items() if k != "image"}


def test_streams_are_augmented(built):
    (batch,) = islice(stream(built, augmentation=Augmentation(hard_negatives=1.0), batch_size=64), 1)
    assert sum(row["no_target"] for row in batch) > 20


def test_too_many_processes_are_refused(built):
    with pytest.raises(ValueError, match="fewer sentences than one batch of 300"):
        next(iter(stream(built, rank=30, world_size=31, batch_size=300)))


def test_indexed_rows_are_augmented_by_epoch(built):
    rows = grefcoco.load(str(built), split="train", columns=COLUMNS)
    varied = TrainRows(rows, Augmentation(flip=0.5, hard_negatives=0.5), seed=0)
    keys = [(0, index) for index in range(8)]
    first, again = (varied.__getitems__(keys) for _ in range(2))
    other = varied.__getitems__([(1, index) for index in range(8)])
    assert [row["sentence"] for row in first] == [row["sentence"] for row in again]
    assert [row["sentence"] for row in first] != [row["sentence"] for row in other]
    assert len(donors(rows).sentences) == len(rows)
