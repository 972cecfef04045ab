"""The commands, a file a command or two: each parses, calls, prints. No maths, and nothing heavy is imported before it is needed."""
