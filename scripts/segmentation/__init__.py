"""Semantic segmentation with FADC backbones: training, evaluation, and a comparison under one recipe."""
