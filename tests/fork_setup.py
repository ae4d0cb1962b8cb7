"""ctclip_setup in one process after another, each forked from this one, which has imported everything: so that a test
can kill many. Arguments: the hub's address, then ctclip_setup's. Each line on stdin starts one: its number is printed,
and its exit code (negative: a signal's number) when it has ended.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import huggingface_hub.constants as constants
import huggingface_hub.file_download  # noqa: F401
import torch

import ctclip.hub.streaming  # noqa: F401
import ctclip_setup

torch.set_num_threads(1)  # a forked process has no threads of this one's pool
constants.HF_HUB_OFFLINE, constants.DOWNLOAD_CHUNK_SIZE = False, 1 << 16  # small transfers in blocks, as large ones
os.environ["HF_ENDPOINT"] = sys.argv[1]
ctclip_setup.packages_step = lambda requirements: None

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(ctclip_setup.main(sys.argv[2:]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
