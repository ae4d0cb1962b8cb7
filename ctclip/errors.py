"""What a user can mend. Standard library only."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong usage or bad input: one line, "found X, expected Y; remedy".

    `ctclip.cli.run_cli` prints the line and ends the command with `exit_code`. ctclip_model.py, which imports nothing
    of ours, gives its errors the same attribute.
    """

    exit_code = 2
