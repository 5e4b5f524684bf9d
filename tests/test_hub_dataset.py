"""The data set on a Hub: built and pushed by one process, loaded by others by its id alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.hub_server import Hub
from tests.tiny_grefcoco import write_genuine, write_json
from tests.tiny_training import tiny

ROOT = Path(__file__).resolve().parents[1]
TOKENS = {"hf_me": "me", "hf_you": "you"}
LOAD = """
import json, sys, datasets
streaming, *arguments = json.loads(sys.argv[1])
rows = datasets.load_dataset("me/grefcoco", split="testA", streaming=streaming, revision=(arguments or [None])[0])
for row in rows:
    sentences = [expression["sentence"] for expression in row["expressions"]]
    print(json.dumps([row["image_id"], row["image"].size, sentences]))
"""
SENTENCES = """
import grefcoco
print(grefcoco.category_ids("me/grefcoco", ["testA", "val"]))
for row in grefcoco.load("me/grefcoco", split="testA"):
    print(row["sent_id"], row["sentence"], row["image"].size, row["mask"]["counts"], sep="|")
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub", TOKENS) as hub:
        yield hub


@pytest.fixture
def genuine(tmp_path: Path) -> Path:
    return write_genuine(tmp_path / "set")


def push(hub: Hub, genuine: Path, token: str = "hf_me") -> CompletedProcess:
    place = genuine.parent
    options = ["--annotations", genuine, "--images", genuine / "train2014", "--out", place / "out"]
    script = ROOT / "grefcoco.py"
    return hub.python(place / "author", script, "build", *options, "--push-to-hub", "me/grefcoco", token=token)


def load(hub: Hub, home: Path, *arguments: object, token: str | None = None) -> CompletedProcess:
    return hub.python(home, "-c", LOAD, json.dumps(arguments), token=token)


def uploads(hub: Hub) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


def rows(done: CompletedProcess) -> list[list]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_pushed_set_loads_by_its_id(hub: Hub, genuine: Path, tmp_path: Path) -> None:
    assert push(hub, genuine).returncode == 0
    there = sorted(hub.repository("dataset", "me/grefcoco").files("main"))
    assert [name for name in there if not name.startswith("data/")] == ["README.md", "build.json"]
    mapped, streamed = rows(load(hub, tmp_path / "user", False)), rows(load(hub, tmp_path / "other", True))
    refs = json.loads((genuine / "grefs(unc).json").read_text())
    expected = sorted(s["sent"] for ref in refs if ref["split"] == "testA" for s in ref["sentences"])
    assert mapped == streamed and sorted(text for *_, texts in mapped for text in texts) == expected
    assert {tuple(size) for _, size, _ in mapped} == {(64, 48)}
    by_id = hub.python(tmp_path / "user", "-c", SENTENCES, token=None, PYTHONPATH=str(ROOT))
    local = SENTENCES.replace("me/grefcoco", str(tmp_path / "out"))
    known = hub.python(tmp_path / "user", "-c", local, token=None, PYTHONPATH=str(ROOT))
    assert by_id.returncode == 0 and len(by_id.stdout.splitlines()) == 1 + len(expected), by_id.stderr
    assert by_id.stdout.startswith("[1, 3]\n")
    assert by_id.stdout == known.stdout


@pytest.mark.slow
def test_pushing_again_uploads_what_changed(hub: Hub, genuine: Path, tmp_path: Path) -> None:
    assert push(hub, genuine).returncode == 0 and uploads(hub) == 4
    first = hub.repository("dataset", "me/grefcoco").resolve("main")
    hub.requests.clear()
    assert push(hub, genuine).returncode == 0 and uploads(hub) == 0
    assert hub.repository("dataset", "me/grefcoco").resolve("main") == first, "a commit that changes nothing"
    refs = json.loads((genuine / "grefs(unc).json").read_text())
    next(ref for ref in refs if ref["split"] == "testA")["sentences"][0]["sent"] = "the newest sentence"
    write_json(genuine / "grefs(unc).json", refs)
    assert push(hub, genuine).returncode == 0 and uploads(hub) == 1
    now, pinned = rows(load(hub, tmp_path / "user", False)), rows(load(hub, tmp_path / "user", False, first))
    changed = [text for *_, texts in now for text in texts], [text for *_, texts in pinned for text in texts]
    assert "the newest sentence" in changed[0] and "the newest sentence" not in changed[1]
    missing = load(hub, tmp_path / "user", True, "0" * 40)
    assert missing.returncode == 1 and "0" * 40 in missing.stderr.splitlines()[-1]


