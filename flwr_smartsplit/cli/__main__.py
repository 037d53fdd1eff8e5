"""``python -m flwr_smartsplit.cli``, for where the package is not installed."""

from flwr_smartsplit.cli.app import main

if __name__ == "__main__":
    main()
