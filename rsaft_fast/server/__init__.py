"""Server of rewards behind HTTP, for those that need another process, environment or machine.

`rewards.remote` is the client.
"""

from rsaft_fast.server.app import make_app
from rsaft_fast.server.batching import Batcher
from rsaft_fast.server.connections import make_server
from rsaft_fast.server.limits import Limits, connections_that_fit

__all__ = ["Batcher", "Limits", "connections_that_fit", "make_app", "make_server"]
