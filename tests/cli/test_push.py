"""`rsaft-fast push`: what arrives at a hub, here a local server that speaks its protocol; and what is never sent."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from builders.messages import says
from builders.recipes import config

from rsaft_fast.cli import main
from rsaft_fast.train.loop import train
from rsaft_fast.train.model_card import CARD


class Hub:
    """A hub that takes every commit of who has its token.

    Attributes:
        calls: (path, JSON content) of every request. files: path to bytes of what was committed.
    """

    token = "hf_test"

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.files: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                lines = [json.loads(line) for line in body.split(b"\n") if line.strip()]
                hub.calls.append((self.path, lines))
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.answer({"error": "Invalid credentials"}, 401)
                else:
                    self.answer(hub.respond(self.path, lines))

            def answer(self, content: object, code: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def respond(self, path: str, lines: list) -> object:
        if path.endswith("/repos/create"):
            return {"url": f"{self.url}/me/{lines[0]['name']}"}
        if "/preupload/" in path:
            names = [file["path"] for file in lines[0]["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in lines:
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"success": True, "commitOid": "a" * 40, "commitUrl": f"{self.url}/me/lora/commit/{'a' * 40}"}
        return {"warnings": [], "errors": []}  # of the card's front matter


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A run with an evaluation of its own weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config(tiny, folder, optimizer__lr=0.1))
    evaluation = ["--prompts", str(tiny.prompts), "--rewards", f"held:clip={tiny.clip},dtype=bf16", "--s1", "0"]
    assert main(["eval", str(folder), *evaluation]) == 0
    return folder


def push(*arguments: object) -> int:
    return main(["push", *map(str, arguments)])


def test_the_run_arrives_whole_with_a_card_that_says_what_it_is(tiny, run, hub, capsys):
    assert push(run, "--repo", "me/lora", "--license", "openrail++") == 0
    assert hub.url in capsys.readouterr().out.strip().splitlines()[-1]
    sent = {path.name: path.read_bytes() for path in (run / "lora").iterdir() if path.name != CARD}
    card = hub.files.pop(CARD).decode()
    assert hub.files == sent and len(sent) == 2
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "openrail++" and "lora" in head["tags"]
    for told in ("| base model |", "| reward |", "| method | draft |", "rho 0.01", '"me/lora"', "Held-out scores"):
        assert told in card, told
    assert '"lora"' not in card and "Fill in" not in card and "not known here" not in card
    assert str(run.parent) not in card and str(tiny.clip.parent) not in card
    found = json.loads((run / "evaluation" / tiny.prompts.stem / "evaluation.json").read_text())
    for label, row in (("before", found["rows"][0]), ("these", found["rows"][1])):
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {label} |"))
        assert f"{row['scores']['held']['value']:.3f}" in line and f"{row['scores']['clip']['value']:.3f}" in line
    assert "clip\\*" in card and "held\\*" not in card
    # The run's own card stays as it was.
    assert "Fill in" in (run / "lora" / CARD).read_text()
    created = next(lines[0] for path, lines in hub.calls if path.endswith("/repos/create"))
    assert created["name"] == "lora" and created["organization"] == "me" and created.get("private") in (None, False)


def test_a_dry_run_sends_nothing(run, hub, capsys):
    assert push(run, "--repo", "me/lora", "--license", "mit", "--dry-run") == 0
    said = capsys.readouterr().out
    assert not hub.calls and "license: mit" in said and CARD in said and "pytorch_lora_weights.safetensors" in said


def test_without_a_name_a_licence_or_an_end_nothing_is_sent(tiny, run, hub, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        push(run)
    assert ended.value.code == 2 and "--repo" in capsys.readouterr().err
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    for arguments, words in [
        ((run, "--repo", "lora"), says("'lora'", "OWNER/NAME")),
        ((run, "--repo", "me/lora"), says(tiny.sd15.name, "--license")),
        ((tmp_path, "--repo", "me/lora"), says(tmp_path, "config.yaml")),
        ((tmp_path / "begun", "--repo", "me/lora", "--license", "mit"), says("lora", "resume=")),
        ((run, "--repo", "me/lora", "--license", "mit", "--checkpoint", "best"), says("best", "STEP")),
        ((run, "--repo", "me/lora", "--license", "mit", "--evaluation", tmp_path), says("evaluation.json")),
    ]:
        assert push(*arguments) == 2
        assert words.search(capsys.readouterr().err), arguments
    assert not hub.calls


def test_a_wrong_token_is_one_line_with_the_mend(run, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert push(run, "--repo", "me/lora", "--license", "mit") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rsaft-fast: error:") and says("me/lora", 401, "hf auth login").search(error)
    assert not hub.files
    hub.server.shutdown()
    hub.server.server_close()
    assert push(run, "--repo", "me/lora", "--license", "mit") == 2
    assert says("me/lora", "reached").search(capsys.readouterr().err)


def test_an_evaluation_of_other_weights_is_not_theirs(tiny, run, hub, tmp_path, capsys):
    other = tmp_path / "other"
    train(config(tiny, other, seed=3))
    evaluation = run / "evaluation" / tiny.prompts.stem
    assert push(other, "--repo", "me/lora", "--license", "mit", "--evaluation", evaluation) == 2
    assert says("--evaluation", other).search(capsys.readouterr().err)
    assert push(other, "--repo", "me/lora", "--license", "mit", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "Held-out scores" not in said and "rsaft-fast eval" in said
