"""Semantic segmentation with FADC backbones: what train_segmentation.py and compare.py share."""
