"""Users' mistakes, which are reported in one line without a stack trace; exit codes."""

import json
import os
import time
from contextlib import suppress

FINISHED, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 75


class UserError(Exception):
    """A user's mistake: what is wrong, where, and what to do, in one line (exit code 2)."""


def record_for_torchrun(message: str) -> None:
    """Record why this rank fails, in one line, where torchrun's summary of failures finds it.

    The first message of a process counts. Without torchrun there is no such file, and nothing is
    written. The format is that of torch.distributed.elastic.multiprocessing.errors, where a
    message without "py_callstack" is shown as it is.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # torchrun takes the earliest error of the ranks as the cause
    extra = {"timestamp": str(int(time.time()))}
    content = {"message": {"message": " ".join(message.split()), "extraInfo": extra}}
    with suppress(OSError), open(path, "x") as file:
        file.write(json.dumps(content))
