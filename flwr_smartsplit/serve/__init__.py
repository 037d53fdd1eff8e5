"""Using a trained model along a route: what is offered to devices, and what they do."""
