"""One process, or several under torchrun."""

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Process:
    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self):
        return self.rank == 0

    def parallel(self, model):
        """The model whose backward averages gradients over the processes."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def wait(self):
        if self.world > 1:
            distributed.barrier()


@contextlib.contextmanager
def this_process(device=None):
    """Join the group that torchrun describes in the environment, or be alone; device None takes a GPU where one is."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if world == 1:
        yield Process(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(distributed.get_rank(), world, device)
    finally:
        distributed.destroy_process_group()
