"""Make the assets that the playground ships, stage by stage: `python -m rsaft_fast.playground.build`.

Each finished stage leaves its fp32 result and its log in the working folder and is not run again, unless named with
--stage, or where the pipeline that a reward was made for has changed. Training of the pipeline that was broken off goes
on where it last saved. The assets are the same weights in fp16. The same settings, package versions and processor give
the same bits.
"""

import argparse
import shutil
from pathlib import Path

from rsaft_fast.playground import ASSETS
from rsaft_fast.playground.build.settings import Settings
from rsaft_fast.playground.build.stages import JUDGES, STAGES, run


def main() -> None:
    """Build the stages that the command line names, or all."""
    parser = argparse.ArgumentParser(prog="python -m rsaft_fast.playground.build", description=__doc__)
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only this stage (may be repeated), anew")
    parser.add_argument("--work", type=Path, default=Path("runs/playground-build"), help="folder of fp32 results")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder to write the fp16 assets to")
    parser.add_argument(
        "--keep-pipeline", action="store_true", help="make the rewards and their cards alone, for the assets' pipeline"
    )
    arguments = parser.parse_args()
    for stage in arguments.stage or ():
        for folder in (stage, f"{stage}.partial"):
            shutil.rmtree(arguments.work / folder, ignore_errors=True)
    stages = arguments.stage or (JUDGES if arguments.keep_pipeline else STAGES)
    run(Settings(), arguments.work, arguments.assets, stages)


if __name__ == "__main__":
    main()
