"""fedavg_app: A Flower / PyTorch app."""
