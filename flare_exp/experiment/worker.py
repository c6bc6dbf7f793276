"""Run a further process of a run."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
import warnings
from contextlib import suppress

from flare_exp.experiment.launch import WorkerSpec, destroy_process_groups, join
from flare_exp.utils.signals import StopRequested


def worker_main() -> None:
    """Go through the pipeline as a process that another one started."""
    # the other end of our input closes when who started us is gone, however it went
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    logging.disable()  # rank 0 prints the messages
    warnings.simplefilter("ignore")
    try:
        place = WorkerSpec(**json.loads(sys.argv[1]))
        distributed = join(place, place.connect())
        from flare_exp.experiment import pipeline

        cfg, folder = distributed.broadcast()
        with suppress(StopRequested):
            pipeline.run(cfg, folder, distributed)
        destroy_process_groups()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # without waiting for threads of a broken connection
