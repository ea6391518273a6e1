"""Scripts of the checkout, run from its root as `python -m scripts.FOLDER.NAME`; README.md lists them."""
