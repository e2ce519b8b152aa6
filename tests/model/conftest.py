"""Toy tensors are too small to share among threads: one thread is faster, and steadier on a busy machine."""

import torch

torch.set_num_threads(1)
