"""A recipe trained from Python: what it needs first, then a few updates, then what they logged.

python examples/train_from_python.py
"""

import json

from rsaft_fast import estimate_memory, finetune


def main(steps: int = 2, output_dir: str = "runs/from_python") -> list[dict]:
    """Train; return the record of each update."""
    overrides = [f"max_steps={steps}", f"output_dir={output_dir}", "parameters.train=lora", "samples.count=2"]
    need = estimate_memory("playground.yaml", overrides)
    print(f"peak {need.peak / 2**20:.0f} MiB, in {need.largest.name}")
    outcome = finetune("playground.yaml", overrides)
    records = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    print(f"{len(records)} updates, reward {records[-1]['reward']:.3f}; the LoRA is in {outcome.export}")
    return records


if __name__ == "__main__":
    main()
