"""Prompts that are read in part are counted, and the longest is named."""

from __future__ import annotations

from rsaft_fast.truncation import cut_prompts_note


def words(texts, **options):
    """A token a word, and one at either end; as transformers' tokenizers, it cuts only where it is asked to."""
    assert options == {"truncation": False, "padding": False, "verbose": False}
    return {"input_ids": [[0, *text.split(), 1] for text in texts]}


def test_the_limit_itself_is_read_whole():
    assert cut_prompts_note(words, ["a b c", "", "a b"], 5, "encoder") is None
    assert cut_prompts_note(words, [], 5, "encoder") is None


def test_different_prompts_are_counted_and_the_longest_is_named():
    prompts = ["short", "a b c d", "a b c d", "x " * 40, *(f"{i}" for i in range(3000)), "one two three four"]
    note = cut_prompts_note(words, prompts, 5, "encoder")
    assert note.startswith("encoder reads 5 tokens") and "3 of 3004" in note and "42 tokens" in note
    assert f"'{('x ' * 40)[:60]}...'" in note
