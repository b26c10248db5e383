"""Prompt files in every format, as the public sets are written, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os

import pytest

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
    with pytest.raises(UserError, match="did you mean starter"):
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
    with pytest.raises(UserError, match="line 2 is a str and has no column 'long'"):
        load_prompts(write(tmp_path, "a.jsonl", '{"long": "x"}\n"y"'), column="long")


def test_the_playground():
    assert load_prompts("playground") == playground.train_prompts()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", "\n \n\t\n", "holds no prompt"),
        ("a.csv", "", "holds no prompt"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.json", "", "holds no prompt"),
        ("a.json", "[]", "holds no prompt"),
        ("a.jsonl", "\n", "holds no prompt"),
        ("a.csv", "title,size\na,b\n", "none of the columns prompt.*it has 'title', 'size'"),
        ("a.json", '{"title": []}', "none of the columns"),
        ("a.jsonl", '{"prompt": "a"}\n{"title": "b"}', "line 2 has no column 'prompt'; it has 'title'"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2 has no column 'prompt'"),
        ("a.json", '[{"text": "a"}, {"prompt": "b", "txt": "c"}]', "entry 2 has no column 'text'"),
        ("a.csv", "prompt,b\nx,y\n,z\n", "line 3: the prompt is empty"),
        ("a.csv", "a,prompt\nx,y\nz\n", "line 3: 1 .* the header's is 2"),
        ("a.csv", "prompt,a\nx,y\nz\n", "line 3: 1 .* the header's is 2"),
        ("a.csv", "prompt\na cat, sitting on a mat, 4k\n", "line 2: 3 .* the header's is 1.*quotation marks"),
        ("a.csv", '\n\nid,prompt\n1,"a\nb"\n2,c,d\n', "line 6: 3 .* the header's is 2"),
        ("a.tsv", "prompt\nx\ty\n", "line 2: 2 .* the header's is 1"),
        ("a.csv", "prompt,Prompt\nx,y\n", "2 columns 'prompt', 'Prompt'"),
        ("a.csv", "text,text\nx,y\n", "2 columns 'text', 'text'"),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', "2 columns 'prompt', 'prompt'"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}', "line 2 has 2 columns"),
        ("a.csv", 'prompt\n"open\n', "mend the quoting"),
        ("a.json", '["a", "  "]', "entry 2: the prompt is empty"),
        ("a.json", '["a", 3]', "entry 2: the prompt is a int"),
        ("a.json", '["a", null]', "entry 2: the prompt is a NoneType"),
        ("a.json", '"a"', "holds a str"),
        ("a.json", '{"prompt": "a"}', "holds a str"),
        ("a.json", '["a"', "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.jsonl", '"a"\nb\n', "line 2 is not JSON"),
        ("a.txt", "a\n" + "x" * (LONGEST_TEXT + 1), rf"line 2: .*{LONGEST_TEXT + 1} characters"),
        ("a.txt", "a\0b", "line 1: a NUL"),
        ("a.csv", "prompt\na\0b\n", "line 2: a NUL"),
        ("a.json", r'["a\u0000b"]', "entry 1: .* NUL"),
        ("a.json", r'["a", "b\ud83d"]', "entry 2: .*half a character"),
        ("a.md", "a", "ending must be one of"),
        ("a", "a", "ending must be one of"),
    ],
)
def test_what_is_wrong_is_one_clear_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path / "folder.txt")
    (tmp_path / "latin.txt").write_bytes("Mädchen".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 1\)"):
        load_prompts(tmp_path / "latin.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name, words in [
        ("pipe.txt", "a pipe"),
        ("zero.csv", "a device"),
        ("x" * 300, "ending"),
        ("a\0.txt", "NUL|null"),
    ]:
        with pytest.raises(UserError, match=words):
            load_prompts(f"{tmp_path}/{name}")
    monkeypatch.setattr("rsaft_fast.data.prompts.MAX_FILE_BYTES", 3)
    with pytest.raises(UserError, match="4 bytes; the limit is 3"):
        load_prompts(write(tmp_path, "a.txt", "four"))


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no column 'caption'.*it has 'prompt'"):
        load_prompts(write(tmp_path, "a.csv", "prompt\nx\n"), column="caption")
    with pytest.raises(UserError, match="plain text"):
        load_prompts(write(tmp_path, "a.txt", "x"), column="prompt")
