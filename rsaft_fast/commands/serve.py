"""`rsaft-fast serve`: rewards behind HTTP, for processes and environments that cannot hold them."""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
import socket
from urllib.parse import quote

from rsaft_fast.commands.reward_options import parse_rewards
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.check import check_device, pick_device
from rsaft_fast.rewards import load_reward
from rsaft_fast.rewards.wire import TOKEN_VARIABLE, check_token

MIN_TOKEN = 16


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast serve`."""
    try:
        from rsaft_fast.server import Limits, connections_that_fit, make_app, make_server
    except ImportError as error:
        raise UserError(f"rsaft-fast serve needs fastapi and uvicorn ({error}): pip install fastapi uvicorn") from error
    check_device(arguments.device, "--device")
    chosen = parse_rewards(arguments.reward)
    names = {label: settings.name if settings.name != "combination" else label for label, settings in chosen.items()}
    if len(set(names.values())) < len(names):
        raise UserError("--reward names two rewards of one family; a server's addresses end in the family: start two")
    token, generated = _token()
    device = pick_device(arguments.device)
    limits = Limits(
        max_pictures=arguments.max_pictures,
        max_bytes=arguments.max_bytes,
        max_prompt=arguments.max_prompt,
        timeout=float(arguments.timeout),
    )
    # These before the weights: that the port is taken shall not be found out after minutes of loading.
    connections_that_fit(limits)
    listener = _listen(arguments.host, arguments.port)
    try:
        rewards = {names[label]: load_reward(settings, device=device) for label, settings in chosen.items()}
        server = make_server(make_app(rewards, token, device, limits), limits, log_level="warning")
        _announce(listener, rewards, token if generated else None)
        server.run(sockets=[listener])
    finally:
        listener.close()
    return 0


def _token() -> tuple[str, bool]:
    """The token, and whether it was made here."""
    given = os.environ.get(TOKEN_VARIABLE, "")
    if not given:
        return secrets.token_urlsafe(32), True
    if len(given) < MIN_TOKEN:
        raise UserError(
            f"{TOKEN_VARIABLE} has {len(given)} characters; a token has at least {MIN_TOKEN}. Unset it to have one made"
        )
    check_token(given, TOKEN_VARIABLE)
    return given, False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} cannot be listened on ({error}); choose another port") from error


def _announce(listener: socket.socket, rewards: dict, token: str | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not ipaddress.ip_address(host).is_loopback:
        print(
            f"rsaft-fast: warning: {host} is not a loopback address: pictures and the token travel unencrypted to "
            "whoever listens there; put a TLS proxy in front, or tunnel",
            flush=True,
        )
    for name, reward in rewards.items():
        address = f"http://{shown}:{port}/{quote(name, safe='')}"
        print(f"rsaft-fast: serving {reward.spec.name} ({reward.spec.source}) at {address}", flush=True)
    if token is not None:
        print(f"rsaft-fast: clients need: export {TOKEN_VARIABLE}={token}", flush=True)
