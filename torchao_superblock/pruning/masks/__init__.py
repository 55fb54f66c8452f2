"""Ways to find a block mask, one file each: the mask and its sparsifier. What they share is `base.py`."""
