"""Readers of foreign files, one a format: magic first, then structure, then values.

A reader takes what it understands exactly and refuses the rest by name. What it leaves out or guesses it
says, in a warning and in ``notes``, which end in the history of the file that is written.
``docs/foreign_formats.md`` has the table.
"""
