"""Training samples: order, augmentation, back-translation."""
