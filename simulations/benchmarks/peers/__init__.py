"""What a step costs, beside a plain loop, Flower's FedAvg and other split learning."""
