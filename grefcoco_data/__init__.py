"""The data sets behind `grefcoco.py`: reading, checking, building, loading and showing them."""
