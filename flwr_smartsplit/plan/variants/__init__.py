"""Which variants a client is offered, as pure functions."""
