"""From what a user names to documents: which files, and the texts in them, in a fixed order."""
