"""Prompt files in every format, as the public sets are written, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os

import pytest
from builders.messages import says

from rsaft_fast import playground
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.errors import UserError
from rsaft_fast.settings import LONGEST_TEXT

AWKWARD = ['a sign that says "Open, today"', "ein Mädchen mit 漢字\u2028und mehr", "# not a comment", "a, b; c"]


def write(tmp_path, name, text, encoding="utf-8", newline="\n"):
    path = tmp_path / name
    path.write_bytes(text.replace("\n", newline).encode(encoding))
    return path


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


FORMATS = {
    "a.txt": "\n".join(AWKWARD) + "\n\n",
    "b.csv": "id,Prompt,note\n" + "".join(f"{i},{quoted(p)},x\n" for i, p in enumerate(AWKWARD)),
    "c.tsv": "Prompt\tCategory\n" + "".join(f"{p}\tAbstract\n" for p in AWKWARD),
    "d.json": json.dumps(AWKWARD, ensure_ascii=False),
    "e.json": json.dumps([{"id": i, "caption": p} for i, p in enumerate(AWKWARD)]),
    "f.json": json.dumps({"name": "set", "prompts": AWKWARD}),
    "g.jsonl": "\n".join(json.dumps({"tag": "single_object", "include": [], "prompt": p}) for p in AWKWARD),
    "h.jsonl": "\n".join(json.dumps(p) for p in AWKWARD) + "\n\n",
    "i.TXT": "\n".join(f"  {p}\t" for p in AWKWARD),
}


def test_the_prompts_that_ship_for_real_models_fit_their_encoders():
    prompts = load_prompts("starter")
    assert len(prompts) == 96 == len({prompt.lower() for prompt in prompts})
    # CLIP reads 77 tokens, an English word has two at most; the first eight are what the sample grids show.
    assert all(3 <= len(prompt.split()) <= 20 for prompt in prompts)
    with pytest.raises(UserError, match=says("'startr'", "starter?")):
        load_prompts("startr")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_prompts(tmp_path, name, newline, encoding):
    assert load_prompts(write(tmp_path, name, FORMATS[name], encoding, newline)) == AWKWARD


def test_order_and_duplicates_are_kept(tmp_path):
    assert load_prompts(write(tmp_path, "a.txt", "b\na\nb\n")) == ["b", "a", "b"]


def test_a_named_column(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,long\nx,"one\ntwo"\n')
    assert load_prompts(path) == ["x"]
    assert load_prompts(path, column="long") == ["one\ntwo"]
    assert load_prompts(write(tmp_path, "a.json", '[{"prompt": "x", "long": "y"}]'), column="long") == ["y"]
    assert load_prompts(write(tmp_path, "a.tsv", 'Text\tPROMPT\nt\t"p\n')) == ['"p']


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("a.csv", "\n \n,\nid,prompt\n1,x\n", ["x"]),
        ("a.csv", 'id, prompt\n1, "a cat, on a mat"\n2,  b\n', ["a cat, on a mat", "b"]),
        ("a.csv", 'prompt\n"a cat, on a mat"\na 5" disc\n', ["a cat, on a mat", 'a 5" disc']),
        ("a.csv", "prompt,,\nx,,\n,,\n", ["x"]),
        ("a.csv", "prompt,id\ra\x0bb,1\rc\x85d,2\r", ["a\x0bb", "c\x85d"]),
        ("a.csv", "prompt,text\na,b\n", ["a"]),
        ("a.tsv", 'prompt\tid\n"a sign ""x"""\t1\nb\t2\n', ['a sign "x"', "b"]),
        ("a.tsv", '"prompt"\n"a ""b"" c"\n"one\ntwo"\n', ['a "b" c', "one\ntwo"]),
        ("a.tsv", 'prompt\tn\n"a cat, on a mat"\t1\n', ["a cat, on a mat"]),
        ("a.tsv", 'prompt\n"a cat\nsitting"\n', ["a cat\nsitting"]),
        ("a.tsv", 'prompt\n"Hello" and "World"\n"whole"\n', ['"Hello" and "World"', '"whole"']),
        ("a.txt", "a\x0bb\x85c\u2028d\x1ce\n\ufeff f\n", ["a\x0bb\x85c\u2028d\x1ce", "f"]),
        ("a.jsonl", '"a"\n{"prompt": "b\u2028c", "id": 1, "id": 2}', ["a", "b\u2028c"]),
    ],
)
def test_odd_files_are_read_whole(tmp_path, name, content, prompts):
    assert load_prompts(write(tmp_path, name, content)) == prompts


def test_a_column_that_is_there_twice_can_be_named_by_its_very_letters(tmp_path):
    path = write(tmp_path, "a.csv", " prompt ,Prompt,long\nx,y,z\n")
    assert [load_prompts(path, column=name) for name in ("prompt", "Prompt", "long")] == [["x"], ["y"], ["z"]]
    with pytest.raises(UserError, match=says("line 2", "str", "'long'")):
        load_prompts(write(tmp_path, "a.jsonl", '{"long": "x"}\n"y"'), column="long")


