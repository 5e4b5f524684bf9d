"""How much the random tests try: small counts in every run, large ones where GREFCOCO_TESTS is `large`."""

import os

LARGE = os.environ.get("GREFCOCO_TESTS") == "large"
MUTATED_FILES = 10_000 if LARGE else 1_000  # damaged annotation files of test_grefcoco_files.py
MUTATED_ZIPS = 15_000 if LARGE else 500  # damaged zips of test_grefcoco_files.py
DAMAGED_BUILDS = 1_000 if LARGE else 40  # damaged built folders of test_grefcoco_damage.py
