"""Learned block sparsity for PyTorch: find a block mask in training, use it at inference."""
