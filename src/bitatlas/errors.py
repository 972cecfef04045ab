"""The one error a user's mistake raises. The command line prints it as a single line and exits with code 2."""


class UserError(Exception):
    """Wrong use or an impossible request: the message names what is wrong and what would be right."""
