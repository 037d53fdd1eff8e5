"""The models of torchvision as chains: which can be cut, and proof that it is exact."""
