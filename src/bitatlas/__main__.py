"""`python -m bitatlas` is the command `bitatlas`."""

from bitatlas.cli.main import main

main()
