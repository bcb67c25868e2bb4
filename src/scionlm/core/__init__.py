"""The lowest floor: errors, strict configuration, durations, records, files, logging. No torch."""
