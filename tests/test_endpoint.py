"""Served language models: a server on loopback that answers from the truth, with the faults of real ones."""

import base64
import json
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import grefcoco
from grefcoco_data.masks import xywh_to_xyxy
from scoring import endpoint
from scoring.__main__ import main
from scoring.answers import parse_answer
from scoring.endpoint import Endpoint
from scoring.grammars import format_answer, prompt
from tests.processes import Forked
from tests.tiny_grefcoco import write_genuine

EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "[]"}}]}\n\ndata: [DONE]\n\n'
BODIES = {"bad json": b"{", "other json": b'{"detail": "busy"}', "no choices": b'{"choices": []}', "events": EVENT}
BODIES |= {"deep json": b"[" * 100_000, "list": b"[1]", "null": b"null", "latin": b"\xff", "nothing": b""}
CONTENTS = {"number": 7, "odd parts": [{"type": "text"}, 7], "no text": None, "no parts": [], "thoughts": None}
CONTENTS["parts"] = [{"type": "text", "text": "[1, 2, "}, {"type": "image"}, {"type": "text", "text": "500, 600]"}]


class Server:
    """An OpenAI-compatible server; `faults` holds what the next requests get instead of an answer."""

    def __init__(self, grammar: str, rows: list[dict]) -> None:
        self.grammar, self.answers, self.faults, self.requests = grammar, {}, [], []
        self.retry_after = "0"
        self.at_once, self.most_at_once, self.delay, self.lock = 0, 0, 0.0, threading.Lock()
        for row in rows:
            boxes = xywh_to_xyxy(row["boxes"]).tolist()
            text = format_answer(grammar, boxes, row["sentence"], row["width"], row["height"])
            self.answers.setdefault(prompt(grammar, row["sentence"]), text)

    def __enter__(self) -> "Server":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    server.requests.append((self.path, headers, body))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    fault = server.faults.pop(0) if server.faults else None
                time.sleep(server.delay)
                with server.lock:
                    server.at_once -= 1
                server.answer(self, body, fault)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return self

    def __exit__(self, *arguments: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: dict, fault: object) -> None:
        status = fault if isinstance(fault, int) else 200
        text = self.answers.get(body["messages"][0]["content"][1]["text"], "What?")
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        content = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        message["content"] = CONTENTS.get(fault, text)
        data = BODIES.get(fault, json.dumps(content).encode())
        if fault == "slow":
            time.sleep(1.0)
        request.send_response(status)
        if status == 429:
            request.send_header("Retry-After", self.retry_after)
        request.send_header("Content-Length", str(len(data) + (100 if fault == "cut" else 0)))
        request.end_headers()
        try:
            request.wfile.write(data)
            if fault == "cut":
                request.close_connection = True
        except OSError:
            pass


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    genuine = write_genuine(folder / "genuine")
    grefcoco.build(genuine, genuine / "train2014", folder / "built")
    return folder / "built"


@pytest.fixture
def rows(dataset) -> list[dict]:
    """Sentences whose words say which they are."""
    return [row | {"sentence": f"thing {row['sent_id']}"} for row in grefcoco.load(dataset, split="val")]


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_DELAY", 0.01)


@pytest.mark.parametrize("grammar", ["qwen2.5", "qwen3", "gemini"])
def test_a_server_that_knows_the_truth_is_right(rows, grammar):
    with Server(grammar, rows) as server:
        answers = Endpoint(server.url, "some/model", grammar, concurrency=3)(rows)
    for answer, row in zip(answers, rows, strict=True):
        assert answer.sent_id == row["sent_id"] and not answer.unreadable
        assert answer.answer == server.answers[prompt(grammar, row["sentence"])]
        assert answer.scores == [1.0] * len(row["boxes"])
        for box, truth in zip(answer.boxes, xywh_to_xyxy(row["boxes"]).tolist(), strict=True):
            assert box == pytest.approx(truth, abs=0.7)
    assert server.most_at_once <= 3 and len(server.requests) == len(rows)
    path, _, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "some/model" and body["seed"] == 0
    image = body["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    size = Image.open(BytesIO(base64.b64decode(image))).size
    assert size == ((64, 48) if grammar != "qwen2.5" else (56, 56))


def test_the_key_of_the_environment_is_sent(rows, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    with Server("qwen3", rows) as server:
        Endpoint(server.url, "m", "qwen3")(rows[:1])
    assert server.requests[0][1]["authorization"] == "Bearer abc"


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "slow", "number", "odd parts", *BODIES])
def test_faults_that_pass_are_tried_again(rows, fault):
    with Server("qwen3", rows) as server:
        server.faults = [fault, fault]
        answers = Endpoint(server.url, "m", "qwen3", concurrency=1, timeout=0.5)(rows[:3])
    assert [answer.answer for answer in answers] == [
        server.answers[prompt("qwen3", row["sentence"])] for row in rows[:3]
    ]
    assert len(server.requests) == 5


