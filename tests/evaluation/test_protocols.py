"""Frozen protocols: the published counts are checked to the prompt, and what is wrong is said."""

from __future__ import annotations

import json

import pytest
from builders.messages import says

from rsaft_fast.data.prompt_sets import SETS
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.protocols import PROTOCOLS, protocol_prompts

# Prompts and pictures of each, as the benchmarks' authors publish them.
PUBLISHED = {
    "drawbench": (200, 1),
    "hpdv2-400": (400, 1),
    "hpdv2-3200": (3200, 1),
    "partiprompts": (1632, 1),
    "geneval": (553, 4),
    "geneval2": (800, 1),
    "dpg-bench": (1065, 4),
    "unigenbench": (600, 4),
}


def test_counts_are_the_published_ones():
    assert {name: (SETS[p.prompts].count, p.pictures) for name, p in PROTOCOLS.items()} == PUBLISHED


def test_a_whole_set_is_taken_and_any_other_number_refused(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    lines = [json.dumps({"tag": "counting", "include": [], "prompt": f"a photo of {i} cows"}) for i in range(554)]
    file.write_text("\n".join(lines[:553]))
    name, protocol, prompts = protocol_prompts(f"geneval={tmp_path}")
    assert (name, protocol.pictures, len(prompts), prompts[552]) == ("geneval", 4, 553, "a photo of 552 cows")
    for count in (552, 554):
        file.write_text("\n".join(lines[:count]))
        with pytest.raises(UserError, match=says("geneval", count, 553, "github.com/djghosh13/geneval")):
            protocol_prompts(f"geneval={tmp_path}")


def test_hpdv2_s_four_files_are_one_protocol(tmp_path):
    (tmp_path / "benchmark").mkdir()
    for style in ("photo", "anime", "paintings", "concept-art"):
        (tmp_path / "benchmark" / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(800)]))
    prompts = protocol_prompts(f"hpdv2-3200={tmp_path}")[2]
    assert prompts[0] == "anime 0" and prompts[-1] == "photo 799" and len(prompts) == 3200


def test_an_unknown_protocol_lists_those_there_are(tmp_path):
    with pytest.raises(UserError, match=says("drawbnch", "drawbench", "unigenbench", "--prompts")):
        protocol_prompts("drawbnch")
