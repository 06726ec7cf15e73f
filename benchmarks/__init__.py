"""Every op against eager PyTorch, torch.compile and the best named peer: verified first, then timed side by side."""
