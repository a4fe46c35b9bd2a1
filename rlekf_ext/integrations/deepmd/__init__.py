"""RLEKF inside DeePMD-kit: `"optimizer": {"type": "RLEKF"}` in the input of an unmodified `dp --pt train`.

optimizer.py holds the optimizer and its updates, and imports nothing of DeePMD-kit; patch.py puts them into
DeePMD-kit's trainer, and is the only place that knows its private names.
"""
