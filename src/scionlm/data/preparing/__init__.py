"""From documents to a data folder: survey, split, tokenize, write; shared among processes, resumable at any kill."""
