"""The parts of train.py: its flags, the model families, batches, augmentation and learning rates."""
