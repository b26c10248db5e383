"""Two-pass steps in other people's training loops: `accelerate` and the `transformers` Trainer.

Each module is imported by name, so that nothing here loads a library that is not used:
`from rsaft_fast.integrations.accelerate import TwoPasses`,
`from rsaft_fast.integrations.transformers import SharpnessCallback`.
"""
