"""What every command that runs on several processes sees first."""

import os

from tiue.errors import InputError


def require_shared_work(num_processes: int) -> None:
    """See that processes which were started together know of one another.

    Args:
        num_processes: How many accelerate has found.

    Raises:
        InputError: If more were started: each would believe that it is alone.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and num_processes == 1:
        raise InputError(
            f"{started} processes were started, and each would work alone: accelerate finds no GPU "
            "that they could share. Give --cpu (cpu: true) to work on CPUs, or start one."
        )
