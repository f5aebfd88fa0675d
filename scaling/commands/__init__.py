"""The verbs of `python -m scaling`, one file each; compare.py holds crossover too."""
