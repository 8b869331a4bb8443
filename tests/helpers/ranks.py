"""A process group for tests: processes that wait for functions of a test module to run, each as one rank of it."""

import importlib.util
import os
import queue
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from one process that has imported this, as the tests' own, which has called autograd, cannot be.
IMPORTED = ["accelerate", "pytest", "rnn_longctx.train", "torch.distributed.fsdp"]


class Ranks:
    """`run("name", ...)` calls a function of the module at `path` on every rank, with the rank's device and the rest;
    the first that fails is raised here, with its traceback."""

    def __init__(self, path: str, world: int, backend: str):
        self.settings = path, world, backend
        self.start(*self.settings)

    def start(self, path: str, world: int, backend: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.asked = [context.SimpleQueue() for _ in range(world)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(path, rank, world, backend, port, asked, self.answers), daemon=True)
            for rank, asked in enumerate(self.asked)
        ]
        for process in self.processes:
            process.start()

    def run(self, name: str, *args, seed: int = 0, timeout: float = 120.0) -> None:
        for asked in self.asked:
            asked.put((name, args, seed))
        problems, left = [], len(self.processes)
        try:
            for _ in self.processes:
                problem = self.answers.get(timeout=10.0 if problems else timeout)
                left -= 1
                problems += [problem] if problem else []
        except queue.Empty:  # a rank that waits for another waits for ever
            problems.append(f"{left} of the ranks did not answer")
            self.close()
            self.start(*self.settings)
        assert not problems, problems[0] + "".join(problems[1:])[-200:]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(path, rank, world, backend, port, asked, answers) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    spec = importlib.util.spec_from_file_location("rank_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    while True:
        name, args, seed = asked.get()
        torch.manual_seed(seed)
        try:
            getattr(module, name)(device, *args)
            answers.put(None)
        except BaseException:
            answers.put(f"rank {rank}, seed {seed}\n{traceback.format_exc()}")
