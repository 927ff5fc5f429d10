"""Preference training: OT-DPO, offline and online."""