@pytest.mark.parametrize("grammar", ["qwen3", "paligemma"])
@pytest.mark.parametrize("fault", ["no text", "thoughts"])
def test_an_answer_without_text_is_unreadable(rows, grammar, fault):
    with Server(grammar, rows) as server:
        server.faults = [fault]
        (answer,) = Endpoint(server.url, "m", grammar)(rows[:1])
    assert answer.unreadable and not answer.boxes and len(server.requests) == 1


def test_an_answer_in_parts_is_put_together(rows):
    with Server("qwen3", rows) as server:
        server.faults = ["parts"]
        (answer,) = Endpoint(server.url, "m", "qwen3")(rows[:1])
    assert answer.answer == "[1, 2, 500, 600]" and len(answer.boxes) == 1


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("0.4", 0.4, 5), ("Sat, 01 Jan 2000 00:00:00 GMT", 0, 5), ("soon", 0, 5), ("-3", 0, 5), ("nan", 0, 5)],
)
def test_the_server_says_when_to_try_again(rows, asked, least, most):
    with Server("qwen3", rows) as server:
        server.faults, server.retry_after = [429], asked
        start = time.monotonic()
        (answer,) = Endpoint(server.url, "m", "qwen3")(rows[:1])
        assert least <= time.monotonic() - start < most and not answer.unreadable


@pytest.mark.parametrize("url", ["http://", "http://[bad/v1", "http://127.0.0.1:99999/v1", "http://a b/v1"])
def test_a_url_of_no_server_is_refused_at_once(url):
    with pytest.raises(ValueError, match="is no URL of a server"):
        Endpoint(url, "m", "qwen3")


def test_faults_that_stay_are_errors(rows, monkeypatch):
    monkeypatch.setattr(endpoint, "RETRIES", 2)
    with Server("qwen3", rows) as server:
        server.faults = [500] * 3
        with pytest.raises(OSError, match="no answer after 3 requests"):
            Endpoint(server.url, "m", "qwen3")(rows[:1])
        server.faults = [401]
        with pytest.raises(OSError, match="401"):
            Endpoint(server.url, "m", "qwen3")(rows[:1])
    assert len(server.requests) == 4, "a refusal is not tried again"
    with pytest.raises(OSError, match="no answer after 3 requests"):
        Endpoint(server.url, "m", "qwen3")(rows[:1])


# ---- commands


def predict(server: Server, dataset: Path, out: Path, *options: str) -> list[str]:
    data = [server.url, str(dataset), "--split", "train", "--model", "some/model", "--out", str(out)]
    return ["predict", *data, "--grammar", "qwen3", "--concurrency", "2", "--batch-size", "4", *options]


