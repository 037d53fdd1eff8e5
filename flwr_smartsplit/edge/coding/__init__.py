"""What crosses a cut: tensors as bytes, as the codec of the cut says."""
