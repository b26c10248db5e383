"""A reward that nobody differentiates, for recipes: how red a picture is."""

from __future__ import annotations


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def nowhere(images, prompts):
    return redness(images, prompts) * float("nan")
