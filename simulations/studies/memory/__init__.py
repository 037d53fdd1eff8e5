"""How small the device's part of a training step gets, for models of torchvision."""