@pytest.mark.slow
def test_shards_of_an_earlier_build_are_deleted_from_the_repository(hub: Hub, genuine: Path) -> None:
    assert push(hub, genuine).returncode == 0
    repo = hub.repository("dataset", "me/grefcoco")
    files = repo.files("main")
    repo.commit(files | {"data/testA-00001-of-00002.parquet": files["data/testA-00000-of-00001.parquet"]}, "more")
    assert push(hub, genuine).returncode == 0
    assert repo.files("main") == files


@pytest.mark.slow
def test_images_come_from_a_repository(hub: Hub, genuine: Path, tmp_path: Path) -> None:
    hub.folder.mkdir()
    images = hub.repository("dataset", "you/coco")
    images.create(private=False)
    pictures = {f"train2014/{path.name}": images.keep(path.read_bytes()) for path in (genuine / "train2014").iterdir()}
    images.commit(pictures | {"README.md": images.keep(b"pictures")}, "pictures")

    def build(source: str) -> CompletedProcess:
        options = ["--annotations", genuine, "--images", source, "--out", tmp_path / "out"]
        return hub.python(tmp_path / "me", ROOT / "grefcoco.py", "build", *options, token=None)

    for wrong, word in {"you/coco/val2014": "val2014", "you/nothing/train2014": "you/nothing", "you": "OWNER"}.items():
        refused = build(f"hf://datasets/{wrong}")
        assert refused.returncode == 2 and word in refused.stderr.splitlines()[-1], refused.stderr
        assert "Traceback" not in refused.stderr and not (tmp_path / "out").exists()
    done = build("hf://datasets/you/coco/train2014")
    assert done.returncode == 0, done.stderr
    shards = {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    assert push(hub, genuine).returncode == 0
    assert shards == {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}


@pytest.mark.slow
def test_private_set_needs_its_owners_token(hub: Hub, genuine: Path, tmp_path: Path) -> None:
    hub.folder.mkdir()
    hub.repository("dataset", "me/grefcoco").create(private=True)
    assert push(hub, genuine).returncode == 0
    for streaming in (False, True):
        assert len(rows(load(hub, tmp_path / "mine", streaming, token="hf_me"))) == 2
    for token, word in {None: "me/grefcoco", "hf_you": "me/grefcoco", "hf_expired": "Invalid credentials"}.items():
        refused = load(hub, tmp_path / f"{token}", True, token=token)
        assert refused.returncode == 1 and word in refused.stderr.splitlines()[-1]
        assert not refused.stdout


@pytest.mark.slow
@pytest.mark.parametrize("token", ["hf_you", "hf_expired"])
def test_push_without_the_right_is_one_line(hub: Hub, genuine: Path, token: str) -> None:
    refused = push(hub, genuine, token)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("grefcoco build: ")
    assert not (hub.folder / "datasets").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "status", "survives"),
    [
        ("/lfs/", 500, True),
        ("/lfs/", None, True),
        ("/preupload/", 503, True),
        ("/commit/", 500, False),
        ("/commit/", None, False),
    ],
)
def test_upload_survives_faults_or_completes_when_run_again(
    hub: Hub, genuine: Path, tmp_path: Path, path: str, status: int | None, survives: bool
) -> None:
    hub.fail("PUT" if path == "/lfs/" else "POST", path, times=1, status=status, after=1000)
    done = push(hub, genuine)
    assert done.returncode == (0 if survives else 2), done.stderr
    if not survives:
        assert hub.repository("dataset", "me/grefcoco").files("main") == {}, "half of a data set became visible"
        hub.requests.clear()
        assert push(hub, genuine).returncode == 0
        assert uploads(hub) == 0, "what had arrived was sent again"
    assert len(rows(load(hub, tmp_path / "user", True))) == 2


