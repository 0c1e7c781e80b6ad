"""What each operator means, in plain PyTorch: one file an operator, differentiable by autograd."""
