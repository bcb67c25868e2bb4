"""The command line: one thin function a command; everything heavy is imported inside."""
