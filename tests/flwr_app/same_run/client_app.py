"""The clients of tests/simulated_app.py."""

from functools import partial

from flwr_smartsplit import build_client_app
from tests.simulated_app import client_fn

app = build_client_app(partial(client_fn, budgets=[None] * 6))
