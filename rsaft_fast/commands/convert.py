"""`rsaft-fast convert`: a reward's pickle as safetensors."""

from __future__ import annotations

import argparse

from rsaft_fast.rewards.convert import convert


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast convert`."""
    written = convert(arguments.source, arguments.folder, arguments.reward, arguments.force)
    beside = f", beside it {', '.join(written.copied)}" if written.copied else ""
    print(f"rsaft-fast: {written.tensors} tensors, {written.bytes / 1e6:.1f} MB in {written.weights}{beside}")
    print(f"rsaft-fast: from a pickle with SHA-256 {written.source_sha256}; read back and compared bit by bit")
    print(f"rsaft-fast: use it as --reward {arguments.reward}={written.weights.parent}, or reward.path in a recipe")
    return 0
