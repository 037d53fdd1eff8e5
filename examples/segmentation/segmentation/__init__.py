"""segmentation: a U-Net that is cut across its skip connections."""
