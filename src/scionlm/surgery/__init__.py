"""Surgery: a pure function of (source, plan) to (target, provenance) that proves itself; the source stays as it was."""
