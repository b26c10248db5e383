"""Rewards behind HTTP, for those that need another process, environment or machine; `rewards.remote` is the client."""

from rsaft_fast.server.app import Limits, make_app
from rsaft_fast.server.batching import Batcher

__all__ = ["Batcher", "Limits", "make_app"]
