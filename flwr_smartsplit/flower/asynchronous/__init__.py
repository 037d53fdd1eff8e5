"""An asynchronous run: a reply is merged when it comes, not when all have come."""
