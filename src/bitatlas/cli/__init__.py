"""The commands: each calls and prints. No maths, and nothing heavy is imported before it is needed."""
