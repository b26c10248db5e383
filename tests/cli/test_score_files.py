"""What `rsaft-fast score` leaves where, whatever happens on the way: nothing scored is lost, nothing is overwritten."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import re

import numpy as np
import pytest
from builders.clip import write_clip
from builders.messages import says
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.commands import pictures as shared
from rsaft_fast.commands import score
from rsaft_fast.commands.score_journal import Journal
from rsaft_fast.errors import UserError
from rsaft_fast.rewards import ClipReward


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), context=40)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures 0.png to 11.png in one folder, eleven of them and another in a second, and prompts."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(12):
            Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(12)))
    return tmp_path


def run(folder, *arguments, rewards=(), pictures=("a",)) -> int:
    words = ["score", *(folder / name for name in pictures), "--prompts", folder / "prompts.txt", "--device", "cpu"]
    words += ["--output", folder / "s.csv", "--batch-size", "4", *arguments]
    return main([str(w) for w in (*words, *(word for reward in rewards for word in ("--reward", reward)))])


def rows(path):
    return list(csv.DictReader(path.open(encoding="utf-8", newline="")))


def test_ten_comes_after_two_and_it_is_said(clip, folder, capsys):
    (folder / "a" / ".hidden.png").touch()
    (folder / "a" / "c.gif").touch()
    assert run(folder, rewards=[f"clip={clip}"]) == 0
    found = [(row["picture"].rpartition("/")[2], row["prompt"]) for row in rows(folder / "s.csv")]
    assert found == [(f"{i}.png", f"prompt {i}") for i in range(12)]
    said = capsys.readouterr().out
    assert "0.png 'prompt 0' to 11.png 'prompt 11'" in said and "2 other entries" in said
    assert ".hidden.png, c.gif" in said and "standard deviation" in said
    assert not (folder / "s.csv.partial").exists()


def test_two_folders_of_the_same_prompts_are_compared(clip, folder, capsys):
    assert run(folder, rewards=[f"clip={clip}"], pictures=["a", "b"]) == 0
    scores = [float(row["clip"]) for row in rows(folder / "s.csv")]
    difference = np.array(scores[12:]) - np.array(scores[:12])
    half = 2.201 * difference.std(ddof=1) / 12**0.5
    out = capsys.readouterr().out
    line = next(line.split() for line in out.splitlines() if line.split()[:1] == ["clip"])
    assert float(line[1]) == pytest.approx(difference.mean(), abs=1e-4)
    assert [float(line[2]), float(line[4])] == pytest.approx(
        [difference.mean() - half, difference.mean() + half], abs=1e-3
    )
    assert line[5] == f"{(difference > 0).mean():.0%}" and says("12 pairs", "name").search(out)


def test_a_reward_that_fails_costs_the_others_nothing(clip, folder, capsys, monkeypatch):
    assert run(folder, rewards=[f"clip={clip}", "pickscore=/no/where"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "/no/where" in line and "12 scores" in line and "s.csv.partial" in line
    assert not (folder / "s.csv").exists()
    calls = []
    inputs = ClipReward.score_inputs
    monkeypatch.setattr(
        ClipReward, "score_inputs", lambda self, i, p: calls.append((self.spec.name, len(i))) or inputs(self, i, p)
    )
    assert run(folder, rewards=[f"clip={clip}", f"pickscore={clip}"]) == 0
    assert says(12, "scores").search(capsys.readouterr().out)
    assert calls == [("pickscore", 4)] * 3
    assert run(folder, "--output", folder / "fresh.csv", rewards=[f"clip={clip}", f"pickscore={clip}"]) == 0
    assert rows(folder / "s.csv") == rows(folder / "fresh.csv")
    assert json.loads((folder / "s.json").read_text()) == json.loads((folder / "fresh.json").read_text())
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
        "fresh.csv", "fresh.json", "prompts.txt", "s.csv", "s.json",
    ]  # fmt: skip


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt(), RuntimeError("x"), UserError("x"), MemoryError()])
def test_within_a_reward_a_batch_is_lost_at_most(clip, folder, capsys, monkeypatch, stopped_by):
    inputs, calls = ClipReward.score_inputs, []

    def failing(self, images, prompts):
        calls.append(len(images))
        if len(calls) == 3:
            raise stopped_by
        return inputs(self, images, prompts)

    monkeypatch.setattr(ClipReward, "score_inputs", failing)
    if type(stopped_by) is RuntimeError:
        with pytest.raises(RuntimeError):
            run(folder, rewards=[f"clip={clip}"])
    else:
        assert run(folder, rewards=[f"clip={clip}"]) == (130 if isinstance(stopped_by, KeyboardInterrupt) else 2)
        said = capsys.readouterr().err
        assert "8 scores" in said
        assert ("lower --batch-size" in said) == isinstance(stopped_by, MemoryError)
    assert run(folder, rewards=[f"clip={clip}"]) == 0
    assert calls == [4, 4, 4, 4] and len(rows(folder / "s.csv")) == 12


def test_other_weights_under_the_same_name_are_scored_anew(clip, folder, capsys, tmp_path):
    assert run(folder, rewards=[f"clip={clip}", "pickscore=/no/where"]) == 2
    write_clip(tmp_path / "moved", seed=3, context=40)
    here = tmp_path / "here"
    here.symlink_to(clip)
    assert run(folder, rewards=[f"clip={here}", "pickscore=/no/where"]) == 2
    here.unlink()
    here.symlink_to(tmp_path / "moved")
    assert run(folder, rewards=[f"clip={here}"]) == 0
    assert run(folder, "--output", folder / "t.csv", rewards=[f"clip={tmp_path / 'moved'}"]) == 0
    assert [r["clip"] for r in rows(folder / "s.csv")] == [r["clip"] for r in rows(folder / "t.csv")]


def test_a_full_disk_is_one_line_and_what_is_scored_is_safe(clip, folder, capsys, monkeypatch):
    """Once while scoring, once when the table is written."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written, append = [], Journal._append

    class Full:
        """A stream whose disk takes half of the third line."""

        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, content):
            written.append(content)
            return self.stream.write(content[:20] if len(written) == 2 else content)

    def on_full(self, entry):
        self._stream = Full(self._stream) if not isinstance(self._stream, Full) else self._stream
        append(self, entry)

    monkeypatch.setattr(Journal, "_append", on_full)
    assert run(folder, rewards=[f"clip={clip}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left" in line and "s.csv.partial" in line
    monkeypatch.setattr(Journal, "_append", append)
    replace = score.replace_file

    def refuse(path, content):
        raise full

    monkeypatch.setattr(score, "replace_file", refuse)
    assert run(folder, rewards=[f"clip={clip}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left" in line and "12 scores" in line and "s.json" in line
    monkeypatch.setattr(score, "replace_file", replace)
    assert run(folder, rewards=[f"clip={clip}"]) == 0 and len(rows(folder / "s.csv")) == 12


def test_a_table_that_is_there_is_kept_even_beside_scores_that_wait(clip, folder, capsys):
    assert run(folder, rewards=[f"clip={clip}", "pickscore=/no/where"]) == 2
    (folder / "s.csv").write_text("mine")
    assert run(folder, rewards=[f"clip={clip}"]) == 2
    assert "s.csv exists" in capsys.readouterr().err and (folder / "s.csv").read_text() == "mine"


def test_two_at_once_do_not_write_one_file(clip, folder, capsys):
    identity = "x"
    first = Journal(folder / "s.csv.partial", identity)
    assert run(folder, rewards=[f"clip={clip}"]) == 2
    assert "another rsaft-fast score" in capsys.readouterr().err
    first.close(finished=True)


def test_a_journal_that_its_last_holder_removed_is_begun_anew(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "s.partial", fcntl.flock, []

    def late(descriptor, how):
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    journal = Journal(path, "x")
    journal.add(("r", ""), [1.0])
    journal.close()
    assert len(calls) == 2 and Journal(path, "x").scores(("r", "")) == [1.0]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_locks_that_are_not_there_are_said_and_those_that_fail_are_errors(tmp_path, monkeypatch, number):
    def refuse(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = []
    if number == errno.ENOLCK:
        Journal(tmp_path / "s.partial", "x", said.append).close()
        assert len(said) == 1 and "no locks" in said[0]
    else:
        with pytest.raises(UserError, match="--output.*(?i:input/output error)"):
            Journal(tmp_path / "s.partial", "x", said.append)


def test_a_table_that_another_call_has_just_finished_is_kept(clip, folder, capsys, monkeypatch):
    def begun(pictures, prompts):
        (folder / "s.csv").write_text("theirs")
        return identity_of(pictures, prompts)

    identity_of = shared.identity_of
    monkeypatch.setattr(shared, "identity_of", begun)
    assert run(folder, rewards=[f"clip={clip}"]) == 2
    assert "s.csv exists" in capsys.readouterr().err
    assert (folder / "s.csv").read_text() == "theirs" and not (folder / "s.csv.partial").exists()


def test_a_journal_takes_what_it_wrote_and_nothing_else(tmp_path):
    path = tmp_path / "s.partial"
    journal = Journal(path, "x")
    journal.add(("r", ""), [1.0, 2.5])
    journal.add(("r", "part"), [0.1])
    journal.close()
    whole = path.read_bytes()
    for damage in (
        b'{"reward": "r", "part": "", "fir',
        b"\0" * 40 + b"\n",
        b'{"reward": "r", "part": "", "first": 9, "scores": [1.0]}\n',
        b"[]\n",
    ):
        path.write_bytes(whole + damage)
        again = Journal(path, "x")
        assert (again.scores(("r", "")), again.scores(("r", "part")), again.count) == ([1.0, 2.5], [0.1], 3)
        again.add(("r", ""), [1 / 3])
        again.close()
        assert Journal(path, "x").scores(("r", "")) == [1.0, 2.5, 1 / 3]
    for content in (b"my notes\n", whole.replace(b'"x"', b'"y"'), b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=says("s.partial", "--output")):
            Journal(path, "x")
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "options, words",
    [
        (["--output", "{}/x.json"], "table in a .json"),
        (["--output", "{}/X.JSON"], "table in a .json"),
        (["--output", "{}/x.csv", "--calibration", "{}/x.csv"], "--calibration .* writes already"),
        (["--output", "{}/x.csv", "--calibration", "{}/x.json"], "--calibration .* writes already"),
        (["--output", "{}/x.csv", "--calibration", "{}/a/../X.Json"], "--calibration .* writes already"),
        (["--output", "{}/x.csv", "--calibration", "{}/x.csv.partial"], "--calibration .* writes already"),
        (["--output", "{}/old"], "old.json exists"),
        (["--output", "{}/a"], "a exists"),
        (["--output", "{}/" + "x" * 251 + ".csv"], "File name too long"),
        (["--output", "{}/prompts.txt/x.csv"], "is a file"),
        (["--output", "{}/.."], "no name of a file"),
    ],
)
def test_names_that_coincide_or_cannot_be_are_refused_first(clip, folder, capsys, options, words):
    (folder / "old.json").write_text("mine")
    before = sorted(p.name for p in folder.iterdir())
    assert run(folder, *(option.format(folder) for option in options), rewards=[f"clip={clip}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, line), line
    assert sorted(p.name for p in folder.iterdir()) == before


def test_reserved_columns_and_a_folder_given_twice(clip, folder, capsys):
    (folder / "prompt.yaml").write_text(f"name: clip\npath: {clip}\n")
    assert run(folder, rewards=[folder / "prompt.yaml"]) == 2
    assert "column" in capsys.readouterr().err
    assert run(folder, rewards=[f"clip={clip}"], pictures=["a", "../" + folder.name + "/a"]) == 2
    assert "same folder" in capsys.readouterr().err


def test_a_terminal_without_the_sign_and_names_that_are_no_text(clip, folder, monkeypatch):
    os.rename(os.fsencode(folder / "a" / "3.png"), os.fsencode(folder / "a") + b"/3\xff.png")
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    assert run(folder, rewards=[f"clip={clip}"]) == 0
    assert b" +- " in shown.getvalue() and "3\\udcff.png" in rows(folder / "s.csv")[3]["picture"]


def test_listings(clip, folder, capsys):
    """Seeds and prompts pair; other prompts that were given are counted; what a listing may not hold is said."""
    listing = folder / "a" / "pictures.json"
    entries = [{"file": f"{i}.png", "prompt": f"prompt {i % 6}", "seed": i // 6} for i in range(10)]
    listing.write_text(json.dumps(entries))
    (folder / "b" / "pictures.json").write_text(json.dumps(entries[::-1]))
    words = ["score", folder / "a", folder / "b", "--reward", f"clip={clip}", "--device", "cpu"]
    assert main([str(w) for w in (*words, "--output", folder / "l.csv")]) == 0
    out = capsys.readouterr().out
    assert says("10 pairs", "prompt and seed").search(out) and "over 6 prompts" in out
    assert says(2, "10.png, 11.png").search(out)
    (folder / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(10)))
    assert run(folder, rewards=[f"clip={clip}"]) == 0
    assert says("4 of 10", "pictures.json").search(capsys.readouterr().out)
    for damage in ([{"file": "0.png", "prompt": 3}], [{"file": 3, "prompt": "x"}], [{"file": "0.png", "prompt": None}],
                   [{"file": "0.png", "prompt": "x", "seed": "1"}], {"file": "0.png"}, [3]):  # fmt: skip
        listing.write_text(json.dumps(damage))
        assert main([str(w) for w in (*words, "--output", folder / "d.csv")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "pictures.json" in line
