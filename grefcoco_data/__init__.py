"""What `grefcoco.py` is made of: reading the genuine files, the field's own index, the commands, pages and plots."""
