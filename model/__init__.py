"""Pure PyTorch: configs in, tensors out. Nothing here knows about stages, clusters or experiment trackers."""