@pytest.mark.slow
def test_outcomes_are_counted_and_scored(dataset, tmp_path, capsys):
    rows = list(grefcoco.load(dataset, split="train"))
    out = tmp_path / "train.jsonl"
    with Server("qwen3", rows) as server:
        server.answers = dict.fromkeys(server.answers, "I cannot tell.")
        assert main(predict(server, dataset, out)) == 0, capsys.readouterr().err
    assert f"0 boxes, 0 none, {len(rows)} unreadable" in capsys.readouterr().out
    origin = json.loads(out.with_name("train.jsonl.json").read_text())
    assert origin["outcomes"]["unreadable"] == len(rows)
    assert (origin["grammar"], origin["model"], origin["seed"]) == ("qwen3", "some/model", 0)
    assert "{sentence}" in origin["prompt"] and origin["versions"]["huggingface_hub"]
    score = ["score", str(out), str(dataset), "--split", "train"]
    assert main(score) == 0, capsys.readouterr().err
    scores = json.loads(capsys.readouterr().out)
    assert scores["grec"]["F1_score"] == 0 == scores["grec"]["N_acc"], "unreadable is no rejection"
    assert scores["origin"]["outcomes"]["unreadable"] == len(rows)
    lines = [{"sent_id": row["sent_id"], "unreadable": True} for row in rows]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(score) == 0 and json.loads(capsys.readouterr().out)["grec"]["N_acc"] == 0
    masks = [{"sent_id": row["sent_id"], "mask": row["mask"]} for row in rows]
    unread = next(number for number, row in enumerate(rows) if row["no_target"])
    masks[unread] = lines[unread]
    out.write_text("".join(json.dumps(line) + "\n" for line in masks))
    for compat in ("rela", "lisa"):
        assert main([*score, "--compat", compat]) == 0, capsys.readouterr().err
        gres = json.loads(capsys.readouterr().out)["gres"]
        none = sum(row["no_target"] for row in rows)
        assert gres["N_acc"] == pytest.approx((none - 1) / none) and gres["T_acc"] == 1


@pytest.mark.slow
def test_old_answers_are_read_again(dataset, tmp_path, capsys):
    rows = list(grefcoco.load(dataset, split="train"))
    out = tmp_path / "train.jsonl"
    with Server("gemini", rows) as server:
        server.answers = {re.sub("box_2d", "bbox_2d", key): text for key, text in server.answers.items()}
        server.answers = {prompt("qwen3", row["sentence"]): server.answers[key] for key, row in _asked(server, rows)}
        assert main(predict(server, dataset, out)) == 0, capsys.readouterr().err
    wrong = [parse_answer(line) for line in out.read_text().splitlines()]
    data = [str(out), str(dataset), "--split", "train"]
    capsys.readouterr()
    assert main(["reparse", *data]) == 0 and ": 0 answers changed" in capsys.readouterr().out
    assert main(["reparse", *data, "--grammar", "gemini"]) == 0, capsys.readouterr().err
    right = [parse_answer(line) for line in out.read_text().splitlines()]
    assert [answer.answer for answer in right] == [answer.answer for answer in wrong]
    assert any(answer.boxes != other.boxes for answer, other in zip(right, wrong))
    assert json.loads(out.with_name("train.jsonl.json").read_text())["grammar"] == "gemini"


def _asked(server: Server, rows: list[dict]) -> list[tuple[str, dict]]:
    by_sentence = {row["sentence"]: row for row in rows}
    return [
        (next(key for key in server.answers if f'"{sentence}"' in key), row) for sentence, row in by_sentence.items()
    ]


def run_predict(arguments: list[str]) -> int:
    from scoring.__main__ import main

    return main(arguments)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_file(dataset, tmp_path):
    rows = list(grefcoco.load(dataset, split="train"))
    with Server("qwen3", rows) as server:
        assert main(predict(server, dataset, tmp_path / "whole.jsonl")) == 0
        asked, server.delay = len(server.requests), 0.3
        running = Forked(run_predict, predict(server, dataset, tmp_path / "part.jsonl"))
        part = tmp_path / "part.jsonl.part"
        deadline = time.monotonic() + 120
        while not (part.exists() and part.read_bytes().count(b"\n") >= 8) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.process.kill()
        assert running.wait().returncode == -signal.SIGKILL
        assert not (tmp_path / "part.jsonl").exists()
        with part.open("a") as file:
            file.write('{"sent_id": 1, "bo')
        server.delay, before = 0.0, len(server.requests)
        assert main(predict(server, dataset, tmp_path / "part.jsonl")) == 0
        assert len(server.requests) - before <= asked - 8, "what was answered is not asked again"
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
