"""`python -m bitatlas` is the command `bitatlas`."""

from bitatlas.cli import main

main()
