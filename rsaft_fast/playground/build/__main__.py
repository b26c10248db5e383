"""Make the assets that the playground ships, stage by stage: `python -m rsaft_fast.playground.build`.

Each finished stage leaves its fp32 result and its log in the working folder and is not run again unless named with
--stage; a stage that was broken off goes on where it last saved. The assets are the same weights in fp16. The same
settings, package versions and processor give the same bits.
"""

import argparse
import shutil
from pathlib import Path

from rsaft_fast.playground import ASSETS
from rsaft_fast.playground.build.settings import Settings
from rsaft_fast.playground.build.stages import STAGES, run


def main() -> None:
    """Build the stages that the command line names, or all."""
    parser = argparse.ArgumentParser(prog="python -m rsaft_fast.playground.build", description=__doc__)
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only this stage (may be repeated), anew")
    parser.add_argument("--work", type=Path, default=Path("runs/playground-build"), help="folder of fp32 results")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder to write the fp16 assets to")
    arguments = parser.parse_args()
    for stage in arguments.stage or ():
        for folder in (stage, f"{stage}.partial"):
            shutil.rmtree(arguments.work / folder, ignore_errors=True)
    run(Settings(), arguments.work, arguments.assets, arguments.stage or STAGES)


if __name__ == "__main__":
    main()
