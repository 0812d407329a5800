"""Who runs this process."""

from __future__ import annotations

import getpass
import os


def name_user() -> None:
    """Give a user without an entry in passwd a name: MONAI and torch ask for one when they are loaded, and end in a
    traceback where there is none, as in a container that is started with a user's number alone.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())
