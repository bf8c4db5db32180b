"""torchrun without its report of thirty lines: `python core/engine/launch.py <what torchrun takes>`, for run_ddp.sh.

The ranks have said what is wrong; it ends with the exit code of the first that failed, or as the signal says that
ended it. A rank that could say nothing, killed by a signal, is named. With LOGLEVEL in the environment torchrun speaks.
"""

import logging
import os
import signal
import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are not for others to find
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    quiet = ("torch.distributed.elastic.multiprocessing", "torch.distributed.elastic.agent")
    for name in list(logging.root.manager.loggerDict) if "LOGLEVEL" not in os.environ else ():
        if name.startswith(quiet):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        # Who was killed may be noticed after those that miss it; SIGTERM is what torchrun sends to the others.
        killed = [
            item for item in error.failures.items() if item[1].exitcode < 0 and item[1].exitcode != -signal.SIGTERM
        ]
        rank, failure = killed[0] if killed else error.get_first_failure()
        if failure.exitcode < 0:
            sys.stderr.write(
                f"error: rank {rank} was ended by {failure.signal_name()} from outside, or lacked memory\n"
            )
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
