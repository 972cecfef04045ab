"""The command line: `commands` (each calls and prints), `options` (what typer reads), `show` (what is printed). No maths."""
