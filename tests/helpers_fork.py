"""A command in processes forked from this one, which has imported everything: so that a test can kill many."""

import os
import sys

import torch
import torch.distributed as dist


def start(command, rank, world, restarts, store):
    child = os.fork()
    if child:
        return child
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                 "TORCHELASTIC_RESTART_COUNT": restarts, "TORCHELASTIC_MAX_RESTARTS": 1000}
        os.environ |= {name: str(value) for name, value in group.items()}
    os._exit(command(rank))


def serve(command):
    """`command`: of a rank, gives the exit code. Each line on stdin says how many to start, as torchrun's group where
    they are several: their numbers are printed on one line, and when all have ended their exit codes on another
    (negative: a signal's number)."""
    torch.set_num_threads(1)  # a forked process has no threads of this one's pool
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # kept over restarts, by torchrun
    for restarts, line in enumerate(sys.stdin):
        children = [start(command, rank, int(line), restarts, store) for rank in range(int(line))]
        print(*children, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
