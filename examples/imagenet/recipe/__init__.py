"""The parts of the ImageNet recipe, one file each; `train.py` and `evaluate.py` put them together."""
