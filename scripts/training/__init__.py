"""What the training scripts share: the loop, checkpoints, variants of backbones, their weights, lists of runs."""