def test_the_playground():
    assert load_prompts("playground") == playground.train_prompts()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "no prompt"),
        ("a.txt", "\n \n\t\n", "no prompt"),
        ("a.csv", "", "no prompt"),
        ("a.csv", "prompt\n", "no prompt"),
        ("a.json", "", "no prompt"),
        ("a.json", "[]", "no prompt"),
        ("a.jsonl", "\n", "no prompt"),
        ("a.csv", "title,size\na,b\n", says("columns", "prompt, prompts, text, caption", "'title', 'size'")),
        ("a.json", '{"title": []}', says("columns", "prompt, prompts, text, caption", "'title'")),
        ("a.jsonl", '{"prompt": "a"}\n{"title": "b"}', says("line 2", "'prompt'", "'title'")),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', says("line 2", "'prompt'", "'text'")),
        ("a.json", '[{"text": "a"}, {"prompt": "b", "txt": "c"}]', says("entry 2", "'text'", "'prompt', 'txt'")),
        ("a.csv", "prompt,b\nx,y\n,z\n", says("line 3", "empty")),
        ("a.csv", "a,prompt\nx,y\nz\n", says("line 3", "fields", 1, "header", 2)),
        ("a.csv", "prompt,a\nx,y\nz\n", says("line 3", "fields", 1, "header", 2)),
        (
            "a.csv",
            "prompt\na cat, sitting on a mat, 4k\n",
            says("line 2", "fields", 3, "header", 1, "quotation marks", ".txt"),
        ),
        ("a.csv", '\n\nid,prompt\n1,"a\nb"\n2,c,d\n', says("line 6", "fields", 3, "header", 2)),
        ("a.tsv", "prompt\nx\ty\n", says("line 2:", "fields", 2, "header", 1)),
        ("a.csv", "prompt,Prompt\nx,y\n", says("2 columns", "'prompt', 'Prompt'")),
        ("a.csv", "text,text\nx,y\n", says("2 columns", "'text', 'text'")),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', says("2 columns", "'prompt', 'prompt'")),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}',
            says("line 2", "2 columns", "'prompt', 'prompt'"),
        ),
        ("a.csv", 'prompt\n"open\n', says("line 2", "quoting")),
        ("a.json", '["a", "  "]', says("entry 2", "empty")),
        ("a.json", '["a", 3]', says("entry 2", "int", "string")),
        ("a.json", '["a", null]', says("entry 2", "NoneType", "string")),
        ("a.json", '"a"', says("str", "list of prompts")),
        ("a.json", '{"prompt": "a"}', says("str", "list of prompts")),
        ("a.json", '["a"', "JSON"),
        ("a.json", "[" * 100_000, "JSON"),
        ("a.jsonl", '"a"\nb\n', says("line 2", "JSON")),
        ("a.txt", "a\n" + "x" * (LONGEST_TEXT + 1), says("line 2", "characters", LONGEST_TEXT + 1, LONGEST_TEXT)),
        ("a.txt", "a\0b", says("line 1", "NUL")),
        ("a.csv", "prompt\na\0b\n", says("line 2", "NUL")),
        ("a.json", r'["a\u0000b"]', says("entry 1", "NUL")),
        ("a.json", r'["a", "b\ud83d"]', says("entry 2", r"'\ud83d'", "UTF-8")),
        ("a.md", "a", says("ending", ".txt, .csv", "NAME=PATH")),
        ("a", "a", says("ending", ".txt, .csv", "NAME=PATH")),
    ],
)
def test_what_is_wrong_is_one_clear_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(write(tmp_path, name, content))
    assert f"{name}'" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=says("absent.txt", "No such file")):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=says("folder.txt", "folder;")):
        load_prompts(tmp_path / "folder.txt")
    (tmp_path / "latin.txt").write_bytes("Mädchen".encode("latin-1"))
    with pytest.raises(UserError, match=says("latin.txt", "UTF-8", "byte 1")):
        load_prompts(tmp_path / "latin.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name, words in [
        ("pipe.txt", "a pipe"),
        ("zero.csv", "a device"),
        ("x" * 300, says("ending", ".txt, .csv")),
        ("a\0.txt", "NUL|null"),
    ]:
        with pytest.raises(UserError, match=words):
            load_prompts(f"{tmp_path}/{name}")
    monkeypatch.setattr("rsaft_fast.data.prompts.MAX_FILE_BYTES", 3)
    with pytest.raises(UserError, match=says("bytes", 4, 3)):
        load_prompts(write(tmp_path, "a.txt", "four"))


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=says("'caption'", "'prompt'")):
        load_prompts(write(tmp_path, "a.csv", "prompt\nx\n"), column="caption")
    with pytest.raises(UserError, match=says("a.txt", "'prompt'", "column")):
        load_prompts(write(tmp_path, "a.txt", "x"), column="prompt")
