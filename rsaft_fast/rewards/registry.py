"""The reward families that come with the package: each module registers its own when it is imported.

A new one is a file of its own and a line here.
"""

# ruff: noqa: F401, I001 (in the order in which help and messages list them)

from rsaft_fast.rewards import (
    clip,
    hps,
    image_reward,
    aesthetic,
    hpsv3,
    ocr,
    geneval,
    counting,
    remote,
    python,
    combine,
)
