"""Decontamination: what it finds of known edits, what it flags wrongly, and its speed."""
