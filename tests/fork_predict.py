"""run_task2 in processes forked from this one, which has imported everything: so that a test can kill many.

Arguments: seconds that reading a scan takes longer, "shared" or "own" (each process then works in a folder of its own,
as on another machine's disk), then run_task2's. Each line on stdin says how many to start, as torchrun's group where
they are several: their numbers are printed on one line, and when all have ended their exit codes on another (negative:
a signal's number).
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import run_task2
from ctclip.data import loading
from ctclip.inference import commands  # noqa: F401

torch.set_num_threads(1)  # a forked process has no threads of this one's pool
seconds, disks, *arguments = sys.argv[1:]
read_volume = loading.read_volume


def slowly(volume, shape):
    time.sleep(float(seconds))
    return read_volume(volume, shape)


loading.read_volume = slowly
agent_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # kept over restarts, by torchrun


def start(rank: int, world: int, restarts: int) -> int:
    child = os.fork()
    if child:
        return child
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if disks == "own":
        os.makedirs(f"disk{rank}", exist_ok=True)
        os.chdir(f"disk{rank}")
    if world > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent_store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                 "TORCHELASTIC_RESTART_COUNT": restarts, "TORCHELASTIC_MAX_RESTARTS": 1000}
        os.environ |= {name: str(value) for name, value in group.items()}
    os._exit(run_task2.main(arguments))


for restarts, line in enumerate(sys.stdin):
    children = [start(rank, int(line), restarts) for rank in range(int(line))]
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
