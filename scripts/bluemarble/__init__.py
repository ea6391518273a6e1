"""The Blue Marble: the image and its masks, the segmentation task made of them, and a picture of it."""