@pytest.mark.slow
def test_stream_survives_errors_and_cut_connections(hub: Hub, genuine: Path, tmp_path: Path) -> None:
    assert push(hub, genuine).returncode == 0
    expected = rows(load(hub, tmp_path / "undisturbed", True))
    hub.fail("GET", "/resolve/.*testA", after=1000)
    hub.fail("GET", "/resolve/.*testA", status=503)
    assert rows(load(hub, tmp_path / "disturbed", True)) == expected
    assert not any(fault.times for fault in hub.faults), "a fault never happened"


@pytest.mark.slow
@pytest.mark.parametrize("status", [None, 503])
def test_download_that_failed_completes_when_run_again(
    hub: Hub, genuine: Path, tmp_path: Path, status: int | None
) -> None:
    assert push(hub, genuine).returncode == 0
    hub.fail("GET", "/resolve/.*testA", status=status, after=1000)
    assert load(hub, tmp_path / "user", False).returncode == 1, "the client does not try this again itself"
    hub.requests.clear()
    assert len(rows(load(hub, tmp_path / "user", False))) == 2
    fetched = [path for method, path in hub.requests if method == "GET" and path.endswith(".parquet")]
    assert fetched and not any("train" in path for path in fetched), "what had arrived was fetched again"


SILENT = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "PYTHONPATH": str(ROOT)}
COUNT = """
import sys, time
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.1))  # all waits between tries
import grefcoco
rows = grefcoco.load("me/scenes", split="testA", streaming=sys.argv[1] == "stream")
print(len([row["image"].size for row in rows]))
"""


@pytest.fixture
def scenes_hub(hub: Hub, scenes_dataset: Path) -> Hub:
    """A Hub with the scenes on which tests train, as me/scenes."""
    hub.folder.mkdir()
    repo = hub.repository("dataset", "me/scenes")
    repo.create(private=False)
    files = {str(path.relative_to(scenes_dataset)): path for path in scenes_dataset.rglob("*") if path.is_file()}
    repo.commit({name: repo.keep(path.read_bytes()) for name, path in files.items()}, "scenes")
    return hub


@pytest.mark.slow
def test_cuts_of_a_download_are_tried_again_and_then_are_one_error(scenes_hub: Hub, tmp_path: Path) -> None:
    scenes_hub.fail("GET", "/resolve/.*testA", after=1000, times=2)
    done = scenes_hub.python(tmp_path / "cut", "-c", COUNT, "map", token=None, **SILENT)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
    scenes_hub.fail("GET", "/resolve/.*testA", after=1000, times=-1)
    done = scenes_hub.python(tmp_path / "lost", "-c", COUNT, "map", token=None, **SILENT)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and line.startswith("ConnectionError: the connection to the Hub broke"), done.stderr
    assert "me/scenes" in line and done.stderr.count("Traceback") == 1, "errors of libraries are shown with it"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "after"), [("map", 1000), ("stream", 0), ("stream", 1000)])
def test_a_dead_line_ends_a_load_in_bounded_time(scenes_hub: Hub, tmp_path: Path, kind: str, after: int) -> None:
    """The server accepts and never answers, or stops in the middle; each wait is a tenth of the real one or less."""
    scenes_hub.fail("GET", "/resolve/.*testA", after=after, times=-1, silent=True)
    done = scenes_hub.python(tmp_path / "user", "-c", COUNT, kind, token=None, **SILENT)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ConnectionError: "), done.stderr
    tries = [path for method, path in scenes_hub.requests if method == "GET" and "testA" in path]
    assert 2 <= len(tries) <= 20, "each of which ends after HF_HUB_DOWNLOAD_TIMEOUT seconds"


@pytest.mark.slow
def test_a_dead_line_ends_a_streamed_training_in_one_line(scenes_hub: Hub, tmp_path: Path) -> None:
    flags = tiny("me/scenes", tmp_path / "out", streaming=True)
    scenes_hub.fail("GET", "/resolve/.*train-", after=1000, times=-1, silent=True)
    code = COUNT.partition("import grefcoco\n")[0] + "import train; train.main(sys.argv[1:])"
    done = scenes_hub.python(tmp_path / "user", "-c", code, *flags, token=None, **SILENT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: ")
