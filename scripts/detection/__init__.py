"""Object detection with FADC backbones: training and evaluation with torchvision's detectors."""
