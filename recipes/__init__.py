"""Experiments: one folder each, with its configuration, its command and a README of what was measured. Not
part of the wheel."""
