"""ctclip_setup in processes forked from this one, which has imported everything: so that a test can kill many.
Arguments: the hub's address, then ctclip_setup's. Each line on stdin says how many to start, as torchrun's group where
they are several: their numbers are printed on one line, and when all have ended their exit codes on another (negative:
a signal's number).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import huggingface_hub.constants as constants
import huggingface_hub.file_download  # noqa: F401
import torch
import torch.distributed as dist

import ctclip.hub.streaming  # noqa: F401
import ctclip_setup

torch.set_num_threads(1)  # a forked process has no threads of this one's pool
constants.HF_HUB_OFFLINE, constants.DOWNLOAD_CHUNK_SIZE = False, 1 << 16  # small transfers in blocks, as large ones
os.environ["HF_ENDPOINT"] = sys.argv[1]
ctclip_setup.packages_step = lambda requirements: None



agent_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # kept over restarts, by torchrun


def start(rank: int, world: int, restarts: int) -> int:
    child = os.fork()
    if child:
        return child
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent_store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                 "TORCHELASTIC_RESTART_COUNT": restarts}
        os.environ |= {name: str(value) for name, value in group.items()}
    os._exit(ctclip_setup.main(sys.argv[2:]))


for restarts, line in enumerate(sys.stdin):
    children = [start(rank, int(line), restarts) for rank in range(int(line))]
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
