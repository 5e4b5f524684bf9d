"""What answers are worth: write the answers of a model, score a file of answers (`python -m scoring --help`)."""

from scoring.conversations import messages

__all__ = ["messages"]
