"""Frequency-Adaptive Dilated Convolution for timm."""
