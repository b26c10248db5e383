"""Frozen protocols: which prompts, how many pictures of each, and from which seeds, so that results compare."""

from __future__ import annotations

from dataclasses import dataclass

from rsaft_fast.data.prompt_sets import SETS
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.errors import UserError

SEED = 0


@dataclass(frozen=True)
class Protocol:
    """A set of prompts and how often each is drawn; how a picture is sampled is the model's own affair.

    Attributes:
        prompts: name in `prompt_sets.SETS`; its count is checked.
        pictures: of each prompt, from seeds `SEED`, `SEED` + 1, ...
        judged: what its authors judge the pictures by, for whoever reads the table.
    """

    prompts: str
    pictures: int
    judged: str


PROTOCOLS = {
    "drawbench": Protocol("drawbench", 1, "preference rewards (RSA-FT, Flow-GRPO, DiffusionNFT)"),
    "hpdv2-400": Protocol("hpdv2-400", 1, "HPSv2.1, PickScore, ImageReward, UnifiedReward (FlowBP)"),
    "hpdv2-3200": Protocol("hpdv2", 1, "HPSv2 or HPSv2.1, four styles (the HPSv2 benchmark)"),
    "partiprompts": Protocol("partiprompts", 1, "preference rewards"),
    "geneval": Protocol("geneval", 4, "a detector's tasks (reward geneval-hf is a re-implementation)"),
    "geneval2": Protocol("geneval2", 1, "Soft-TIFA by a vision-language model, which is not here: pictures only"),
    "dpg-bench": Protocol("dpg-bench", 4, "mPLUG's answers, which is not here: pictures only"),
    "unigenbench": Protocol("unigenbench", 4, "a vision-language judge, which is not here: pictures only"),
}


def protocol_prompts(source: str) -> tuple[str, Protocol, list[str]]:
    """Load a protocol's prompts.

    Args:
        source: NAME, or NAME=PATH of the published files.

    Returns:
        the protocol's name, itself, and its prompts in the published order.

    Raises:
        UserError: no such protocol, nothing there, or another number of prompts than published.
    """
    name, _, path = source.partition("=")
    if name not in PROTOCOLS:
        raise UserError(
            f"--protocol {name!r}: there are {', '.join(PROTOCOLS)}; other prompts are given by --prompts FILE"
        )
    protocol = PROTOCOLS[name]
    wanted = SETS[protocol.prompts]
    prompts = load_prompts(f"{protocol.prompts}={path}" if path else protocol.prompts)
    if len(prompts) != wanted.count:
        raise UserError(
            f"--protocol {source}: {len(prompts)} prompts, and the published set has {wanted.count}: another copy; "
            f"download {wanted.place}, or take what you have by --prompts"
        )
    return name, protocol, prompts
